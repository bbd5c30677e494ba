"""The study's decoder: each encoding against its family in transformers, or its definition."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from tl_posheads import LayerGeometry
from tl_posheads.rotary.contributions import rotate_by

_FILE = Path(__file__).parents[2] / "benchmarks" / "small_decoder.py"


@pytest.fixture(scope="module")
def decoders():
    spec = importlib.util.spec_from_file_location("small_decoder", _FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TOKENS = torch.randint(0, 1024, (2, 40), generator=torch.Generator().manual_seed(0))


def decoder(decoders, encoding):
    torch.manual_seed(0)
    model = decoders.SmallDecoder(encoding)
    if encoding == "t5":
        with torch.no_grad():
            model.relative.normal_()
    return model.eval()


def queries(model, **how):
    seen = []
    with torch.no_grad():
        logits = model(TOKENS, on_qk=lambda layer, q, k: seen.append(q), **how)
    return seen, logits


def test_rotations_are_the_packages(decoders):
    x = torch.randn(1, 30, 4, 32, generator=torch.Generator().manual_seed(1))
    for rotary_dim in (32, 16):
        geometry = LayerGeometry.from_inv_freq(decoders.inv_freq(rotary_dim), 4, d_head=32)
        at = torch.arange(30)
        expected = rotate_by(x, at, geometry)
        assert torch.allclose(decoders.rotate(x, at, rotary_dim), expected, atol=1e-6)


def test_t5_buckets_and_alibi_slopes_are_transformers(decoders):
    distance = torch.arange(300)
    expected = T5Attention._relative_position_bucket(
        -distance, bidirectional=False, num_buckets=32, max_distance=128
    )
    assert torch.equal(decoders.t5_bucket(distance), expected)
    for n_heads in (4, 8):
        bloom = build_alibi_tensor(torch.ones(1, 2), n_heads, torch.float32)[:, 0, 1]
        assert torch.allclose(decoders.alibi_slopes(n_heads), bloom)


@pytest.mark.parametrize("encoding", ["rope", "partial_rope", "alibi", "t5", "nope"])
def test_relative_encodings_do_not_know_where_a_text_begins(decoders, encoding):
    model = decoder(decoders, encoding)
    (here, plain), (moved, logits) = queries(model), queries(model, offset=9)
    assert torch.allclose(plain, logits, atol=1e-3)
    assert torch.allclose(here[1], moved[1], atol=1e-4) == (
        encoding not in ("rope", "partial_rope")
    )


@pytest.mark.parametrize("encoding", ["sinusoidal", "learned"])
def test_absolute_encodings_do(decoders, encoding):
    model = decoder(decoders, encoding)
    assert not torch.allclose(queries(model)[1], queries(model, offset=9)[1], atol=1e-2)


@pytest.mark.parametrize("encoding", ["alibi", "t5"])
def test_the_bias_is_added_to_scaled_scores_before_the_mask(decoders, encoding):
    model, seen = decoder(decoders, encoding), []
    with torch.no_grad():
        plain = model(TOKENS, on_qk=lambda layer, q, k: seen.append((q, k)))
        # The last layer's attention by hand: ablating all heads and adding what they wrote.
        layer, (q, k) = 2, seen[2]
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * 32**-0.5
        i, j = torch.arange(40)[:, None], torch.arange(40)
        scores = scores + model.bias(40)[:, (i - j).clamp_min(0)]
        pattern = scores.masked_fill(j > i, float("-inf")).softmax(-1)
    kept = {}
    block = model.blocks[layer]
    handles = [
        block.qkv.register_forward_hook(lambda m, a, out: kept.update(qkv=out)),
        block.out.register_forward_pre_hook(lambda m, a: kept.update(z=a[0])),
    ]
    with torch.no_grad():
        assert torch.equal(model(TOKENS), plain)
    for handle in handles:
        handle.remove()
    v = kept["qkv"].view(2, 40, 3, 4, 32)[:, :, 2]
    expected = torch.einsum("bhij,bjhd->bihd", pattern, v).flatten(2)
    assert torch.allclose(kept["z"], expected, atol=1e-5)


def test_ablated_heads_write_nothing(decoders):
    model = decoder(decoders, "rope")
    written = []
    handle = model.blocks[1].out.register_forward_pre_hook(lambda m, a: written.append(a[0]))
    with torch.no_grad():
        model(TOKENS, without={1: [0, 2]})
    handle.remove()
    z = written[0].view(2, 40, 4, 32)
    assert (z[:, :, [0, 2]] == 0).all()
    assert (z[:, :, [1, 3]] != 0).any()

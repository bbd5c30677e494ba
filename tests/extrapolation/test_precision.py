"""Models in half precision: what is computed of them is not, and no row of a comparison is."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import tl_posheads as ph
from helpers import architectures, small_models
from tl_posheads import extrapolation as ex
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.rotary.contributions import turn, unrotated_contribution
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.rotary.precision import rounding_of
from tl_posheads.rotary.remapping import remapped_attention
from tl_posheads.studies.ablation.norms import output_norms
from tl_posheads.tasks import Prompt

pytestmark = pytest.mark.lens

TOKENS = torch.randint(3, 97, (2, 96), generator=torch.Generator().manual_seed(1))
TRAINED = 64
HALF = [torch.bfloat16, torch.float16]


def with_biases(family, config, bias, dtype, **options):
    """A model whose queries and keys carry large biases, as Qwen2's do; one in every precision."""
    hf = small_models.build(family, config, **options)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if name.endswith(("q_proj.bias", "k_proj.bias")):
                weight[3::8] = weight[7::8] = bias
            if name.endswith("query_key_value.bias"):  # queries, keys and values of each head
                parts = weight.view(-1, 3, 8)
                parts[:, :2, 3] = parts[:, :2, 7] = bias
            weight.copy_(weight.to(torch.bfloat16).float())
    return TransformerBridge.boot_transformers(
        "tiny",
        hf_model=hf.to(dtype),
        tokenizer=small_models.tiny_tokenizer(),
        device="cpu",
        dtype=dtype,
    )


def qwen2(dtype, bias=300.0):
    return with_biases("Qwen2", architectures.BASE, bias, dtype)


def losses(model, methods):
    """Nats of every token under every method."""
    found = ph.compare_extrapolations(
        model, methods, TOKENS, trained=TRAINED, heads=[(0, 0)], qk_pairs=50, progress=False
    )
    table = found.loss.pivot_table(
        index=["document", "position"], columns="method", values="loss", sort=False
    )
    return {method: table[method].to_numpy() for method in found.methods}


def apart(a, b):
    return np.abs(a - b).mean()


def test_a_method_of_distance_that_moves_nothing_keeps_the_loss_of_its_bare_row():
    rows = losses(qwen2(torch.bfloat16), [ex.SelfExtend(1, 16)])
    bare, same = rows.values()
    assert apart(bare, same) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "method", [ex.SelfExtend(4, 16), ex.ReRoPE(16), ex.DualChunk(32, 8), ex.Linear(2.0)], ids=repr
)
def test_methods_lose_no_more_digits_than_the_bare_model(method, dtype):
    bias = 300.0 if dtype == torch.bfloat16 else 100.0  # fp16 ends at 65504
    exact, half = (losses(qwen2(x, bias), [method]) for x in (torch.float32, dtype))
    bare, changed = (apart(exact[name], half[name]) for name in exact)
    assert apart(*exact.values()) > 0.005  # the method does something
    assert changed < 2 * bare + 0.01


def vectors(dtype, n=40):
    """q, k and v of one text, ``[1, pos, head, d_head]``; q and k have a large coordinate."""
    random = torch.Generator().manual_seed(2)
    out = []
    for n_heads, large in ((4, 200), (2, 200), (2, 0)):
        x = torch.randn(1, n, n_heads, 8, generator=random)
        x[..., 3] += large
        out.append(x.to(dtype))
    return out


GEOMETRY = LayerGeometry.from_inv_freq(
    torch.tensor([1.0, 0.1, 0.01, 1e-3]), n_heads=4, n_kv_heads=2, attention_scale=8**-0.5
)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "method", [ex.SelfExtend(4, 8), ex.ReRoPE(8), ex.DualChunk(16, 4)], ids=repr
)
def test_remapped_attention_is_that_of_float64_rounded_once(method, dtype):
    q, k, v = vectors(dtype)
    geometry = method.layer_geometry(GEOMETRY, 24, 40)
    at = torch.arange(40)[None]
    got = remapped_attention(q, k, v, at, geometry)
    right = remapped_attention(q.double(), k.double(), v.double(), at, geometry)
    assert got.dtype == dtype
    # The weights and the result are rounded, never the scores, whose last digit is worth 64 nats.
    eps = torch.finfo(dtype).eps
    assert (got.double() - right).abs().max() < 1.5 * eps * right.abs().max()
    assert right.dtype == torch.float64


@pytest.mark.parametrize("dtype", HALF)
def test_vectors_are_turned_in_float32_and_rounded_once(dtype):
    q, _, _ = vectors(dtype)
    angle = torch.linspace(0, 7, 160, dtype=torch.float64).view(1, 40, 1, 4)
    got = turn(q, angle.cos(), angle.sin(), GEOMETRY)
    right = turn(q.double(), angle.cos(), angle.sin(), GEOMETRY)
    assert got.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * right.abs() + 1e-4
    assert ((got.double() - right).abs() <= bound).all()
    assert torch.equal(turn(q, angle.cos() * 0 + 1, angle.sin() * 0, GEOMETRY), q)


@pytest.mark.parametrize("dtype", HALF)
def test_contributions_keep_their_digits(dtype):
    q, k, _ = vectors(dtype)
    got = ph.dimension_contributions(q, k, GEOMETRY)
    right = ph.dimension_contributions(q.double(), k.double(), GEOMETRY)
    np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-3)
    part = LayerGeometry.from_inv_freq(torch.ones(2), n_heads=4, n_kv_heads=2, d_head=8)
    got = unrotated_contribution(q, k, part)
    np.testing.assert_allclose(
        got, unrotated_contribution(q.double(), k.double(), part), rtol=1e-5, atol=1e-3
    )


@torch.no_grad()
def test_scores_that_half_precision_cannot_hold_are_refused():
    # GPT-NeoX's attention always keeps its scores, so it rounds them.
    name = "GPT-NeoX, Pythia"
    config = architectures.ROTARY[name][1]
    small, large = (with_biases("GPTNeoX", config, b, torch.bfloat16) for b in (1.0, 100.0))
    with ex.SelfExtend(4, 16)(small, trained=TRAINED), fused_attention(small) as on:
        small(TOKENS)
    assert not on
    refused = pytest.raises(
        ph.PosheadsError, match="layer 0 are so large that torch.bfloat16.*in float32"
    )
    with ex.SelfExtend(4, 16)(large, trained=TRAINED), refused:
        large(TOKENS)
    exact = with_biases("GPTNeoX", config, 100.0, torch.float32)
    with ex.SelfExtend(1, 16)(exact, trained=TRAINED):
        same = exact(TOKENS)
    torch.testing.assert_close(same, exact(TOKENS), atol=0.05, rtol=0)


@torch.no_grad()
def test_left_padding_is_not_taken_for_a_large_score():
    model = qwen2(torch.bfloat16, 1.0)
    mask = torch.ones_like(TOKENS)
    mask[1, :5] = 0
    with ex.SelfExtend(4, 16)(model, trained=TRAINED):
        assert model(TOKENS, attention_mask=mask).isfinite().all()


def test_metrics_of_patching_get_logits_in_float32():
    model, seen = qwen2(torch.bfloat16, 1.0), set()

    def metric(logits):
        seen.add(logits.dtype)
        return logits[0, -1].log_softmax(-1)[5]

    ph.patch_heads(model, TOKENS[:1], TOKENS[1:], metric, [(0, 1)], progress=False)
    assert seen == {torch.float32}


def test_norms_of_what_heads_write_are_summed_in_float32():
    model, tokens = qwen2(torch.bfloat16, 1.0), TOKENS[0]
    found = output_norms(model, [Prompt(tokens, torch.tensor([95]))])
    with fused_attention(model):  # eager attention rounds z elsewhere
        _, cache = model.run_with_cache(tokens[None], names_filter=lambda name: "hook_z" in name)
    for layer in (0, 1):
        z = cache[f"blocks.{layer}.attn.hook_z"][0].detach().double().numpy()
        weight = model.blocks[layer].attn.W_O.detach().double().numpy()
        written = np.einsum("phd,hdm->phm", z, weight)
        np.testing.assert_allclose(
            found[layer], np.linalg.norm(written, axis=-1).mean(0), rtol=1e-5
        )


@torch.no_grad()
def test_passes_that_fall_back_on_rounded_scores_say_so():
    model = qwen2(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fused_attention(model) as on:
            assert on
            model(TOKENS)
        with ph.ablate(model, [(0, 1)], on="pattern"), fused_attention(model) as on:
            assert not on
            with pytest.raises(UserWarning, match="scores of layer 0 in torch.bfloat16.*float32"):
                model(TOKENS)
        for quiet in (qwen2(torch.bfloat16, 1.0), qwen2(torch.float32)):
            with ph.ablate(quiet, [(0, 1)], on="pattern"), fused_attention(quiet):
                quiet(TOKENS)


def test_only_scores_that_decide_a_row_count_as_rounded():
    digit = 2**-8  # half of bfloat16's last
    low = torch.finfo(torch.bfloat16).min
    for rows, expected in [
        ([[300.0, 301.0]], 301 * digit),
        ([[900.0, 300.0]], 0.0),  # one key takes all, rounded or not
        ([[low, low]], 0.0),  # padding
        ([[-400.0, low], [-400.0, -399.0]], 399 * digit),
    ]:
        scores = torch.tensor([[rows]])
        assert rounding_of(scores, torch.bfloat16) == expected
        assert rounding_of(scores, torch.float32) == 0

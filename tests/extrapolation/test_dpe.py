"""DPE: its special cases, whose pairs it changes, and what its detection finds where it is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import planted
from helpers.distances_by_hand import CHOSEN, SCALES, TOKENS, WINDOW, N, numbers, off
from helpers.traces import assert_same, state, warm
from tl_posheads import PosheadsError, capture_rotary
from tl_posheads.extrapolation.methods.dpe import DPE
from tl_posheads.extrapolation.methods.dpe_detect import (
    detect_effective_lengths,
    fit_dpe,
    key_pairs,
)
from tl_posheads.extrapolation.methods.self_extend import SelfExtend
from tl_posheads.hooks.fused import fused_attention

pytestmark = pytest.mark.lens


@torch.no_grad()
def test_equal_scales_are_self_extend_and_ones_the_bare_model(llama):
    bare = llama(TOKENS)
    with DPE((1, 1, 1, 1), WINDOW)(llama):
        assert torch.equal(llama(TOKENS), bare)
    with SelfExtend(4, WINDOW)(llama):
        expected = llama(TOKENS)
    for chosen in (None, [[range(4)] * 4] * 2):
        with DPE((4,) * 4, WINDOW, chosen)(llama):
            assert off(llama(TOKENS), expected) < 1e-6


@torch.no_grad()
def test_heads_without_key_pairs_are_left_alone(llama):
    name = "blocks.0.attn.hook_attn_scores"
    bare = llama.run_with_cache(TOKENS, names_filter=[name])[1][name]
    with DPE(SCALES, WINDOW, [CHOSEN, ((),) * 4])(llama):
        got = llama.run_with_cache(TOKENS, names_filter=[name])[1][name]
    # Head 1 has pair 1 alone, whose scale is 1.
    assert [torch.equal(got[:, h], bare[:, h]) for h in range(4)] == [False, True, True, False]
    near = torch.ones(N, N).tril(0).triu(1 - WINDOW).bool()
    assert torch.equal(got[..., near], bare[..., near])


def test_settings_are_frozen_and_tell_apart():
    one, other = DPE([2, 4], 8, [[[1, 0], []]]), DPE((2, 4), 8, [[[1], []]])
    assert one.scales == (2, 4)
    assert one.key_pairs == (((0, 1), ()),)
    assert one == DPE((2, 4), 8, (((0, 1), ()),))
    assert hash(one) != hash(other)
    assert repr(one) != repr(other)  # what a checkpoint of scores is told by


def test_key_pairs_are_those_with_the_largest_products_of_lengths(llama):
    chosen = key_pairs(llama, TOKENS, share=0.5, progress=False)
    kept = {0: [], 1: []}
    for document in TOKENS:
        capture_rotary(llama, document[None], lambda layer, q, k: kept[layer].append((q, k)))
    for layer, g in enumerate(llama.geometry.layers):
        total = 0
        for both in kept[layer]:
            q, k = (np.abs(numbers(x, g)[0][0]) for x in both)
            total = total + (q * k[:, g.kv_head]).mean(0)
        assert [set(p) for p in chosen[layer]] == [set(np.argsort(row)[2:]) for row in total]


@pytest.fixture(scope="module")
def retriever():
    """All heads find the needle by pair 2, which turns by 0.01 a token: lost from 157 on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planted, "_SLOWEST", 2)
        model = planted.equal_heads(n_layers=1, n_heads=4)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for weight in (model.blocks[0].attn.q.weight, model.blocks[0].attn.k.weight):
            # Geometry is measured on a filler token, which should have a query.
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def needles(retriever):
    prompts = planted.Retrieval(n=12, length=512).prompts(retriever)
    far = [prompt for prompt in prompts if prompt.facts["distance"] > 300]
    assert len(far) >= 4
    return [prompt.tokens for prompt in far], [prompt.targets for prompt in far]


def test_effective_lengths_of_a_planted_pair(retriever, needles):
    tokens, targets = needles
    options = dict(
        targets=targets,
        trained=128,
        window=8,
        groups=4,
        progress=False,
        tolerance=0.1,
        candidates=[32, 64, 128, 256, 512],
    )
    warm(retriever)
    with torch.no_grad(), fused_attention(retriever):
        retriever(tokens[0][None, :8])  # transformers' layers fill tables of their own, too
    before = state(retriever)
    found = detect_effective_lengths(retriever, tokens, **options)
    assert_same(before, state(retriever))
    assert found.candidates == (32, 64, 128, 256, 512)
    # Pairs 2 and 3 are the second of four groups; nothing rests on the others.
    assert found.pairs == (2, 2, 2, 2)
    assert found.lengths[0] == found.lengths[2] == found.lengths[3] == 512
    assert found.lengths[1] < 128
    # 512 tokens are more than half a turn of the pair: its cosine comes back.
    assert (found.loss[1, :4].diff() > 0).all()
    assert found.loss[1, -1] - found.loss[1, 0] > 1
    s = 1024 // found.lengths[1]
    assert found.scales(1024) == (2, 2, s, s, 2, 2, 2, 2)
    again = detect_effective_lengths(retriever, tokens, **options)
    assert torch.equal(again.loss, found.loss)


@torch.no_grad()
def test_fitted_dpe_reads_what_the_bare_model_loses(retriever, needles):
    tokens, targets = needles
    options = dict(target=512, targets=targets, trained=128, groups=4, progress=False)
    method = fit_dpe(retriever, tokens, **options)
    assert method == fit_dpe(retriever, tokens, **options)
    assert all(2 in pairs and len(pairs) == 6 for pairs in method.key_pairs[0])
    assert (method.window, method.scales[2]) == (16, max(method.scales))

    def loss():
        logits = torch.stack([retriever(text[None])[0, -2] for text in tokens])
        return torch.nn.functional.cross_entropy(logits, torch.stack([t[-1] for t in tokens]))

    bare = loss()
    with method(retriever):
        assert loss() < bare - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scales=(2, 0)), "every rotary pair"),
        (dict(scales=()), "every rotary pair"),
        (dict(scales=(2.5, 1)), "every rotary pair"),
        (dict(scales=3), "every rotary pair"),
        (dict(window=0), r"DPE\(window=0\)"),
        (
            dict(key_pairs=[[[0, 2]]]),
            "layer 0 head 0; expected different whole numbers from 0 to 1",
        ),
        (dict(key_pairs=[[[0], [1, 1]]]), "layer 0 head 1"),
        (dict(key_pairs=[0, 1]), r"key_pairs\[layer\]\[head\]"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(PosheadsError, match=message):
        DPE(**{"scales": (2, 2), "window": 8, **options})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DPE((2, 2), 8), "with 2 scales, but layer 0 has 4 rotary pairs"),
        (DPE((2,) * 4, 8, [CHOSEN]), "0 heads in layer 1, but that has 4"),
        (DPE((2,) * 4, 8, [CHOSEN[:3]] * 2), "3 heads in layer 0, but that has 4"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(llama, method, message):
    before = state(llama)
    with pytest.raises(PosheadsError, match=message), method(llama):
        pass
    assert_same(before, state(llama))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(groups=5), r"groups=5 .* \[4\] rotary pairs"),
        (dict(candidates=[0]), "candidates=0"),
        (dict(targets=[]), "0 targets .* 2 texts"),
        (dict(trained=1), "trained=1"),
        (dict(window=0), r"DPE\(window=0\)"),
        (dict(tolerance=-1), "tolerance=-1"),
    ],
)
def test_bad_calls_of_the_detection_are_refused(llama, options, message):
    before = state(llama)
    with pytest.raises(PosheadsError, match=message):
        detect_effective_lengths(llama, TOKENS, **{"groups": 2, "progress": False, **options})
    with pytest.raises(PosheadsError, match="share=0 was given"):
        key_pairs(llama, TOKENS, share=0)
    with pytest.raises(PosheadsError, match=r"fit_dpe\(target=1\)"):
        fit_dpe(llama, TOKENS, target=1)
    assert_same(before, state(llama))

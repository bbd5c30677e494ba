"""Rotation and content under methods, windows and layouts, against contents moved one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from helpers import small_models
from helpers.distances_by_hand import METHODS, TRAINED, numbers
from helpers.lens import CLASSES
from helpers.text_by_hand import positions
from helpers.traces import warm
from tl_posheads import RotaryGeometry, capture_rotary, edit_rotary, score_heads
from tl_posheads import extrapolation as ex
from tl_posheads.scoring.draws import MEASURES, DocumentDraws, Settings, measure

pytestmark = pytest.mark.lens

N = 44
TOKENS = torch.randint(3, 90, (1, N), generator=torch.Generator().manual_seed(8))
HEADS = (0, 2)  # those edited in both layers


def plain(i, j, n):
    return i - j


def edited(pairs):
    """Distances of heads edited, pairs by number; other heads' and pairs' stay."""

    def distance(i, j, n):
        out = np.full((4, n), float(i - j))
        for m, of in pairs.items():
            out[list(HEADS), m] = of(i - j)
        return out

    return distance


def editing(**edit):
    places = [(layer, head) for layer in (0, 1) for head in HEADS]
    return lambda n: lambda model, trained: edit_rotary(model, places, **edit)


# Methods, given the number of pairs, and the distance at which query i and key j meet.
ALL = METHODS | {
    "Linear": (lambda n: ex.Linear(3), plain),
    "YaRN": (lambda n: ex.YaRN(4), plain),
    "DynamicNTK": (lambda n: ex.DynamicNTK(4), plain),
    "freeze": (editing(freeze={0: 4.0}), edited({0: lambda d: 4.0})),
    "swap": (editing(swap=[(0, 1)]), None),
}
CASES = [
    *(("Llama", name) for name in ALL),
    *(("Phi", name) for name in ("SelfExtend", "DPE", "YaRN")),
    *(("Mistral, sliding window", name) for name in ("DPE by head", "DualChunk", "Linear")),
    *(("Cohere", name) for name in ("SelfExtend", "leaky", "DPE by head", "YaRN")),
    *(("GPT-J", name) for name in ("Linear", "YaRN")),
]


def swapped(g):
    first, second = g.inv_freq[:2].tolist()
    return edited({0: lambda d: d * second / first, 1: lambda d: d * first / second})


def by_loop(q, k, g, draw, distance, first, factor):
    """D of each content, ``[pair, head]``, at its own positions and at those given to it."""

    def dominant(content, place):
        (i, j), (at, other) = content, place
        turn = np.exp(1j * g.inv_freq.numpy() * distance(at, other, g.n_pairs))
        score = (q[i] * k[j].conj() * turn).real * factor(at)
        weight = np.exp(score - score.max(-1, keepdims=True))
        return weight @ np.arange(g.n_pairs) / weight.sum(-1)

    own, given, *octaves = ([(i + first, j + first) for i, j in some] for some in positions(draw))
    apart, there = (np.array([i - j for i, j in at]) for at in (own, given))
    here = np.stack([dominant(at, at) for at in own], 1)
    moved = np.stack([dominant(*both) for both in zip(own, given)], 1)
    near, far = (np.mean([dominant(at, at) for at in some], 0) for some in octaves)
    return {
        "rho": [spearmanr(apart, row).statistic for row in here],
        "rotation": [spearmanr(there, row).statistic for row in moved],
        "content": [spearmanr(apart, row).statistic for row in moved],
        "d_near": near,
        "d_far": far,
    }


@pytest.mark.parametrize(("family", "name"), CASES)
def test_contents_are_moved_as_the_method_places_them(family, name):
    if family == "Cohere" and "hooked" in CLASSES:
        pytest.skip("transformer-lens 3.9 turns Cohere's coordinates unlike transformers")
    model = warm(small_models.rotary_model(family))
    make, distance = ALL[name]
    skip, scale = (5, "attention") if name in ("SelfExtend", "log n", "YaRN") else (0, "none")
    captured = {}
    with make(RotaryGeometry.from_model(model)[0].n_pairs)(model, trained=TRAINED):
        geometry = RotaryGeometry.from_model(model, length=N)
        capture_rotary(model, TOKENS, lambda layer, *both: captured.update({layer: both}))
    draws = DocumentDraws("5" * 24, N - skip, Settings(250, scale=scale, skip_first=skip, seed=3))
    for layer, g in enumerate(geometry.layers):
        both = [x.double() for x in captured[layer]]
        q, k = (numbers(x, g)[0][0] for x in both)
        draw = draws.within(g.window, torch.device("cpu"))

        def factor(at, g=g):
            longer = max(1.0, np.log(at + 1) / np.log(TRAINED)) if name == "log n" else 1.0
            return longer * (g.attention_scale if scale == "attention" else 1.0)

        expected = by_loop(q, k[:, list(g.kv_head)], g, draw, distance or swapped(g), skip, factor)
        cut = [x[0, skip:] for x in both]
        found = measure(*cut, g.after(skip), draws)
        for number, which in enumerate(MEASURES[:5]):
            np.testing.assert_allclose(found[number], expected[which], atol=1e-5, err_msg=which)
        if g.remapping is not None:
            # It matters where contents are put: at plain distances the numbers are others.
            bare = measure(*cut, replace(g, remapping=None), draws)
            assert (found - bare)[1:3].abs().max() > 0.01


def test_a_fourier_series_has_no_rotation_to_move_contents_by():
    model = warm(small_models.rotary_model("Llama"))
    for sigma, known in ((0.0, True), (0.1, False)):
        with ex.FoPE(sigma=sigma)(model, trained=TRAINED):
            scores = score_heads(model, TOKENS, progress=False)
        assert scores.rho.isfinite().all()
        for part in (scores.rotation, scores.content, scores.interaction):
            assert part.isfinite().all() == known


@pytest.mark.parametrize("method", [ex.Unchanged(), ex.SelfExtend(4, 8)], ids=str)
def test_scores_are_these_measures(method):
    """The measures that the other test looks at are what ``score_heads`` returns."""
    model, captured = warm(small_models.rotary_model("Llama")), {}
    with method(model, trained=TRAINED):
        scores = score_heads(model, TOKENS, qk_pairs=250, seed=3, progress=False)
        geometry = RotaryGeometry.from_model(model)
        capture_rotary(model, TOKENS, lambda layer, *both: captured.update({layer: both}))
    draws = DocumentDraws(scores.document_names[0], N, Settings(250, seed=3))
    for layer, (q, k) in captured.items():
        values = measure(q[0], k[0], geometry[layer], draws)
        torch.testing.assert_close(scores.values[:, 0, layer], values, atol=1e-9, rtol=0)
        torch.testing.assert_close(scores.rotation[layer], values[1])
        torch.testing.assert_close(scores.interaction[layer], values[0] - values[1] - values[2])

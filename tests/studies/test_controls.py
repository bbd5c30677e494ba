"""Control sets: sizes, nesting, strata, and that the draws are as random as they say."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.scores_by_hand import head_scores
from tl_posheads import PosheadsError
from tl_posheads.studies.ablation.controls import CONTROLS, control_sets, top_sets

DRAWN = ("random", "layer_matched", "norm_matched")


def made(layers, heads, seed=0, missing=0.0):
    generator = np.random.default_rng(seed)
    rho = np.tanh(generator.normal(size=(layers, heads)))
    rho[generator.random((layers, heads)) < missing] = np.nan
    return head_scores(rho), torch.as_tensor(generator.lognormal(size=(layers, heads)))


def norm_bin(heads, norms):
    """The bin of each head, by an explicit loop over ascending norms."""
    ordered = sorted(heads, key=lambda head: (float(norms[head]), head))
    n_bins = max(1, len(ordered) // max(10, round(len(ordered) / 20)))
    return {head: i * n_bins // len(ordered) for i, head in enumerate(ordered)}


@given(
    layers=st.integers(1, 5),
    heads=st.integers(4, 12),
    missing=st.sampled_from([0.0, 0.3]),
    kind=st.sampled_from(CONTROLS),
    seed=st.integers(0, 99),
    shares=st.sets(st.floats(0.01, 0.5), min_size=1, max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_sizes_nesting_and_strata(layers, heads, missing, kind, seed, shares):
    scores, norms = made(layers, heads, seed, missing)
    scored = scores.top(1.0)
    sizes, fractions = set(), []
    for share in sorted(shares):
        k = max(1, round(share * len(scored)))
        if k not in sizes and 2 * k <= len(scored):
            sizes.add(k)
            fractions.append(share)
    if not fractions:
        return
    top = top_sets(scores, fractions)
    assert [len(s) for s in top] == sorted(sizes)
    draws = control_sets(scores, fractions, kind, n=3, seed=seed, norms=norms)
    assert len(draws) == (1 if kind == "lowest" else 3)
    stratum = {
        "random": lambda head: 0,
        "lowest": lambda head: 0,
        "layer_matched": lambda head: head[0],
        "norm_matched": norm_bin(scored, norms).__getitem__,
    }[kind]
    for draw in draws:
        assert len(draw) == len(top)
        before: set = set()
        for best, drawn in zip(top, draw):
            assert drawn == sorted(set(drawn))
            assert set(drawn) <= set(scored)
            assert before <= set(drawn)
            assert Counter(map(stratum, drawn)) == Counter(map(stratum, best))
            before = set(drawn)
    if kind == "lowest":
        worst = sorted(scored, key=lambda head: float(scores.rho[head]))
        assert draws[0] == [sorted(worst[: len(best)]) for best in top]
        assert not set(draws[0][-1]) & set(top[-1])


def test_top_sets_are_the_scores_own():
    scores, _ = made(4, 8)
    assert top_sets(scores, (0.1, 0.5, 1)) == [scores.top(0.1), scores.top(0.5), scores.top(1.0)]


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_draw_depends_on_the_seed_the_kind_and_its_number_alone(kind):
    scores, norms = made(6, 8)

    def draw(n, seed, kind=kind):
        return control_sets(scores, [0.1, 0.3], kind, n=n, seed=seed, norms=norms)

    assert draw(5, 3) == draw(5, 3)
    if kind != "lowest":
        assert draw(5, 3) == draw(9, 3)[:5]
        assert draw(5, 3) != draw(5, 4)
        assert len({str(one) for one in draw(20, 3)}) == 20


def test_draws_are_pinned():
    """A kind that is added, or a change of the seeding, must not move the draws of old studies."""
    scores, norms = made(3, 4)
    got = [control_sets(scores, [0.25], kind, n=1, seed=7, norms=norms)[0][0] for kind in DRAWN]
    assert got == [[(1, 2), (1, 3), (2, 1)], [(0, 3), (1, 2), (1, 3)], [(1, 2), (1, 3), (2, 0)]]


@pytest.mark.parametrize("kind", DRAWN)
def test_every_scored_head_of_a_stratum_is_drawn_equally_often(kind):
    """The top heads too: the rank test is exact because the top set is one of the draws."""
    scores, norms = made(3, 8, seed=1)
    n = 3000
    draws = control_sets(scores, [0.25], kind, n=n, seed=0, norms=norms)
    counts = Counter(head for (draw,) in draws for head in draw)
    scored, (top,) = scores.top(1.0), top_sets(scores, [0.25])
    bins = norm_bin(scored, norms)
    stratum = {"random": lambda h: 0, "layer_matched": lambda h: h[0], "norm_matched": bins.get}
    key = stratum[kind]
    for head in scored:
        size = sum(key(other) == key(head) for other in scored)
        share = sum(key(other) == key(head) for other in top) / size
        error = 4.5 * np.sqrt(n * share * (1 - share))
        assert abs(counts[head] - n * share) <= error


def test_every_random_set_is_as_likely_as_the_top_one():
    scores = head_scores([[0.1, 0.2, 0.3, 0.4, 0.5]])
    draws = control_sets(scores, [0.4], "random", n=4000, seed=0)
    counts = Counter(tuple(draw[0]) for draw in draws)
    assert len(counts) == 10
    assert all(abs(count - 400) < 4.5 * np.sqrt(400) for count in counts.values())
    assert tuple(sorted(scores.top(0.4))) in counts


def test_norm_matched_sets_have_norms_like_the_top_set():
    scores, norms = made(10, 20, seed=2)
    # The best heads write most: a random set of heads would write far less.
    scores = head_scores(torch.tanh(norms.log() + 0.3 * scores.rho))
    (top,) = top_sets(scores, [0.1])

    def mean(heads):
        return float(np.mean([float(norms[head]) for head in heads]))

    means = {
        kind: np.mean(
            [mean(d[0]) for d in control_sets(scores, [0.1], kind, n=30, seed=0, norms=norms)]
        )
        for kind in ("random", "norm_matched")
    }
    assert means["norm_matched"] == pytest.approx(mean(top), rel=0.15)
    assert means["random"] < 0.5 * mean(top)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "worst"}, "expected one of 'random'"),
        ({"n": 0}, "at least 1"),
        ({"seed": -1}, "at least 0"),
        ({"fractions": []}, "shares above 0"),
        ({"fractions": [0.0, 0.5]}, "shares above 0"),
        ({"fractions": [0.5, 1.1]}, "shares above 0"),
        ({"fractions": [float("nan")]}, "shares above 0"),
        ({"fractions": [0.5, 0.2]}, "ascending"),
        ({"fractions": [0.2, 0.2]}, "ascending"),
        ({"fractions": [0.18, 0.2]}, "both give 2 of 12"),
        ({"kind": "norm_matched"}, "norms is missing"),
        ({"kind": "norm_matched", "norms": torch.ones(4, 3)}, r"expected \(3, 4\)"),
        ({"kind": "norm_matched", "norms": torch.full((3, 4), torch.nan)}, "L0H0 is nan"),
        ({"kind": "lowest", "fractions": [0.6]}, "lowest 7 of 12"),
        ({"scores": head_scores(torch.full((2, 2), torch.nan))}, "no scored head"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change, message):
    options = {"scores": made(3, 4)[0], "fractions": [0.2], "kind": "random", "n": 1, "seed": 0}
    options.update(change)
    with pytest.raises(PosheadsError, match=message):
        control_sets(**options)


def test_norms_of_heads_without_a_score_are_not_needed():
    scores, norms = made(4, 6, missing=0.3)
    norms[torch.isnan(scores.rho)] = torch.nan
    (draw,) = control_sets(scores, [0.2], "norm_matched", n=1, seed=0, norms=norms)
    assert len(draw[0]) == len(scores.top(0.2))

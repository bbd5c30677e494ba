"""Ranks, correlations, intervals and p-values against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tl_posheads import PosheadsError, spearman_by_distance
from tl_posheads.scoring.draws import draw_pairs
from tl_posheads.statistics.ranks import (
    benjamini_hochberg,
    chance_overlap,
    correlation,
    draws_for,
    mean_over_documents,
    midranks,
    spearman_of_few,
    split_half,
)


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=50), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_midranks_are_scipys_and_weighted_those_of_a_loop(values, seed):
    weights = np.random.default_rng(seed).random(len(values))
    both = np.array([values, values[::-1]], dtype=float)
    plain, weighted = (
        midranks(torch.tensor(both)),
        midranks(torch.tensor(both), torch.tensor(weights)),
    )
    for x, ranks, of_weights in zip(both, plain, weighted):
        np.testing.assert_allclose(ranks, stats.rankdata(x) - 0.5)
        loop = [weights[x < a].sum() + weights[x == a].sum() / 2 for a in x]
        np.testing.assert_allclose(of_weights, loop, atol=1e-12)


def test_midranks_tell_neighbouring_floats_apart():
    x = torch.tensor([31.0, np.nextafter(31, 0), np.nextafter(31, 99), 31.0]).double()
    assert midranks(x).tolist() == [2.0, 0.5, 3.5, 2.0]
    assert midranks(torch.zeros(2, 0)).shape == (2, 0)


def test_correlation_is_numpys_with_and_without_weights():
    generator = np.random.default_rng(0)
    x, y, weights = generator.normal(size=(3, 5, 40))
    weights = weights[0] ** 2
    plain, weighted = (
        correlation(*map(torch.tensor, (x, y)), *w) for w in ((), (torch.tensor(weights),))
    )
    for a, b, one, other in zip(x, y, plain, weighted):
        assert one.item() == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
        c = np.cov(a, b, aweights=weights)
        assert other.item() == pytest.approx(c[0, 1] / np.sqrt(c[0, 0] * c[1, 1]), abs=1e-12)
    constant = torch.tensor(x)
    constant[2] = 0.1
    found = correlation(constant, torch.tensor(y))
    assert torch.isnan(found).tolist() == [False, False, True, False, False]
    # Of one row against many, and the other way round.
    torch.testing.assert_close(correlation(torch.tensor(x), torch.tensor(y[0]))[0], plain[0])


@given(
    values=st.lists(st.integers(-3, 3), min_size=4, max_size=60),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_rho_equals_scipys_with_ties(values, seed):
    distance = torch.as_tensor(np.random.default_rng(seed).integers(1, 6, len(values)))
    dominant = torch.tensor([values], dtype=torch.float64)
    got = spearman_by_distance(distance, dominant)[0].item()
    if len(set(values)) == 1 or len(set(distance.tolist())) == 1:
        assert np.isnan(got)
    else:
        assert got == pytest.approx(stats.spearmanr(distance, values).statistic, abs=1e-12)


def test_weighted_rho_equals_the_unweighted_one_on_repeated_pairs():
    generator = np.random.default_rng(0)
    distance, times = generator.integers(1, 9, 40), generator.integers(1, 5, 40)
    values = generator.normal(size=40) + 0.2 * distance
    weighted = spearman_by_distance(
        torch.as_tensor(distance), torch.as_tensor(values)[None], torch.as_tensor(times)
    )
    repeated = stats.spearmanr(np.repeat(distance, times), np.repeat(values, times)).statistic
    assert weighted.item() == pytest.approx(repeated, abs=1e-12)


def test_shapes_are_checked():
    with pytest.raises(PosheadsError, match=r"expected \[n\] and \[head, n\]"):
        spearman_by_distance(torch.arange(4), torch.zeros(4))


def test_draws_for_an_error_are_enough_for_what_heads_do():
    """The standard error over draws of that size, where D rises, falls, does both, or neither."""
    generator = np.random.default_rng(0)
    n = draws_for(0.05)
    assert n == 600
    longest = 3000
    apart = np.arange(longest)
    # Of every distance, the share of pairs that lie nearer: evenly spread over pairs.
    nearer = 1 - (1 - apart / longest) ** 2
    drawn = [
        draw_pairs(longest, 1, longest - 1, n, "pair", generator)[0].distance for _ in range(400)
    ]
    x, noise = nearer[np.stack(drawn)], generator.normal(size=(400, n))
    either = np.where(noise > 0, x, 1 - x)
    shapes = {
        "no tie": noise,
        "V": abs(x - 0.5),
        "waves": np.cos(8 * np.pi * x),
        "two values": abs(x - 0.5) > 0.25,
        "wider with distance": x * noise,
        "noisy": x + noise,
        "noisy V": abs(x - 0.7) + 0.3 * noise,
        "ties": np.floor(4 * abs(x - 0.5)),
        "rising or falling": either,
    }
    errors = {
        name: np.std([stats.spearmanr(a, b).statistic for a, b in zip(x, shape)], ddof=1)
        for name, shape in shapes.items()
    }
    # 400 samples tell a standard error to 4 %. The last is the one that is larger, as documented.
    assert 0.05 < errors.pop("rising or falling") < 0.05 * 1.2
    assert max(errors.values()) < 0.05 * 1.04
    # Distances are drawn evenly: where they alone decide, drawing makes next to no error.
    assert max(errors[name] for name in ("V", "waves", "two values", "ties")) < 0.005
    # And no fewer would do.
    assert max(errors.values()) > 0.04


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_mean_over_documents_is_scipys_t_test_and_interval(level):
    values = np.random.default_rng(1).normal(0.1, 0.3, (9, 3, 4))
    found = mean_over_documents(torch.tensor(values), level=level)
    for place in np.ndindex(3, 4):
        x = values[(slice(None), *place)]
        test = stats.ttest_1samp(x, 0.0)
        interval = test.confidence_interval(level)
        assert found.mean[place].item() == pytest.approx(x.mean())
        assert found.se[place].item() == pytest.approx(stats.sem(x))
        assert found.p[place].item() == pytest.approx(test.pvalue)
        assert found.ci_low[place].item() == pytest.approx(interval.low)
        assert found.ci_high[place].item() == pytest.approx(interval.high)
        assert found.n[place] == 9
    adjusted = stats.false_discovery_control(found.p.numpy().ravel())
    np.testing.assert_allclose(found.p_adjusted.numpy().ravel(), adjusted)


def test_documents_in_which_a_head_has_no_value_are_left_out():
    nan = float("nan")
    values = torch.tensor(
        [[0.1, nan, nan, 0.2], [0.3, 0.5, nan, nan], [0.2, nan, nan, 0.7]], dtype=torch.float64
    )
    found = mean_over_documents(values)
    assert found.n.tolist() == [3, 1, 0, 2]
    np.testing.assert_allclose(found.mean, [0.2, 0.5, nan, 0.45])
    alone = stats.ttest_1samp([0.2, 0.7], 0.0)
    assert found.p[3].item() == pytest.approx(alone.pvalue)
    assert found.ci_low[3].item() == pytest.approx(alone.confidence_interval().low)
    for name in ("se", "ci_low", "ci_high", "p", "p_adjusted"):
        assert torch.isnan(getattr(found, name)).tolist() == [False, True, True, False]
    # NaN counts for none of the tests that p-values are corrected for.
    expected = stats.false_discovery_control(found.p[[0, 3]].numpy())
    np.testing.assert_allclose(found.p_adjusted[[0, 3]], expected)


def test_documents_that_all_say_the_same():
    """A mean without spread is no zero; zero without spread tells nothing."""
    found = mean_over_documents(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    assert found.ci_low.tolist() == found.ci_high.tolist() == [1.0, 0.0]
    assert found.p[0] == 0
    assert torch.isnan(found.p[1])


def test_split_half_tells_order_from_noise():
    generator = np.random.default_rng(2)
    truth, noise = np.linspace(-0.5, 0.5, 30), generator.normal(size=(11, 30))
    assert split_half(torch.tensor(truth + 0.01 * noise)) > 0.98
    assert abs(split_half(torch.tensor(noise))) < 0.3
    # A halving by hand: two documents have but one.
    two = torch.tensor(truth + 0.5 * noise)[:2]
    expected = stats.spearmanr(two[0], two[1]).statistic
    assert split_half(two) == pytest.approx(expected)
    # Four have three, and each is found about as often.
    four = torch.tensor(truth + 0.5 * noise)[:4]
    halves = [[0, 1], [0, 2], [0, 3]]
    expected = np.mean(
        [
            stats.spearmanr(
                four[h].mean(0), four[[i for i in range(4) if i not in h]].mean(0)
            ).statistic
            for h in halves
        ]
    )
    assert split_half(four, seed=1) == pytest.approx(expected, abs=0.03)
    assert split_half(four, seed=1) == split_half(four.view(4, 5, 6), seed=1)
    holes = torch.cat([four, torch.full((4, 1), float("nan"))], 1)
    assert split_half(holes, seed=1) == split_half(four, seed=1)
    assert np.isnan(split_half(four[:1]))
    assert np.isnan(split_half(four[:, :2]))


def test_benjamini_hochberg_is_scipys_and_leaves_gaps():
    p = np.array([[0.01, np.nan], [0.04, 0.03]])
    got = benjamini_hochberg(p)
    assert np.isnan(got[0, 1])
    np.testing.assert_allclose(
        got[np.isfinite(got)], stats.false_discovery_control([0.01, 0.04, 0.03])
    )
    assert np.isnan(benjamini_hochberg(np.full((2, 2), np.nan))).all()


def test_chance_overlap_is_hypergeometric():
    mean, p = chance_overlap(270, 14, 14, 3)
    assert mean == pytest.approx(14 * 14 / 270)
    draws = np.random.default_rng(0).permuted(np.tile(np.arange(270), (20000, 1)), axis=1)[:, :14]
    assert p == pytest.approx(np.mean((draws < 14).sum(1) >= 3), abs=0.01)


@pytest.mark.parametrize("n", [4, 6, 8])
def test_few_pairs_are_judged_against_every_order(n):
    random = np.random.default_rng(n)
    x, y = random.integers(0, 5, n).astype(float), random.random(n)
    rho, p = spearman_of_few(x, y)
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)

    def centred(a, axis):
        return np.abs(((stats.rankdata(a, axis=axis) - (n + 1) / 2) * stats.rankdata(y)).sum(axis))

    true = stats.permutation_test(
        (x,),
        centred,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=np.inf,
        alternative="greater",
    )
    assert p == pytest.approx(true.pvalue)
    many = random.random((2, 30))
    assert spearman_of_few(*many) == pytest.approx(tuple(stats.spearmanr(*many)))

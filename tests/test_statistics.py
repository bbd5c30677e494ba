"""Rho, intervals and nulls against scipy, and against data whose truth was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tl_posheads import PosheadsError, spearman_by_distance
from tl_posheads.statistics import (
    DominantGrid,
    benjamini_hochberg,
    bootstrap_interval,
    chance_overlap,
    circular_shift_statistic,
    distance_edges,
    draws_for,
    sampled_standard_error,
    shift_p_value,
    spearman_of_few,
    spearman_of_tables,
    weighted_midranks,
)


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
    assert weighted_midranks(np.array([5.0, 5.0, 7.0])).tolist() == pytest.approx(
        [1 / 3, 1 / 3, 5 / 6]
    )


def test_shapes_are_checked():
    with pytest.raises(PosheadsError, match=r"expected \[n\] and \[head, n\]"):
        spearman_by_distance(torch.arange(4), torch.zeros(4))


@given(short=st.integers(1, 3000), more=st.integers(0, 3000))
@settings(max_examples=50, deadline=None)
def test_distance_bins_of_a_shorter_text_begin_those_of_a_longer(short, more):
    a, b = distance_edges(short), distance_edges(short + more)
    assert torch.equal(a, b[: len(a)])
    assert bool((b[1:] > b[:-1]).all())
    assert int(a[0]) == 1
    widths = b[1:] - b[:-1]
    assert bool((widths <= torch.clamp(b[:-1] // 32, min=1)).all())


def table_of(distance, dominant, grid=None):
    grid = grid or DominantGrid.from_sample(dominant, 32)
    edges = distance_edges(int(distance.max()))
    x = torch.bucketize(distance, edges, right=True) - 1
    n_x = len(edges)
    code = grid.bins(dominant) * n_x + x
    return torch.stack([torch.bincount(c, minlength=grid.n_bins * n_x) for c in code]).view(
        len(dominant), grid.n_bins, n_x
    )


@pytest.mark.parametrize(
    "crowd",
    ["spread", "a hair's breadth", "two values", "mostly tied", "against a whole number"],
)
def test_binned_rho_is_within_a_thousandth_of_scipys(crowd):
    generator = np.random.default_rng(3)
    distance = generator.integers(1, 2000, 60_000)
    x = 15 + 3 * generator.normal(size=60_000) + 0.002 * distance
    dominant = {
        "spread": x,
        "a hair's breadth": 31 - 1e-9 * x,
        "two values": (x > 16).astype(float),
        "mostly tied": np.where(x > 18, x, 0.0),
        "against a whole number": 31 - np.exp(-x),
    }[crowd]
    table = table_of(torch.as_tensor(distance), torch.as_tensor(dominant)[None])
    exact = stats.spearmanr(distance, dominant).statistic
    assert spearman_of_tables(table.double().numpy())[0] == pytest.approx(exact, abs=1e-3)


def test_a_constant_head_has_no_score():
    table = table_of(torch.arange(1, 50), torch.full((1, 49), 3.0))
    assert np.isnan(spearman_of_tables(table.double().numpy())[0])


def test_draws_for_an_error_are_enough_for_any_shape():
    generator = np.random.default_rng(0)
    n = draws_for(0.02)
    assert n == 5000
    x, noise = generator.random(n), generator.normal(size=n)
    crossed = np.where(noise > 0, x, 1 - x)
    shapes = noise, abs(x - 0.5), np.cos(8 * np.pi * x), abs(x - 0.5) > 0.25, crossed, x + noise
    for shape in shapes:
        assert 0 < sampled_standard_error(x, shape) < 0.02


def test_grid_gives_ties_bins_of_their_own_and_levels_by_share():
    values = torch.tensor([[1.0] * 60 + list(np.linspace(2, 3, 40))], dtype=torch.float64)
    grid = DominantGrid.from_sample(values, 4)
    tied, above, below = grid.bins(
        torch.tensor([[1.0, np.nextafter(1, 2), np.nextafter(1, 0)]]).double()
    )[0]
    assert below < tied < above
    assert grid.level[0, tied].item() == pytest.approx(0.3)
    assert grid.same_as(DominantGrid.from_sample(values, 4))


def test_bootstrap_covers_the_truth_at_its_rate_and_finds_planted_ties():
    generator = np.random.default_rng(5)
    covered, found = 0, 0
    for _ in range(150):
        # Documents differ: the tie between distance and D has a slope of its own in each.
        blocks, planted = [], []
        for _ in range(12):
            distance = generator.integers(1, 64, 400)
            noise = generator.normal(size=400)
            slope = 0.02 * generator.normal()
            blocks.append((distance, slope * distance + noise))
            planted.append((distance, (slope + 0.05) * distance + noise))
        edges = np.quantile(np.concatenate([d for _, d in blocks]), np.linspace(0, 1, 17)[1:-1])

        def tables(parts, edges=edges):
            return np.stack(
                [np.histogram2d(np.digitize(d, edges), x, bins=[np.arange(17), np.arange(0, 65, 4)])[0]
                 for x, d in parts]
            )  # fmt: skip

        for parts, truth in ((blocks, 0.0), (planted, None)):
            small = tables(parts)
            rho = float(spearman_of_tables(small.sum(0)))
            low, high = bootstrap_interval(small, rho, generator=generator, n_draws=300)
            assert low <= rho <= high
            if truth is None:
                found += low > 0
            else:
                covered += low <= truth <= high
    # 95 % of 150 is 142.5 with a standard deviation of 2.7
    assert 134 <= covered <= 150
    assert found >= 148


def test_few_blocks_or_no_rho_give_no_interval():
    generator = np.random.default_rng(0)
    assert np.isnan(bootstrap_interval(np.ones((2, 4, 4)), 0.0, generator=generator)).all()
    assert np.isnan(bootstrap_interval(np.ones((5, 4, 4)), np.nan, generator=generator)).all()


def test_shift_statistic_equals_rolled_sums():
    rank, level = torch.randn(11).double(), torch.rand(2, 11).double()
    offset = torch.tensor([[0, 3, 25], [10, 11, 7]])
    observed, shifted = circular_shift_statistic(rank, level, offset)
    for h in range(2):
        assert observed[h].item() == pytest.approx(float(rank @ level[h]))
        for d in range(3):
            rolled = torch.roll(level[h], -int(offset[h, d]))
            assert shifted[h, d].item() == pytest.approx(float(rank @ rolled))


def test_p_values_count_ties_and_are_never_zero():
    observed = torch.tensor([3.0, 9.0]).double()
    draws = torch.tensor([[1.0, 3.0, 5.0], [1.0, 2.0, 3.0]]).double()
    assert shift_p_value(observed, draws).tolist() == [0.75, 0.25]


def test_benjamini_hochberg_is_scipys_and_leaves_gaps():
    p = np.array([[0.01, np.nan], [0.04, 0.03]])
    got = benjamini_hochberg(p)
    assert np.isnan(got[0, 1])
    np.testing.assert_allclose(
        got[np.isfinite(got)], stats.false_discovery_control([0.01, 0.04, 0.03])
    )


def test_sampled_standard_error_is_the_spread_over_samples():
    generator = np.random.default_rng(7)
    rhos, errors = [], []
    for _ in range(400):
        distance = generator.integers(1, 30, 300)
        dominant = 0.05 * distance + generator.normal(size=300)
        rhos.append(stats.spearmanr(distance, dominant).statistic)
        errors.append(sampled_standard_error(distance, dominant))
    assert np.mean(errors) == pytest.approx(np.std(rhos), rel=0.12)


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
        (x,), centred, permutation_type="pairings", vectorized=True, n_resamples=np.inf,
        alternative="greater",
    )  # fmt: skip
    assert p == pytest.approx(true.pvalue)
    many = random.random((2, 30))
    assert spearman_of_few(*many) == pytest.approx(tuple(stats.spearmanr(*many)))

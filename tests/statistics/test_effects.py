"""Intervals, p-values and power against explicit loops, scipy, and simulated truths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tl_posheads import PosheadsError
from tl_posheads.statistics.effects import (
    agreement,
    holm,
    paired_effect,
    rank_tests,
    sign_flip_p,
)


def coverage(draw, n_prompts, n_sim=2000):
    """Share of studies whose interval holds the true mean difference, -0.3."""
    generator, hits = np.random.default_rng(n_prompts), 0
    for _ in range(n_sim):
        clean = generator.normal(-2, 1, n_prompts)
        effect = paired_effect(clean - 0.3 + draw(generator, n_prompts), clean)
        hits += effect.ci_low <= -0.3 <= effect.ci_high
    return hits / n_sim


@pytest.mark.parametrize("n_prompts", [3, 5, 8])
def test_the_interval_covers_the_mean_of_few_prompts(n_prompts):
    error = 3 * np.sqrt(0.95 * 0.05 / 2000)
    normal = coverage(lambda rng, n: 0.4 * rng.normal(size=n), n_prompts)
    assert normal == pytest.approx(0.95, abs=error)
    # Most prompts lose little, some much: .88, .88 and .90 over 8000 studies.
    skewed = coverage(lambda rng, n: 0.4 * (1 - rng.exponential(size=n)), n_prompts)
    assert 0.86 <= skewed <= 0.95


@pytest.mark.parametrize("n_prompts", [2, 5, 40])
def test_the_interval_is_scipys_of_the_paired_differences(n_prompts):
    generator = np.random.default_rng(1)
    clean = generator.normal(-5, 30, n_prompts)
    ablated = clean + generator.exponential(1.0, n_prompts) - 2
    effect = paired_effect(ablated, clean)
    reference = stats.ttest_rel(ablated, clean)
    assert effect.mean == pytest.approx(np.mean(ablated - clean), abs=1e-12)
    assert effect.n_prompts == n_prompts
    interval = reference.confidence_interval(0.95)
    assert (effect.ci_low, effect.ci_high) == pytest.approx((interval.low, interval.high))


def test_degenerate_effects():
    same = paired_effect(np.full(7, 0.1), np.full(7, 0.3))
    assert same.mean == same.ci_low == same.ci_high == 0.1 - 0.3
    one = paired_effect(np.array([1.0]), np.array([3.0]))
    assert one.mean == -2
    assert np.isnan([one.ci_low, one.ci_high]).all()
    none = paired_effect(np.array([]), np.array([]))
    assert np.isnan([none.mean, none.ci_low, none.ci_high]).all()
    lost = paired_effect(np.array([1.0, np.nan]), np.zeros(2))
    assert np.isnan([lost.mean, lost.ci_low]).all()
    with pytest.raises(PosheadsError, match="one value for each prompt"):
        paired_effect(np.zeros(3), np.zeros(4))


def loops(top, draws):
    """p and adjusted p from the definition, without tolerances."""
    rows = [list(top), *(list(row) for row in draws)]
    n, n_tests = len(rows), len(top)
    p = [sum(row[j] <= top[j] for row in rows) / n for j in range(n_tests)]
    columns = [np.array([row[j] for row in rows]) for j in range(n_tests)]
    standard = [(c - c.mean()) / c.std() for c in columns]
    adjusted = []
    for j in range(n_tests):
        count = 0
        for i in range(n):
            extreme = min(standard[k][i] for k in range(n_tests))
            count += extreme <= standard[j][0]
        adjusted.append(count / n)
    return p, adjusted


@pytest.mark.parametrize("seed", range(8))
def test_rank_tests_equal_the_loops(seed):
    generator = np.random.default_rng(seed)
    scale = generator.lognormal(size=5)
    top, draws = scale * generator.normal(-1, 1, 5), scale * generator.normal(size=(40, 5))
    got = rank_tests(top, draws)
    p, adjusted = loops(top, draws)
    np.testing.assert_allclose(got.p, p, atol=1e-12)
    np.testing.assert_allclose(got.p_adjusted, adjusted, atol=1e-12)


@given(
    n_draws=st.integers(1, 25),
    n_tests=st.integers(1, 5),
    coarse=st.booleans(),
    seed=st.integers(0, 9999),
)
@settings(max_examples=150, deadline=None)
def test_properties_of_rank_tests(n_draws, n_tests, coarse, seed):
    generator = np.random.default_rng(seed)
    pooled = generator.normal(size=(n_draws + 1, n_tests))
    if coarse:  # full of ties, whole columns of them
        pooled = pooled.round() / 3
    top, draws = pooled[0], pooled[1:]
    got = rank_tests(top, draws)
    assert ((got.p > 0) & (got.p <= 1)).all()
    assert ((got.p_adjusted >= got.p) & (got.p_adjusted <= 1)).all()
    shuffled = rank_tests(top, draws[generator.permutation(n_draws)])
    np.testing.assert_allclose(shuffled.p, got.p, atol=1e-12)
    np.testing.assert_allclose(shuffled.p_adjusted, got.p_adjusted, atol=1e-12)
    order = generator.permutation(n_tests)
    swapped = rank_tests(top[order], draws[:, order])
    np.testing.assert_allclose(swapped.p_adjusted, got.p_adjusted[order], atol=1e-12)
    # Units don't matter, and neither does a test's own scale for the others.
    scaled = rank_tests(7 * top, 7 * draws)
    np.testing.assert_allclose(scaled.p_adjusted, got.p_adjusted, atol=1e-12)
    if n_tests == 1:
        np.testing.assert_allclose(got.p, got.p_adjusted, atol=1e-12)


def test_ties_up_to_rounding_count_against_the_top():
    draws = np.full((19, 2), -3.0)
    draws[:, 1] = np.linspace(-1, 1, 19)
    got = rank_tests(np.array([-3.0 - 1e-6, -1.0 - 1e-7]), draws)
    assert got.p.tolist() == [1.0, 0.1]
    assert got.p_adjusted.tolist() == [1.0, 0.1]
    # A difference that is more than rounding counts.
    assert rank_tests(np.array([-3.0 - 1e-4, -2.0]), draws).p.tolist() == [0.05, 0.05]
    zero = rank_tests(np.zeros(1), np.zeros((9, 1)))
    assert (zero.p.item(), zero.p_adjusted.item()) == (1.0, 1.0)


def test_a_lost_test_takes_no_part():
    generator = np.random.default_rng(0)
    top, draws = generator.normal(-1, 1, 3), generator.normal(size=(30, 3))
    alone = rank_tests(top[[0, 2]], draws[:, [0, 2]])
    draws[4, 1] = np.nan
    got = rank_tests(top, draws)
    assert np.isnan([got.p[1], got.p_adjusted[1]]).all()
    assert got.p_adjusted[[0, 2]].tolist() == alone.p_adjusted.tolist()
    assert np.isnan(rank_tests(np.array([np.nan]), np.zeros((3, 1))).p).all()
    for wrong in (np.zeros((0, 3)), np.zeros((5, 2)), np.zeros(3)):
        with pytest.raises(PosheadsError, match="at least one draw"):
            rank_tests(top, wrong)


def test_levels_hold_when_the_top_is_one_of_the_draws():
    """Skewed, dependent tests, as nested sets give: 5 % each, and 5 % for all together."""
    generator = np.random.default_rng(0)
    n_sim, n_draws, n_tests = 3000, 59, 6
    each, any_of_them = np.zeros(n_tests), 0
    for _ in range(n_sim):
        common = generator.exponential(size=(n_draws + 1, 1))
        pooled = -common * (1 + np.arange(n_tests)) - generator.exponential(
            size=(n_draws + 1, n_tests)
        )
        got = rank_tests(pooled[0], pooled[1:])
        each += got.p <= 0.05
        any_of_them += bool((got.p_adjusted <= 0.05).any())
    error = 3.5 * np.sqrt(0.05 * 0.95 / n_sim)
    # 3 of 60 possible ranks: the level is reached exactly, from below and from above.
    assert np.abs(each / n_sim - 0.05).max() <= error
    assert abs(any_of_them / n_sim - 0.05) <= error


def test_family_wise_level_holds_beside_a_test_with_an_effect():
    generator = np.random.default_rng(1)
    n_sim, false, found = 1500, 0, 0
    for _ in range(n_sim):
        pooled = generator.normal(size=(60, 4))
        pooled[0, 0] -= 8
        got = rank_tests(pooled[0], pooled[1:])
        found += got.p_adjusted[0] <= 0.05
        false += bool((got.p_adjusted[1:] <= 0.05).any())
    assert found > 0.99 * n_sim
    assert false / n_sim <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_sim)


def test_dependent_tests_cost_less_than_by_bonferroni():
    generator = np.random.default_rng(2)
    common = generator.normal(size=(100, 1))
    pooled = common + 0.01 * generator.normal(size=(100, 10))
    pooled[0] = np.sort(pooled, axis=0)[2] - 1e-3
    got = rank_tests(pooled[0], np.delete(pooled, 0, axis=0))
    assert got.p_adjusted.min() < 3 * got.p.min()


@pytest.mark.parametrize("n", [2, 5, 9])
def test_sign_flips_equal_the_enumeration(n):
    difference = np.random.default_rng(n).normal(-0.4, 1, n)
    flips = [np.mean(np.array(s) * difference) for s in itertools.product([1, -1], repeat=n)]
    expected = np.mean(np.array(flips) <= difference.mean() + 1e-12)
    assert sign_flip_p(difference) == pytest.approx(expected)


def test_sign_flips_of_many_prompts_go_with_the_t_test():
    difference = np.random.default_rng(0).normal(-0.2, 1, 100)
    expected = stats.ttest_1samp(difference, 0, alternative="less").pvalue
    assert sign_flip_p(difference) == pytest.approx(expected, abs=0.01)
    assert sign_flip_p(difference) == sign_flip_p(difference, seed=0)
    assert sign_flip_p(-difference) > 0.85
    assert sign_flip_p(difference - 9) == pytest.approx(1 / 10_001)
    assert sign_flip_p(np.full(14, -1.0)) == pytest.approx(2**-14)  # still all of them
    assert sign_flip_p(np.zeros(5)) == 1
    assert np.isnan([sign_flip_p(np.array(x)) for x in ([], [1.0], [np.nan, 1.0])]).all()
    with pytest.raises(PosheadsError, match="one value for each prompt"):
        sign_flip_p(np.zeros((2, 2)))


def test_sign_flips_keep_their_level():
    generator = np.random.default_rng(4)
    p = np.array([sign_flip_p(generator.laplace(size=8)) for _ in range(1200)])
    for level in (0.05, 0.25):
        assert np.mean(p <= level) <= level + 3 * np.sqrt(level * (1 - level) / len(p))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_holm_equals_its_definition(p):
    n = len(p)
    got = holm(np.array(p))
    ranked = sorted(p)
    for value, adjusted in zip(p, got):
        steps = [(n - i) * q for i, q in enumerate(ranked) if q <= value]
        assert adjusted == pytest.approx(min(1.0, max(steps)))
        assert min(1.0, n * value) >= adjusted - 1e-12
        assert adjusted >= value


def test_holm_leaves_out_what_is_nan():
    got = holm(np.array([[0.01, np.nan], [0.03, 0.5]]))
    np.testing.assert_allclose(got, [[0.03, np.nan], [0.06, 0.5]])
    assert holm(np.array([])).shape == (0,)


def test_agreement_of_an_estimate():
    generator = np.random.default_rng(0)
    estimated = generator.normal(-1, 1, 60)
    true = 2 * estimated + 0.5 * generator.normal(size=60)
    got = agreement(estimated, true)
    assert got.rank_correlation == pytest.approx(stats.spearmanr(estimated, true).statistic)
    assert got.slope == pytest.approx(np.linalg.lstsq(estimated[:, None], true)[0].item())
    assert got.ci_low < got.rank_correlation < got.ci_high <= 1
    assert got.n_sets == 60
    # Percentiles of resampled sets, one at a time, a little further apart than 2.5 and 97.5 %.
    drawn = []
    for _ in range(1000):
        picks = generator.integers(0, 60, 60)
        drawn.append(stats.spearmanr(estimated[picks], true[picks]).statistic)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert got.ci_low == pytest.approx(low, abs=0.03)
    assert got.ci_high == pytest.approx(high, abs=0.01)
    assert got == agreement(estimated, true, seed=0)


def test_agreement_of_ties_constants_and_few():
    tied = np.array([0.0, 0.0, 1.0, 1.0, 2.0, 3.0])
    other = np.array([1.0, 0.0, 1.0, 2.0, 2.0, 2.0])
    assert agreement(tied, other).rank_correlation == pytest.approx(
        stats.spearmanr(tied, other).statistic
    )
    constant = agreement(np.ones(5), np.arange(5.0))
    assert np.isnan([constant.rank_correlation, constant.ci_low]).all()
    assert constant.slope == 2
    zero = agreement(np.zeros(5), np.arange(5.0))
    assert np.isnan(zero.slope)
    assert np.isnan(agreement(np.arange(2.0), np.arange(2.0)).rank_correlation)
    few = agreement(np.arange(3.0), np.arange(3.0))
    assert few.rank_correlation == pytest.approx(1)
    assert np.isnan([few.ci_low, few.ci_high]).all()
    with pytest.raises(PosheadsError, match="one value for each set"):
        agreement(np.zeros(3), np.zeros(4))
    with pytest.raises(PosheadsError, match="leave that set out"):
        agreement(np.array([1.0, np.nan]), np.zeros(2))

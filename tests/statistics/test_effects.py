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
    holm,
    paired_effect,
    rank_tests,
    screen_agreement,
    sign_flip_p,
)
from tl_posheads.statistics.power import smallest_detectable


def test_the_interval_covers_the_mean_at_about_its_rate():
    generator = np.random.default_rng(0)
    hits = []
    for i in range(300):
        clean = generator.normal(-2, 1, 60)
        effect = paired_effect(
            clean - 0.3 + 0.4 * generator.standard_normal(60), clean, n_boot=500, seed=i
        )
        hits.append(effect.ci_low <= -0.3 <= effect.ci_high)
    assert 0.90 <= np.mean(hits) <= 0.985


def test_the_interval_is_that_of_the_paired_differences():
    generator = np.random.default_rng(1)
    clean = generator.normal(-5, 30, 40)
    ablated = clean + generator.exponential(1.0, 40) - 2
    effect = paired_effect(ablated, clean, seed=3)
    assert effect.mean == pytest.approx(np.mean(ablated - clean), abs=1e-12)
    assert effect.n_prompts == 40
    # By hand: percentiles of resampled means, which BCa moves a little for skewed data.
    differences = ablated - clean
    means = [differences[generator.integers(0, 40, 40)].mean() for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert effect.ci_low == pytest.approx(low, abs=0.08)
    assert effect.ci_high == pytest.approx(high, abs=0.12)
    assert effect == paired_effect(ablated, clean, seed=3)
    bca = stats.bootstrap((differences,), np.mean, n_resamples=10_000, rng=np.random.default_rng(8))
    assert effect.ci_low == pytest.approx(bca.confidence_interval.low, abs=0.02)
    assert effect.ci_high == pytest.approx(bca.confidence_interval.high, abs=0.02)


def test_degenerate_effects():
    same = paired_effect(np.full(7, 0.1), np.full(7, 0.3), seed=0)
    assert same.mean == same.ci_low == same.ci_high == 0.1 - 0.3
    one = paired_effect(np.array([1.0]), np.array([3.0]), seed=0)
    assert one.mean == -2
    assert np.isnan([one.ci_low, one.ci_high]).all()
    none = paired_effect(np.array([]), np.array([]), seed=0)
    assert np.isnan([none.mean, none.ci_low, none.ci_high]).all()
    lost = paired_effect(np.array([1.0, np.nan]), np.zeros(2), seed=0)
    assert np.isnan([lost.mean, lost.ci_low]).all()
    # BCa of nearly constant data: some interval that holds the mean, and no warning.
    near = paired_effect(np.array([0.0] * 9 + [1.0]), np.zeros(10), seed=0)
    assert near.ci_low <= near.mean <= near.ci_high
    with pytest.raises(PosheadsError, match="one value for each prompt"):
        paired_effect(np.zeros(3), np.zeros(4), seed=0)
    with pytest.raises(PosheadsError, match="n_boot=0"):
        paired_effect(np.zeros(3), np.zeros(3), n_boot=0, seed=0)


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


@pytest.mark.parametrize(
    ("n_draws", "n_tests", "draw_sd", "prompt_sd"),
    [(39, 1, 0.1, 0.5), (59, 4, 0.1, 0.5), (99, 8, 0.02, 1.0), (29, 3, 0.2, 0.0)],
)
def test_power_at_the_smallest_detectable_effect(n_draws, n_tests, draw_sd, prompt_sd):
    """Experiments of which everything is simulated, down to the prompts, and rank_tests itself."""
    n_prompts, n_sim = 50, 1200
    delta = smallest_detectable(
        draw_sd=draw_sd,
        prompt_sd=prompt_sd,
        n_draws=n_draws,
        n_prompts=n_prompts,
        n_tests=n_tests,
        seed=1,
    )
    generator = np.random.default_rng(99)
    found = 0
    for _ in range(n_sim):
        true = draw_sd * generator.normal(size=(n_draws + 1, n_tests))
        true[0, 0] = -delta
        # Every set's deviations by prompt: the difference of two has prompt_sd.
        noise = prompt_sd / np.sqrt(2) * generator.normal(size=(n_draws + 1, n_tests, n_prompts))
        measured = true + noise.mean(-1)
        found += rank_tests(measured[0], measured[1:]).p_adjusted[0] <= 0.05
    assert found / n_sim == pytest.approx(0.8, abs=0.05)


def test_the_smallest_detectable_effect_is_smaller_with_more_of_everything():
    base = dict(draw_sd=0.1, prompt_sd=1.0, n_draws=59, n_prompts=20, n_tests=4, seed=0)
    delta = smallest_detectable(**base)
    assert delta == smallest_detectable(**base)
    assert smallest_detectable(**{**base, "n_prompts": 200}) < delta
    assert smallest_detectable(**{**base, "n_tests": 1}) < delta
    assert smallest_detectable(**base, power=0.5) < delta
    assert smallest_detectable(**base, alpha=0.1) < delta
    scaled = smallest_detectable(**{**base, "draw_sd": 1.0, "prompt_sd": 10.0})
    assert scaled == pytest.approx(10 * delta, rel=2e-3)


def test_what_cannot_be_detected():
    base = dict(draw_sd=0.1, prompt_sd=1.0, n_draws=19, n_prompts=20, n_tests=1, seed=0, n_sim=200)
    assert np.isfinite(smallest_detectable(**base))
    assert smallest_detectable(**{**base, "n_draws": 18}) == np.inf
    assert smallest_detectable(**{**base, "draw_sd": 0.0, "prompt_sd": 0.0}) == 0
    assert np.isnan(smallest_detectable(**{**base, "prompt_sd": np.nan}))
    for wrong in (
        {"draw_sd": -1.0},
        {"prompt_sd": np.inf},
        {"n_draws": 0},
        {"alpha": 0.0},
        {"power": 1.0},
    ):
        with pytest.raises(PosheadsError, match="expected"):
            smallest_detectable(**{**base, **wrong})


def test_agreement_of_an_estimate():
    generator = np.random.default_rng(0)
    estimated = generator.normal(-1, 1, 60)
    true = 2 * estimated + 0.5 * generator.normal(size=60)
    got = screen_agreement(estimated, true)
    assert got.rank_correlation == pytest.approx(stats.spearmanr(estimated, true).statistic)
    assert got.slope == pytest.approx(np.linalg.lstsq(estimated[:, None], true)[0].item())
    assert got.ci_low < got.rank_correlation < got.ci_high <= 1
    assert got.n_sets == 60
    reference = stats.bootstrap(
        (estimated, true),
        lambda x, y: stats.spearmanr(x, y).statistic,
        paired=True,
        vectorized=False,
        n_resamples=1000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert got.ci_low == pytest.approx(reference.low, abs=0.03)
    assert got.ci_high == pytest.approx(reference.high, abs=0.03)


def test_agreement_of_ties_constants_and_few():
    tied = np.array([0.0, 0.0, 1.0, 1.0, 2.0, 3.0])
    other = np.array([1.0, 0.0, 1.0, 2.0, 2.0, 2.0])
    assert screen_agreement(tied, other).rank_correlation == pytest.approx(
        stats.spearmanr(tied, other).statistic
    )
    constant = screen_agreement(np.ones(5), np.arange(5.0))
    assert np.isnan([constant.rank_correlation, constant.ci_low]).all()
    assert constant.slope == 2
    zero = screen_agreement(np.zeros(5), np.arange(5.0))
    assert np.isnan(zero.slope)
    assert np.isnan(screen_agreement(np.arange(2.0), np.arange(2.0)).rank_correlation)
    few = screen_agreement(np.arange(3.0), np.arange(3.0))
    assert few.rank_correlation == pytest.approx(1)
    with pytest.raises(PosheadsError, match="one value for each set"):
        screen_agreement(np.zeros(3), np.zeros(4))
    with pytest.raises(PosheadsError, match="leave that set out"):
        screen_agreement(np.array([1.0, np.nan]), np.zeros(2))

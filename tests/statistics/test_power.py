"""The smallest detectable effect: fresh studies with an effect of that size, and by definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tl_posheads import PosheadsError
from tl_posheads.statistics.effects import rank_tests
from tl_posheads.statistics.power import smallest_detectable

# True effects of random sets, mean 0: lower is more harm, the tail is on that side.
LAWS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skew -0.7": lambda rng, shape: (8 - rng.gamma(8, size=shape)) / np.sqrt(8),
    "skew -2.4": lambda rng, shape: (0.7 - rng.gamma(0.7, size=shape)) / np.sqrt(0.7),
    # One set in eight has a vital head in it.
    "two kinds": lambda rng, shape: (
        0.36 - 3 * (rng.random(shape) < 0.12) + 0.2 * rng.normal(size=shape)
    ),
}


def sets(rng, law, n_sets, n_tests, n_prompts):
    """Effects ``[prompt, set, test]``: nested sets go together, and prompts hurt all sets alike."""
    true = (law(rng, (n_sets, 1)) + law(rng, (n_sets, n_tests))) / 2
    noise = rng.normal(size=(n_prompts, n_sets, n_tests)) + rng.normal(size=(n_prompts, 1, n_tests))
    return true, true + 0.5 * noise


def share_found(law, n_draws, n_tests, n_prompts, studies=40, fresh=12):
    """Of new studies in which the top set lies ``delta`` below the mean draw's true effect."""
    found = []
    for seed in range(studies):
        rng = np.random.default_rng(seed)
        _, seen = sets(rng, law, n_draws + 1, n_tests, n_prompts)
        delta = smallest_detectable(seen[:, 0], seen[:, 1:], seed=seed, n_sim=300)[0]
        for _ in range(fresh):
            true, new = sets(rng, law, n_draws + 1, n_tests, n_prompts)
            means = new.mean(0)
            means[0, 0] -= true[0, 0] + delta
            found.append(rank_tests(means[0], means[1:]).p_adjusted[0] <= 0.05)
    return np.mean(found)


@pytest.mark.parametrize("name", LAWS)
def test_a_new_study_finds_an_effect_of_that_size(name):
    assert 0.7 <= share_found(LAWS[name], 32, 3, 12) <= 0.96


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_draws", "n_tests", "n_prompts"), [(19, 1, 8), (32, 8, 24), (99, 8, 24)]
)
@pytest.mark.parametrize("name", LAWS)
def test_new_studies_of_other_sizes_find_it(name, n_draws, n_tests, n_prompts):
    share = share_found(LAWS[name], n_draws, n_tests, n_prompts, studies=60, fresh=20)
    assert 0.7 <= share <= 0.96


def measured(seed=0, n_prompts=24, n_draws=59, n_tests=4):
    _, effects = sets(np.random.default_rng(seed), LAWS["normal"], n_draws + 1, n_tests, n_prompts)
    return effects[:, 0], effects[:, 1:]


def test_without_tail_or_noise_it_is_a_quantile_of_the_draws():
    """120 draws in steps: at 10 % the top must be among the twelve lowest of 121."""
    values = -np.round(np.sqrt(np.arange(120.0)), 1)
    draws = np.broadcast_to(values[:, None], (5, 120, 1))
    delta = smallest_detectable(np.zeros((5, 1)), draws, alpha=0.5, power=0.9, seed=0, n_sim=8000)
    # As many as 60 - 1 of 120 resampled draws at or below: a step at which 90 % of binomials stop.
    below = [stats.binom.cdf(59, 120, np.mean(values <= at)) for at in np.unique(values)]
    at = np.unique(values)[np.flatnonzero(np.array(below) >= 0.9)[-1]]
    step = np.unique(values)[np.flatnonzero(np.array(below) >= 0.9)[-1] + 1]
    assert at <= values.mean() - delta.item() <= step


def test_it_is_smaller_with_less_asked_and_scales_with_the_unit():
    top, draws = measured()
    delta = smallest_detectable(top, draws, seed=0)
    assert (delta > 0).all()
    assert delta.tolist() == smallest_detectable(top, draws, seed=0).tolist()
    assert (smallest_detectable(top[:, :1], draws[:, :, :1], seed=0) < delta[0]).all()
    assert (smallest_detectable(top, draws, power=0.5, seed=0) < delta).all()
    assert (smallest_detectable(top, draws, alpha=0.1, seed=0) < delta).all()
    scaled = smallest_detectable(10 * top, 10 * draws, seed=0)
    np.testing.assert_allclose(scaled, 10 * delta, rtol=2e-3)
    # The top set's own effect doesn't matter, how prompts scatter it does.
    np.testing.assert_allclose(smallest_detectable(top - 3, draws, seed=0), delta, rtol=1e-9)
    scattered = top + 4 * np.random.default_rng(1).normal(size=top.shape)
    assert (smallest_detectable(scattered, draws, seed=0) > delta).all()
    # What a prompt does to all sets alike is not noise.
    common = 50 * np.random.default_rng(2).normal(size=(24, 1))
    same = smallest_detectable(top + common, draws + common[:, None], seed=0)
    np.testing.assert_allclose(same, delta, rtol=1e-6)
    # The same draws in another test cost little: that test is hardly a second chance.
    twice = smallest_detectable(top[:, [0, 0]], draws[:, :, [0, 0]], seed=0)
    once = smallest_detectable(top[:, :1], draws[:, :, :1], seed=0).item()
    other = smallest_detectable(top[:, :2], draws[:, :, :2], seed=0)
    assert once <= twice[0] < 1.08 * once < other[0]


def test_what_cannot_be_detected_or_told():
    top, draws = measured()
    assert np.isfinite(smallest_detectable(top, draws[:, :19], seed=0)).all()
    assert (smallest_detectable(top, draws[:, :18], seed=0) == np.inf).all()
    for few in ((top[:1], draws[:1]), (top, draws[:, :1])):
        assert np.isnan(smallest_detectable(*few, seed=0)).all()
    assert np.isfinite(smallest_detectable(top[:2], draws[:2], seed=0)).all()
    lost = draws.copy()
    lost[3, 5, 1] = np.nan
    found = smallest_detectable(top, lost, seed=0)
    rest = smallest_detectable(top[:, [0, 2, 3]], draws[:, :, [0, 2, 3]], seed=0)
    assert np.isnan(found[1])
    assert found[[0, 2, 3]].tolist() == rest.tolist()
    # Nothing varies: any effect is seen that the measurement tells from none.
    still = np.zeros((6, 19, 1))
    assert smallest_detectable(np.zeros((6, 1)), still, seed=0).item() == 0
    coarse = smallest_detectable(np.zeros((6, 1)), still, resolution=0.1, seed=0).item()
    assert coarse == pytest.approx(0.1, rel=2e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": 0.0}, "between 0 and 1"),
        ({"power": 1.0}, "between 0 and 1"),
        ({"n_sim": 0}, "at least 1 study"),
        ({"top": np.zeros((23, 4))}, r"\[prompt, draw, test\]"),
        ({"top": np.zeros(24)}, r"\[prompt, draw, test\]"),
    ],
)
def test_refusals(change, said):
    top, draws = measured()
    with pytest.raises(PosheadsError, match=said):
        smallest_detectable(**{"top": top, "draws": draws, "seed": 0} | change)

"""The effect of an ablation, and whether ablating the top heads did more than the controls.

Effects are differences of mean log-probability, ablated minus clean, in nats: lower is more harm.
Everything here works on arrays; nothing needs a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from tl_posheads.errors import PosheadsError
from tl_posheads.statistics.log_bins import interval_of

# Effects that differ by less than this share of the largest are equal up to rounding.
_ROUNDING = 1e-6
_EXACT_SIGNS = 14


@dataclass(frozen=True)
class Effect:
    """A mean difference over prompts.

    Attributes:
        mean: ablated minus clean, in the unit of the data.
        ci_low, ci_high: 95 % confidence interval over prompts; NaN with fewer than two.
        n_prompts: number of prompts.
    """

    mean: float
    ci_low: float
    ci_high: float
    n_prompts: int


@dataclass(frozen=True, eq=False)
class RankTests:
    """Rank of the top set's effect among those of the control draws, for each test.

    Attributes:
        p: uncorrected one-sided p-value of each test, ``[test]``.
        p_adjusted: corrected for all tests together, ``[test]``; at least ``p``.
    """

    p: Float[np.ndarray, " test"]
    p_adjusted: Float[np.ndarray, " test"]


@dataclass(frozen=True)
class Agreement:
    """How well estimated effects predict the true ones.

    Attributes:
        rank_correlation: Spearman's rho over the sets.
        ci_low, ci_high: its 95 % bootstrap interval over the sets; NaN with fewer than four.
        slope: least-squares slope through the origin of true on estimated; 1 if the estimates are
            right on average.
        n_sets: number of sets.
    """

    rank_correlation: float
    ci_low: float
    ci_high: float
    slope: float
    n_sets: int


def paired_effect(
    ablated: Float[np.ndarray, " prompt"], clean: Float[np.ndarray, " prompt"]
) -> Effect:
    """Mean of ablated minus clean over the prompts, with Student's 95 % interval.

    What affects both runs of a prompt cancels. For normal differences the coverage is exact, with
    as few as two prompts. If most prompts lose little and some lose much, a small sample often
    misses the latter and coverage drops: .88 to .90 with three to eight exponential differences.

    Args:
        ablated, clean: the same prompts' values in the same order, log-probabilities in nats.

    Returns:
        :class:`Effect`. If all differences are equal, both ends of the interval are the mean. With
        one prompt the interval is NaN; with none, the mean too.

    Raises:
        PosheadsError: arrays of different or more than one dimension.

    Example:
        >>> import numpy as np
        >>> paired_effect(np.array([-3.0, -2.0]), np.array([-2.0, -1.0]))
        Effect(mean=-1.0, ci_low=-1.0, ci_high=-1.0, n_prompts=2)
    """
    ablated, clean = (np.asarray(values, dtype=np.float64) for values in (ablated, clean))
    if ablated.ndim != 1 or ablated.shape != clean.shape:
        raise PosheadsError(
            f"ablated of shape {ablated.shape} and clean of shape {clean.shape} were given; "
            "expected one value for each prompt in both"
        )
    difference = ablated - clean
    n = len(difference)
    mean = float(difference.mean()) if n else float("nan")
    if n < 2 or not np.isfinite(mean):
        return Effect(mean, float("nan"), float("nan"), n)
    if np.ptp(difference) == 0:
        # The mean of equal numbers may have a rounding error; the number itself has none.
        mean = float(difference[0])
        return Effect(mean, mean, mean, n)
    half = float(stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / np.sqrt(n))
    return Effect(mean, mean - half, mean + half, n)


def rank_tests(
    top: Float[np.ndarray, " test"],
    draws: Float[np.ndarray, "draw test"],
    *,
    resolution: float = 0.0,
) -> RankTests:
    """Rank test of whether the top set's effect is below the control draws', for many tests.

    For one test ``p = (1 + #draws at or below the top) / (1 + #draws)`` (Phipson & Smyth 2010,
    Stat. Appl. Genet. Mol. Biol. 9, 39): exact if under the null hypothesis the top set is one of
    the draws, and never zero. A draw above the top by less than ``resolution``, or by less than
    rounding (1e-6 of the test's largest absolute effect), counts as equal, so against the top.

    Over all tests (tasks, fractions) the single-step procedure of Westfall & Young 1993
    (*Resampling-Based Multiple Testing*, section 2.3.3) controls the family-wise error rate.
    Every test is standardised by the mean and standard deviation of its draws and the top together,
    and the top's value is compared with each draw's most extreme one. Standardising with the top
    included treats all rows alike, so the family-wise test is exact too. Correlated tests, such as
    those of nested sets, lose less power than with Bonferroni.

    Args:
        top: the top set's effect in each test; lower is more harm.
        draws: the control draws' effects. A row is the same draw in all tests.
        resolution: differences below it are measurement noise, in the effects' unit.

    Returns:
        :class:`RankTests`. A test whose effects are all equal has ``p = 1``. A test with a
        non-finite value gives NaN and is left out of the correction of the others.

    Raises:
        PosheadsError: shapes that don't fit, or no draws.

    Example:
        >>> import numpy as np
        >>> draws = np.array([[-0.1, 0.0], [-0.3, 0.2], [0.1, -0.2]])
        >>> tests = rank_tests(np.array([-2.0, 0.1]), draws)
        >>> tests.p.tolist(), tests.p_adjusted.tolist()
        ([0.25, 0.75], [0.25, 1.0])
    """
    top, draws = np.asarray(top, dtype=np.float64), np.asarray(draws, dtype=np.float64)
    if top.ndim != 1 or draws.ndim != 2 or draws.shape[1] != len(top) or len(draws) < 1:
        raise PosheadsError(
            f"top of shape {top.shape} and draws of shape {draws.shape} were given; expected "
            "[test] and [draw, test] with at least one draw"
        )
    p, p_adjusted = np.full(len(top), np.nan), np.full(len(top), np.nan)
    known = np.isfinite(top) & np.isfinite(draws).all(0)
    if not known.any():
        return RankTests(p, p_adjusted)
    pooled = np.concatenate([top[None, known], draws[:, known]])
    tolerance = np.maximum(_ROUNDING * np.abs(pooled).max(0), resolution)
    n = len(pooled)
    p[known] = (pooled <= pooled[0] + tolerance).sum(0) / n

    flat = np.ptp(pooled, axis=0) <= tolerance
    sd = np.where(flat, 1.0, pooled.std(0))
    standard = np.where(flat, 0.0, (pooled - pooled.mean(0)) / sd)
    tolerance = np.where(flat, 0.0, tolerance / sd)
    extreme = standard.min(1, keepdims=True)
    adjusted = (extreme <= standard[0] + tolerance).sum(0) / n
    # Equal up to the last bit of a standardised value; the larger p-value is the safe one.
    p_adjusted[known] = np.where(flat, 1.0, np.maximum(adjusted, p[known]))
    return RankTests(p, p_adjusted)


def sign_flip_p(
    difference: Float[np.ndarray, " prompt"], *, n_resamples: int = 10_000, seed: int = 0
) -> float:
    """One-sided paired permutation test that the mean difference is below zero.

    For a control that is a single set: the difference on each prompt is the top set's effect minus
    the control's. Under the null hypothesis the two sets are exchangeable on every prompt. The
    p-value compares these two sets and says nothing about others.

    Args:
        difference: top minus control.
        n_resamples: sign vectors to draw with more than 14 prompts; with fewer, all are used.
        seed: of those draws.

    Returns:
        p-value; NaN with fewer than two prompts or a non-finite difference.

    Raises:
        PosheadsError: an array of other than one dimension.

    Example:
        >>> import numpy as np
        >>> sign_flip_p(np.array([-1.0, -2.0, -0.5]))
        0.125
    """
    difference = np.asarray(difference, dtype=np.float64)
    if difference.ndim != 1:
        raise PosheadsError(
            f"difference of shape {difference.shape} was given; expected one value for each prompt"
        )
    n = len(difference)
    if n < 2 or not np.isfinite(difference).all():
        return float("nan")
    result = stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        alternative="less",
        n_resamples=2**n if n <= _EXACT_SIGNS else n_resamples,
        batch=max(1, 4_000_000 // n),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Family-wise corrected p-values, under any dependence (Holm 1979); NaN stays NaN.

    Example:
        >>> import numpy as np
        >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, dtype=np.float64)
    out = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    values = p[known]
    order = np.argsort(values, kind="stable")
    adjusted = np.empty(len(values))
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    out[known] = adjusted
    return out


def spearman(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Spearman's rho along the last axis; NaN where one side is constant."""
    x, y = (stats.rankdata(values, axis=axis) for values in (x, y))
    x, y = (values - values.mean(axis, keepdims=True) for values in (x, y))
    variance = (x * x).sum(axis) * (y * y).sum(axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(variance > 0, (x * y).sum(axis) / np.sqrt(variance), np.nan)


def agreement(
    estimated: Float[np.ndarray, " set"],
    true: Float[np.ndarray, " set"],
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Agreement:
    """How well a cheap estimate of the sets' effects agrees with the measured ones.

    Compares the order (Spearman's rho, with a bootstrap interval over the sets) and the size: zero
    estimated should mean zero measured, so the slope goes through the origin.

    Args:
        estimated, true: effects of the same sets in the same order.
        n_boot: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        :class:`Agreement`. The correlation is NaN where one side is constant or there are fewer
        than three sets; the slope where all estimates are zero.

    Raises:
        PosheadsError: arrays of different or more than one dimension, a non-finite value.

    Example:
        >>> import numpy as np
        >>> found = agreement(np.array([-1.0, -2.0, -4.0]), np.array([-2.0, -4.0, -8.0]))
        >>> round(found.rank_correlation, 6), found.slope
        (1.0, 2.0)
    """
    estimated, true = (np.asarray(values, dtype=np.float64) for values in (estimated, true))
    if estimated.ndim != 1 or estimated.shape != true.shape:
        raise PosheadsError(
            f"estimated of shape {estimated.shape} and true of shape {true.shape} were given; "
            "expected one value for each set in both"
        )
    if not (np.isfinite(estimated).all() and np.isfinite(true).all()):
        raise PosheadsError("an effect is NaN or infinite; leave that set out")
    n = len(true)
    squares = float(estimated @ estimated)
    slope = float(estimated @ true) / squares if squares > 0 else float("nan")
    rho = float(spearman(estimated, true)) if n >= 3 else float("nan")
    low = high = float("nan")
    if np.isfinite(rho):
        picks = np.random.default_rng(seed).integers(n, size=(n_boot, n))
        drawn = spearman(estimated[picks], true[picks])
        # A resample that repeats a single set has no order and is left out.
        low, high = interval_of(drawn[np.isfinite(drawn)], n)
    return Agreement(rho, low, high, slope, n)

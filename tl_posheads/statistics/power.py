"""Minimum detectable effect of an experiment, by resampling its measurements."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from tl_posheads.errors import PosheadsError

# Prior for the shape of a tail, and how many values it counts as: few values say next to nothing
# about the shape. 0 is an exponential tail; a normal distribution's is near -0.2.
_SHAPE, _WORTH = -0.1, 20


def smallest_detectable(
    top: Float[np.ndarray, "prompt test"],
    draws: Float[np.ndarray, "prompt draw test"],
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    resolution: float = 0.0,
    seed: int,
    n_sim: int = 1000,
) -> Float[np.ndarray, " test"]:
    """Minimum detectable harm of :func:`rank_tests` in each test, by resampling.

    A non-significant result says little if only a large effect could have been detected. The
    answer for a test is ``delta``: a set of heads whose true effect in this test lies ``delta``
    below the mean draw's would have ``p_adjusted <= alpha`` in a share ``power`` of such studies,
    each with new draws and new prompts.

    A simulated study resamples the draws with replacement, each with its effects in all tests,
    which keeps the dependence between tests. One more draw serves as the top set in the other
    tests, which have no true effect. In this test the top set lies at the mean of the draws minus
    ``delta``, plus the noise in that distance from resampled prompts.

    The rank test depends on the lowest draws of a new study, and half of the time these lie below
    all observed ones. So the lowest quarter of the draws is not resampled but drawn from a
    generalized Pareto distribution, the limit of tails (Pickands 1975, Ann. Stat. 3, 119). Its
    shape, by probability-weighted moments (Hosking & Wallis 1987, Technometrics 29, 339), is shared
    by all tests; its scale is per test, with the uncertainty of so few values. Simulated studies
    with normal and skewed draws (-0.7 to -2.4) found an effect of ``delta`` in .75 to .95 of cases;
    with the plain draws resampled, ``delta`` would have been found in .5 to .75.

    Args:
        top: the top set's effects, ablated minus clean; lower is more harm.
        draws: the control draws' effects on the same prompts.
        alpha: level of the adjusted test.
        power: desired probability of finding the effect.
        resolution: as given to :func:`rank_tests`.
        seed: of the simulation.
        n_sim: number of simulated studies; 1000 give the power to within 0.03.

    Returns:
        ``delta`` of each test, in the effects' unit, to 0.1 %. Infinity where no effect is large
        enough, as with fewer than ``1 / alpha - 1`` draws. NaN with fewer than two prompts or
        draws, and in a test with a non-finite value, which the other tests ignore.

    Raises:
        PosheadsError: shapes that don't fit, ``alpha`` or ``power`` outside (0, 1), ``n_sim``
            below 1.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> draws = 0.1 * rng.normal(size=32) + 0.2 * rng.normal(size=(24, 32))
        >>> top = 0.2 * rng.normal(size=(24, 1))
        >>> smallest_detectable(top, draws[:, :, None], seed=0).round(2).tolist()
        [0.3]
        >>> smallest_detectable(top, draws[:, :18, None], seed=0).tolist()
        [inf]
    """
    top, draws = np.asarray(top, dtype=np.float64), np.asarray(draws, dtype=np.float64)
    if top.ndim != 2 or draws.ndim != 3 or top.shape != (draws.shape[0], draws.shape[2]):
        raise PosheadsError(
            f"top of shape {top.shape} and draws of shape {draws.shape} were given; expected "
            "[prompt, test] and [prompt, draw, test]"
        )
    if not (0 < alpha < 1 and 0 < power < 1) or n_sim < 1:
        raise PosheadsError(
            f"alpha={alpha}, power={power} and n_sim={n_sim} were given; expected numbers between "
            "0 and 1, and at least 1 study"
        )
    n_prompts, n_draws = draws.shape[:2]
    out = np.full(draws.shape[2], np.nan)
    known = np.isfinite(top).all(0) & np.isfinite(draws).all((0, 1))
    if min(n_prompts, n_draws) < 2 or not known.any():
        return out
    if 1 / (n_draws + 1) > alpha:
        out[known] = np.inf
        return out
    top, draws = top[:, known], draws[:, :, known]
    generator = np.random.default_rng(seed)
    rows = generator.integers(n_draws, size=(n_sim, n_draws + 1))
    values = _resampled(draws.mean(0), rows, generator)
    spread = values.std(1, keepdims=True)
    standard = (values - values.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)

    # A prompt's effect on all sets alike doesn't change the ranks: only the distance counts.
    distance = top - draws.mean(1)
    distance -= distance.mean(0)
    counts = generator.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=n_sim)
    # The variance of resampled means of n values is too small by (n - 1) / n.
    noise = counts @ distance / np.sqrt(n_prompts * (n_prompts - 1))
    centre = draws.mean((0, 1))
    found = []
    for i in range(len(centre)):
        others = np.delete(standard[:, 1:], i, axis=2).min(2, initial=np.inf)
        study = _Studies(values[:, 1:, i], others, centre[i] + noise[:, i], resolution)
        found.append(study.smallest(alpha, power))
    out[known] = found
    return out


def _resampled(
    means: Float[np.ndarray, "draw test"],
    rows: Int[np.ndarray, "study row"],
    generator: np.random.Generator,
) -> Float[np.ndarray, "study row test"]:
    """The draws in these rows, with each test's lowest redrawn from the tail distribution."""
    n = len(means)
    k = min(max(3, -(-n // 4)), n - 1)
    ordered = np.sort(means, axis=0)
    excess = ordered[k] - ordered[k - 1 :: -1]  # from small to large
    mean = excess.mean(0)
    relative = excess / np.where(mean > 0, mean, 1.0)
    weighted = (np.arange(k)[::-1] / max(k - 1, 1) @ relative / k)[mean > 0]
    shape = _SHAPE
    if len(weighted):
        estimate = 2 - 1 / max(1 - 2 * float(weighted.mean()), 0.1)
        n_values = k * len(weighted)
        shape = (n_values * estimate + _WORTH * _SHAPE) / (n_values + _WORTH)
        shape = float(np.clip(shape, -0.5, 0.5))  # where the moments identify it at all
    scale = mean * (1 - shape) / generator.gamma(k, 1 / k, size=(len(rows), 1, 1))
    place = means.argsort(0).argsort(0)[rows]
    # One number per row: identical tests get identical draws.
    upto = np.minimum((place + 1 - generator.random((*rows.shape, 1))) / k, 1.0)
    beyond = -np.log(upto) if abs(shape) < 1e-6 else (upto**-shape - 1) / shape
    values: np.ndarray = np.where(place < k, ordered[k] - scale * beyond, means[rows])
    return values


class _Studies:
    """Simulated studies of one test: the same random numbers for every delta."""

    def __init__(
        self,
        draws: Float[np.ndarray, "study draw"],
        others: Float[np.ndarray, "study draw"],
        top: Float[np.ndarray, " study"],
        resolution: float,
    ) -> None:
        self.draws, self.others, self.top, self.resolution = draws, others, top, resolution
        self.n = draws.shape[1] + 1
        self.sums, self.squares = draws.sum(1), (draws**2).sum(1)

    def power(self, delta: float, alpha: float) -> float:
        top = self.top - delta
        mean = (self.sums + top) / self.n
        sd = np.sqrt(np.maximum((self.squares + top**2) / self.n - mean**2, 0.0))
        # A draw is as extreme as the top if it is in this test, or if its most extreme
        # standardised value in the others is.
        standard, reach = (top - mean) / np.where(sd > 0, sd, 1.0), top + self.resolution
        at_or_below = (self.draws <= reach[:, None]) | (self.others <= standard[:, None])
        return float(np.mean((1 + at_or_below.sum(1)) / self.n <= alpha))

    def smallest(self, alpha: float, power: float) -> float:
        unit = float(np.ptp(self.draws) + np.ptp(self.top)) + self.resolution
        if unit == 0 or self.power(0.0, alpha) >= power:
            return 0.0
        low, high = 0.0, unit
        while self.power(high, alpha) < power:
            high *= 2
            if high > 1e6 * unit:
                return float("inf")
        while high - low > 1e-3 * high:
            middle = (low + high) / 2
            if self.power(middle, alpha) >= power:
                high = middle
            else:
                low = middle
        return high

"""How small an effect an experiment could have found, by simulation."""

from __future__ import annotations

import numpy as np

from tl_posheads.errors import PosheadsError


def smallest_detectable(
    *,
    draw_sd: float,
    prompt_sd: float,
    n_draws: int,
    n_prompts: int,
    n_tests: int,
    alpha: float = 0.05,
    power: float = 0.8,
    seed: int,
    n_sim: int = 2000,
) -> float:
    """The smallest harm that :func:`rank_tests` would have found, by simulation.

    A result that is not significant says little where only a large effect could have been seen.
    True effects of the draws are normal with ``draw_sd`` around zero, the top set's is ``-delta``;
    every one is measured with independent normal noise. Found means ``p_adjusted <= alpha`` among
    ``n_tests`` tests, in the others of which there is nothing to find. The tests are simulated as
    independent; real ones go together, which makes the correction smaller, so that the answer errs
    to the large side.

    Args:
        draw_sd: standard deviation of the draws' true effects, in nats.
        prompt_sd: standard deviation over prompts of the difference between the top set and a
            draw. The clean run is common to both, so each has noise of
            ``prompt_sd / sqrt(2 * n_prompts)``.
        n_draws, n_prompts, n_tests: of the experiment.
        alpha: level of the adjusted test.
        power: wanted probability to find the effect.
        seed: of the simulation.
        n_sim: simulated experiments; with 2000 the power is known to 0.02.

    Returns:
        ``delta`` below the draws' mean, in nats: the smallest, to 0.1 %, whose simulated power is
        at least ``power``. Infinity where no effect is large enough, as with fewer than
        ``1 / alpha - 1`` draws; NaN where a standard deviation is NaN.

    Raises:
        PosheadsError: negative or infinite standard deviations, counts below 1, ``alpha`` or
            ``power`` outside (0, 1).

    Example:
        >>> few = dict(draw_sd=0.1, prompt_sd=0.5, n_prompts=50, n_tests=4, seed=0)
        >>> 0.2 < smallest_detectable(n_draws=99, **few) < 0.5
        True
        >>> smallest_detectable(n_draws=18, **few)
        inf
    """
    if any(np.isinf(sd) or sd < 0 for sd in (draw_sd, prompt_sd)):
        raise PosheadsError(
            f"draw_sd={draw_sd} and prompt_sd={prompt_sd} were given; expected finite standard "
            "deviations of at least 0"
        )
    if min(n_draws, n_prompts, n_tests, n_sim) < 1:
        raise PosheadsError(
            f"n_draws={n_draws}, n_prompts={n_prompts}, n_tests={n_tests} and n_sim={n_sim} were "
            "given; expected at least 1 of each"
        )
    if not (0 < alpha < 1 and 0 < power < 1):
        raise PosheadsError(
            f"alpha={alpha} and power={power} were given; expected numbers between 0 and 1"
        )
    if np.isnan(draw_sd) or np.isnan(prompt_sd):
        return float("nan")
    n = n_draws + 1
    if 1 / n > alpha:
        return float("inf")
    noise = prompt_sd / np.sqrt(2 * n_prompts)
    spread = float(np.hypot(draw_sd, noise))
    if spread == 0:
        return 0.0

    # One set of random numbers for every delta: the power is then a step function that grows.
    generator = np.random.default_rng(seed)
    draws = spread * generator.standard_normal((n_sim, n_draws))
    top_noise = noise * generator.standard_normal(n_sim)
    others = np.full((n_sim, n_draws), np.inf)
    for _ in range(n_tests - 1):
        values = generator.standard_normal((n_sim, n))
        values -= values.mean(1, keepdims=True)
        values /= values.std(1, keepdims=True)
        np.minimum(others, values[:, 1:], out=others)
    sums, squares = draws.sum(1), (draws**2).sum(1)

    def found(delta: float) -> float:
        top = top_noise - delta
        mean = (sums + top) / n
        sd = np.sqrt((squares + top**2) / n - mean**2)
        # A draw is as extreme as the top if it is in this test, or if its most extreme
        # standardised value in the others is: min(a, b) <= c, without building the minimum.
        at_or_below = (draws <= top[:, None]) | (others <= ((top - mean) / sd)[:, None])
        return float(np.mean((1 + at_or_below.sum(1)) / n <= alpha))

    if found(0.0) >= power:
        return 0.0
    high = spread
    while found(high) < power:
        high *= 2
        if high > 1e6 * spread:
            return float("inf")
    low = 0.0
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if found(middle) >= power:
            high = middle
        else:
            low = middle
    return high

"""When a quantity has changed by half, and which of two changes first; plain functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_posheads.errors import PosheadsError


def crossing(
    steps: Float[np.ndarray, " step"], values: Float[np.ndarray, "... step"]
) -> Float[np.ndarray, "..."]:
    """Step from which a quantity stays past the midpoint between its first and last value.

    Between two steps the crossing is interpolated over ``log2(step + 1)``, since training is
    measured at ever longer intervals. NaN if the first and the last value are equal, or a value is
    missing.

    Example:
        >>> half = crossing(np.array([0.0, 1.0, 3.0, 7.0]), np.array([0.0, 0.0, 1.0, 1.0]))
        >>> round(float(half), 3)
        1.828
    """
    at = np.log2(np.asarray(steps, dtype=float) + 1)
    values = np.asarray(values, dtype=float)
    first, last = values[..., :1], values[..., -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (values - first) / (last - first)
    below = share < 0.5
    n = len(at)
    # The last step still below half; the one after it is beyond, and stays there.
    low = n - 1 - np.argmax(below[..., ::-1], axis=-1)
    low = np.minimum(low, n - 2)
    y0 = np.take_along_axis(share, low[..., None], -1)[..., 0]
    y1 = np.take_along_axis(share, low[..., None] + 1, -1)[..., 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        place = at[low] + (at[low + 1] - at[low]) * (0.5 - y0) / (y1 - y0)
    known = np.isfinite(share).all(-1)
    return np.where(known, 2**place - 1, np.nan)


def lag_of(
    steps: Float[np.ndarray, " step"],
    rising: Float[np.ndarray, "... step"],
    reference: Float[np.ndarray, "... step"],
) -> Float[np.ndarray, "..."]:
    """Octaves of training by which ``rising`` is half done after ``falling``; negative: before.

    Example:
        >>> steps = np.array([0, 1, 3, 7, 15])
        >>> rising, falling = np.array([0, 0, 0, 1, 1.0]), np.array([5, 5, 1, 1, 1.0])
        >>> float(lag_of(steps, rising, falling))
        1.0
    """
    late, early = crossing(steps, rising), crossing(steps, reference)
    return np.asarray(np.log2(late + 1) - np.log2(early + 1))


def pooled_lag(
    runs: Sequence[pd.DataFrame], column: str = "lag_loss", *, n_draws: int = 2000, seed: int = 0
) -> pd.Series:
    """Mean lag over heads and runs; the interval draws runs, then heads within them.

    Args:
        runs: ``Emergence.lead_lag()`` of each run; rows without a lag are left out.
        column: ``lag_loss`` or ``lag_gain``.

    Returns:
        ``lag``, ``ci_low``, ``ci_high``, ``n_heads``, ``n_runs``; NaN without any lag. Few runs
        give a rough interval.

    Raises:
        PosheadsError: no runs, or another column.

    Example:
        >>> runs = [pd.DataFrame({"lag_loss": [1.0, 1.0]}), pd.DataFrame({"lag_loss": [1.0]})]
        >>> pooled_lag(runs)[["lag", "ci_low", "n_heads"]].tolist()
        [1.0, 1.0, 3.0]
    """
    if not runs or any(column not in run for run in runs):
        raise PosheadsError(
            f"{len(runs)} runs and column={column!r} were given; expected what "
            "Emergence.lead_lag() returns of at least one run, and lag_loss or lag_gain"
        )
    lags = [run[column].dropna().to_numpy(dtype=float) for run in runs]
    lags = [values for values in lags if len(values)]
    names = ["lag", "ci_low", "ci_high", "n_heads", "n_runs"]
    if not lags:
        return pd.Series([np.nan, np.nan, np.nan, 0, 0], names)
    random = np.random.default_rng(seed)
    draws = []
    for _ in range(n_draws):
        chosen = [lags[i] for i in random.integers(len(lags), size=len(lags))]
        again = [values[random.integers(len(values), size=len(values))] for values in chosen]
        draws.append(np.concatenate(again).mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    everything = np.concatenate(lags)
    return pd.Series([everything.mean(), low, high, len(everything), len(lags)], names)

"""Curves over bins of log distance, and resampling them over documents or heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from tl_posheads.errors import PosheadsError

# Fewer documents, or heads, don't show how much others would differ.
_FEWEST = 4
# Distances with a smaller share of the pairs than the fullest one: few queries, few keys.
_SPARSE = 0.1


@dataclass(frozen=True, eq=False)
class LogBins:
    """Means over bins of equal width in log distance.

    Attributes:
        distance: geometric mean over each bin's query-key pairs, in tokens.
        n_qk_pairs: query-key pairs in each bin.
        mean: mean over the pairs, in rotary dimensions; NaN in an empty bin.
    """

    distance: Float[np.ndarray, " bin"]
    n_qk_pairs: Float[np.ndarray, "*rest bin"]
    mean: Float[np.ndarray, "*rest bin"]


def log_bins(
    distance: Float[np.ndarray, " distance"],
    n_qk_pairs: Float[np.ndarray, "*rest distance"],
    values: Float[np.ndarray, "*rest distance"],
    *,
    per_octave: int = 8,
) -> LogBins:
    """Means of curves over bins of equal width in log distance, weighted by pairs.

    Near distances, where a bin is narrower than a token, get a bin each. Bins without any pair
    are left out.

    Args:
        distance: token distances, from 1 on.
        n_qk_pairs: query-key pairs behind each value; anything that broadcasts to ``values``.
        values: the curves; NaN counts as no pair.
        per_octave: bins per doubling of the distance.

    Returns:
        :class:`LogBins`.

    Raises:
        PosheadsError: shapes that don't fit, distances below 1, negative numbers of pairs, an
            infinite value, no pair at all.

    Example:
        >>> import numpy as np
        >>> bins = log_bins(np.arange(1, 5), np.array([3, 2, 1, 0]), np.arange(4.0), per_octave=1)
        >>> bins.distance.round(2).tolist(), bins.n_qk_pairs.tolist(), bins.mean.round(2).tolist()
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [0.0, 1.0, 2.0])
    """
    distance, n_qk_pairs, values = (
        np.asarray(given, dtype=np.float64) for given in (distance, n_qk_pairs, values)
    )
    try:
        pairs = np.broadcast_to(n_qk_pairs, values.shape)
    except ValueError:
        pairs = np.full(values.shape, -1.0)
    fits = values.ndim > 0 and distance.shape == values.shape[-1:] and per_octave >= 1
    if not fits or not (pairs >= 0).all() or not (distance >= 1).all() or np.isinf(values).any():
        raise PosheadsError(
            f"values of shape {values.shape}, n_qk_pairs of shape {n_qk_pairs.shape}, distances of "
            f"{distance.shape} and per_octave={per_octave} were given; expected distances from 1 "
            "on, for each a finite value or NaN and a number of pairs, and at least one bin in an "
            "octave"
        )
    pairs = np.where(np.isnan(values), 0.0, pairs)
    per_distance = pairs.reshape(-1, len(distance)).sum(0)
    held = per_distance > 0
    if not held.any():
        raise PosheadsError("no curve has a pair at any distance; give longer texts")
    log = np.log2(distance[held])
    # Bins are centred on the powers of two, so distances 1 and 2 lie in the middle of theirs.
    _, which = np.unique(np.round(log * per_octave), return_inverse=True)
    member = (which[:, None] == np.arange(which.max() + 1)).astype(np.float64)
    per_bin = per_distance[held] @ member
    n = pairs[..., held] @ member
    with np.errstate(invalid="ignore"):
        mean = (pairs[..., held] * np.nan_to_num(values[..., held])) @ member / n
    return LogBins(2 ** ((per_distance[held] * log) @ member / per_bin), n, mean)


@dataclass(frozen=True, eq=False)
class BinnedCurves:
    """Sums over the pairs of every bin, so that resampling only has to add them up."""

    octave: np.ndarray  # [bin], log2 of the distance
    total: np.ndarray  # [doc, head, bin]
    weight: np.ndarray  # [doc, head, bin]

    @classmethod
    def of(
        cls,
        values: np.ndarray,
        n_qk_pairs: np.ndarray | None,
        first: int,
        last: float,
        per_octave: int,
    ) -> BinnedCurves:
        values = np.asarray(values, dtype=np.float64)
        n = np.asarray(1.0 if n_qk_pairs is None else n_qk_pairs, dtype=np.float64)
        n = n[:, None] if n.ndim == 2 else n
        if values.ndim != 3 or 0 in values.shape or first < 1:
            raise PosheadsError(
                f"curves of shape {values.shape} and first={first} were given; expected "
                "[doc, head, distance] with the mean at distances 1, 2, ..., and first from 1 on"
            )
        distance = np.arange(1, values.shape[2] + 1)
        seen = (distance >= first) & (distance <= last)
        if not seen.any():
            raise PosheadsError(
                f"curves that reach distance {values.shape[2]} have none from {first} to {last:g}; "
                "give longer texts or another first="
            )
        try:
            n = np.broadcast_to(n, values.shape)
        except ValueError as problem:
            raise PosheadsError(
                f"curves of shape {values.shape} and numbers of pairs of shape {n.shape} "
                "were given; expected [doc, distance] or [doc, head, distance] of the same length"
            ) from problem
        pairs = (n * np.isfinite(values)).sum(0)
        filled = pairs >= _SPARSE * pairs.max(1, keepdims=True)
        bins = log_bins(
            distance[seen],
            n[..., seen],
            np.where(filled, values, np.nan)[..., seen],
            per_octave=per_octave,
        )
        n = bins.n_qk_pairs
        return cls(np.log2(bins.distance), np.nan_to_num(bins.mean) * n, n)

    def of_heads(self, chosen: np.ndarray) -> BinnedCurves:
        """Only these heads."""
        return BinnedCurves(self.octave, self.total[:, chosen], self.weight[:, chosen])

    def drawn(self, counts: np.ndarray, unit: str) -> np.ndarray:
        """Curves ``[draw, head, bin]`` of the resampled units; NaN without a pair."""
        if unit == "heads":
            picks = np.stack([np.repeat(np.arange(len(row)), row) for row in counts.astype(int)])
            alone = self.drawn(np.ones((1, len(self.total))), "documents")
            chosen: np.ndarray = alone[0, picks]
            return chosen
        with np.errstate(invalid="ignore"):
            weight = np.tensordot(counts, self.weight, 1)
            total = np.tensordot(counts, self.total, 1)
            mean: np.ndarray = total / np.where(weight > 0, weight, np.nan)
            return mean


def bootstrap_counts(n_units: int, n_boot: int, seed: int) -> np.ndarray:
    """How often each bootstrap draw has each unit, ``[draw, unit]``."""
    if n_boot < 1:
        raise PosheadsError(f"n_boot={n_boot} was given; expected at least 1")
    chances = np.full(n_units, 1 / n_units)
    return np.random.default_rng(seed).multinomial(n_units, chances, size=n_boot).astype(np.float64)


def interval_of(
    values: np.ndarray, n_units: int, method: Literal["linear", "nearest"] = "linear"
) -> tuple[float, float]:
    """Percentile interval, widened for few units (Hesterberg 2015, Am. Stat. 69, 371)."""
    if n_units < _FEWEST:
        return float("nan"), float("nan")
    t = stats.t.ppf(0.975, n_units - 1) * np.sqrt(n_units / (n_units - 1))
    low, high = np.quantile(values, stats.norm.cdf([-t, t]), method=method)
    return float(low), float(high)

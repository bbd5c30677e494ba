"""How far a method draws out the curves of Positional Heads, and where the bare model's break.

Curves are mean dominant dimensions by token distance, document by document. Everything here works
on arrays; nothing needs a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tl_posheads.errors import PosheadsError

# Fewer documents, or heads, say nothing about how others would differ.
_FEWEST = 4
# Distances with a smaller share of the pairs than the best-filled one: few queries, few keys.
_SPARSE = 0.1
# Share of the bare curve's octaves that have to be seen in the extended one, whatever the scale.
_OVERLAP = 0.5
# Bins at least on either side of a break.
_EDGE = 4
_ROUNDING = 1e-10


@dataclass(frozen=True, eq=False)
class LogBins:
    """Means over bins of equal width in log distance.

    Attributes:
        distance: of each bin, the geometric mean over its pairs, in tokens.
        n_pairs: query-key pairs in each bin.
        mean: mean over the pairs, in rotary dimensions; NaN where there is none.
    """

    distance: Float[np.ndarray, "bin"]
    n_pairs: Float[np.ndarray, "*rest bin"]
    mean: Float[np.ndarray, "*rest bin"]


@dataclass(frozen=True)
class Stretch:
    """The scale by which one set of curves is another one drawn out.

    Attributes:
        scale: ``extended(d)`` fits ``bare(d / scale)`` best; NaN where it can't be told.
        ci_low, ci_high: 95 % bootstrap interval over the units; NaN with fewer than four.
        factor: what the method was set to, to be read beside the scale.
        misfit: root mean square difference at that scale, in rotary dimensions.
        misfit_unscaled: the same at scale 1.
        r2: share of the extended curves' variance along distance that the drawn-out bare curves
            explain; negative if they are worse than each curve's mean.
        n_heads, n_docs: what was fitted.
        unit: ``"documents"`` or ``"heads"``, what the bootstrap draws.
        reason: why the scale can't be told; None where it can.
    """

    scale: float
    ci_low: float
    ci_high: float
    factor: float | None
    misfit: float
    misfit_unscaled: float
    r2: float
    n_heads: int
    n_docs: int
    unit: str
    reason: str | None = None

    @property
    def identifiable(self) -> bool:
        """Whether the curves tell a scale."""
        return self.reason is None


@dataclass(frozen=True)
class BreakPoint:
    """Where curves leave their trend.

    Attributes:
        distance: of the break, in tokens.
        ci_low, ci_high: 95 % bootstrap interval over the units, from bin to bin; NaN with fewer
            than four.
        p: of the test that there is a break at all; NaN with fewer than eight documents. Read it
            first: a distance is given in any case.
        slope_before, slope_after: of the trend on both sides of the break, in rotary dimensions
            per doubling of the distance, mean over heads.
        jump: change of level at the break, in rotary dimensions, mean over heads.
        n_heads, n_docs: what was fitted.
        unit: ``"documents"`` or ``"heads"``, what the bootstrap draws for the interval.
    """

    distance: float
    ci_low: float
    ci_high: float
    p: float
    slope_before: float
    slope_after: float
    jump: float
    n_heads: int
    n_docs: int
    unit: str


def log_bins(
    distance: Float[np.ndarray, "distance"],
    n_pairs: Float[np.ndarray, "*rest distance"],
    values: Float[np.ndarray, "*rest distance"],
    *,
    per_octave: int = 8,
) -> LogBins:
    """Means of curves over bins of equal width in log distance, weighted by pairs.

    Near distances, where a bin is narrower than a token, keep a bin each. Bins without any pair
    are left out.

    Args:
        distance: token distances, from 1 on.
        n_pairs: pairs behind each value; anything that broadcasts to ``values``.
        values: NaN counts as no pair.
        per_octave: bins in a doubling of the distance.

    Returns:
        :class:`LogBins`.

    Raises:
        PosheadsError: shapes that don't fit, distances below 1, negative numbers of pairs, an
            infinite value, no pair at all.

    Example:
        >>> import numpy as np
        >>> bins = log_bins(np.arange(1, 5), np.array([3, 2, 1, 0]), np.arange(4.0), per_octave=1)
        >>> bins.distance.round(2).tolist(), bins.n_pairs.tolist(), bins.mean.round(2).tolist()
        ([1.0, 2.29], [3.0, 3.0], [0.0, 1.33])
    """
    distance, n_pairs, values = (
        np.asarray(given, dtype=np.float64) for given in (distance, n_pairs, values)
    )
    try:
        pairs = np.broadcast_to(n_pairs, values.shape)
    except ValueError:
        pairs = np.full(values.shape, -1.0)
    fits = values.ndim > 0 and distance.shape == values.shape[-1:] and per_octave >= 1
    if not fits or not (pairs >= 0).all() or not (distance >= 1).all() or np.isinf(values).any():
        raise PosheadsError(
            f"values of shape {values.shape}, n_pairs of shape {n_pairs.shape}, distances of shape "
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
    # Bins are centred on the powers of two, so that distances 1 and 2 lie in the middle of theirs.
    _, which = np.unique(np.round(log * per_octave), return_inverse=True)
    member = (which[:, None] == np.arange(which.max() + 1)).astype(np.float64)
    per_bin = per_distance[held] @ member
    n = pairs[..., held] @ member
    with np.errstate(invalid="ignore"):
        mean = (pairs[..., held] * np.nan_to_num(values[..., held])) @ member / n
    return LogBins(2 ** ((per_distance[held] * log) @ member / per_bin), n, mean)

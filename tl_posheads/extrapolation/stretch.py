"""How far a method stretches the curves of Positional Heads.

Curves are mean dominant dimensions by token distance, document by document. Everything here works
on arrays; nothing needs a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from tl_posheads.errors import PosheadsError
from tl_posheads.statistics.log_bins import BinnedCurves, bootstrap_counts, interval_of

# Share of the bare curve's octaves that the extended one must cover at any scale.
_OVERLAP = 0.5
_ROUNDING = 1e-10


@dataclass(frozen=True)
class Stretch:
    """The scale by which one set of curves is a stretched copy of another.

    Attributes:
        scale: ``extended(d)`` fits ``bare(d / scale)`` best; NaN where it can't be determined.
        ci_low, ci_high: 95 % bootstrap interval over the units; NaN with fewer than four.
        factor: the method's setting, to compare with the scale.
        misfit: root mean square difference at that scale, in the curves' unit.
        misfit_unscaled: the same at scale 1.
        r2: share of the extended curves' variance along distance that the stretched bare curves
            explain.
        n_heads, n_docs: what was fitted; heads without values take no part.
        unit: ``"documents"`` or ``"heads"``, what the bootstrap draws.
        reason: why there is no scale; None where there is one.
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
        """Whether the curves determine a scale."""
        return self.reason is None


def _difference(
    shift: np.ndarray, x: np.ndarray, extended: np.ndarray, x_bare: np.ndarray, bare: np.ndarray
) -> np.ndarray:
    """Extended minus bare moved by ``shift [draw]`` octaves, ``[draw, head, bin]``; NaN outside."""
    at = x - shift[:, None]
    left = np.clip(np.searchsorted(x_bare, at, side="right") - 1, 0, len(x_bare) - 2)
    part = (at - x_bare[left]) / np.diff(x_bare)[left]
    part = np.where((part < -_ROUNDING) | (part > 1 + _ROUNDING), np.nan, part)[:, None]
    low, high = (np.take_along_axis(bare, i[:, None], 2) for i in (left, left + 1))
    # Where a point lies on a bin, the bin's neighbour need not exist.
    moved = np.where(part < _ROUNDING, low, low + part * (high - low))
    return extended - moved


def _best_shift(bounds: tuple[float, float], *curves: np.ndarray) -> np.ndarray:
    """The shift with the least mean square difference for each draw: a grid, then sections."""

    def misfit(shift: np.ndarray) -> np.ndarray:
        square = _difference(shift, *curves) ** 2
        n = np.isfinite(square).sum((1, 2))
        return np.where(n > 0, np.nansum(square, axis=(1, 2)) / np.maximum(n, 1), np.inf)

    grid = np.linspace(*bounds, max(3, int(8 * (bounds[1] - bounds[0])) + 1))
    n_draws = len(curves[1])
    best = np.argmin([misfit(np.full(n_draws, shift)) for shift in grid], axis=0)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(24):
        a, b = high - golden * (high - low), low + golden * (high - low)
        left = misfit(a) <= misfit(b)
        low, high = np.where(left, low, a), np.where(left, b, high)
    middle: np.ndarray = (low + high) / 2
    return middle


def _spread(curves: np.ndarray) -> np.ndarray:
    """Sum of squares along distance about each head's mean, ``[draw]``."""
    n = np.isfinite(curves).sum(2, keepdims=True)
    mean = np.nansum(curves, axis=2, keepdims=True) / np.maximum(n, 1)
    squares: np.ndarray = np.nansum((curves - mean) ** 2, axis=(1, 2))
    return squares


def stretch(
    extended: Float[np.ndarray, "doc head distance"],
    bare: Float[np.ndarray, "doc head near"],
    *,
    trained: int,
    n_extended: Float[np.ndarray, "doc distance"] | None = None,
    n_bare: Float[np.ndarray, "doc near"] | None = None,
    factor: float | None = None,
    first: int = 1,
    per_octave: int = 8,
    n_boot: int = 1000,
    seed: int = 0,
) -> Stretch:
    """The scale ``s`` at which ``extended(d)`` is nearest to ``bare(d / s)``.

    One scale for all heads, by least squares over bins of equal width in log distance, where a
    scale is a shift. Every bin and head has the same weight: neighbouring query-key pairs repeat
    each other, and weighting by them would leave only the last octave. The bare curve is
    used up to ``trained``, both where a distance has a tenth of the best-filled one's query-key
    pairs, and scales are searched from 1/4 to four times the factor (or the longest distance over
    ``trained``, if that is more) where half of the bare curve's octaves find a counterpart.

    Heads get no offset of their own: for a curve that is straight in log distance, an offset can't
    be told from a stretch; for others it would hide a change in content, which ``misfit`` and
    ``r2`` show.

    The interval is a percentile bootstrap over documents, the same in both curves, so that what
    a text does to both cancels; with a single document over heads, for this text alone.

    There is no scale (NaN, with the reason) if the bare curves vary along distance no more
    than 19 in 20 resamples of the documents do about their mean, if the best scale lies at an end
    of those searched or leaves the curves further off than their means, or if the interval covers
    half of the scales on a log scale.

    Args:
        extended: mean dominant dimension (or another mean, such as the softmax weight of the slow
            pairs) at distances 1, 2, ... under the method; NaN where there is no query-key pair.
        bare: the same for these documents and heads without the method.
        trained: positions that the model was trained on.
        n_extended, n_bare: query-key pairs of each document (or document and head) at each
            distance; all equal by default.
        factor: the method's setting; it widens the search and is kept in the result.
        first: nearer distances are left out of both curves.
        per_octave: bins in a doubling of the distance.
        n_boot: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        :class:`Stretch`.

    Raises:
        PosheadsError: shapes that don't fit, curves that share too few distances, a factor or
            training length below 1, ``n_boot`` below 1, or what :func:`log_bins` refuses.

    Example:
        >>> import numpy as np
        >>> d = np.arange(1, 1025)
        >>> bare, extended = 5 + np.log(d)[None, None, :256], 5 + np.log(d / 4)[None, None]
        >>> found = stretch(extended, bare, trained=256, factor=4)
        >>> round(found.scale, 3), found.unit
        (4.0, 'heads')
    """
    shapes = [np.shape(curves)[:2] for curves in (extended, bare)]
    if shapes[0] != shapes[1] or trained < 1 or (factor is not None and not 1 <= factor < np.inf):
        raise PosheadsError(
            f"extended curves of {shapes[0]} and bare ones of {shapes[1]} documents and heads, "
            f"trained={trained} and factor={factor} were given; expected the same documents and "
            "heads in both, and a training length and a factor of at least 1"
        )
    n_docs, unit = shapes[0][0], "documents" if shapes[0][0] > 1 else "heads"
    held = np.isfinite(extended).any((0, 2)) & np.isfinite(bare).any((0, 2))
    if not held.any():
        nan = float("nan")
        why = "no head has values"
        return Stretch(nan, nan, nan, factor, nan, nan, nan, 0, n_docs, unit, why)
    extended, n_extended = _of_heads(extended, held), _of_heads(n_extended, held)
    bare, n_bare = _of_heads(bare, held), _of_heads(n_bare, held)
    n_heads = int(held.sum())
    long = BinnedCurves.of(extended, n_extended, first, np.inf, per_octave)
    short = BinnedCurves.of(bare, n_bare, first, trained, per_octave)
    bounds = _bounds(long.octave, short.octave, max(factor or 1.0, np.shape(extended)[2] / trained))
    counts = bootstrap_counts(n_docs if n_docs > 1 else n_heads, n_boot, seed)
    drawn = (long.octave, long.drawn(counts, unit), short.octave, short.drawn(counts, unit))
    once = np.ones_like(counts[:1])
    given = (long.octave, long.drawn(once, unit), short.octave, short.drawn(once, unit))
    shift = _best_shift(bounds, *given)
    low, high = interval_of(_best_shift(bounds, *drawn), counts.shape[1])

    size, noise = _spread(given[3])[0], 0.0
    if unit == "documents":
        noise = np.quantile(_spread(drawn[3] - given[3]), 0.95) * n_docs / (n_docs - 1)
    reason = None
    if size <= max(noise, _ROUNDING * np.nansum(given[3] ** 2)):
        reason = "the bare curves are flat: they vary along distance no more than by chance"
    elif min(shift[0] - bounds[0], bounds[1] - shift[0]) < 0.01:
        reason = "the best scale lies at an end of those searched"
    elif high - low > (bounds[1] - bounds[0]) / 2:
        reason = "the interval covers half of the scales searched"
    unscaled = _difference(np.zeros(1), *given)
    at_best = _difference(shift, *given)
    seen = np.where(np.isfinite(at_best), given[1], np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        r2 = 1 - np.nansum(at_best**2) / _spread(seen)[0]
    if reason is None and not r2 > 0:
        reason = "no scale fits: the stretched bare curves fit worse than each curve's own mean"
    told = np.array([1.0 if reason is None else np.nan])
    scale, ci_low, ci_high = 2 ** (told * [shift[0], low, high])
    misfit = float(told[0] * np.sqrt(np.nanmean(at_best**2)))
    return Stretch(
        float(scale),
        float(ci_low),
        float(ci_high),
        factor,
        misfit,
        float(np.sqrt(np.nanmean(unscaled**2))),
        float(told[0] * r2),
        n_heads,
        n_docs,
        unit,
        reason,
    )


def _of_heads(values: np.ndarray | None, held: np.ndarray) -> Any:
    """Only these heads of ``[doc, head, distance]``; counts of a document alone are all heads'."""
    array = np.asarray(values)  # of None, without an axis
    return array[:, held] if array.ndim == 3 else values


def _bounds(x: np.ndarray, x_bare: np.ndarray, factor: float) -> tuple[float, float]:
    """Shifts to search, in octaves: near enough, and with enough of the bare curve in view."""
    need = _OVERLAP * (x_bare[-1] - x_bare[0])
    low = max(-2.0, need + x[0] - x_bare[-1])
    high = min(2 + np.log2(factor), x[-1] - need - x_bare[0])
    if need <= 0 or high - low < 0.5:
        raise PosheadsError(
            f"curves from {2 ** x[0]:.0f} to {2 ** x[-1]:.0f} and bare ones from "
            f"{2 ** x_bare[0]:.0f} to {2 ** x_bare[-1]:.0f} tokens have too few distances in "
            "common; give longer texts"
        )
    return low, high

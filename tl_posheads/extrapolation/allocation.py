"""How far a method draws out the softmax weight of the slow rotary pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import isotonic_regression

from tl_posheads.errors import PosheadsError
from tl_posheads.statistics.log_bins import BinnedCurves, bootstrap_counts, interval_of

# Share of the bare curve's weights that the extended one has to reach, too.
_OVERLAP = 0.5
# Share of a curve's variance along distance that a monotone one has to explain.
_MONOTONE = 0.9
# Share of the resamples that may have no weights in common.
_LOST = 0.05
_N_LEVELS = 19
_ROUNDING = 1e-10


@dataclass(frozen=True)
class AllocationStretch:
    """By how much the distance grew at which slow pairs have the same softmax weight.

    Attributes:
        scale: distance under the method over the bare model's, at the same weight; NaN where it
            can't be told.
        ci_low, ci_high: 95 % bootstrap interval over the units; NaN with fewer than four.
        weight_low, weight_high: softmax weights that both curves reach, between which they were
            compared; NaN without any.
        monotone_bare, monotone_extended: share of each curve's variance over bins of log distance
            that a monotone curve explains.
        n_heads, n_docs: what was averaged.
        unit: ``"documents"`` or ``"heads"``, what the bootstrap draws.
        reason: why the scale can't be told; None where it can.
    """

    scale: float
    ci_low: float
    ci_high: float
    weight_low: float
    weight_high: float
    monotone_bare: float
    monotone_extended: float
    n_heads: int
    n_docs: int
    unit: str
    reason: str | None = None

    @property
    def identifiable(self) -> bool:
        """Whether the curves tell a scale."""
        return self.reason is None


def allocation_stretch(
    extended: Float[np.ndarray, "doc head distance"],
    bare: Float[np.ndarray, "doc head near"],
    *,
    trained: int,
    n_extended: Float[np.ndarray, "doc distance"] | None = None,
    n_bare: Float[np.ndarray, "doc near"] | None = None,
    first: int = 1,
    per_octave: int = 8,
    n_boot: int = 1000,
    seed: int = 0,
) -> AllocationStretch:
    """The factor by which the distance grew at which slow pairs reach the same softmax weight.

    "The extension of the high-dimensional attention allocation" (Hong et al. 2024, arXiv
    2410.08703, section 4.3), as a number. The curves are averaged over heads in bins of equal
    width in log distance and made monotone (isotonic regression), each bin counting alike. At
    weights evenly spaced over those that both reach, the distance under the method is divided by
    the bare model's; the scale is the geometric mean. Where :func:`stretch` lays whole curves of
    the dominant dimension on each other, this reads distances off one weight.

    The interval is a percentile bootstrap over documents, the same in both curves; with a single
    document over heads, for this text alone. Heads that see less far than others, through a window,
    take no part.

    The scale can't be told (NaN, with the reason) if there are no slow pairs, if a curve is flat,
    if a monotone curve in the bare one's direction explains less than 90 % of either, if they have
    less than half of the bare curve's weights in common, or if 5 % of the resamples do.

    Args:
        extended: mean softmax weight of the slow pairs together, at distances 1, 2, ... under the
            method, from 0 to 1; NaN where there is no pair.
        bare: the same documents' and heads' without it.
        trained: positions that the model was trained on; the bare curve is used up to there.
        n_extended, n_bare: query-key pairs of each document (or document and head) at each
            distance; all alike by default.
        first: nearer distances are left out of both curves.
        per_octave: bins in a doubling of the distance.
        n_boot: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        :class:`AllocationStretch`.

    Raises:
        PosheadsError: shapes that don't fit, or ``n_boot`` below 1.

    Example:
        >>> import numpy as np
        >>> d = np.arange(1, 1025)
        >>> weight = lambda d: (0.3 + 0.05 * np.log2(d))[None, None]
        >>> found = allocation_stretch(weight(d / 4), weight(d[:256]), trained=256)
        >>> round(found.scale, 3), found.unit
        (4.0, 'heads')
    """
    shapes = [np.shape(curves)[:2] for curves in (extended, bare)]
    if shapes[0] != shapes[1] or trained < 1:
        raise PosheadsError(
            f"extended curves of {shapes[0]} and bare ones of {shapes[1]} documents and heads and "
            f"trained={trained} were given; expected the same documents and heads in both, and a "
            "training length of at least 1"
        )
    n_docs, unit = shapes[0][0], "documents" if shapes[0][0] > 1 else "heads"
    slow = np.isfinite(extended).any((0, 2)) & np.isfinite(bare).any((0, 2))
    if not slow.any():
        reason = "no head has pairs that are slow"
        nan = float("nan")
        return AllocationStretch(nan, nan, nan, nan, nan, nan, nan, 0, n_docs, unit, reason)
    long = _binned(extended, n_extended, slow, first, np.inf, per_octave)
    short = _binned(bare, n_bare, slow, first, trained, per_octave)
    reach = (long.weight.sum(0) > 0).sum(1)
    farthest = reach == reach.max()
    counts = bootstrap_counts(n_docs if n_docs > 1 else int(farthest.sum()), n_boot, seed)
    extended_mean, bare_mean = (
        _Mean.of(curves.of_heads(farthest), counts, unit) for curves in (long, short)
    )
    return _told(extended_mean, bare_mean, counts.shape[1], int(farthest.sum()), n_docs, unit)


@dataclass(frozen=True, eq=False)
class _Mean:
    """The heads' mean curve over bins of log distance, as it is and drawn again."""

    octave: np.ndarray  # [bin]
    given: np.ndarray  # [bin]
    drawn: np.ndarray  # [draw, bin]

    @classmethod
    def of(cls, curves: BinnedCurves, counts: np.ndarray, unit: str) -> _Mean:
        given = curves.drawn(np.ones_like(counts[:1]), unit)
        held = np.isfinite(given[0]).all(0)
        drawn = curves.drawn(counts, unit)
        # A document without pairs in a far bin leaves it empty in some draws; they say nothing.
        drawn = np.where(np.isfinite(drawn), drawn, given)
        return cls(curves.octave[held], given[0, :, held].mean(1), drawn[..., held].mean(1))


def _binned(
    curves: np.ndarray,
    n_qk_pairs: np.ndarray | None,
    heads: np.ndarray,
    first: int,
    last: float,
    per_octave: int,
) -> BinnedCurves:
    if n_qk_pairs is not None and np.ndim(n_qk_pairs) == 3:
        n_qk_pairs = np.asarray(n_qk_pairs)[:, heads]
    return BinnedCurves.of(np.asarray(curves)[:, heads], n_qk_pairs, first, last, per_octave)


def _told(
    long: _Mean, short: _Mean, n_units: int, n_heads: int, n_docs: int, unit: str
) -> AllocationStretch:
    """The scale of the mean curves with its interval, or why there is none."""
    rises = _explained(short.given, True) >= _explained(short.given, False)
    monotone = [_explained(curves.given, rises) for curves in (short, long)]
    low, high, common = _common(long.given, short.given, rises)
    shift = _shift(long.octave, long.given, short.octave, short.given, rises)
    drawn = np.array(
        [
            _shift(long.octave, extended, short.octave, bare, rises)
            for extended, bare in zip(long.drawn, short.drawn, strict=True)
        ]
    )
    reason = None
    if np.isnan(monotone).any():
        reason = "a curve is flat: slow pairs have the same weight at all distances"
    elif min(monotone) < _MONOTONE:
        which = 0 if monotone[0] < _MONOTONE else 1
        reason = (
            f"the {('bare', 'extended')[which]} curve is not monotone: one that only "
            f"{'rises' if rises else 'falls'}, as the bare one does most, explains "
            f"{100 * max(0.0, monotone[which]):.0f} % of its variance, less than 90 %"
        )
    elif np.isnan(shift):
        reason = (
            f"the curves have {100 * max(0.0, common):.0f} % of the bare one's weights in common, "
            "less than half"
        )
    elif np.isnan(drawn).mean() >= _LOST:
        reason = (
            f"in {100 * np.isnan(drawn).mean():.0f} % of the resamples the curves have less than "
            "half of the bare one's weights in common"
        )
    octaves = [np.nan] * 3
    if reason is None:
        octaves = [shift, *interval_of(drawn[np.isfinite(drawn)], n_units)]
    scale, ci_low, ci_high = 2.0 ** np.array(octaves)
    return AllocationStretch(
        scale=float(scale),
        ci_low=float(ci_low),
        ci_high=float(ci_high),
        weight_low=float(low) if common > 0 else float("nan"),
        weight_high=float(high) if common > 0 else float("nan"),
        monotone_bare=monotone[0],
        monotone_extended=monotone[1],
        n_heads=n_heads,
        n_docs=n_docs,
        unit=unit,
        reason=reason,
    )


def _monotone(curve: np.ndarray, rises: bool) -> np.ndarray:
    fitted: np.ndarray = isotonic_regression(curve, increasing=rises).x
    return fitted


def _explained(curve: np.ndarray, rises: bool) -> float:
    """Share of the variance that a monotone curve explains; NaN of a flat one."""
    spread = ((curve - curve.mean()) ** 2).sum()
    if spread <= _ROUNDING * (curve**2).sum():
        return float("nan")
    return float(1 - ((curve - _monotone(curve, rises)) ** 2).sum() / spread)


def _common(extended: np.ndarray, bare: np.ndarray, rises: bool) -> tuple[float, float, float]:
    """Lowest and highest weight that both reach, and their share of the bare curve's weights."""
    long, short = _monotone(extended, rises), _monotone(bare, rises)
    low, high = max(long.min(), short.min()), min(long.max(), short.max())
    return low, high, (high - low) / max(short.max() - short.min(), 1e-300)


def _shift(
    x: np.ndarray, extended: np.ndarray, x_bare: np.ndarray, bare: np.ndarray, rises: bool
) -> float:
    """Mean octaves between the distances at which the two have the same weight."""
    low, high, common = _common(extended, bare, rises)
    if common < _OVERLAP:
        return float("nan")
    levels = low + (high - low) * np.linspace(0, 1, _N_LEVELS + 2)[1:-1]
    apart = _octave_of(levels, x, extended, rises) - _octave_of(levels, x_bare, bare, rises)
    return float(apart.mean())


def _octave_of(levels: np.ndarray, x: np.ndarray, curve: np.ndarray, rises: bool) -> np.ndarray:
    """Where the monotone curve has these weights; a level stretch counts by its middle."""
    weights, which = np.unique(_monotone(curve, rises), return_inverse=True)
    middle = np.bincount(which, x) / np.bincount(which)
    found: np.ndarray = np.interp(levels, weights, middle)
    return found

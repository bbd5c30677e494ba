"""Where the bare model's curves leave their trend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.interpolate import BSpline

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.log_bins import BinnedCurves, bootstrap_counts, interval_of

# Bins at least on either side of a break.
_EDGE = 4
# Fewer documents say too little about how their mean would vary by chance.
_FEWEST_FOR_TEST = 8
# Inner knots of the trend to choose from, and of a single document's, which can't choose.
_KNOTS, _KNOTS_OF_ONE = (0, 1, 2, 3, 4, 6, 8, 11, 14), 3


@dataclass(frozen=True)
class BreakPoint:
    """Where curves leave their trend.

    Attributes:
        distance: of the break, in tokens.
        ci_low, ci_high: 95 % bootstrap interval over the units and a bin on either side, since a
            break inside a bin may be put at either of its ends; NaN with fewer than four.
        p: of the test that there is a break at all; NaN with fewer than eight documents. Read it
            first: a distance is given in any case.
        slope_before, slope_after: of the trend on both sides of the break, in rotary dimensions
            per doubling of the distance, mean over heads.
        jump: change of level at the break, in rotary dimensions, mean over heads.
        n_knots: inner knots of the trend.
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
    n_knots: int
    n_heads: int
    n_docs: int
    unit: str


def break_point(
    curves: Float[np.ndarray, "doc head distance"],
    *,
    n_pairs: Float[np.ndarray, "doc distance"] | None = None,
    first: int = 1,
    per_octave: int = 8,
    n_boot: int = 1000,
    seed: int = 0,
) -> BreakPoint:
    """The distance at which curves of mean dominant dimension leave their trend.

    Over bins of log distance every head has a trend of its own, a cubic spline, and from the break
    on another level and another slope; the break is the same for all heads, and lies anywhere in
    its bin. It is where least squares put it (segmented regression: Bai and Perron 1998,
    Econometrica 66, 47). Every bin counts alike. The spline has as many knots as predict a left-out
    document best. Heads that see less far than others, through a window, take no part.

    The interval is a percentile bootstrap over documents, or over heads of a single document. The
    test asks whether the best break explains more than the best one would of unbroken curves to
    which whole documents' deviations are added, with random signs (wild bootstrap): neighbouring
    distances go together, so that points can't be drawn one by one. The unbroken curves are
    splines with knots of their own number, so that a bend that the documents resolve is no break.
    In simulations of a dozen documents it called 0 to 12 % of unbroken lines, parabolas and
    sigmoids broken at the 5 % level and found jumps well; a mere change of slope it finds seldom,
    since a bend can be as sharp.

    Args:
        curves: mean dominant dimension at distances 1, 2, ..., in rotary dimensions; NaN where
            there is no pair.
        n_pairs: pairs of each document (or document and head) at each distance.
        first: nearer distances are left out.
        per_octave: bins in a doubling of the distance.
        n_boot: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        :class:`BreakPoint`.

    Raises:
        PosheadsError: curves of another shape, fewer than a dozen bins, ``n_boot`` below 1.

    Example:
        >>> import numpy as np
        >>> d = np.arange(1, 1025)
        >>> found = break_point((np.log2(d) + 3 * (d > 256))[None, None])
        >>> 240 < found.distance < 275, round(found.jump), round(found.slope_before)
        (True, 3, 1)
    """
    binned = BinnedCurves.of(curves, n_pairs, first, np.inf, per_octave)
    seen = binned.weight.sum(0) > 0
    binned = binned.of_heads(seen.sum(1) == seen.sum(1).max())
    n_docs, n_heads, _ = binned.total.shape
    held = (binned.weight.sum(0) > 0).all(0)
    x = binned.octave[held]
    if len(x) < 2 * _EDGE + 4:
        raise PosheadsError(
            f"curves of {len(x)} bins of log distance were given; expected at least "
            f"{2 * _EDGE + 4}; give longer texts or a larger per_octave"
        )
    unit = "documents" if n_docs > 1 else "heads"
    counts = bootstrap_counts(n_docs if n_docs > 1 else n_heads, n_boot, seed)
    given = binned.drawn(np.ones_like(counts[:1]), unit)[..., held]
    bases, smooth = _chosen(binned.weight[..., held], binned.total[..., held], x)
    gain = bases.gain(given)[0]
    place = _EDGE + int(gain.argmax())
    # A document without pairs in a far bin leaves it empty in some draws; they say nothing there.
    drawn = binned.drawn(counts, unit)[..., held]
    drawn = np.where(np.isfinite(drawn), drawn, given)
    places = x[_EDGE + bases.gain(drawn).argmax(1)]
    low, high = interval_of(places, counts.shape[1], "nearest")
    before, change, jump = bases.slopes(given[0], place)
    return BreakPoint(
        distance=float(2 ** x[place]), ci_low=float(2 ** (low - 1 / per_octave)),
        ci_high=float(2 ** (high + 1 / per_octave)),
        p=_p_value(binned, held, bases, smooth, n_boot, seed), slope_before=before,
        slope_after=before + change, jump=jump, n_knots=bases.n_knots, n_heads=n_heads,
        n_docs=n_docs, unit=unit,
    )  # fmt: skip


class _Bases:
    """Orthonormal columns of the trend, and for every possible break of what it adds to it."""

    def __init__(self, x: np.ndarray, n_knots: int) -> None:
        self.x, self.n_knots, self.columns = x, n_knots, _spline(x, n_knots)
        self.trend, _ = np.linalg.qr(self.columns)
        added = []
        for place in range(_EDGE, len(x) - _EDGE):
            change = self.change(place)
            change -= self.trend @ (self.trend.T @ change)
            added.append(np.linalg.qr(change)[0])
        self.added = np.stack(added)

    def rest(self, curves: np.ndarray) -> np.ndarray:
        """Curves without their unbroken trends, ``[..., bin]``."""
        return curves - (curves @ self.trend) @ self.trend.T

    def gain(self, curves: np.ndarray) -> np.ndarray:
        """Squares that each break explains over squares left, ``[draw, break]``."""
        rest = self.rest(curves)
        total = (rest**2).sum((1, 2))[:, None]
        told = (np.einsum("dhb,kbc->dkhc", rest, self.added, optimize=True) ** 2).sum((2, 3))
        return told / np.maximum(total - told, 1e-12 * np.maximum(total, 1e-300))

    def broken(self, curves: np.ndarray) -> np.ndarray:
        """Trends with the best break of each draw, ``[draw, head, bin]``."""
        rest, added = self.rest(curves), self.added[self.gain(curves).argmax(1)]
        return curves - rest + np.einsum("dhb,dbc,dxc->dhx", rest, added, added, optimize=True)

    def change(self, place: int) -> np.ndarray:
        """Level, slope and a bin of its own, since a break may lie anywhere in it."""
        order, here = np.arange(len(self.x)), self.x[place]
        after = order > place
        return np.stack([after, after * (self.x - here), order == place], 1).astype(float)

    def slopes(self, curves: np.ndarray, place: int) -> tuple[float, float, float]:
        """Slope before the break, its change and the jump there, mean over heads."""
        columns = np.column_stack([self.columns, self.change(place)])
        *trend, jump, change, _ = np.linalg.lstsq(columns, curves.T, rcond=None)[0].mean(1)
        spline = BSpline(_knots(self.x, self.n_knots), trend, 3)
        return float(spline.derivative()(self.x[place])), float(change), float(jump)


def _knots(x: np.ndarray, n_knots: int) -> np.ndarray:
    """Of a cubic spline: its ends, and inner ones between which lie as many bins each."""
    inner = np.quantile(x, np.linspace(0, 1, n_knots + 2)[1:-1])
    return np.concatenate([[x[0]] * 4, inner, [x[-1]] * 4])


def _spline(x: np.ndarray, n_knots: int) -> np.ndarray:
    return BSpline.design_matrix(x, _knots(x, n_knots), 3).toarray()


def _chosen(weight: np.ndarray, total: np.ndarray, x: np.ndarray) -> tuple[_Bases, _Bases]:
    """Trends that predict every document best from the others: with a break, and without."""
    # A spline needs more bins than columns, or it follows every one of them.
    bases = [_Bases(x, n) for n in _KNOTS if 2 * (n + 4) <= len(x)] or [_Bases(x, 0)]
    if len(weight) == 1:
        return (bases[min(_KNOTS_OF_ONE, len(bases) - 1)],) * 2
    everywhere = total.sum(0) / weight.sum(0)
    with np.errstate(invalid="ignore"):
        one = total / np.where(weight > 0, weight, np.nan)
        others = (total.sum(0) - total) / (weight.sum(0) - weight)
    others = np.where(np.isfinite(others), others, everywhere)
    smooth = [np.nansum((one - others + each.rest(others)) ** 2) for each in bases]
    broken = [np.nansum((one - each.broken(others)) ** 2) for each in bases]
    return bases[int(np.argmin(broken))], bases[int(np.argmin(smooth))]


def _p_value(
    binned: BinnedCurves, held: np.ndarray, bases: _Bases, smooth: _Bases, n_boot: int, seed: int
) -> float:
    n_docs = len(binned.total)
    if n_docs < _FEWEST_FOR_TEST:
        return float("nan")
    weight, total = binned.weight[..., held], binned.total[..., held]
    mean = total.sum(0) / weight.sum(0)
    # Each document's share of what the mean is off by.
    share = (total - weight * mean) / weight.sum(0) * np.sqrt(n_docs / (n_docs - 1))
    signs = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], size=(n_boot, n_docs))
    unbroken = mean - smooth.rest(mean)
    by_chance = bases.gain(unbroken + np.tensordot(signs, share, 1)).max(1)
    return float((1 + (by_chance >= bases.gain(mean[None]).max()).sum()) / (1 + n_boot))

"""The distance at which the unmodified model's curves break from their trend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.interpolate import BSpline

from tl_posheads.errors import PosheadsError
from tl_posheads.statistics.log_bins import BinnedCurves, bootstrap_counts, interval_of

# Bins at least on either side of a break.
_EDGE = 4
# Smooth curves reach it by chance in fewer than one case in twenty: see BreakPoint.
_BREAK = 0.5
# Inner knots of the trend to choose from.
_KNOTS = (0, 1, 2, 3, 4, 6, 8, 11, 14)


@dataclass(frozen=True, repr=False)
class BreakPoint:
    """The distance at which curves break from their trend, if they do.

    Attributes:
        distance: of the break, in tokens; NaN where there is none.
        ci_low, ci_high: 95 % bootstrap interval over the units and a bin on either side, since a
            break inside a bin may be put at either of its ends; NaN with fewer than four.
        error_ratio: held-out mean squared error over half octaves, of the best fit with a break
            over that of the best one without. From 0.5 on there is no break and no distance.
            In simulations (power laws, lines and saturating curves over the logarithm; 1 to 12
            documents of 1,024 tokens, 3 to 12 heads; noise of 0.05 and 0.3 dimensions) smooth
            curves lay around 1, and at most 3 % below 0.5; clear jumps lie below 0.3. Sigmoids
            that rise by 8 dimensions over four octaves lay below it in up to 8 %, and one that
            rises within two counts as a break: look at the curve. Small jumps are missed among
            the waves of single pairs.
        slope_before, slope_after: of the trend on both sides of the break, in rotary dimensions
            per doubling of the distance, mean over heads; NaN without a break.
        jump: change of level at the break, in rotary dimensions, mean over heads; NaN without.
        n_knots: inner knots of the trend.
        n_heads, n_docs: what was fitted.
        unit: ``"documents"`` or ``"heads"``, what the bootstrap draws for the interval.
    """

    distance: float
    ci_low: float
    ci_high: float
    error_ratio: float
    slope_before: float
    slope_after: float
    jump: float
    n_knots: int
    n_heads: int
    n_docs: int
    unit: str

    @property
    def reason(self) -> str | None:
        """Why no distance is given; None where there is a break."""
        if self.error_ratio < _BREAK:
            return None
        return (
            f"no break: the best one leaves {self.error_ratio:.2f} of the held-out error of a fit "
            f"without a break (error_ratio); a break leaves less than {_BREAK}"
        )

    def __repr__(self) -> str:
        of = f"{self.n_heads} heads, {self.n_docs} documents"
        if self.reason is not None:
            return f"BreakPoint({self.reason}; {of})"
        interval = ""
        if np.isfinite(self.ci_low):
            interval = (
                f" (95 % interval over {self.unit} {self.ci_low:,.0f} to {self.ci_high:,.0f})"
            )
        return (
            f"BreakPoint(at {self.distance:,.0f} tokens{interval}, error_ratio "
            f"{self.error_ratio:.2f}; jump {self.jump:+.2f} dimensions, slope "
            f"{self.slope_before:+.2f} before and {self.slope_after:+.2f} after, in dimensions a "
            f"doubling; {of})"
        )


def break_point(
    curves: Float[np.ndarray, "doc head distance"],
    *,
    n_qk_pairs: Float[np.ndarray, "doc distance"] | None = None,
    first: int = 1,
    per_octave: int = 8,
    n_boot: int = 1000,
    seed: int = 0,
) -> BreakPoint:
    """The distance at which curves of mean dominant dimension break from their trend.

    Over bins of log distance each head has its own trend, a cubic spline, whose level and slope
    change at the break. All heads share the break, which may lie anywhere in its bin. Least squares
    places it (segmented regression: Bai and Perron 1998, Econometrica 66, 47), with equal weight
    for every bin. The number of knots is the one that best predicts held-out half octaves: a bend
    is no break, nor are wiggles, such as the waves of single rotary pairs. Heads that a sliding
    window keeps from seeing as far as the others are left out.

    The interval is a percentile bootstrap over documents, or over heads of a single document, with
    the knots fixed. There is no p-value: it would need to know how sharply an unbroken curve may
    bend. ``error_ratio`` says instead whether a break helps; if not, no distance is given.

    Args:
        curves: mean dominant dimension at distances 1, 2, ..., in rotary dimensions; NaN where
            there is no pair.
        n_qk_pairs: query-key pairs of each document (or document and head) at each distance.
        first: nearer distances are left out.
        per_octave: bins in a doubling of the distance.
        n_boot: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        :class:`BreakPoint`, whose ``reason`` is set where there is no break.

    Raises:
        PosheadsError: curves of another shape, fewer than a dozen bins, ``n_boot`` below 1.

    Example:
        >>> import numpy as np
        >>> d = np.arange(1, 1025)
        >>> found = break_point((np.log2(d) + 3 * (d > 256))[None, None])
        >>> 240 < found.distance < 275, round(found.jump), round(found.slope_before)
        (True, 3, 1)
    """
    binned = BinnedCurves.of(curves, n_qk_pairs, first, np.inf, per_octave)
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
    bases, error_ratio = _chosen(given[0], x)
    found = [np.nan] * 6
    if error_ratio < _BREAK:
        place = _EDGE + int(bases.gain(given)[0].argmax())
        # A document without pairs in a far bin leaves it empty in some draws; ignore those.
        drawn = binned.drawn(counts, unit)[..., held]
        drawn = np.where(np.isfinite(drawn), drawn, given)
        places = x[_EDGE + bases.gain(drawn).argmax(1)]
        low, high = interval_of(places, counts.shape[1], "nearest")
        before, change, jump = bases.slopes(given[0], place)
        ends = (low - 1 / per_octave, high + 1 / per_octave)
        found = [*2.0 ** np.array([x[place], *ends]), before, before + change, jump]
    distance, ci_low, ci_high, before, after, jump = map(float, found)
    return BreakPoint(
        distance=distance,
        ci_low=ci_low,
        ci_high=ci_high,
        error_ratio=error_ratio,
        slope_before=before,
        slope_after=after,
        jump=jump,
        n_knots=bases.n_knots,
        n_heads=n_heads,
        n_docs=n_docs,
        unit=unit,
    )


class _Bases:
    """Orthonormal columns of the trend, and of what each possible break adds to it."""

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
        left: np.ndarray = curves - (curves @ self.trend) @ self.trend.T
        return left

    def gain(self, curves: np.ndarray) -> np.ndarray:
        """Sum of squares that each break explains over the residual sum, ``[draw, break]``."""
        rest = self.rest(curves)
        total = (rest**2).sum((1, 2))[:, None]
        told = (np.einsum("dhb,kbc->dkhc", rest, self.added, optimize=True) ** 2).sum((2, 3))
        share: np.ndarray = told / np.maximum(total - told, 1e-12 * np.maximum(total, 1e-300))
        return share

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
    """Knots of a cubic spline: its ends, and inner ones with equally many bins between them."""
    inner = np.quantile(x, np.linspace(0, 1, n_knots + 2)[1:-1])
    return np.concatenate([[x[0]] * 4, inner, [x[-1]] * 4])


def _spline(x: np.ndarray, n_knots: int) -> np.ndarray:
    splines: np.ndarray = BSpline.design_matrix(x, _knots(x, n_knots), 3).toarray()
    return splines


def _chosen(curves: np.ndarray, x: np.ndarray) -> tuple[_Bases, float]:
    """The trend that best predicts held-out half octaves, and how much the break helps."""
    # A spline needs more bins than columns, or it follows every one of them.
    candidates = [_Bases(x, n) for n in _KNOTS if 2 * (n + 4) <= len(x)] or [_Bases(x, 0)]
    broken, unbroken = [], []
    for each in candidates:
        place = _EDGE + int(each.gain(curves[None])[0].argmax())
        columns = np.column_stack([each.columns, each.change(place)])
        broken.append(_left_out(columns, curves, x, place))
        unbroken.append(_left_out(each.columns, curves, x, place))
    best = int(np.argmin(broken))
    return candidates[best], broken[best] / max(min(unbroken), 1e-300)


def _half_octaves(x: np.ndarray) -> np.ndarray:
    return np.unique(np.floor(2 * x), return_inverse=True)[1]


def _left_out(columns: np.ndarray, curves: np.ndarray, x: np.ndarray, place: int) -> float:
    """Mean squared error on half octaves left out of the fit."""
    missed, which = np.zeros_like(curves), _half_octaves(x)
    for one in np.unique(which):
        out = which == one
        fitted = np.linalg.lstsq(columns[~out], curves[:, ~out].T, rcond=None)[0]
        missed[:, out] = curves[:, out] - (columns[out] @ fitted).T
    missed[:, place] = 0  # the break's own bin: nothing else tells its level
    return float((missed**2).mean())

"""Does ablation harm correlate with a score across heads? Ranks only, no model needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from tl_posheads.errors import PosheadsError
from tl_posheads.statistics.effects import spearman

_FEWEST_HEADS = 8
# Squared length of n rank residuals, over n**3: anything below is rounding error.
_NOTHING = 1e-12


@dataclass(frozen=True)
class RankAssociation:
    """How the harm of ablating single heads correlates with a score of the heads.

    Attributes:
        rho: adjusted Spearman's rho of score and harm over heads; positive where ablating heads
            with a higher score does more harm.
        ci_low, ci_high: 95 % confidence interval over prompts; NaN with one prompt.
        p: two-sided p-value, by permutation within layers.
        n_heads: heads with a score, an effect and a norm.
        n_prompts: number of prompts.
        raw_rho: Spearman's rho without adjustment.
    """

    rho: float
    ci_low: float
    ci_high: float
    p: float
    n_heads: int
    n_prompts: int
    raw_rho: float


def rank_association(
    score: Float[np.ndarray, "layer head"],
    effects: Float[np.ndarray, "prompt layer head"],
    *,
    norms: Float[np.ndarray, "layer head"] | None = None,
    n_permutations: int = 2000,
    seed: int,
) -> RankAssociation:
    """Spearman's rho over heads between a score and the harm of ablating each head by itself.

    Harm is the mean effect over prompts with its sign flipped. Both score and harm vary with the
    layer and with the norm of a head's output, which confounds them. So ``rho`` is the partial
    correlation of the ranks, given the layer as a factor and the rank of the norm.

    The p-value permutes the residuals of the harm's ranks within layers (Freedman &
    Lane 1983, J. Bus. Econ. Stat. 1, 292; Winkler et al. 2014, NeuroImage 92, 381), and is
    ``(1 + #as large) / (1 + #permutations)``. Without ``norms`` it is exact if scores are
    exchangeable within a layer. Adjust the p-values of several scores or tasks with
    :func:`~tl_posheads.statistics.ranks.benjamini_hochberg`.

    The interval is Student's t with the jackknife's standard error over prompts; heads are fixed.
    It covers the rho that this many such prompts give on average. With few prompts, noise in the
    means pulls rho towards 0, so more prompts would give a larger one.

    Ablating heads one by one misses redundant heads: losing either one does no harm, however high
    both score.

    Args:
        score: one number per head, like its positional score; NaN where it has none.
        effects: ablated minus clean, nats per token, for each head ablated alone; NaN where it was
            not ablated. A head that lacks any prompt is left out.
        norms: mean norm of each head's output.
        n_permutations: permutations.
        seed: of the permutations.

    Returns:
        :class:`RankAssociation`. ``rho`` and ``p`` are NaN if all scores or all effects are equal
        within layers, given the norm.

    Raises:
        PosheadsError: shapes that don't fit, no prompts, fewer than 8 heads with all numbers,
            ``n_permutations`` below 1.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> score = rng.normal(size=(6, 8))
        >>> effects = -0.02 * score + 0.03 * rng.normal(size=(12, 6, 8))
        >>> found = rank_association(score, effects, seed=0)
        >>> found.rho > 0.5, found.p < 0.001, found.n_heads, found.n_prompts
        (True, True, 48, 12)

        Another score, and both p-values adjusted:

        >>> from tl_posheads.statistics.ranks import benjamini_hochberg
        >>> other = rank_association(rng.normal(size=(6, 8)), effects, seed=0)
        >>> (benjamini_hochberg(np.array([found.p, other.p])) <= 0.05).tolist()
        [True, False]
    """
    score, effects = (np.asarray(values, dtype=np.float64) for values in (score, effects))
    norms = None if norms is None else np.asarray(norms, dtype=np.float64)
    _check(score, effects, norms, n_permutations)
    known = np.isfinite(score) & np.isfinite(effects).all(0)
    if norms is not None:
        known &= np.isfinite(norms)
    n_prompts, n_heads = len(effects), int(known.sum())
    if n_heads < _FEWEST_HEADS:
        raise PosheadsError(
            f"{n_heads} heads have a score, an effect on every prompt and a norm; expected at "
            f"least {_FEWEST_HEADS}, so ablate more heads"
        )
    layer = np.unique(np.nonzero(known)[0], return_inverse=True)[1]
    adjusted = _Adjusted(layer, None if norms is None else norms[known])
    harm = -effects[:, known]
    scores, left = adjusted.ranks(score[known]), adjusted.ranks(harm.mean(0))
    rho = float(_cosine(left, scores))
    low = high = p = float("nan")
    if np.isfinite(rho):
        # Keys that grow with the layer: sorting them permutes heads within each layer.
        keys = np.random.default_rng(seed).random((n_permutations, n_heads)) + layer
        drawn = _cosine(adjusted(left[keys.argsort(1)]), scores)
        p = float((1 + (np.abs(drawn) >= abs(rho) - 1e-12).sum()) / (1 + n_permutations))
    if np.isfinite(rho) and n_prompts > 1:
        without = _cosine(adjusted.ranks((harm.sum(0) - harm) / (n_prompts - 1)), scores)
        half = stats.t.ppf(0.975, n_prompts - 1) * without.std() * np.sqrt(n_prompts - 1)
        low, high = (float(np.clip(bound, -1, 1)) for bound in (rho - half, rho + half))
    raw = float(spearman(score[known], harm.mean(0)))
    return RankAssociation(rho, low, high, p, n_heads, n_prompts, raw)


class _Adjusted:
    """Residuals of values over heads, given the layer as a factor and the rank of the norm."""

    def __init__(self, layer: Int[np.ndarray, " n"], norms: Float[np.ndarray, " n"] | None) -> None:
        self.layer = layer
        self.share = np.eye(layer.max() + 1)[layer] / np.bincount(layer)
        self.norm: Float[np.ndarray, " n"] | None = None
        if norms is not None:
            norm = self(stats.rankdata(norms))
            length = np.linalg.norm(norm)
            self.norm = norm / length if length**2 > _NOTHING * len(norm) ** 3 else None

    def __call__(self, values: Float[np.ndarray, "*draw n"]) -> Float[np.ndarray, "*draw n"]:
        left: np.ndarray = values - (values @ self.share)[..., self.layer]
        return left if self.norm is None else left - (left @ self.norm)[..., None] * self.norm

    def ranks(self, values: Float[np.ndarray, "*draw n"]) -> Float[np.ndarray, "*draw n"]:
        return self(stats.rankdata(values, axis=-1))


def _cosine(x: Float[np.ndarray, "*draw n"], y: Float[np.ndarray, " n"]) -> np.ndarray:
    """Correlation of the residuals; NaN where there are none."""
    squares, square, least = (x * x).sum(-1), y @ y, _NOTHING * len(y) ** 3
    with np.errstate(invalid="ignore", divide="ignore"):
        some = (squares > least) & (square > least)
        return np.where(some, (x @ y) / np.sqrt(squares * square), np.nan)


def _check(
    score: np.ndarray, effects: np.ndarray, norms: np.ndarray | None, n_permutations: int
) -> None:
    fits = score.ndim == 2 and effects.ndim == 3 and effects.shape[1:] == score.shape
    if not fits or len(effects) < 1 or (norms is not None and norms.shape != score.shape):
        given = "" if norms is None else f" and norms of shape {norms.shape}"
        raise PosheadsError(
            f"score of shape {score.shape}, effects of shape {effects.shape}{given} were given; "
            "expected [layer, head], [prompt, layer, head] with at least one prompt, and "
            "[layer, head]"
        )
    if n_permutations < 1:
        raise PosheadsError(f"n_permutations={n_permutations} was given; expected at least 1")

"""Ranks, rank correlations, and tests with documents as replicates; no model needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from tl_posheads.errors import PosheadsError

FEW_DOCUMENTS = 8  # fewer give intervals too wide to tell heads apart
_N_SPLITS = 100  # random halves of the documents


def midranks(
    values: Float[Tensor, "... n"], weights: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "... n"]:
    """Mid-rank of each value along the last axis, from 0 on; ties share a rank; float64.

    With weights, a rank is the weight below the value plus half the weight tied with it.

    Example:
        >>> import torch
        >>> midranks(torch.tensor([3.0, 1.0, 3.0]))
        tensor([2.0000, 0.5000, 2.0000], dtype=torch.float64)
    """
    order, middle = ordered_midranks(values, weights)
    return torch.empty_like(middle).scatter_(-1, order, middle)


def ordered_midranks(
    values: Float[Tensor, "... n"], weights: Float[Tensor, " n"] | None = None
) -> tuple[Int[Tensor, "... n"], Float[Tensor, "... n"]]:
    """The order of the values along the last axis, and :func:`midranks` in that order."""
    order = _argsort(values)
    ordered = values.gather(-1, order)
    n = values.shape[-1]
    at = torch.arange(n, device=values.device).expand(values.shape)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    if weights is None and bool(starts.all()):  # no ties: the usual case
        return order, at.double() + 0.5
    ends = torch.ones_like(starts)
    ends[..., :-1] = starts[..., 1:]
    first = torch.where(starts, at, 0).cummax(-1).values
    last = torch.where(ends, at, n).flip(-1).cummin(-1).values.flip(-1)
    if weights is None:
        middle = (first + last + 1).double().div_(2)
    else:
        upto = weights.double()[order].cumsum(-1)
        below = torch.cat([torch.zeros_like(upto[..., :1]), upto[..., :-1]], -1)
        middle = (below.gather(-1, first) + upto.gather(-1, last)) / 2
    return order, middle


def _argsort(values: Tensor) -> Tensor:
    # numpy's is four times as fast on a CPU with vector instructions.
    if values.device.type == "cpu":
        return torch.from_numpy(np.argsort(values.numpy(), axis=-1))
    return values.argsort(-1)


def correlation(
    x: Float[Tensor, "... n"], y: Float[Tensor, "... n"], weights: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "..."]:
    """Weighted Pearson correlation along the last axis; NaN where either side is constant."""
    flat = (x.amax(-1) == x.amin(-1)) | (y.amax(-1) == y.amin(-1))
    if weights is None:
        weights = torch.ones(x.shape[-1], dtype=torch.float64, device=x.device)
    share = weights.double() / weights.sum()
    x, y = (v - (v @ share)[..., None] for v in (x, y))
    covariance, var_x, var_y = (v @ share for v in (x * y, x * x, y * y))
    return (covariance / (var_x * var_y).sqrt()).masked_fill(flat, float("nan"))


def spearman_by_distance(
    distance: Int[Tensor, " n"],
    dominant: Float[Tensor, "head n"],
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " head"]:
    """Exact Spearman's rho between token distance and dominant dimension, per head.

    Ties share their mid-rank. Without weights it equals ``scipy.stats.spearmanr``; weights apply
    to both the ranks and the correlation. A head whose D is constant gives NaN.

    Raises:
        PosheadsError: shapes that don't match.

    Example:
        >>> import torch
        >>> spearman_by_distance(torch.tensor([1, 2, 3, 4]), torch.tensor([[0.1, 0.2, 0.4, 0.3]]))
        tensor([0.8000], dtype=torch.float64)
    """
    if dominant.ndim != 2 or distance.shape != dominant.shape[1:]:
        raise PosheadsError(
            f"distance of shape {tuple(distance.shape)} and dominant of shape "
            f"{tuple(dominant.shape)} were given; expected [n] and [head, n]"
        )
    return correlation(midranks(dominant, weights), midranks(distance, weights), weights)


_EXACT = 8  # at most so many pairs: all 8! orders are enumerated


def spearman_of_few(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Spearman's rho and its two-sided p-value, exact for few pairs.

    The t approximation gives four pairs in perfect order a p-value of 0, but two of their 24 orders
    are as extreme.

    Example:
        >>> rho, p = spearman_of_few(np.arange(4.0), np.arange(4.0))
        >>> round(rho, 3), round(p, 3)
        (1.0, 0.083)
    """
    found = stats.spearmanr(x, y)
    if len(x) > _EXACT:
        return float(found.statistic), float(found.pvalue)
    a, b = stats.rankdata(x) - (len(x) + 1) / 2, stats.rankdata(y) - (len(y) + 1) / 2
    orders = np.array(list(permutations(range(len(x)))))
    reached = np.abs(a[orders] @ b) >= abs(float(a @ b)) - 1e-9
    return float(found.statistic), float(reached.mean())


def draws_for(error: float) -> int:
    """Query-key pairs, drawn evenly over distances, for a standard error of rho of ``error``.

    The standard error is 1/sqrt(n) where D doesn't depend on the distance, and less where it does
    (``draw_pairs``). The largest among SmolLM2's heads is 1.22/sqrt(n); a head whose D rises or
    falls with distance at random would have 1.34/sqrt(n). Hence 1.5/error**2.

    >>> draws_for(0.01)
    15000
    """
    return math.ceil(1.5 / error**2 - 1e-6)


@dataclass(frozen=True, eq=False)
class MeanTest:
    """Every head's mean over documents, tested against zero; NaN where undefined.

    Attributes:
        mean: over the documents in which the head has a value.
        n: number of those documents.
        se: standard error of the mean; NaN with fewer than two.
        ci_low, ci_high: interval by Student's t.
        p: two-sided p-value of a mean of zero, by the t test.
        p_adjusted: the same, corrected for the number of heads (Benjamini and Hochberg 1995).
    """

    mean: Float[Tensor, "*head"]
    n: Int[Tensor, "*head"]
    se: Float[Tensor, "*head"]
    ci_low: Float[Tensor, "*head"]
    ci_high: Float[Tensor, "*head"]
    p: Float[Tensor, "*head"]
    p_adjusted: Float[Tensor, "*head"]


def mean_over_documents(values: Float[Tensor, " doc *head"], *, level: float = 0.95) -> MeanTest:
    """Mean over documents, with confidence interval and test: documents are the replicates.

    Example:
        >>> import torch
        >>> test = mean_over_documents(torch.tensor([[0.1], [0.2], [0.3]]))
        >>> round(test.mean.item(), 3), round(test.ci_low.item(), 3), round(test.p.item(), 3)
        (0.2, -0.048, 0.074)
    """
    x = values.double().cpu().numpy()
    known = np.isfinite(x)
    n = known.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, x, 0).sum(0) / n
        spread = np.where(known, x - mean, 0)
        se = np.where(n > 1, np.sqrt((spread**2).sum(0) / (n - 1) / n), np.nan)
        half = stats.t.ppf((1 + level) / 2, n - 1) * se
        # Identical documents give a p-value of 0, except a mean of zero, which can't be tested.
        sure = np.where((se == 0) & (mean != 0), 0.0, np.nan)
        p = np.where(se > 0, 2 * stats.t.sf(np.abs(mean) / se, n - 1), sure)
    out = (mean, n, se, mean - half, mean + half, p, benjamini_hochberg(p))
    return MeanTest(*map(torch.as_tensor, out))


def split_half(values: Float[Tensor, " doc *head"], *, seed: int = 0) -> float:
    """Rank correlation over heads between the means of two halves of the documents.

    The mean over a hundred random halvings; NaN with fewer than two documents or three heads.
    """
    x = values.double().cpu().flatten(1).numpy()
    x = x[:, np.isfinite(x).all(0)]
    if len(x) < 2 or x.shape[1] < 3:
        return float("nan")
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(_N_SPLITS):
        order = generator.permutation(len(x))
        half = len(x) // 2
        a, b = x[order[:half]].mean(0), x[order[half : 2 * half]].mean(0)
        found.append(stats.spearmanr(a, b).statistic)
    return float(np.mean(found))


def benjamini_hochberg(p: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """p-values that control the false discovery rate (Benjamini & Hochberg 1995); NaN stays NaN."""
    out = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    if known.any():
        out[known] = stats.false_discovery_control(p[known])
    return out


def chance_overlap(n: int, k: int, j: int, overlap: int) -> tuple[float, float]:
    """Expected overlap of random sets of ``k`` and ``j`` out of ``n``, and P(at least this)."""
    law = stats.hypergeom(n, k, j)
    return float(law.mean()), float(law.sf(overlap - 1))

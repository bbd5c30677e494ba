"""Spearman's rho between token distance and D: exact on lists, and from mergeable tables.

Two ways to the same number. :func:`spearman_by_distance` ranks a full list of pairs. For long
texts the list is never kept: ``tables.LayerTable`` counts pairs in cells of (D, distance), with
about 144 D bins per head that hold nearly equal shares. Replacing values by their bin's mid-rank
loses a fraction ``sum(share**3)`` of the rank variance, 1e-4 here. Tables add cell by cell, so
documents, batches and machines can be merged in any order.
"""

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

N_QUANTILE_BINS = 128
N_FIXED_BINS = 16
BINS_PER_OCTAVE = 32


def weighted_midranks(
    values: Float[np.ndarray, "n"], weights: Float[np.ndarray, "n"] | None = None
) -> Float[np.ndarray, "n"]:
    """Mid-rank of each value as a share of the whole weight, ties sharing theirs; in (0, 1)."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    w = np.ones(len(values)) if weights is None else weights[order]
    below = np.concatenate([[0.0], np.cumsum(w)])
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.append(starts[1:], len(ordered))
    middle = (below[starts] + below[ends]) / 2
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(middle, ends - starts) / below[-1]
    return ranks


def _correlation(x: np.ndarray, y: np.ndarray, w: np.ndarray | None) -> float:
    x, y = x - np.average(x, weights=w), y - np.average(y, weights=w)
    covariance, var_x, var_y = (np.average(v, weights=w) for v in (x * y, x * x, y * y))
    # Ranks are multiples of 1/n: a variance this small is a constant, whatever rounding left.
    if min(var_x, var_y) < 1e-20:
        return float("nan")
    return float(covariance / np.sqrt(var_x * var_y))


def spearman_by_distance(
    distance: Int[Tensor, "n"],
    dominant: Float[Tensor, "head n"],
    weights: Float[Tensor, "n"] | None = None,
) -> Float[Tensor, "head"]:
    """Spearman's rho between token distance and dominant dimension, exactly, per head.

    Ties share their mid-rank. Without weights it is ``scipy.stats.spearmanr``; with weights the
    ranks and the correlation are weighted alike. A head whose D is constant gives NaN.

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
    w = None if weights is None else weights.double().cpu().numpy()
    x = weighted_midranks(distance.cpu().numpy().astype(np.float64), w)
    rows = dominant.double().cpu().numpy()
    return torch.tensor(
        [_correlation(x, weighted_midranks(row, w), w) for row in rows], dtype=torch.float64
    )


_EXACT = 8  # pairs at most, whose 8! orders are all looked at


def spearman_of_few(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> tuple[float, float]:
    """Spearman's rho and its two-sided p-value, exact for few pairs.

    The t approximation gives four pairs in perfect order a p-value of 0; of their 24 orders two
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


def sampled_standard_error(distance: np.ndarray, dominant: np.ndarray) -> float:
    """Standard error of Spearman's rho over independently drawn pairs, by its influence function.

    The derivative of rho in the joint distribution (Croux & Dehon 2010, Stat. Methods Appl. 19,
    section 2), plugged in at the sample.
    """
    u, v = weighted_midranks(distance) - 0.5, weighted_midranks(dominant) - 0.5

    def tail_mean(key: np.ndarray, value: np.ndarray) -> np.ndarray:
        order = np.argsort(key, kind="stable")
        tail = np.empty(len(key))
        tail[order] = np.cumsum(value[order][::-1])[::-1] / len(key)
        return tail

    influence = u * v + tail_mean(distance, v) + tail_mean(dominant, u)
    norm = np.sqrt(np.mean(u * u) * np.mean(v * v))
    return float(np.std(influence) / norm / np.sqrt(len(u))) if norm > 0 else float("nan")


def draws_for(error: float) -> int:
    """Independent draws that give Spearman's rho a standard error of at most ``error``.

    The standard error is 1/sqrt(n) for independent ranks and less for ranks that agree. Where D
    depends on the distance but not monotonously it can be larger: 1.34/sqrt(n) where D falls and
    rises again like a V, the worst found. Hence 2/error**2.

    >>> draws_for(0.01)
    20000
    """
    return math.ceil(2 / error**2 - 1e-6)


def distance_edges(longest: int) -> Int[Tensor, "bin"]:
    """First distance of every distance bin up to ``longest``: single to 64, then 32 an octave.

    They don't depend on the text: a longer text's edges begin with a shorter text's.
    """
    edges = list(range(1, min(longest, 64) + 1))
    octave = 64
    while octave < longest:
        step = octave // BINS_PER_OCTAVE
        edges += list(range(octave + step, 2 * octave + 1, step))
        octave *= 2
    return torch.tensor([e for e in edges if e <= longest], dtype=torch.long)


@dataclass(frozen=True)
class DominantGrid:
    """The D bins of one layer's heads, taken from the quantiles of a first look.

    Attributes:
        edges: ascending interior edges, ``[head, bin - 1]``, float64.
        level: share of the first look below the middle of each bin, ``[head, bin]``.
    """

    edges: Float[Tensor, "head edge"]
    level: Float[Tensor, "head bin"]

    @classmethod
    def from_sample(cls, dominant: Float[Tensor, "head n"], n_pairs: int) -> DominantGrid:
        """Quantile bins, and a coarse fixed grid for what the first look did not see.

        A value that fills several quantiles by itself (a tie) gets a bin of its own.
        """
        heads, _ = dominant.shape
        ordered = dominant.double().sort(dim=1).values
        at = torch.linspace(0, ordered.shape[1] - 1, N_QUANTILE_BINS + 1)[1:-1].round().long()
        cuts = ordered[:, at.to(ordered.device)]
        repeated = torch.zeros_like(cuts, dtype=torch.bool)
        repeated[:, 1:] = cuts[:, 1:] == cuts[:, :-1]
        cuts = torch.where(repeated, torch.nextafter(cuts, cuts - 1.0), cuts)
        fixed = torch.linspace(0, n_pairs - 1, N_FIXED_BINS + 1)[1:-1].double()
        edges = torch.cat([cuts, fixed.to(cuts.device).expand(heads, -1)], 1).sort(1).values
        upper = torch.searchsorted(ordered, edges.contiguous(), right=True).double()
        share = (
            torch.cat(
                [
                    torch.zeros_like(upper[:, :1]),
                    upper,
                    torch.full_like(upper[:, :1], ordered.shape[1]),
                ],
                dim=1,
            )
            / ordered.shape[1]
        )
        return cls(edges.contiguous(), (share[:, 1:] + share[:, :-1]) / 2)

    @property
    def n_bins(self) -> int:
        return self.edges.shape[1] + 1

    def bins(self, dominant: Float[Tensor, "head n"]) -> Int[Tensor, "head n"]:
        """Bin of each value: edge ``e`` closes the bin below it."""
        return torch.searchsorted(self.edges, dominant.contiguous())

    def same_as(self, other: DominantGrid) -> bool:
        return torch.equal(self.edges.cpu(), other.edges.cpu())


def table_midranks(share: Float[np.ndarray, "... bin"]) -> Float[np.ndarray, "... bin"]:
    """Mid-rank of each bin, from the bins' shares."""
    return np.cumsum(share, axis=-1) - share / 2


def spearman_of_tables(table: Float[np.ndarray, "... d_bin x_bin"]) -> Float[np.ndarray, "..."]:
    """Spearman's rho of counts (or weights) in cells of D bin by distance bin."""
    total = table.sum((-2, -1), keepdims=True)
    share = table / np.where(total > 0, total, 1)
    share_d, share_x = share.sum(-1), share.sum(-2)
    u, v = table_midranks(share_d) - 0.5, table_midranks(share_x) - 0.5
    covariance = np.einsum("...dx,...d,...x->...", share, u, v)
    variance = (share_d * u**2).sum(-1) * (share_x * v**2).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(variance > 1e-20, covariance / np.sqrt(variance), np.nan)


def bootstrap_interval(
    blocks: Float[np.ndarray, "block d_bin x_bin"],
    rho: float,
    *,
    generator: np.random.Generator,
    rows: Int[np.ndarray, "block"] | None = None,
    columns: Int[np.ndarray, "block"] | None = None,
    level: float = 0.95,
    n_draws: int = 1000,
) -> tuple[float, float]:
    """Interval for rho: whole blocks are drawn with replacement.

    Without ``rows`` and ``columns`` the blocks are documents, drawn independently. With them, a
    block is what stretch ``rows`` of queries and stretch ``columns`` of keys have in common, and
    queries and keys are drawn apart: a pair's weight is the product (Owen & Eckles 2012, Ann. Appl.
    Stat. 6, 895). Within a text pairs share queries and keys, and a bootstrap of queries alone
    would take the keys for fixed.

    The expanded percentile bootstrap (Hesterberg 2015, Am. Stat. 69, section 4.3): percentiles
    widened by ``sqrt(n/(n-1))`` and Student's t, without which few blocks cover too rarely.
    NaN with fewer than three rows.
    """
    rows = np.arange(len(blocks)) if rows is None else rows
    n = int(rows.max()) + 1
    if n < 3 or not np.isfinite(rho):
        return float("nan"), float("nan")
    draws = generator.multinomial(n, np.full(n, 1 / n), size=n_draws)[:, rows].astype(np.float64)
    if columns is not None:
        draws *= generator.multinomial(n, np.full(n, 1 / n), size=n_draws)[:, columns]
    pooled = (draws @ blocks.reshape(len(blocks), -1)).reshape(n_draws, *blocks.shape[1:])
    values = spearman_of_tables(pooled)
    values = values[np.isfinite(values)]
    if len(values) < n_draws // 2:
        return float("nan"), float("nan")
    tail = stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 - level) / 2, n - 1))
    # The small tables are coarser than the score's: only their spread is used, around rho.
    shift = rho - float(spearman_of_tables(blocks.sum(0)))
    low, high = np.quantile(values, [tail, 1 - tail]) + shift
    return float(max(low, -1.0)), float(min(high, 1.0))


def circular_shift_statistic(
    distance_rank: Float[Tensor, "n"],
    dominant_level: Float[Tensor, "head n"],
    offset: Int[Tensor, "head draw"],
) -> tuple[Float[Tensor, "head"], Float[Tensor, "head draw"]]:
    """Sum of (distance rank x D level) over one query's keys: as it is, and with D shifted.

    A circular shift keeps the row's own smoothness and breaks its tie to distance. All ``n``
    shifts come from one FFT; ``offset`` (modulo n) picks those that are wanted.
    """
    n = dominant_level.shape[-1]
    spectrum = torch.fft.rfft(distance_rank.double()).conj() * torch.fft.rfft(
        dominant_level.double()
    )
    shifted = torch.fft.irfft(spectrum, n=n)
    return shifted[:, 0], shifted.gather(1, offset % n)


def shift_p_value(
    observed: Float[Tensor, "head"], surrogates: Float[Tensor, "head draw"]
) -> Float[np.ndarray, "head"]:
    """One-sided p-value that D grows with distance: ``(1 + #surrogates >= observed) / (1 + n)``.

    Phipson & Smyth 2010: a Monte Carlo p-value is never zero.
    """
    tolerance = 1e-12 * surrogates.abs().amax(1, keepdim=True)
    at_least = (surrogates >= observed[:, None] - tolerance).sum(1)
    return ((1 + at_least) / (1 + surrogates.shape[1])).double().cpu().numpy()


def benjamini_hochberg(p: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """p-values corrected for their number (Benjamini & Hochberg 1995); NaN stays NaN."""
    out = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    if known.any():
        out[known] = stats.false_discovery_control(p[known])
    return out


def chance_overlap(n: int, k: int, j: int, overlap: int) -> tuple[float, float]:
    """Expected overlap of two random choices of ``k`` and ``j`` among ``n``, and P(at least it)."""
    law = stats.hypergeom(n, k, j)
    return float(law.mean()), float(law.sf(overlap - 1))

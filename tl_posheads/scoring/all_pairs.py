"""Exact Spearman's rho over all query-key pairs of a text of any length, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_posheads.rotary.contributions import PairVectors, Scale, evenly, farthest, rows_of
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.rotary.remapping import pair_vectors
from tl_posheads.statistics.ranks import ordered_midranks

Weighting = Literal["pair", "distance"]

_HELD = 1 << 24  # values of D that are ranked at a time


def n_visible(n_pos: int, window: int | None) -> int:
    """Number of query-key pairs under causal attention, without a token with itself."""
    longest = farthest(n_pos, window)
    return longest * n_pos - longest * (longest + 1) // 2


def spearman_of_all(
    rot_q: Float[Tensor, "pos head d_head"],
    rot_k: Float[Tensor, "pos kv_head d_head"],
    geometry: LayerGeometry,
    *,
    scale: Scale,
    weighting: Weighting,
) -> Float[Tensor, " head"]:
    """Exact Spearman's rho over all query-key pairs under causal attention, in bounded memory.

    Processes as many heads at a time as fit into 17 million values of D. A single head with more
    (texts of more than 5,792 tokens) is recomputed for each of several ranges of D.

    Memory: about 1.8 GB. Time: quadratic in the length up to 5,792 tokens, of fourth order beyond.
    """
    n_pos, n = rot_q.shape[0], n_visible(rot_q.shape[0], geometry.window)
    longest, device = farthest(n_pos, geometry.window), rot_q.device
    apart = torch.arange(1, longest + 1, device=device)
    weight = torch.ones(longest, dtype=torch.float64, device=device)
    if weighting == "distance":
        weight = 1.0 / (n_pos - apart).double()
    share = weight * (n_pos - apart)
    rank = share.cumsum(0) - share / 2
    by_distance = torch.stack([weight, rank - (rank @ share) / share.sum()])
    rows, step = torch.arange(1, n_pos, device=device), max(1, _HELD // n)
    found = []
    for start in range(0, geometry.n_heads, step):
        heads = list(range(start, min(start + step, geometry.n_heads)))
        vectors = pair_vectors(rot_q, rot_k, geometry, heads=heads, scale=scale)
        splits = [-math.inf, *_splits(vectors, n_pos, geometry.window), math.inf]
        sums = torch.zeros(4, len(heads), dtype=torch.float64, device=device)
        for low, high in pairwise(splits):
            _add_range(sums, rows_of(vectors, rows, geometry.window), low, high, by_distance)
        total, first, second, product = sums
        spread = second / total - (first / total) ** 2
        over = (share * by_distance[1] ** 2).sum() / share.sum()
        rho = product / total / (spread * over).sqrt()
        found.append(rho.masked_fill(spread < 1e-13 * total**2, float("nan")))
    return torch.cat(found)


def _splits(vectors: PairVectors, n_pos: int, window: int | None) -> list[float]:
    """Thresholds that split one head's values of D into ranges small enough to rank."""
    n = n_visible(n_pos, window)
    if n * vectors.n_heads <= _HELD:
        return []
    rows = evenly(n_pos, 16, vectors.q.device)
    some = torch.cat([d[:, valid].flatten() for d, _, valid, _ in rows_of(vectors, rows, window)])
    at = torch.linspace(0, len(some) - 1, 2 + n // _HELD * 2)[1:-1].long()
    splits: list[float] = some.sort().values[at].unique().tolist()
    return splits


def _add_range(
    sums: Float[Tensor, "four head"],
    chunks: Iterator[tuple[Tensor, ...]],
    low: float,
    high: float,
    by_distance: Float[Tensor, "two distance"],
) -> None:
    """Add weight, rank, squared rank and rank times distance rank of all D in [low, high).

    ``low`` itself, which many pairs may share, is counted without being stored. More than one head
    is allowed only where the range covers all values.
    """
    values, distances = [], []
    at_low = torch.zeros(2, dtype=torch.float64, device=sums.device)
    for dominant, distance, valid, _ in chunks:
        d, apart = dominant[:, valid], distance[valid]
        if low > -math.inf or high < math.inf:
            weight, y = by_distance[:, apart[d[0] == low] - 1]
            at_low += torch.stack([weight.sum(), (weight * y).sum()])
            inside = (d[0] > low) & (d[0] < high)
            d, apart = d[:, inside], apart[inside]
        values.append(d)
        distances.append(apart)
    weight, y = by_distance[:, torch.cat(distances) - 1]
    middle = sums[0] + at_low[0] / 2
    even = None if bool((by_distance[0] == 1).all()) else weight
    y = weight * y
    sums[1] += middle * at_low[0]
    sums[2] += middle**2 * at_low[0]
    sums[3] += middle * at_low[1]
    # Head by head: ranking takes ten times the memory of the ranked values.
    for sum_, d in zip(sums.T, torch.cat(values, 1), strict=True):
        order, rank = ordered_midranks(d, even)
        rank += sum_[0] + at_low[0]
        own = torch.ones_like(rank) if even is None else even[order]
        sum_[1:] += torch.stack([rank @ own, rank.square() @ own, rank @ y[order]])
    sums[0] += at_low[0] + weight.sum()

"""One text and layer measured for the atlas: means of vectors, and drawn query-key pairs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.rotary.contributions import farthest, scale_factor
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.scoring.draws import (
    DocumentDraws,
    Product,
    QKPairs,
    Settings,
    distances_met,
    draw_pairs,
    products,
)
from tl_posheads.studies.atlas.needed import needed_order
from tl_posheads.studies.atlas.vectors import VectorMeans, separation, slow_dimensions, slow_share

BY_PAIR = (
    "usage",
    "realised",
    "concentration_q",
    "concentration_k",
    "weight_near",
    "weight_far",
    "needed_rank",
    "needed_error",
    "mean_product_real",
    "mean_product_imag",
)
BY_HEAD = ("separation", "slow_norm_q", "slow_norm_k")
BY_DISTANCE = ("distance", "mean_curve", "score")
_PER_OCTAVE = 2  # bins of distance
_PER_BIN = 64  # pairs drawn in each


def bin_edges(longest: int) -> Int[np.ndarray, " edge"]:
    """First distances of half-octave bins, and the distance after the last bin.

    Example:
        >>> bin_edges(12).tolist()
        [1, 2, 3, 4, 6, 8, 11, 13]
    """
    octaves = np.arange(0, math.log2(longest) + 1, 1 / _PER_OCTAVE)
    starts = np.unique(np.round(2**octaves).astype(np.int64))
    return np.append(starts[starts <= longest], longest + 1)


@dataclass(frozen=True, eq=False)
class Measured:
    """Measurements of one layer on one text; float64, NaN where there is nothing.

    Attributes:
        by_pair: of :data:`BY_PAIR`, every rotary pair.
        by_head: of :data:`BY_HEAD`.
        by_distance: of :data:`BY_DISTANCE`, every bin of distance.
    """

    by_pair: Float[Tensor, "measure head pair"]
    by_head: Float[Tensor, "measure head"]
    by_distance: Float[Tensor, "measure head bin"]


class AtlasDraws:
    """Query-key pairs of one text: those of its scores, and some in every bin of distance.

    Args:
        document: its name; with the seed it decides what is drawn.
        n_pos: its positions, those skipped not counted.
        edges: of the bins, of :func:`bin_edges`.
    """

    def __init__(
        self, document: str, n_pos: int, settings: Settings, edges: Int[np.ndarray, " edge"]
    ) -> None:
        self.settings, self.n_pos, self.n_bins = settings, n_pos, len(edges) - 1
        self._of_scores = DocumentDraws(document, n_pos, settings)
        self._document, self._edges = document, edges
        self._known: dict[tuple[int, torch.device], tuple[QKPairs, Tensor]] = {}

    def groups(self, window: int | None, device: torch.device) -> tuple[QKPairs, QKPairs, QKPairs]:
        """Pairs like all that the layer sees; 1 or 2 tokens apart; of the farthest octave."""
        draw = self._of_scores.within(window, device)
        q_pos, k_pos = (x.split(draw.sizes) for x in draw.qk_pairs)
        some, near, far = (QKPairs(*x) for x in zip(q_pos, k_pos, strict=True))
        return some, near, far

    def binned(self, window: int | None, device: torch.device) -> tuple[QKPairs, Int[Tensor, " n"]]:
        """Pairs of every bin that the layer sees, and each one's bin."""
        longest = farthest(self.n_pos, window)
        key = (longest, device)
        if key not in self._known:
            name = hashlib.sha256(self._document.encode()).digest()
            # The prefix makes this random stream independent of the scores' draws.
            generator = np.random.default_rng([1, self.settings.seed, *name])
            drawn, bins = [], []
            for number, (start, stop) in enumerate(zip(self._edges, self._edges[1:], strict=False)):
                if start > longest:
                    break
                last = min(int(stop) - 1, longest)
                found, _ = draw_pairs(self.n_pos, int(start), last, _PER_BIN, "pair", generator)
                drawn.append(found)
                bins += [number] * len(found.q_pos)
            pairs = QKPairs(*(torch.cat(x).to(device) for x in zip(*drawn, strict=True)))
            self._known[key] = pairs, torch.tensor(bins, device=device)
        return self._known[key]


def measure_layer(
    rot_q: Float[Tensor, "pos head d_head"],
    rot_k: Float[Tensor, "pos kv_head d_head"],
    geometry: LayerGeometry,
    draws: AtlasDraws,
    *,
    needed: bool = False,
) -> Measured:
    """A layer's measures of one text, without the positions that are skipped.

    Memory: some arrays of 512 positions, and some of 1 MB; with ``needed`` an array
    ``[draws, head, pair]`` in float32.
    """
    settings, window, device = draws.settings, geometry.window, rot_q.device
    factor = scale_factor(settings.scale, geometry)
    first = settings.skip_first
    queries = VectorMeans.of(rot_q, geometry, first=first)
    keys = VectorMeans.of(rot_k, geometry, first=first).of_heads(geometry.kv_head)
    product = queries.centre * keys.centre.conj() * factor
    usage = queries.length * keys.length * factor
    some, near, far = draws.groups(window, device)

    def looked_at(pairs: QKPairs) -> Iterator[Product]:
        return (x for _, x in products(rot_q, rot_k, geometry, pairs, settings.scale))

    realised, change = torch.zeros_like(usage), []
    for part in looked_at(some):
        there = part.contributions()
        realised += there.abs().sum(0, dtype=torch.float64) / len(some.q_pos)
        if needed:
            change.append(there - _unrotated(part))
    rank, error = torch.full_like(usage, math.nan), torch.full_like(usage, math.nan)
    if needed and geometry.is_rotation:
        rank, error = needed_order(torch.cat(change))
    weights = []
    for pairs in (near, far):
        parts = [x.contributions().double().softmax(-1).sum(0) for x in looked_at(pairs)]
        weights.append(torch.stack(parts).sum(0) / len(pairs.q_pos))
    values = [usage, realised / usage.masked_fill(usage == 0, math.nan)]
    values += [queries.concentration, keys.concentration, *weights, rank, error]
    slow = slow_dimensions(geometry, draws.n_pos + first)
    shares = [slow_share(x.dimension_norms, slow) for x in (queries, keys)]
    return Measured(
        torch.stack([*values, product.real, product.imag]).cpu(),
        torch.stack([separation(queries, keys), *shares]).cpu(),
        _by_distance(rot_q, rot_k, geometry, draws, product).cpu(),
    )


def _unrotated(part: Product) -> Float[Tensor, "n head pair"]:
    """Contributions of the contents at distance 0, that is without rotation."""
    factor = distances_met(part.qk_pairs, part.geometry)[1]
    nothing = torch.zeros(1, 1, 1, dtype=torch.float64, device=part.real.device)
    return part.turned_to(nothing, factor)


def _by_distance(
    rot_q: Tensor,
    rot_k: Tensor,
    geometry: LayerGeometry,
    draws: AtlasDraws,
    mean_product: Tensor,
) -> Float[Tensor, "measure head bin"]:
    """In every bin: mean distance, what the means of queries and keys give there, and scores."""
    pairs, bins = draws.binned(geometry.window, rot_q.device)
    n_heads = geometry.n_heads
    sums = torch.zeros(
        len(BY_DISTANCE), draws.n_bins, n_heads, dtype=torch.float64, device=rot_q.device
    )
    for chunk, part in products(rot_q, rot_k, geometry, pairs, draws.settings.scale):
        distance, factor = distances_met(part.qk_pairs, geometry)
        angle = distance * geometry.inv_freq.to(distance.device)
        cos, sin = angle.cos(), angle.sin()
        if factor is not None:
            cos, sin = cos * factor, sin * factor
        curve = torch.einsum("nhm,hm->nh", cos, mean_product.real)
        curve -= torch.einsum("nhm,hm->nh", sin, mean_product.imag)
        found = part.contributions().sum(-1, dtype=torch.float64)
        apart = part.qk_pairs.distance[:, None].expand(-1, n_heads)
        for row, value in zip(sums, (apart, curve, found), strict=True):
            row.index_add_(0, bins[chunk], value.double())
    count = torch.bincount(bins, minlength=draws.n_bins).double()
    return (sums / count.masked_fill(count == 0, math.nan)[:, None]).transpose(1, 2)

"""Counts of one layer's query-key pairs that add up: over documents, batches and machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.contributions import PairVectors, rotate_by
from tl_posheads.errors import PosheadsError
from tl_posheads.geometry import LayerGeometry
from tl_posheads.remapping import pair_vectors
from tl_posheads.statistics import DominantGrid, circular_shift_statistic, distance_edges

Weighting = Literal["all", "per_distance"] | int

N_DRAWS = 999  # shifted surrogates
NULL_ROWS = 64  # queries of a document whose rows are shifted
GEOMETRY_ROWS = 256  # queries of a document whose permuted rows are counted
N_BLOCKS = 16  # stretches of positions that few documents are cut into, together
FEW_DOCUMENTS = 8
POOL = 8  # cells a side that the small tables of the bootstrap put together
N_BUCKETS = 64  # blocks of the bootstrap at most: more documents share them
_N_TENSORS = 8  # fields of LayerTable that are one tensor
_NULL_KEYS = 2048  # keys of a row that the shifts see; of longer texts every second, third ...
_SAMPLE = 1024  # values of D per head and document kept for another grid
_CHUNK = 1 << 19  # elements of D at a time: its arrays then stay near the cache


@dataclass(frozen=True)
class Settings:
    """What is counted, the same for every layer and document.

    Attributes:
        pairs: weighting, as in ``score_heads``.
        exact: keep every D and distance, for exact ranks.
        seed: of permutation, shifts and draws.
        n_blocks: stretches that a document is cut into for the bootstrap.
    """

    pairs: Weighting = "all"
    exact: bool = False
    seed: int = 0
    n_blocks: int = N_BLOCKS


@dataclass
class LayerTable:
    """What is kept of one layer; ``merge`` adds another's.

    Attributes:
        counts: pairs in cells of D bin and distance bin, ``[head, d_bin, x_bin]``; with
            ``pairs="per_distance"`` their weights, float64.
        geometry_counts: the same after the content was permuted, on up to 256 queries a text.
        blocks: document -> small tables of its blocks of queries and keys, ``[block, head, d, x]``.
        null_observed: the shift statistic as it is, ``[head]``.
        null_draws: the same of every surrogate, ``[head, draw]``.
        sample: some values of D, ``[head, n]``.
        longest: the longest distance counted.
        n_documents: texts counted.
        n_pairs: pairs counted, of every head.
        lists: every distance and D where exact ranks are wanted, ``[1 or head, n]``, ``[head, n]``.
    """

    counts: Int[Tensor, "head d_bin x_bin"] | Float[Tensor, "head d_bin x_bin"]
    geometry_counts: Int[Tensor, "head d_bin x_bin"]
    null_observed: Float[Tensor, "head"]
    null_draws: Float[Tensor, "head draw"]
    sample: Float[Tensor, "head n"]
    longest: Int[Tensor, ""]
    n_documents: Int[Tensor, ""]
    n_pairs: Int[Tensor, ""]
    blocks: dict[str, Int[Tensor, "block head d x"]] = field(default_factory=dict)
    lists: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def merge(self, other: LayerTable) -> None:
        """Add another table of the same layer and grid, whatever its texts' lengths."""
        self.counts = _add(self.counts, other.counts)
        self.geometry_counts = _add(self.geometry_counts, other.geometry_counts)
        self.null_observed = self.null_observed + other.null_observed
        self.null_draws = self.null_draws + other.null_draws
        self.sample = torch.cat([self.sample, other.sample], dim=1)
        self.longest = torch.maximum(self.longest, other.longest)
        self.n_documents = self.n_documents + other.n_documents
        self.n_pairs = self.n_pairs + other.n_pairs
        self._add_blocks(other.blocks)
        self.lists += other.lists

    def _add_blocks(self, others: dict[str, Tensor]) -> None:
        merged = dict(self.blocks)
        for key, block in others.items():
            merged[key] = _add(merged[key], block) if key in merged else block
        if len(merged) >= FEW_DOCUMENTS:  # documents are the blocks from here on
            merged = {key: block.sum(0, keepdim=True) for key, block in merged.items()}
        if len(merged) > N_BUCKETS:  # and from here on, handfuls of documents
            folded: dict[str, Tensor] = {}
            for key, block in merged.items():
                name = key if key.startswith("~") else f"~{int(key[:15], 16) % N_BUCKETS}"
                folded[name] = _add(folded[name], block) if name in folded else block
            merged = folded
        self.blocks = merged

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything under flat names, for one safetensors file."""
        out = {f.name: getattr(self, f.name) for f in fields(self)[:_N_TENSORS]}
        out |= {f"blocks.{key}": block for key, block in self.blocks.items()}
        for i, (distance, dominant) in enumerate(self.lists):
            out |= {f"lists.{i}.distance": distance, f"lists.{i}.dominant": dominant}
        return {name: tensor.cpu().contiguous() for name, tensor in out.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> LayerTable:
        plain = {f.name: tensors[f.name] for f in fields(cls)[:_N_TENSORS]}
        blocks = {n[7:]: t for n, t in tensors.items() if n.startswith("blocks.")}
        n_lists = sum(n.startswith("lists.") for n in tensors) // 2
        lists = [
            (tensors[f"lists.{i}.distance"], tensors[f"lists.{i}.dominant"]) for i in range(n_lists)
        ]
        return cls(**plain, blocks=blocks, lists=lists)


def _add(a: Tensor, b: Tensor) -> Tensor:
    """Sum of tables whose last axis (distance) may be of different length, and blocks' first."""
    if a.shape == b.shape:
        return a + b
    shape = [max(m, n) for m, n in zip(a.shape, b.shape, strict=True)]
    out = a.new_zeros(shape)
    for part in (a, b):
        out[tuple(slice(0, n) for n in part.shape)] += part
    return out


@dataclass(frozen=True)
class Grids:
    """The D bins of one layer: of its heads as they are, and with permuted content."""

    dominant: DominantGrid
    geometry: DominantGrid


def rows_of(
    vectors: PairVectors, rows: Int[Tensor, "row"], window: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """D of the queries at ``rows``, ascending, in bites of about half a million.

    Yields ``(dominant [head, row, key], distance [row, key], valid [row, key], query [row, key])``,
    where valid are the keys before the query and inside the window. The last key is the one
    before the last row.
    """
    start = 0
    while start < len(rows):
        n_keys = int(rows[-1])
        step = max(1, _CHUNK // max(1, vectors.n_heads * n_keys))
        some = rows[start : start + step]
        start += step
        first_key = 0 if window is None else max(0, int(some[0]) - window + 1)
        keys = slice(first_key, int(some[-1]))
        if keys.stop <= keys.start:
            continue
        key_pos = torch.arange(keys.start, keys.stop, device=rows.device)
        distance = some[:, None] - key_pos
        valid = distance >= 1
        if window is not None:
            valid &= distance < window
        if bool(valid.any()):
            yield (
                vectors.dominant_rows(some, keys),
                distance,
                valid,
                some[:, None].expand(valid.shape),
            )


def evenly(n_pos: int, n: int, device: torch.device) -> Int[Tensor, "row"]:
    """Up to ``n`` query positions with at least one key before them, the last one included."""
    if n_pos - 1 <= n:
        return torch.arange(1, n_pos, device=device)
    return torch.linspace(1, n_pos - 1, n, dtype=torch.float64, device=device).round().long()


def sample_of(vectors: PairVectors, window: int | None, n_rows: int = NULL_ROWS) -> Tensor:
    """D on some rows, flat: what a grid is made of, ``[head, n]``."""
    rows = evenly(vectors.q.shape[-1], n_rows, vectors.q.device)
    return torch.cat([d[:, valid] for d, _, valid, _ in rows_of(vectors, rows, window)], dim=1)


def document_seed(settings: Settings, document: str) -> np.random.Generator:
    """The same document draws the same numbers, whatever came before it."""
    return np.random.default_rng([settings.seed, int(document[:15], 16)])


def permuted_content(
    rot_q: Tensor, rot_k: Tensor, geometry: LayerGeometry, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose content changed places: unrotated, permuted, rotated at its place."""
    n = rot_q.shape[0]
    order = torch.as_tensor(generator.permutation(n), device=rot_q.device)
    steps = torch.arange(n, device=rot_q.device) - order
    precision = torch.promote_types(rot_q.dtype, torch.float32)
    q, k = (x.to(precision)[order] for x in (rot_q, rot_k))
    return rotate_by(q, steps, geometry), rotate_by(k, steps, geometry)


class _Counter:
    """Adds pairs to cells of D bin by distance bin, and to a coarse copy per block of positions.

    Block ``(a, b)`` holds the queries of stretch ``a`` and the keys of stretch ``b <= a``; it is
    number ``a (a + 1) / 2 + b``.
    """

    def __init__(
        self, grid: DominantGrid, longest: int, cuts: Sequence[int], device: torch.device,
        weight_of: Tensor | None = None,
    ) -> None:  # fmt: skip
        edges = distance_edges(longest)
        heads, bins, n_x = grid.edges.shape[0], grid.n_bins, len(edges)
        self.grid, self.weight_of = grid, weight_of
        self.x_of = torch.bucketize(torch.arange(longest + 1), edges, right=True).sub(1).to(device)
        stretch = torch.bucketize(torch.arange(cuts[-1]), torch.tensor(cuts[1:-1]), right=True)
        self.stretch, n_stretches = stretch.to(device), len(cuts) - 1
        kind = torch.long if weight_of is None else torch.double
        self.counts = torch.zeros(heads, bins, n_x, dtype=kind, device=device)
        n_blocks, small_d, small_x = (
            n_stretches * (n_stretches + 1) // 2, -(-bins // POOL), -(-n_x // POOL)
        )  # fmt: skip
        self.blocks = torch.zeros(n_blocks, heads, small_d, small_x, dtype=kind, device=device)
        self.head = torch.arange(heads, device=device)[:, None]

    def add(self, dominant: Tensor, distance: Tensor, query: Tensor) -> None:
        """Count ``dominant [head, n]`` at distance and query of shape ``[n]`` or ``[head, n]``."""
        heads, bins, n_x = self.counts.shape
        d, x = self.grid.bins(dominant), self.x_of[distance]
        weights = None
        if self.weight_of is not None:
            weights = self.weight_of[distance].expand(d.shape).flatten()
        code = (self.head * bins + d) * n_x + x
        self.counts += _bincount(code, weights, self.counts)
        a, b = self.stretch[query], self.stretch[query - distance]
        block = a * (a + 1) // 2 + b
        _, _, small_d, small_x = self.blocks.shape
        code = ((block * heads + self.head) * small_d + d // POOL) * small_x + x // POOL
        self.blocks += _bincount(code, weights, self.blocks)

    def small_blocks(self) -> Tensor:
        kind = torch.float32 if self.blocks.is_floating_point() else torch.int32
        return self.blocks.to(kind).cpu()


def _bincount(code: Tensor, weights: Tensor | None, like: Tensor) -> Tensor:
    return torch.bincount(code.flatten(), weights, minlength=like.numel()).view(like.shape)


def stretches(n_pos: int, n: int) -> list[int]:
    """Cuts of a text into stretches whose queries see equally many keys: later ones are shorter."""
    share = np.sqrt(np.linspace(0, 1, n + 1))
    return sorted({round(float(x) * n_pos) for x in share})


def count_document(
    rot_q: Float[Tensor, "pos head d_head"],
    rot_k: Float[Tensor, "pos kv_head d_head"],
    geometry: LayerGeometry,
    document: str,
    settings: Settings,
    grids: Grids | None,
) -> tuple[LayerTable, Grids]:
    """Count one text's pairs in one layer. Without grids, they are made from this text.

    Peak memory beyond q and k, for the default weighting: 25 MB of bites and the tables,
    ``16 * head * 144 * (64 + 32 * log2(pos / 64))`` bytes; linear in ``pos``. With
    ``settings.exact`` 8 bytes for every pair and head more.

    Raises:
        PosheadsError: fewer than two positions.
    """
    n_pos, device = rot_q.shape[0], rot_q.device
    if n_pos < 2:
        raise PosheadsError(
            f"a text of {n_pos} positions was given; a pair of tokens needs at least 2"
        )
    # Exact ranks are those of D itself, not of its rounding: heads that hardly move have pairs
    # that only float64 can tell apart.
    precision = torch.float64 if settings.exact else torch.float32
    vectors = pair_vectors(rot_q, rot_k, geometry, precision=precision)
    generator = document_seed(settings, document)
    permuted = pair_vectors(*permuted_content(rot_q, rot_k, geometry, generator), geometry)
    sample = sample_of(vectors, geometry.window)
    if grids is None:
        grids = Grids(
            *(
                DominantGrid.from_sample(values, geometry.n_pairs)
                for values in (sample, sample_of(permuted, geometry.window))
            )
        )
    longest = farthest(n_pos, geometry.window)
    weight_of = None
    if settings.pairs == "per_distance":
        # This text's share; documents of other lengths are balanced when rho is taken.
        weight_of = 1.0 / torch.arange(n_pos, 0, -1, dtype=torch.float64, device=device)
    cuts = stretches(n_pos, settings.n_blocks)
    counter = _Counter(grids.dominant, max(1, longest), cuts, device, weight_of)
    if isinstance(settings.pairs, int):
        lists = _count_sample(vectors, counter, settings.pairs, generator, longest)
    else:
        lists = _count_all(vectors, counter, geometry.window, keep=settings.exact)
    by_geometry = _Counter(grids.geometry, max(1, longest), [0, n_pos], device)
    rows = evenly(n_pos, GEOMETRY_ROWS, device)
    for dominant, distance, valid, query in rows_of(permuted, rows, geometry.window):
        by_geometry.add(dominant[:, valid], distance[valid], query[valid])
    observed, draws = shift_null(vectors, grids.dominant, geometry.window, settings, generator)
    table = LayerTable(
        counts=counter.counts.cpu(),
        geometry_counts=by_geometry.counts.cpu(),
        null_observed=observed.cpu(),
        null_draws=draws.cpu(),
        sample=sample[:, :: max(1, sample.shape[1] // _SAMPLE)].cpu(),
        longest=torch.tensor(max(1, longest)),
        n_documents=torch.tensor(1),
        n_pairs=torch.tensor(_n_pairs(n_pos, longest, settings)),
        blocks={document: counter.small_blocks()},
        lists=lists,
    )
    return table, grids


def _n_pairs(n_pos: int, longest: int, settings: Settings) -> int:
    if isinstance(settings.pairs, int):
        return settings.pairs
    return longest * n_pos - longest * (longest + 1) // 2


def _count_all(
    vectors: PairVectors, counter: _Counter, window: int | None, *, keep: bool
) -> list[tuple[Tensor, Tensor]]:
    distances, dominants = [], []
    rows = torch.arange(1, vectors.q.shape[-1], device=vectors.q.device)
    for dominant, distance, valid, query in rows_of(vectors, rows, window):
        seen, apart = dominant[:, valid], distance[valid]
        counter.add(seen, apart, query[valid])
        if keep:
            distances.append(apart.cpu())
            dominants.append(seen.cpu())
    return [(torch.cat(distances)[None], torch.cat(dominants, dim=1))] if keep else []


def farthest(n_pos: int, window: int | None) -> int:
    """The largest distance between a query and a key that it sees."""
    return n_pos - 1 if window is None else min(n_pos, window) - 1


def draw_pairs(
    vectors: PairVectors, n: int, longest: int, generator: np.random.Generator
) -> tuple[Int[Tensor, "head n"], Int[Tensor, "head n"]]:
    """Distance and query position of pairs drawn for every head: distance first, then position."""
    n_pos, device = vectors.q.shape[-1], vectors.q.device
    distance = generator.integers(1, longest + 1, size=(vectors.n_heads, n))
    q_pos = distance + (generator.random(distance.shape) * (n_pos - distance)).astype(np.int64)
    return torch.as_tensor(distance, device=device), torch.as_tensor(q_pos, device=device)


def _count_sample(
    vectors: PairVectors, counter: _Counter, n: int, generator: np.random.Generator, longest: int
) -> list[tuple[Tensor, Tensor]]:
    apart, query = draw_pairs(vectors, n, longest, generator)
    dominant = vectors.dominant_pairs(query, query - apart)
    counter.add(dominant, apart, query)
    return [(apart.cpu(), dominant.cpu())]


def shift_null(
    vectors: PairVectors,
    grid: DominantGrid,
    window: int | None,
    settings: Settings,
    generator: np.random.Generator,
) -> tuple[Float[Tensor, "head"], Float[Tensor, "head draw"]]:
    """The statistic of the circular-shift null, as it is and for every surrogate.

    Sum over some queries' rows of (rank of distance x level of D), where a level is the share of
    D's distribution below. What a key does to every query alike is taken out first, by its mean:
    rows share their keys, and a few keys of lasting influence would otherwise pass for many rows'
    agreement about distance. A surrogate shifts every row of a text circularly by the same random
    share of its length, so that neighbouring queries, which are alike, stay so.
    """
    n_pos, device = vectors.q.shape[-1], vectors.q.device
    rank_weight = torch.ones(n_pos, dtype=torch.float64, device=device)
    if settings.pairs == "all":
        rank_weight = torch.arange(n_pos, 0, -1, dtype=torch.float64, device=device)
    rank = (rank_weight.cumsum(0) - rank_weight / 2) / rank_weight.sum()
    rows = evenly(n_pos, NULL_ROWS, device)
    step = -(-n_pos // _NULL_KEYS)
    n_keys = -(-n_pos // step)
    level = torch.zeros(vectors.n_heads, len(rows), n_keys, dtype=torch.float64, device=device)
    seen = torch.zeros(len(rows), n_keys, dtype=torch.bool, device=device)
    done = 0
    for dominant, distance, valid, query in rows_of(vectors, rows, window):
        key = query[0] - distance[0]
        kept = key % step == 0
        part = dominant[..., kept].contiguous()
        levels = grid.level.gather(1, grid.bins(part.flatten(1))).view(part.shape)
        at = slice(done, done := done + part.shape[1])
        level[:, at, key[kept] // step] = levels
        seen[at, key[kept] // step] = valid[:, kept]
    n_rows = seen.sum(0)
    mean = (level * seen).sum(1) / n_rows.clamp_min(1)
    # A mean of few rows eats part of their spread; the factor gives it back.
    spread = (n_rows / (n_rows - 1).clamp_min(1)).sqrt()
    level = (level - mean[:, None]) * spread
    seen &= n_rows >= 3
    observed = torch.zeros(vectors.n_heads, dtype=torch.float64, device=device)
    draws = torch.zeros(vectors.n_heads, N_DRAWS, dtype=torch.float64, device=device)
    share = torch.as_tensor(generator.random(N_DRAWS), device=device)
    for r, row in enumerate(rows.tolist()):
        keys = torch.nonzero(seen[r]).flatten()
        if len(keys) < 2:
            continue
        offset = (share * len(keys)).long().expand(vectors.n_heads, -1)
        apart = row - keys * step
        one, shifted = circular_shift_statistic(rank[apart - 1], level[:, r, keys], offset)
        observed += one
        draws += shifted
    return observed, draws

"""One text's query-key pairs of one layer, counted: all of them or a draw, and their nulls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.contributions import PairVectors, rotate_by
from tl_posheads.counter import Counter
from tl_posheads.errors import PosheadsError
from tl_posheads.geometry import LayerGeometry
from tl_posheads.kernel import CannotCompile, Cells, compiled_cells
from tl_posheads.remapping import pair_vectors
from tl_posheads.statistics import DominantGrid, circular_shift_statistic
from tl_posheads.tables import Grids, LayerTable, Settings

N_DRAWS = 999  # shifted surrogates
NULL_ROWS = 64  # queries of a document whose rows are shifted
GEOMETRY_ROWS = 256  # queries of a document whose permuted rows are counted
_NULL_KEYS = 2048  # keys of a row that the shifts see; of longer texts every second, third ...
_SAMPLE_KEYS = 1024  # of those rows, at most
_SAMPLE = 1024  # values of D per head and document kept for another grid
_CHUNK = 1 << 19  # elements of D at a time: its arrays then stay near the cache


def rows_of(
    vectors: PairVectors, rows: Int[Tensor, "row"], window: int | None, every: int = 1
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """D of the queries at ``rows``, ascending, and every so many keys, in bites of half a million.

    Yields ``(dominant [head, row, key], distance [row, key], valid [row, key], query [row, key])``,
    where valid are the keys before the query and inside the window. The last key is the one
    before the last row.
    """
    start = 0
    while start < len(rows):
        n_keys = -(-int(rows[-1]) // every)
        step = max(1, _CHUNK // max(1, vectors.n_heads * n_keys))
        some = rows[start : start + step]
        start += step
        first_key = 0 if window is None else max(0, int(some[0]) - window + 1)
        keys = slice(-(-first_key // every) * every, int(some[-1]), every)
        if keys.stop <= keys.start:
            continue
        key_pos = torch.arange(keys.start, keys.stop, every, device=rows.device)
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
    n_pos = vectors.q.shape[-1]
    rows, every = evenly(n_pos, n_rows, vectors.q.device), -(-n_pos // _SAMPLE_KEYS)
    bites = rows_of(vectors, rows, window, every)
    return torch.cat([d[:, valid] for d, _, valid, _ in bites], dim=1)


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
    counter = Counter(grids.dominant, max(1, longest), cuts, device, weight_of)
    by_geometry = Counter(grids.geometry, max(1, longest), [0, n_pos], device)
    every, window = torch.arange(1, n_pos, device=device), geometry.window
    lists: list[tuple[Tensor, Tensor]] = []
    if isinstance(settings.pairs, int):
        lists = _count_sample(vectors, counter, settings.pairs, generator, longest)
        _count_sample(permuted, by_geometry, settings.pairs, generator, longest)
    else:
        if settings.exact:
            lists = _count_and_list(vectors, counter, every, window)
        else:
            count_rows(vectors, counter, every, window)
        count_rows(permuted, by_geometry, evenly(n_pos, GEOMETRY_ROWS, device), window)
    observed, draws = shift_null(vectors, grids.dominant, geometry.window, settings, generator)
    table = LayerTable(
        counts=counter.counts.cpu(),
        geometry_counts=by_geometry.counts.cpu(),
        null_observed=observed.cpu(),
        null_draws=draws.cpu(),
        longest=torch.tensor(max(1, longest)),
        n_documents=torch.tensor(1),
        n_pairs=torch.tensor(_n_pairs(n_pos, longest, settings)),
        samples={document: sample[:, :: max(1, sample.shape[1] // _SAMPLE)].cpu()},
        blocks={document: counter.small_blocks()},
        lists=lists,
    )
    return table, grids


def _n_pairs(n_pos: int, longest: int, settings: Settings) -> int:
    if isinstance(settings.pairs, int):
        return settings.pairs
    return longest * n_pos - longest * (longest + 1) // 2


def _fused(vectors: PairVectors) -> Cells | None:
    """The compiled kernel, where it counts the same: not at positions that a method moved."""
    if type(vectors) is not PairVectors or vectors.q.dtype != torch.float32:
        return None
    n_pos = vectors.q.shape[-1]
    work = vectors.n_pairs * vectors.n_heads * n_pos * n_pos // 2
    return compiled_cells(work, vectors.q.device)


def count_rows(
    vectors: PairVectors, counter: Counter, rows: Int[Tensor, "row"], window: int | None
) -> None:
    """Count all pairs of the queries at ``rows``, ascending, from 1 on."""
    if (cells := _fused(vectors)) is not None:
        with suppress(CannotCompile):
            counter.add_tiles(vectors, rows, window, cells)
            return
        warnings.warn(
            "torch.compile failed, so that pairs are counted some five times more slowly; is "
            "there a C++ compiler?",
            RuntimeWarning,
            stacklevel=2,
        )
    for dominant, distance, valid, query in rows_of(vectors, rows, window):
        counter.add(dominant[:, valid], distance[valid], query[valid])


def _count_and_list(
    vectors: PairVectors, counter: Counter, rows: Int[Tensor, "row"], window: int | None
) -> list[tuple[Tensor, Tensor]]:
    """Count, and keep every pair's distance ``[1, n]`` and D ``[head, n]`` besides."""
    distances, dominants = [], []
    for dominant, distance, valid, query in rows_of(vectors, rows, window):
        seen, apart = dominant[:, valid], distance[valid]
        counter.add(seen, apart, query[valid])
        distances.append(apart.cpu())
        dominants.append(seen.cpu())
    return [(torch.cat(distances)[None], torch.cat(dominants, dim=1))]


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
    vectors: PairVectors, counter: Counter, n: int, generator: np.random.Generator, longest: int
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
    for dominant, distance, valid, query in rows_of(vectors, rows, window, step):
        key = (query[0] - distance[0]) // step
        levels = grid.level.gather(1, grid.bins(dominant.flatten(1))).view(dominant.shape)
        at = slice(done, done := done + dominant.shape[1])
        level[:, at, key] = levels
        seen[at, key] = valid
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

"""Cells that query-key pairs are counted in: D bin by distance bin, and small ones per block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.contributions import PairVectors
from tl_posheads.kernel import BAND, LOG2_E, TILE, Cells, centred
from tl_posheads.statistics import DominantGrid, distance_edges

_POOL_BITS = 3
POOL = 1 << _POOL_BITS  # cells a side that the small tables of the bootstrap put together
_CELLS = 1 << 21  # cells' numbers of tiles that are counted together


class Counter:
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

    def add_tiles(
        self,
        vectors: PairVectors,
        rows: Int[Tensor, "row"],
        window: int | None,
        cells: Cells,
    ) -> None:
        """Count all pairs of the queries at ``rows``, ascending, tile by tile, with the kernel."""
        n_pos, device = vectors.q.shape[-1], vectors.q.device
        n_heads = vectors.n_heads
        q, k = _tiles(vectors.q[..., rows] * LOG2_E), _tiles(vectors.k)
        q = rearrange(q, "tile h c p (band row) -> tile band h c p row", row=BAND).contiguous()
        pad = torch.nn.functional.pad
        query = pad(rows, (0, -len(rows) % TILE), value=-1).view(-1, TILE // BAND, 1, BAND, 1)
        key = torch.arange(len(k) * TILE, device=device).view(-1, TILE)
        # 32-bit numbers: twice as many fit into a vector, and the largest table has millions.
        key_block = pad(self.stretch.int(), (0, len(k) * TILE - n_pos)).view(-1, TILE)
        query_block = key_block.flatten()[query]
        query_block = query_block * (query_block + 1) // 2
        sizes = (*self.counts.shape[1:], *self.blocks.shape[2:])
        shape = tuple(torch.tensor(n, dtype=torch.int32) for n in sizes)
        edges, pair = centred(self.grid.edges, vectors.n_pairs)
        n_together = max(1, _CELLS // (n_heads * TILE * TILE))
        codes = torch.zeros(
            2, n_together, TILE // BAND, n_heads, BAND, TILE, dtype=torch.int32, device=device
        )
        weights: list[Tensor] = []
        n_waiting = 0
        for i, some in enumerate(rows.split(TILE)):
            first = 0 if window is None else max(0, int(some[0]) - window + 1)
            for j in range(first // TILE, (int(some[-1]) - 1) // TILE + 1):
                x, weight = self._places(query[i] - key[j], window)
                block = (query_block[i], key_block[j])
                cells(q[i], k[j], pair, edges, x, block, shape, _POOL_BITS, codes[:, n_waiting])
                n_waiting += 1
                if weight is not None:
                    weights.append(weight)
                if n_waiting == n_together:
                    self._count(codes, weights)
                    n_waiting = 0
        self._count(codes[:, :n_waiting], weights)

    def _places(
        self, distance: Int[Tensor, "band 1 row key"], window: int | None
    ) -> tuple[Int[Tensor, "band 1 row key"], Float[Tensor, "band 1 row key"] | None]:
        """Distance bins, -1 where attention doesn't see, and weights of a tile's pairs."""
        seen = distance >= 1
        if window is not None:
            seen &= distance < window
        known = distance.clamp_(0, len(self.x_of) - 1)
        x = torch.where(seen, self.x_of[known], -1).int()
        return x, None if self.weight_of is None else self.weight_of[known]

    def _count(self, codes: Int[Tensor, "2 tile band head row key"], weights: list[Tensor]) -> None:
        """Add tiles' pairs; ``weights`` are emptied."""
        weight = torch.stack(weights).expand_as(codes[0]).flatten() if weights else None
        weights.clear()
        for code, table in zip(codes, (self.counts, self.blocks)):
            counted = torch.bincount(code.flatten(), weight, minlength=table.numel() + 1)
            table += counted[1:].view(table.shape)

    def small_blocks(self) -> Tensor:
        kind = torch.float32 if self.blocks.is_floating_point() else torch.int32
        return self.blocks.to(kind).cpu()


def _bincount(code: Tensor, weights: Tensor | None, like: Tensor) -> Tensor:
    return torch.bincount(code.flatten(), weights, minlength=like.numel()).view(like.shape)


def _tiles(x: Float[Tensor, "two pair head pos"]) -> Float[Tensor, "tile head two pair place"]:
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % TILE))
    return rearrange(padded, "two pair head (tile place) -> tile head two pair place", place=TILE)\
        .contiguous()  # fmt: skip

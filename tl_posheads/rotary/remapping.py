"""Attention at distances other than the text's own: the mathematics, on plain tensors.

SelfExtend, ReRoPE and Dual Chunk Attention divide query-key pairs into regions, and give queries
and keys other positions in each. A further rotation moves rotated vectors there, so a
:class:`Remapping` describes such a method completely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.rotary.contributions import PairVectors, Scale, expand_keys, turn
from tl_posheads.rotary.precision import widened

if TYPE_CHECKING:
    from tl_posheads.rotary.geometry import LayerGeometry

Move = Callable[[Int[Tensor, "*batch pos"]], Float[Tensor, "*batch pos head pair"]]
"""Maps positions to those that replace them; the axes of head and pair may have size 1."""

_ROWS = 1 << 22  # scores at a time and text: 16 MB in float32


@dataclass(frozen=True)
class Region:
    """The positions that queries and keys of a region get.

    Attributes:
        queries, keys: their new positions; None keeps their own.
        scale: factor on the attention scores by the query's position; None means 1.
    """

    queries: Move | None = None
    keys: Move | None = None
    scale: Callable[[Int[Tensor, "*batch pos"]], Float[Tensor, "*batch pos"]] | None = None

    @property
    def is_plain(self) -> bool:
        return self.queries is None and self.keys is None and self.scale is None


@dataclass(frozen=True)
class Remapping:
    """Regions of query-key pairs, and the positions that each region uses.

    Attributes:
        regions: at least one.
        region: maps query and key positions, broadcast against each other, to the region's number.
        heads: query heads that it applies to; None means all.
        first: position of the first query and key given, where a text's start was cut off.
    """

    regions: tuple[Region, ...]
    region: Callable[[Int[Tensor, "..."], Int[Tensor, "..."]], Int[Tensor, "..."]]
    heads: tuple[int, ...] | None = None
    first: int = 0

    def after(self, first: int) -> Remapping:
        """The same remapping for a text whose first positions were cut off."""
        return replace(self, first=self.first + first)

    def distances(
        self, q_pos: Int[Tensor, " n"], k_pos: Int[Tensor, " n"], n_heads: int
    ) -> tuple[Float[Tensor, "n head pair"], Float[Tensor, "n head pair"] | None]:
        """The remapped token distance between queries and keys at these positions.

        Returns:
            The distance, and the factor on the scores (None means 1); the axes of head and pair may
            have size 1.
        """
        q_at, k_at = ((at + self.first)[:, None, None].double() for at in (q_pos, k_pos))
        number = self.region(q_pos + self.first, k_pos + self.first)[:, None, None]
        distance, factor = q_at - k_at, None
        mine = torch.ones(n_heads, 1, dtype=torch.bool, device=q_pos.device)
        if self.heads is not None:
            mine = torch.zeros_like(mine).index_fill_(
                0, torch.tensor(self.heads, device=q_pos.device), True
            )
        for r, region in enumerate(self.regions):
            if region.is_plain:
                continue
            here = mine & (number == r)
            q = q_at if region.queries is None else region.queries(q_pos + self.first).double()
            k = k_at if region.keys is None else region.keys(k_pos + self.first).double()
            distance = torch.where(here, q - k, distance)
            if region.scale is not None:
                new = region.scale(q_pos + self.first).double()[:, None, None]
                factor = torch.where(here, new, 1.0 if factor is None else factor)
        return distance, factor

    def only(self, heads: Sequence[int]) -> Remapping:
        """The same remapping for a layer reduced to ``heads``, in that order."""
        mine = None
        if self.heads is not None:
            mine = tuple(i for i, head in enumerate(heads) if head in self.heads)
        regions = tuple(
            replace(
                region, queries=_of_heads(region.queries, heads), keys=_of_heads(region.keys, heads)
            )
            for region in self.regions
        )
        return replace(self, heads=mine, regions=regions)


def _of_heads(move: Move | None, heads: Sequence[int]) -> Move | None:
    if move is None:
        return None

    def of_heads(position: Tensor) -> Tensor:
        moved = move(position)
        return moved if moved.shape[-2] == 1 else moved[..., list(heads), :]

    return of_heads


def only_heads(
    geometry: LayerGeometry, rot_k: Float[Tensor, "*batch pos kv_head d_head"], heads: Sequence[int]
) -> tuple[LayerGeometry, Float[Tensor, "*batch pos head d_head"]]:
    """The layer reduced to these heads: its geometry, and one key for each head."""
    keys = rot_k[..., [geometry.kv_head[head] for head in heads], :]
    remapping = None if geometry.remapping is None else geometry.remapping.only(heads)
    return replace(geometry, kv_head=tuple(range(len(heads))), remapping=remapping), keys


def every_pair(q_pos: Int[Tensor, "..."], k_pos: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The ``region`` function of a remapping with a single region."""
    return torch.zeros_like(q_pos - k_pos)


def move_to(
    x: Float[Tensor, "*batch pos head d_head"],
    position: Int[Tensor, "*batch pos"],
    move: Move | None,
    geometry: LayerGeometry,
    heads: tuple[int, ...] | None = None,
) -> Float[Tensor, "*batch pos head d_head"]:
    """Rotated vectors, rotated further to the positions that ``move`` gives them."""
    if move is None:
        return x
    steps = move(position).double() - position[..., None, None].double()
    angle = steps * geometry.inv_freq.to(x.device)
    if heads is not None:
        mine = torch.zeros(x.shape[-2], 1, dtype=angle.dtype, device=x.device)
        mine[list(heads)] = 1
        angle = angle * mine
    return turn(x, angle.cos(), angle.sin(), geometry)


def _moved(
    rot_q: Tensor,
    keys: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    geometry: LayerGeometry,
    remapping: Remapping,
    region: Region,
) -> tuple[Tensor, Tensor]:
    """Queries and keys of one region, one key per head; the queries include ``scale``."""
    q = move_to(rot_q, q_pos, region.queries, geometry, remapping.heads)
    if region.scale is not None:
        factor = region.scale(q_pos).to(q.dtype)[..., None, None]
        if remapping.heads is None:
            q = q * factor
        else:
            q = q.clone()
            q[..., list(remapping.heads), :] *= factor
    return q, move_to(keys, k_pos, region.keys, geometry, remapping.heads)


def remapped_scores(
    rot_q: Float[Tensor, "batch q_pos head d_head"],
    rot_k: Float[Tensor, "batch k_pos kv_head d_head"],
    q_pos: Int[Tensor, "batch q_pos"],
    k_pos: Int[Tensor, "batch k_pos"],
    geometry: LayerGeometry,
) -> Iterator[tuple[slice, Float[Tensor, "batch head rows keys"], Tensor]]:
    """Attention scores under the geometry's remapping, some queries at a time, with softcap.

    They are scaled but not masked, and stop at the last key that the last row can attend to. With
    them comes ``[batch, rows, keys]``: True where the score equals the unmodified model's. Scores
    and rotation use float32 at least, as torch's kernels do: scores of several hundred, which
    query and key biases cause, keep no decimal in bfloat16.

    Memory: a copy of queries and keys for every region, and five times 16 MB of scores per text.
    """
    remapping = geometry.remapping
    assert remapping is not None
    rot_q, keys = widened(rot_q), widened(expand_keys(rot_k, rot_q, geometry))
    # GPT-NeoX and others broadcast one row of positions over the batch.
    q_pos, k_pos = (p.expand(rot_q.shape[0], -1) for p in (q_pos, k_pos))
    vectors = [
        tuple(
            rearrange(x, "batch pos head d -> batch head pos d")
            for x in _moved(rot_q, keys, q_pos, k_pos, geometry, remapping, region)
        )
        for region in remapping.regions
    ]
    n_q, n_k, n_heads = q_pos.shape[1], k_pos.shape[1], rot_q.shape[2]
    plain = torch.tensor([-1, *(r for r, g in enumerate(remapping.regions) if g.is_plain)])
    step = max(1, _ROWS // (n_k * n_heads))
    for start in range(0, n_q, step):
        rows = slice(start, min(n_q, start + step))
        end = n_k - n_q + rows.stop
        at, key_at = q_pos[:, rows, None], k_pos[:, None, :end]
        # Later keys are masked; they should not add a region of their own.
        number = torch.where(at < key_at, -1, remapping.region(at, key_at))
        scores = vectors[0][0].new_zeros(len(q_pos), n_heads, rows.stop - start, end)
        for r, (q, k) in enumerate(vectors):
            here = (number == r)[:, None]
            columns = torch.nonzero(here.any(2)[:, 0].any(0)).flatten()
            if not len(columns):
                continue
            some = slice(int(columns[0]), int(columns[-1]) + 1)
            part = q[:, :, rows] @ k[:, :, some].transpose(-1, -2) * geometry.attention_scale
            scores[..., some] = torch.where(here[..., some], part, scores[..., some])
        if geometry.softcap is not None:
            scores = geometry.softcap * torch.tanh(scores / geometry.softcap)
        yield rows, scores, torch.isin(number, plain.to(number.device))


def remapped_attention(
    rot_q: Float[Tensor, "batch pos head d_head"],
    rot_k: Float[Tensor, "batch pos kv_head d_head"],
    v: Float[Tensor, "batch pos kv_head d_head"],
    position: Int[Tensor, "batch pos"],
    geometry: LayerGeometry,
) -> Float[Tensor, "batch pos head d_head"]:
    """Causal attention under the geometry's remapping, without forming the whole pattern.

    Memory: as :func:`remapped_scores`.
    """
    values = rearrange(expand_keys(v, rot_q, geometry), "batch pos head d -> batch head pos d")
    z = torch.empty_like(values)
    at = torch.arange(rot_q.shape[1], device=rot_q.device)
    for rows, scores, _ in remapped_scores(rot_q, rot_k, position, position, geometry):
        apart = at[rows, None] - at[: rows.stop]
        hidden = apart < 0
        if geometry.window is not None:
            hidden = hidden | (apart >= geometry.window)
        scores = scores.masked_fill(hidden, float("-inf"))
        pattern = scores.softmax(-1).to(v.dtype)
        z[:, :, rows] = pattern @ values[:, :, : rows.stop]
    return rearrange(z, "batch head pos d -> batch pos head d")


def pair_vectors(
    rot_q: Float[Tensor, "q_pos head d_head"],
    rot_k: Float[Tensor, "k_pos kv_head d_head"],
    geometry: LayerGeometry,
    *,
    heads: Sequence[int] | None = None,
    scale: Scale = "none",
    precision: torch.dtype = torch.float32,
) -> PairVectors:
    """The vectors that D of ``heads`` is computed from: the text's own, or one set per region."""
    if heads is not None:
        geometry, rot_k = only_heads(geometry, rot_k, heads)
        rot_q = rot_q[..., list(heads), :]
    remapping = geometry.remapping
    if remapping is None:
        return PairVectors(rot_q, rot_k, geometry, scale=scale, precision=precision)
    alone = replace(geometry, kv_head=tuple(range(geometry.n_heads)), remapping=None)
    own = torch.promote_types(rot_q.dtype, precision)
    q, k = rot_q.to(own), expand_keys(rot_k, rot_q, geometry).to(own)
    at = torch.arange(rot_q.shape[0], device=rot_q.device) + remapping.first
    regions = [
        PairVectors(*_moved(q, k, at, at, alone, remapping, region), alone, scale=scale)
        for region in remapping.regions
    ]
    return RemappedVectors(remapping, regions)


class RemappedVectors(PairVectors):
    """:class:`PairVectors` of a layer with remapped distances: one set per region."""

    def __init__(self, remapping: Remapping, regions: Sequence[PairVectors]) -> None:
        self.remapping, self.regions, self.q = remapping, regions, regions[0].q
        self.n_pairs, self.n_heads = regions[0].n_pairs, regions[0].n_heads

    def contribution(self, rows: Int[Tensor, " rows"], keys: slice) -> Callable[[int], Tensor]:
        first = self.remapping.first
        k_pos = torch.arange(keys.start, keys.stop, keys.step or 1, device=rows.device)
        number = self.remapping.region(rows[:, None] + first, k_pos + first)
        each = [(number == r, x.contribution(rows, keys)) for r, x in enumerate(self.regions)]
        each = [(here, of) for here, of in each if bool(here.any())]

        def chosen(m: int) -> Tensor:
            out = each[0][1](m)
            for here, of in each[1:]:
                out = torch.where(here, of(m), out)
            return out

        return chosen

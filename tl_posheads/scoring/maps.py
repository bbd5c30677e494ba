"""Attention and dominant dimension of chosen heads on one text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import rotary_consumer, rotary_hook_points
from tl_posheads.hooks.heads import Heads, by_layer, heads_of
from tl_posheads.hooks.inputs import documents_of
from tl_posheads.hooks.model import (
    LensModel,
    attention_of,
    model_name,
    read_pass,
    require_clean,
    require_rotary,
)
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.io.result import Files, Result
from tl_posheads.rotary.contributions import Scale, check_scale, rows_of
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.rotary.layers import ModelGeometry, heads_in, is_one, layer_of
from tl_posheads.rotary.remapping import pair_vectors


@dataclass(frozen=True, eq=False, repr=False)
class HeadMaps(Result):
    """Attention and dominant dimension of some heads on one text.

    Attributes:
        model: name.
        heads: ``(layer, head)`` of each head.
        tokens: the text's tokens as strings.
        step: positions per side of one cell of the maps.
        pattern: attention from a cell's queries to a cell's keys, mean over the queries.
        dominant: mean dominant dimension of the cell's query-key pairs; NaN without any.
        distance: attention-weighted mean distance from each position to the tokens that it attends
            to; 0 for itself.
        dimension: attention-weighted mean dominant dimension of each query, without its own
            position; NaN at position 0.
        q_pos: query positions with full rows.
        row_pattern: their attention to every token.
        row_dominant: dominant dimension of those query-key pairs; NaN where masked or itself.
        n_pairs: rotary pairs of each head.
        wavelengths: tokens per full turn of each head's pairs; NaN-padded where heads differ.
        scale: of the contributions, as in ``dimension_contributions``.
    """

    model: str
    heads: Annotated[list[tuple[int, int]], "head"]
    tokens: Annotated[list[str], "pos"]
    step: int
    pattern: Float[Tensor, "head q_cell k_cell"]
    dominant: Float[Tensor, "head q_cell k_cell"]
    distance: Float[Tensor, "head pos"]
    dimension: Float[Tensor, "head pos"]
    q_pos: Annotated[list[int], "row"]
    row_pattern: Float[Tensor, "head row pos"]
    row_dominant: Float[Tensor, "head row pos"]
    n_pairs: Annotated[list[int], "head"]
    wavelengths: Float[Tensor, "head pair"]
    scale: Scale = "none"

    _files = Files("maps", "maps", "make them again", version=3)

    def _check(self) -> None:
        n_pos = len(self.tokens)
        if self.step < 1 or {*self.pattern.shape[1:]} != {math.ceil(n_pos / self.step)}:
            raise ValueError(f"cells of {self.step} positions")
        if not all(0 <= i < n_pos for i in self.q_pos):
            raise ValueError(f"rows of positions {self.q_pos}")
        if max(self.n_pairs) > self.wavelengths.shape[1]:
            raise ValueError("pairs without a wavelength")

    def _about(self) -> str:
        return f"{self.model}: {', '.join(self.names)} on {len(self.tokens)} tokens"

    def to_pandas(self) -> pd.DataFrame:
        """One row per head and position: token, mean attention distance and mean D."""
        n_pos = len(self.tokens)
        return pd.concat(
            pd.DataFrame(
                {
                    "layer": layer,
                    "head": head,
                    "q_pos": range(n_pos),
                    "token": pd.Series(self.tokens, dtype=object),  # may be half a character
                    "distance": self.distance[i].numpy(),
                    "dimension": self.dimension[i].numpy(),
                }
            )
            for i, (layer, head) in enumerate(self.heads)
        ).reset_index(drop=True)

    @property
    def names(self) -> list[str]:
        """``L3H1`` and so on."""
        return [f"L{layer}H{head}" for layer, head in self.heads]

    def cell_tokens(self) -> list[str]:
        """Labels of the cells: tokens, or the first token of each cell and its position."""
        if self.step == 1:
            return list(self.tokens)
        at = range(0, len(self.tokens), self.step)
        return [f"{i}: {self.tokens[i]}" for i in at]


def head_maps(
    model: LensModel,
    tokens: Int[Tensor, " pos"] | Sequence[Int[Tensor, " pos"]],
    heads: Heads,
    *,
    q_pos: Sequence[int] = (-1,),
    max_cells: int = 80,
    scale: Scale = "none",
) -> HeadMaps:
    """Attention pattern and map of the dominant dimension, for chosen heads on one text.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE and a tokenizer.
        tokens: one text without padding, or a batch or list of one.
        heads: such as ``scores.top(4)``, or as for :func:`tl_posheads.ablate`.
        q_pos: query positions whose full rows are kept; negative ones count from the end.
        max_cells: most cells per side; longer texts are averaged over several positions per cell.
        scale: of the contributions behind the dominant dimension, as in ``score_heads``.

    Returns:
        :class:`HeadMaps`, for ``tl_posheads.views``. The pattern is TransformerLens's own.

    Memory: TransformerLens's eager attention, and 8 bytes per query-key pair and chosen head of
    one layer.

    Raises:
        PosheadsError: no heads, heads that the model doesn't have, duplicates, more than one text,
            positions outside of it, ``max_cells`` below 2; whatever ``score_heads`` refuses.

    Example:
        >>> maps = head_maps(model, tokens[0], scores.top(4))           # doctest: +SKIP
        >>> views.attention(maps).save("heads.html")                    # doctest: +SKIP
    """
    require_rotary(model)
    check_scale(scale)
    require_clean(model)
    documents = documents_of(model, tokens, None, 0)
    if len(documents) != 1 or max_cells < 2 or not heads:
        raise PosheadsError(
            f"{len(documents)} texts, heads={heads!r} and max_cells={max_cells!r} were "
            "given; expected one text, at least one (layer, head) and at least 2 cells"
        )
    document = documents[0]
    n_pos = len(document)
    at = [int(i) + n_pos * (int(i) < 0) for i in q_pos]
    if not all(0 <= i < n_pos for i in at):
        raise PosheadsError(
            f"q_pos={list(q_pos)!r} was given; the text's positions are 0 to {n_pos - 1}"
        )
    wanted = heads_of(model, heads)
    members, step = by_layer(wanted), math.ceil(n_pos / max_cells)
    with rotary_hook_points(model):
        geometry = RotaryGeometry.from_model(model, length=n_pos, layers=list(members))
        found = _read(model, document, geometry, members, at, step, scale)
    pattern, cells, distance, dimension, row_pattern, row_dominant = (
        torch.stack(part).cpu() for part in zip(*(found[place] for place in wanted))
    )
    return HeadMaps(
        model=model_name(model),
        heads=wanted,
        tokens=[str(token) for token in model.to_str_tokens(document)],
        step=step,
        pattern=pattern,
        dominant=cells,
        distance=distance,
        dimension=dimension,
        q_pos=at,
        row_pattern=row_pattern,
        row_dominant=row_dominant,
        n_pairs=[geometry[layer].n_pairs for layer, _ in wanted],
        wavelengths=torch.nn.utils.rnn.pad_sequence(
            [geometry[layer].wavelengths for layer, _ in wanted], True, float("nan")
        ),
        scale=scale,
    )


def _read(
    model: LensModel,
    document: Int[Tensor, " pos"],
    geometry: RotaryGeometry,
    members: dict[int, list[int]],
    at: list[int],
    step: int,
    scale: Scale,
) -> dict[tuple[int, int], tuple[Tensor, ...]]:
    """Cell maps, per-position measures and full rows ``at`` some positions, for each head."""
    found: dict[tuple[int, int], tuple[Tensor, ...]] = {}
    dominant: dict[int, Tensor] = {}

    def keep_dominant(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
        dominant[layer] = dominant_map(
            rot_q[0], rot_k[0], geometry, layer=layer, head=members[layer], scale=scale
        )

    def read(layer: int, pattern: Tensor) -> None:
        here = dominant.pop(layer)
        for i, head in enumerate(members[layer]):
            whole = pattern[0, head].double()
            found[layer, head] = (*_reduced(whole, here[i], step), whole[at], here[i][at])

    with rotary_consumer(model, keep_dominant, list(members)):
        parts: dict[int, Any] = {layer: attention_of(model, layer) for layer in members}
        readers = [(attn.hook_pattern, partial(read, layer)) for layer, attn in parts.items()]
        read_pass(model, document[None], readers)
    return found


def dominant_map(
    rot_q: Float[Tensor, "pos head d_head"],
    rot_k: Float[Tensor, "pos kv_head d_head"],
    geometry: LayerGeometry | ModelGeometry,
    *,
    layer: int | None = None,
    head: int | Sequence[int] | None = None,
    scale: Scale = "none",
) -> Float[Tensor, "*head q_pos k_pos"]:
    """Dominant dimension of every query-key pair of a text, as a square map.

    Needs no model, only rotated queries and keys and the geometry. Takes the arguments of
    :func:`tl_posheads.dimension_contributions`, for one text.

    Returns:
        D in float64, ``[head, q_pos, k_pos]``, without the axis ``head`` where ``head`` is an int;
        NaN where the key is masked or at the query's own position.

    Raises:
        PosheadsError: more than one text, shapes that don't match the geometry, a layer or head
            that doesn't exist, an unknown ``scale``.

    Example:
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]), n_heads=4, n_kv_heads=2)
        >>> q, k = torch.randn(9, 4, 4), torch.randn(9, 2, 4)
        >>> dominant_map(q, k, g).shape, dominant_map(q, k, g, head=3).shape
        (torch.Size([4, 9, 9]), torch.Size([9, 9]))
        >>> geometry = RotaryGeometry.from_model(model)                 # doctest: +SKIP
        >>> dominant_map(q[0], k[0], geometry, layer=6, head=6)         # doctest: +SKIP
    """
    if rot_q.ndim != 3 or rot_q.shape[0] != rot_k.shape[0]:
        raise PosheadsError(
            f"queries of shape {tuple(rot_q.shape)} and keys of shape {tuple(rot_k.shape)} were "
            "given; expected those of one text, [pos, head, d_head]"
        )
    one = layer_of(geometry, layer)
    heads = heads_in(one, head)
    vectors = pair_vectors(rot_q, rot_k, one, heads=heads, scale=scale)
    n_pos = rot_q.shape[0]
    out = torch.full((len(heads), n_pos, n_pos), float("nan"), dtype=torch.float64)
    out = out.to(rot_q.device)
    rows = torch.arange(1, n_pos, device=rot_q.device)
    for dominant, distance, valid, query in rows_of(vectors, rows, one.window):
        row, key = int(query[0, 0]), int(query[0, 0] - distance[0, 0])
        place = out[:, row : row + valid.shape[0], key : key + valid.shape[1]]
        place.copy_(dominant.masked_fill(~valid, float("nan")))
    return out[0] if is_one(head) else out


def _reduced(
    pattern: Float[Tensor, "q_pos k_pos"], dominant: Float[Tensor, "q_pos k_pos"], step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pattern and D in cells, and each position's mean attention distance and mean D."""
    n_pos = pattern.shape[0]
    seen = torch.isfinite(dominant)
    at = torch.arange(n_pos, device=pattern.device)
    distance = (pattern * (at[:, None] - at)).sum(1)
    weight = torch.where(seen, pattern, 0.0)
    visible = torch.where(seen, dominant, 0.0)
    dimension = (weight * visible).sum(1) / weight.sum(1)

    def cells(x: Tensor) -> Tensor:
        short = -n_pos % step
        x = pad(x.double(), (0, short, 0, short))
        x = rearrange(x, "(q a) (k b) -> q k (a b)", a=step, b=step)
        return x.sum(-1)

    n_queries = torch.bincount(at // step)[:, None]
    mean = cells(visible) / cells(seen)
    return cells(pattern) / n_queries, mean, distance, dimension

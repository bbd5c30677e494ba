"""Dominant dimension, and the softmax weight of every pair, by token distance."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import capture_rotary, rotary_hook_points
from tl_posheads.hooks.heads import Head, Heads, as_head, as_heads
from tl_posheads.hooks.inputs import documents_of, layers_of
from tl_posheads.hooks.model import LensModel, model_name, require_clean, require_rotary
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.io.result import Files, Result
from tl_posheads.rotary.contributions import Scale, check_scale, evenly, rows_of
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.rotary.remapping import pair_vectors
from tl_posheads.scoring.score import geometry_by_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS_PER_DIMENSION = 16  # of the histogram that the quantiles are read from


@dataclass(frozen=True, eq=False, repr=False)
class DominantDimensionCurve(Result):
    """Dominant dimension and weight of every rotary pair by token distance, for some heads.

    Attributes:
        heads: ``(layer, head)`` of each head.
        distance: token distances, from 1.
        n_qk_pairs: query-key pairs at each distance; 0 beyond a head's sliding window.
        mean: mean dominant dimension; NaN without a query-key pair.
        quantiles: of the dominant dimension, at ``levels``; exact to 1/16 of a dimension.
        levels: the quantiles' levels.
        allocation: mean softmax weight of every rotary pair; sums to 1 over pairs.
        wavelengths: tokens per full turn of every pair; those of the longest text if they depend
            on the length.
        scale: of the contributions, as in ``dimension_contributions``.
    """

    heads: Annotated[list[tuple[int, int]], "head"]
    distance: Int[Tensor, " distance"]
    n_qk_pairs: Int[Tensor, "head distance"]
    mean: Float[Tensor, "head distance"]
    quantiles: Float[Tensor, "head level distance"]
    levels: Annotated[tuple[float, ...], "level"]
    allocation: Float[Tensor, "head pair distance"]
    wavelengths: Float[Tensor, "head pair"]
    scale: Scale = "none"

    _files = Files("curve", "curves", "make them again", version=3)

    def _check(self) -> None:
        if not all(0 < level < 1 for level in self.levels):
            raise ValueError(f"quantiles at {self.levels}")
        ascends = bool((self.distance.diff() > 0).all()) and bool((self.distance > 0).all())
        if not self.heads or not ascends or bool((self.n_qk_pairs < 0).any()):
            raise ValueError("no heads, distances that don't ascend from 1, or less than no pair")

    def _about(self) -> str:
        return f"{len(self.heads)} heads, distances {self.distance[0]} to {self.distance[-1]}"

    def _finding(self) -> list[str]:
        first, last = self.distance[0], self.distance[-1]
        return [
            f"L{layer}H{head}: mean dominant dimension {mean[0]:.1f} at distance {first}, "
            f"{mean[-1]:.1f} at {last}"
            for (layer, head), mean in zip(self.heads[:2], self.mean, strict=False)
        ]

    def plot(self, *, trained: int | None = None, ax: Axes | None = None) -> Any:
        """Plot mean and outer quantiles by distance, one line per head, with matplotlib.

        Args:
            trained: training length, marked by a vertical line.
            ax: axes to draw into, which are then returned.
        """
        from tl_posheads.figures.curves import curve_figure

        return curve_figure(self.to_pandas(), trained, ax=ax)

    def plot_allocation(
        self, head: Head | str | None = None, *, trained: int | None = None, ax: Axes | None = None
    ) -> Any:
        """Plot the weight of every rotary pair by distance, with wavelengths on the right axis.

        Args:
            head: one of :attr:`heads`, ``(6, 6)`` or ``"L6H6"``; the first by default.
            trained: training length, marked by a vertical line.
            ax: axes to draw into, which are then returned.

        Raises:
            PosheadsError: a head that isn't in the curve.
        """
        from tl_posheads.figures.curves import allocation_figure

        place = self.heads[0] if head is None else as_head(head)
        if place not in self.heads:
            raise PosheadsError(f"head={head!r} was given; the curve has {self.heads}")
        i = self.heads.index(place)
        return allocation_figure(
            self.allocation[i].numpy(),
            self.distance.double().numpy(),
            self.n_qk_pairs[i].double().numpy(),
            self.wavelengths[i].numpy(),
            head=place,
            trained=trained,
            ax=ax,
        )

    def to_pandas(self) -> pd.DataFrame:
        """Long format: layer, head, distance, n_qk_pairs, mean and one column per quantile."""
        frames = []
        for i, (layer, head) in enumerate(self.heads):
            columns: dict[str, Any] = {
                "layer": layer,
                "head": head,
                "distance": self.distance.numpy(),
                "n_qk_pairs": self.n_qk_pairs[i].numpy(),
                "mean": self.mean[i].numpy(),
            }
            for q, level in enumerate(self.levels):
                columns[f"q{100 * level:g}"] = self.quantiles[i, q].numpy()
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)


def sum_by_distance(block: Float[Tensor, "head row key"]) -> Float[Tensor, "head distance"]:
    """Sums along the diagonals of a block of consecutive queries and keys: one per distance.

    Index 0 of the result is the smallest distance, between the first query and the last key.

    Example:
        >>> import torch
        >>> sum_by_distance(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([[2., 5., 3.]])
    """
    heads, rows, keys = block.shape
    # Each row, nearest key first, is shifted one column further right than the row above.
    skewed = pad(block.flip(-1), (0, rows)).reshape(heads, -1)
    width = rows + keys - 1
    return skewed[:, : rows * width].view(heads, rows, width).sum(1)


def dominant_dimension_curve(
    model: LensModel,
    tokens: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]],
    *,
    heads: Heads,
    scale: Scale = "none",
    attention_mask: Int[Tensor, "doc pos"] | None = None,
    skip_first: int = 0,
    levels: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
    progress: bool = True,
) -> DominantDimensionCurve:
    """Mean, quantiles and allocation map of chosen heads by token distance.

    Args:
        model, tokens, scale, attention_mask, skip_first, progress: as in ``score_heads``.
        heads: such as ``scores.top(8)``, or as for ``ablate``. All need the same number of
            rotary pairs.
        levels: quantile levels between 0 and 1.

    Memory: ``8 * heads * pos * 18 * pairs`` bytes, and 30 MB of chunks.

    Raises:
        PosheadsError: no heads, heads that the model doesn't have, or whatever ``score_heads``
            refuses.

    Example:
        >>> curve = dominant_dimension_curve(model, tokens, heads=[(3, 1)])   # doctest: +SKIP
        >>> curve.to_pandas().plot(x="distance", y="mean")                    # doctest: +SKIP
    """
    require_rotary(model)
    check_scale(scale)
    require_clean(model)
    wanted = as_heads(heads)
    layers = layers_of(model, [layer for layer, _ in wanted]) if wanted else []
    documents = documents_of(model, tokens, attention_mask, skip_first)
    if not wanted or not all(0 < level < 1 for level in levels):
        raise PosheadsError(
            f"heads={heads!r} and levels={levels!r} were given; expected at least one "
            "(layer, head) and levels between 0 and 1"
        )
    longest = max(len(document) for document in documents)
    with rotary_hook_points(model):
        geometry = RotaryGeometry.from_model(model, length=longest, layers=layers)
        wrong = [p for p in wanted if not 0 <= p[1] < geometry[p[0]].n_heads]
        sizes = {geometry[layer].n_pairs for layer in layers}
        if wrong or len(sizes) != 1 or 0 in sizes:
            raise PosheadsError(
                f"heads {wrong or wanted} were requested, but {model_name(model)} has "
                f"{geometry.n_heads} heads per layer and {sorted(sizes)} rotary pairs in those "
                "layers; choose heads of layers with RoPE and the same number of pairs"
            )
        sums = {
            place: _HeadSums(longest - skip_first, geometry[place[0]].n_pairs) for place in wanted
        }
        geometry_of = geometry_by_length(model, geometry, layers)
        bar = tqdm(total=len(documents) * len(layers), desc="curves", disable=not progress)

        def consumer(own: RotaryGeometry, layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
            chosen = sorted({head for at, head in wanted if at == layer})
            q, k = rot_q[0, skip_first:], rot_k[0, skip_first:]
            here = own[layer].after(skip_first)
            _add_document(q, k, here, chosen, scale, [sums[layer, h] for h in chosen])
            bar.update(1)

        with bar:
            for document in documents:
                own = geometry_of(len(document))
                capture_rotary(model, document[None], partial(consumer, own), layers=layers)
    return _curve(wanted, [sums[place] for place in wanted], geometry, levels, scale)


def mean_by_distance(
    rot_q: Float[Tensor, "pos head d_head"],
    rot_k: Float[Tensor, "pos kv_head d_head"],
    geometry: LayerGeometry,
    heads: Sequence[int],
    *,
    n_queries: int | None = None,
    scale: Scale = "none",
) -> tuple[Float[Tensor, "head distance"], Int[Tensor, " distance"]]:
    """Mean dominant dimension of heads on one text, by distance from 1.

    Args:
        rot_q, rot_k, geometry: of one layer, as from :func:`tl_posheads.capture_rotary`.
        heads: heads of the layer.
        n_queries: use only so many evenly spaced queries; None uses all.
        scale: as in ``dimension_contributions``.

    Returns:
        The mean in float64 (NaN without a query-key pair), and the number of pairs per head at each
        distance.

    Raises:
        PosheadsError: an unknown ``scale``.

    Example:
        >>> import torch
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]))
        >>> mean, n_qk_pairs = mean_by_distance(torch.zeros(4, 1, 4), torch.zeros(4, 1, 4), g, [0])
        >>> mean.tolist(), n_qk_pairs.tolist()
        ([[0.5, 0.5, 0.5]], [3, 2, 1])
    """
    mean, _, n_qk_pairs = curves_by_distance(
        rot_q, rot_k, geometry, heads, (), n_queries=n_queries, scale=scale
    )
    return mean, n_qk_pairs


def curves_by_distance(
    rot_q: Float[Tensor, "pos head d_head"],
    rot_k: Float[Tensor, "pos kv_head d_head"],
    geometry: LayerGeometry,
    heads: Sequence[int],
    pairs: Collection[int],
    *,
    n_queries: int | None = None,
    scale: Scale = "none",
) -> tuple[
    Float[Tensor, "head distance"], Float[Tensor, "head distance"], Int[Tensor, " distance"]
]:
    """:func:`mean_by_distance`, together with the mean summed softmax weight of ``pairs``.

    Args:
        rot_q, rot_k, geometry, heads, n_queries, scale: as for :func:`mean_by_distance`.
        pairs: rotary pairs whose weight is summed; NaN without any.

    Returns:
        The mean dominant dimension, the weight from 0 to 1, and the number of query-key pairs.

    Raises:
        PosheadsError: an unknown ``scale``.

    Example:
        >>> import torch
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]))
        >>> q = torch.zeros(3, 1, 4)
        >>> curves_by_distance(q, q, g, [0], [1])[1].tolist()
        [[0.5, 0.5]]
    """
    vectors = pair_vectors(rot_q, rot_k, geometry, heads=heads, scale=scale)
    n_pos = rot_q.shape[0]
    rows = evenly(n_pos, n_pos if n_queries is None else n_queries, rot_q.device)
    total = torch.zeros(2, len(heads), n_pos, dtype=torch.float64, device=rot_q.device)
    count = torch.zeros(n_pos, dtype=torch.long, device=rot_q.device)
    for dominant, distance, valid, query in rows_of(vectors, rows, geometry.window):
        apart = distance[valid]
        total[0].index_add_(1, apart, dominant[:, valid])
        count += torch.bincount(apart, minlength=n_pos)
        if pairs:
            first = int(query[0, 0] - distance[0, 0])
            keys = slice(first, first + distance.shape[1])
            weight = vectors.weight_of(query[:, 0], keys, pairs)
            total[1].index_add_(1, apart, weight[:, valid].double())
    n_qk_pairs = count[1:].cpu()
    over = n_qk_pairs.double().masked_fill(n_qk_pairs == 0, float("nan"))
    mean, weight = total[:, :, 1:].cpu() / over
    return mean, weight if pairs else torch.full_like(weight, float("nan")), n_qk_pairs


class _HeadSums:
    """Sums over one head's query-key pairs, by distance."""

    def __init__(self, n_pos: int, n_pairs: int) -> None:
        n_bins = (n_pairs - 1) * _BINS_PER_DIMENSION + 1
        self.n_qk_pairs = torch.zeros(n_pos, dtype=torch.long)
        self.mean = torch.zeros(n_pos, dtype=torch.float64)
        self.weights = torch.zeros(n_pairs, n_pos, dtype=torch.float64)
        self.histogram = torch.zeros(n_bins, n_pos, dtype=torch.long)


def _add_document(
    rot_q: Tensor,
    rot_k: Tensor,
    geometry: LayerGeometry,
    heads: Sequence[int],
    scale: Scale,
    sums: Sequence[_HeadSums],
) -> None:
    vectors = pair_vectors(rot_q, rot_k, geometry, heads=heads, scale=scale)
    rows = torch.arange(1, rot_q.shape[0], device=rot_q.device)
    n_pos = rot_q.shape[0]
    for dominant, distance, valid, query in rows_of(vectors, rows, geometry.window):
        first_key = int(query[0, 0] - distance[0, 0])
        keys_seen = slice(first_key, first_key + distance.shape[1])
        # Diagonal 0 is the first query's distance from the last key: 1 - (rows - 1) at least.
        lowest = int(distance[0, -1])
        stretch = slice(max(0, 1 - lowest), None)
        masked = torch.where(valid, dominant, 0.0)
        by_distance = sum_by_distance(masked)[:, stretch].cpu()
        count = sum_by_distance(valid[None].double())[0, stretch].round().long().cpu()
        at = slice(max(1, lowest), max(1, lowest) + len(count))
        weights = torch.stack(
            [
                sum_by_distance(torch.where(valid, w, 0.0))[:, stretch].double().cpu()
                for w in vectors.weight_rows(query[:, 0], keys_seen)
            ],
            dim=1,
        )
        bins = (dominant[:, valid] * _BINS_PER_DIMENSION).round().long()
        apart = distance[valid]
        for i, one in enumerate(sums):
            one.n_qk_pairs[at] += count
            one.mean[at] += by_distance[i]
            one.weights[:, at] += weights[i]
            n_bins = one.histogram.shape[0]
            code = bins[i] * n_pos + apart
            counted = torch.bincount(code, minlength=n_bins * n_pos).view(n_bins, n_pos)
            one.histogram[:, :n_pos] += counted.cpu()


def _curve(
    heads: list[tuple[int, int]],
    sums: Sequence[_HeadSums],
    geometry: RotaryGeometry,
    levels: Sequence[float],
    scale: Scale,
) -> DominantDimensionCurve:
    n_qk_pairs = torch.stack([one.n_qk_pairs[1:] for one in sums])
    over = n_qk_pairs.double().masked_fill(n_qk_pairs == 0, float("nan"))
    return DominantDimensionCurve(
        heads=heads,
        distance=torch.arange(1, len(sums[0].n_qk_pairs)),
        n_qk_pairs=n_qk_pairs,
        mean=torch.stack([one.mean[1:] for one in sums]) / over,
        quantiles=torch.stack([_quantiles(one.histogram[:, 1:], levels) for one in sums]),
        levels=tuple(float(level) for level in levels),
        allocation=torch.stack([one.weights[:, 1:] for one in sums]) / over[:, None],
        wavelengths=torch.stack([geometry[layer].wavelengths for layer, _ in heads]),
        scale=scale,
    )


def _quantiles(histogram: Tensor, levels: Sequence[float]) -> Tensor:
    below = histogram.cumsum(0).double()
    total = below[-1]
    rows = []
    for level in levels:
        value = (below < level * total).sum(0).double() / _BINS_PER_DIMENSION
        rows.append(torch.where(total > 0, value, float(np.nan)))
    return torch.stack(rows)

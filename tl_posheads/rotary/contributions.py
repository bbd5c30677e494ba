"""What each rotary pair contributes to attention: the mathematics, on plain tensors.

Definitions after Hong et al. 2024 (arXiv 2410.08703). Nothing here needs a model: the functions
take rotated queries and keys, as TransformerLens hooks give them, and the layer's geometry.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.rotary.layers import ModelGeometry, heads_in, is_one, layer_of
from tl_posheads.rotary.precision import widened

if TYPE_CHECKING:
    from tl_posheads.rotary.geometry import LayerGeometry

Scale = Literal["none", "attention"]
"""Contributions to ``q . k``, or multiplied by the model's factor on attention scores."""


def split_pairs(
    x: Float[Tensor, "... d_head"], geometry: LayerGeometry
) -> tuple[Float[Tensor, "... pair"], Float[Tensor, "... pair"]]:
    """The two coordinates of every rotary pair, fastest pair first.

    Half-split layout: coordinates ``m`` and ``m + rotary_dim/2``; adjacent: ``2m`` and ``2m+1``.
    Coordinates past ``rotary_dim`` belong to no pair and are left out.
    """
    if x.shape[-1] != geometry.d_head:
        raise PosheadsError(
            f"a tensor of shape {tuple(x.shape)} was given, but the layer's geometry has "
            f"d_head={geometry.d_head} in the last place; pass the geometry of the layer that "
            "the tensor comes from"
        )
    rotated = x[..., : geometry.rotary_dim]
    pattern = "... (two pair) -> two ... pair"
    if geometry.layout == "adjacent":
        pattern = "... (pair two) -> two ... pair"
    first, second = rearrange(rotated, pattern, two=2)
    return first, second


def join_pairs(
    first: Float[Tensor, "... pair"],
    second: Float[Tensor, "... pair"],
    rest: Float[Tensor, "... rest"],
    geometry: LayerGeometry,
) -> Float[Tensor, "... d_head"]:
    """The inverse of :func:`split_pairs`; the unrotated coordinates are appended."""
    pattern = "two ... pair -> ... (two pair)"
    if geometry.layout == "adjacent":
        pattern = "two ... pair -> ... (pair two)"
    return torch.cat([rearrange(torch.stack([first, second]), pattern), rest], dim=-1)


def rotate_by(
    x: Float[Tensor, "... pos head d_head"],
    steps: Int[Tensor, "*batch pos"],
    geometry: LayerGeometry,
) -> Float[Tensor, "... pos head d_head"]:
    """Turn every pair ``m`` by ``steps * theta_m``: move rotated vectors to other positions.

    With ``steps = r - p``, a vector that RoPE rotated at position ``p`` becomes what it would have
    been at ``r`` (rotations in one plane commute, and the amplitude is unchanged).
    """
    angle = (steps[..., None].double() * geometry.inv_freq.to(steps.device))[..., None, :]
    return turn(x, angle.cos(), angle.sin(), geometry)


def turn(
    x: Float[Tensor, "... d_head"],
    cos: Float[Tensor, "... pair"],
    sin: Float[Tensor, "... pair"],
    geometry: LayerGeometry,
) -> Float[Tensor, "... d_head"]:
    """Multiply every pair, read as a complex number, by ``cos + i sin``.

    Coordinates past ``rotary_dim`` are unchanged. So is a pair with ``cos`` 1 and ``sin`` 0, bit
    for bit. Computed in float32 at least: half precision is rounded once, at the end.
    """
    wide = widened(x)
    cos, sin = cos.to(wide.dtype), sin.to(wide.dtype)
    first, second = split_pairs(wide, geometry)
    rest = wide[..., geometry.rotary_dim :]
    turned = join_pairs(first * cos - second * sin, second * cos + first * sin, rest, geometry)
    return turned.to(x.dtype)


def expand_keys(rot_k: Tensor, rot_q: Tensor, geometry: LayerGeometry) -> Tensor:
    """One key per query head, however grouped-query attention shares the keys."""
    n_heads, n_kv = len(geometry.kv_head), max(geometry.kv_head) + 1
    if rot_q.shape[-2] != n_heads or rot_k.shape[-2] != n_kv:
        raise PosheadsError(
            f"queries with {rot_q.shape[-2]} heads and keys with {rot_k.shape[-2]} were given, "
            f"but the geometry has {n_heads} query heads and {n_kv} key heads; pass tensors of "
            "shape [batch, pos, head, d_head] of this layer"
        )
    index = torch.as_tensor(geometry.kv_head, device=rot_k.device)
    return rot_k.index_select(-2, index)


def check_scale(scale: object) -> None:
    """Refuse a ``scale`` other than the two supported ones.

    Raises:
        PosheadsError: it is neither ``"none"`` nor ``"attention"``.
    """
    if scale not in ("none", "attention"):
        raise PosheadsError(f"scale={scale!r} was given; expected 'none' or 'attention'")


def scale_factor(scale: Scale, geometry: LayerGeometry) -> float:
    """The factor on contributions: 1, or the model's own factor on attention scores."""
    check_scale(scale)
    return geometry.attention_scale if scale == "attention" else 1.0


def dimension_contributions(
    rot_q: Float[Tensor, "*batch q_pos head d_head"],
    rot_k: Float[Tensor, "*batch k_pos kv_head d_head"],
    geometry: LayerGeometry | ModelGeometry,
    *,
    layer: int | None = None,
    head: int | Sequence[int] | None = None,
    scale: Scale = "none",
) -> Float[Tensor, "... q_pos k_pos pair"]:
    """What every rotary pair adds to the dot product of each query-key pair: ``c_m(i, j)``.

    The Hadamard product of rotated query and rotated key, summed over the pair's two coordinates
    (Hong et al. 2024, section 3). Summed over pairs, plus :func:`unrotated_contribution`, it is
    the head's ``q . k``; with ``scale="attention"`` it is that times the model's own factor.

    Args:
        rot_q, rot_k: rotated queries and keys of all heads of a layer.
        geometry: the layer's, or a :class:`~tl_posheads.RotaryGeometry` together with ``layer``.
        layer: the layer that the queries and keys come from.
        head: one head, or a list of heads; None means all.
        scale: ``"attention"`` multiplies by the model's own factor on attention scores.

    Returns:
        ``[*batch, head, q_pos, k_pos, pair]``, without the axis ``head`` where ``head`` is an int.
        It holds that many floats, so pass a slice of the queries for long texts. Scoring never
        builds it.

    Raises:
        PosheadsError: shapes that don't match the geometry, a layer or head that doesn't exist,
            an unknown ``scale``.

    Example:
        >>> import torch
        >>> from tl_posheads import LayerGeometry, dimension_contributions
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]), n_heads=1)
        >>> q, k = torch.randn(2, 1, 7, 1, 4)
        >>> c = dimension_contributions(q, k, g)
        >>> c.shape
        torch.Size([1, 1, 7, 7, 2])
        >>> torch.allclose(c.sum(-1)[0, 0], q[0, :, 0] @ k[0, :, 0].T, atol=1e-5)
        True
        >>> geometry = RotaryGeometry.from_model(model)                 # doctest: +SKIP
        >>> dimension_contributions(q, k, geometry, layer=6, head=6)    # doctest: +SKIP
    """
    one = layer_of(geometry, layer)
    factor = scale_factor(scale, one)
    q, k = _queries_and_keys(rot_q, rot_k, one, head)
    axes = "... q_pos head pair, ... k_pos head pair -> ... head q_pos k_pos pair"
    q1, q2 = split_pairs(q, one)
    k1, k2 = split_pairs(k, one)
    contributions = (einsum(q1, k1, axes) + einsum(q2, k2, axes)) * factor
    return contributions.squeeze(-4) if is_one(head) else contributions


def unrotated_contribution(
    rot_q: Float[Tensor, "*batch q_pos head d_head"],
    rot_k: Float[Tensor, "*batch k_pos kv_head d_head"],
    geometry: LayerGeometry | ModelGeometry,
    *,
    layer: int | None = None,
    head: int | Sequence[int] | None = None,
) -> Float[Tensor, "... q_pos k_pos"]:
    """The part of ``q . k`` from the coordinates that RoPE doesn't rotate (partial rotary).

    Arguments, shape (without ``pair``) and errors are those of :func:`dimension_contributions`.

    Example:
        >>> import torch
        >>> from tl_posheads import LayerGeometry, unrotated_contribution
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]), n_heads=1)
        >>> q, k = torch.randn(2, 1, 7, 1, 4)
        >>> unrotated_contribution(q, k, g).abs().max()  # RoPE rotates all four coordinates
        tensor(0.)
    """
    one = layer_of(geometry, layer)
    q, k = _queries_and_keys(rot_q, rot_k, one, head)
    rest = slice(one.rotary_dim, None)
    axes = "... q_pos head rest, ... k_pos head rest -> ... head q_pos k_pos"
    product = einsum(q[..., rest], k[..., rest], axes)
    return product.squeeze(-3) if is_one(head) else product


def _queries_and_keys(
    rot_q: Tensor, rot_k: Tensor, geometry: LayerGeometry, head: int | Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Queries of the requested heads, and one key for each, in float32 at least."""
    heads, keys = heads_in(geometry, head), expand_keys(rot_k, rot_q, geometry)
    return widened(rot_q[..., heads, :]), widened(keys[..., heads, :])


def dominant_dimension(
    contributions: Float[Tensor, "... pair"],
) -> Float[Tensor, "..."]:
    """The dominant dimension ``D = sum_m m * softmax_m(c)``: the softmax-weighted pair index.

    Real, between 0 (fastest pair) and ``pair - 1`` (slowest). In float64, so that values of D very
    close to a whole number keep their order.

    Example:
        >>> import torch
        >>> dominant_dimension(torch.tensor([0.0, 0.0, 0.0])).item()
        1.0
    """
    weights = torch.softmax(contributions.double(), dim=-1)
    return weights @ torch.arange(contributions.shape[-1], device=weights.device).double()


_CHUNK = 1 << 18  # elements of D at a time: its arrays then stay near the cache


class PairVectors:
    """Queries and keys of one text and layer, laid out to compute D block by block.

    Holds ``2 * pair * head * pos`` floats for each of q and k. :meth:`dominant_rows` keeps the
    pair axis in a loop, so its peak is five arrays of shape ``[head, rows, keys]``.

    Args:
        rot_q: rotated queries of one text, any float dtype.
        rot_k: rotated keys of the same text.
        geometry: of the layer.
        scale: as in :func:`dimension_contributions`.
        precision: the least precision of products and exponentials; sums are float64.
    """

    def __init__(
        self,
        rot_q: Float[Tensor, "q_pos head d_head"],
        rot_k: Float[Tensor, "k_pos kv_head d_head"],
        geometry: LayerGeometry,
        *,
        scale: Scale = "none",
        precision: torch.dtype = torch.float32,
    ) -> None:
        keys = expand_keys(rot_k, rot_q, geometry)
        factor = scale_factor(scale, geometry)
        layout = "two pos head pair -> two pair head pos"
        precision = torch.promote_types(rot_q.dtype, precision)
        self.q, self.k = (
            rearrange(torch.stack(split_pairs(x.to(precision), geometry)), layout).contiguous()
            for x in (rot_q, keys)
        )
        self.q *= factor
        self.n_pairs, self.n_heads = self.q.shape[1], self.q.shape[2]

    def dominant_rows(
        self, rows: Int[Tensor, " rows"], keys: slice
    ) -> Float[Tensor, "head rows keys"]:
        """D of the queries at ``rows`` against a stretch of keys; float64."""
        contribution, peak = self._rows(rows, keys)
        # float64 sums of float32 exponentials: where one pair dominates, D is within 1e-13 of a
        # whole number, and the order of those last digits is part of the head's score.
        total = torch.zeros(peak.shape, dtype=torch.float64, device=peak.device)
        moment = torch.zeros_like(total)
        for m in reversed(range(self.n_pairs)):
            total += contribution(m).sub_(peak).exp_().double()
            if m:  # sum_m m w_m is the sum of the tails w_m + w_m+1 + ...
                moment += total
        return moment.div_(total)

    def weight_rows(
        self, rows: Int[Tensor, " rows"], keys: slice
    ) -> Iterator[Float[Tensor, "head rows keys"]]:
        """The softmax weight of each pair in turn, ``m`` ascending; float32."""
        contribution, peak = self._rows(rows, keys)
        total = torch.zeros_like(peak)
        for m in range(self.n_pairs):
            total += contribution(m).sub_(peak).exp_()
        for m in range(self.n_pairs):
            yield contribution(m).sub_(peak).exp_().div_(total)

    def weight_of(
        self, rows: Int[Tensor, " rows"], keys: slice, pairs: Collection[int]
    ) -> Float[Tensor, "head rows keys"]:
        """The summed softmax weight of ``pairs``; float32."""
        contribution, peak = self._rows(rows, keys)
        total, part = torch.zeros_like(peak), torch.zeros_like(peak)
        for m in range(self.n_pairs):
            share = contribution(m).sub_(peak).exp_()
            total += share
            if m in pairs:
                part += share
        return part.div_(total)

    def contribution(self, rows: Int[Tensor, " rows"], keys: slice) -> Callable[[int], Tensor]:
        """A function from ``m`` to pair ``m``'s contributions, a new ``[head, rows, keys]``."""
        q, k = self.q[..., rows, None], self.k[..., None, keys]
        return lambda m: torch.mul(q[0, m], k[0, m]).addcmul_(q[1, m], k[1, m])

    def _rows(self, rows: Tensor, keys: slice) -> tuple[Callable[[int], Tensor], Tensor]:
        contribution = self.contribution(rows, keys)
        peak = contribution(0)
        for m in range(1, self.n_pairs):
            torch.maximum(peak, contribution(m), out=peak)
        return contribution, peak


def rows_of(
    vectors: PairVectors, rows: Int[Tensor, " row"], window: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """D of the queries at ``rows`` (ascending) with all earlier keys, half a million at a time.

    Yields ``(dominant [head, row, key], distance [row, key], valid [row, key], query [row, key])``,
    where ``valid`` marks the keys before the query and inside the window. The last key is the one
    before the last row.
    """
    start = 0
    while start < len(rows):
        step = max(1, _CHUNK // max(1, vectors.n_heads * int(rows[-1])))
        some = rows[start : start + step]
        start += step
        keys = slice(0 if window is None else max(0, int(some[0]) - window + 1), int(some[-1]))
        if keys.stop <= keys.start:
            continue
        distance = some[:, None] - torch.arange(keys.start, keys.stop, device=rows.device)
        valid = distance >= 1
        if window is not None:
            valid &= distance < window
        yield vectors.dominant_rows(some, keys), distance, valid, some[:, None].expand(valid.shape)


def evenly(n_pos: int, n: int, device: torch.device) -> Int[Tensor, " row"]:
    """Up to ``n`` query positions with at least one key before them, the last one included."""
    if n_pos - 1 <= n:
        return torch.arange(1, n_pos, device=device)
    return torch.linspace(1, n_pos - 1, n, dtype=torch.float64, device=device).round().long()


def farthest(n_pos: int, window: int | None) -> int:
    """The largest distance between a query and a key that it sees."""
    return n_pos - 1 if window is None else min(n_pos, window) - 1

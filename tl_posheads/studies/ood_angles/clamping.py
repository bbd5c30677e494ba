"""Dominant dimension with the relative angle of chosen pairs held at what training saw.

Plain functions on rotated queries and keys. In a clamped pair ``m`` a query and a key at distance
``d`` meet at the angle ``theta_m * min(d, trained - 1)``; content and all other pairs stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.rotary.contributions import PairVectors, Scale, dominant_dimension, rows_of
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.rotary.remapping import move_to, only_heads, pair_vectors

_AT_ONCE = 1 << 20  # contributions at a time: 8 MB an array in float64
JOINT = ("ood", "in_distribution", "all")
"""Sets of pairs that are clamped together."""


def ood_pairs(inv_freq: Float[Tensor, " pair"], trained: int) -> Bool[Tensor, " pair"]:
    """Pairs that turn, but less than once in a text of ``trained`` tokens: wavelength > trained.

    A pair that doesn't turn at all meets no new angle at any distance: it is in distribution.

    Args:
        inv_freq: radians per token. trained: tokens of a training text.

    Example:
        >>> import torch
        >>> ood_pairs(torch.tensor([1.0, 0.1, 0.01, 0.0]), trained=64).tolist()
        [False, False, True, False]
    """
    turns = inv_freq.double().abs() * trained / (2 * math.pi)
    return (turns < 1) & (turns > 0)


@dataclass(frozen=True, eq=False)
class DistanceBins:
    """Bins of log distance with an edge at the training length.

    Attributes:
        trained: tokens of a training text; distances up to ``trained - 1`` were in training.
        start, end: first distance of each bin, and the one after its last.
        octave: of each bin, counted from the training length: -1 is the last one inside.
        of: the bin of every distance from 0; distance 0 is given to the first bin.
    """

    trained: int
    start: Int[Tensor, " bin"]
    end: Int[Tensor, " bin"]
    octave: Int[Tensor, " bin"]
    of: Int[Tensor, " distance"]

    @classmethod
    def up_to(cls, longest: int, trained: int, per_octave: int) -> DistanceBins:
        """Bins of distances 1 to ``longest``, those left out that hold no whole number.

        Example:
            >>> bins = DistanceBins.up_to(11, trained=4, per_octave=1)
            >>> bins.start.tolist(), bins.end.tolist(), bins.octave.tolist()
            ([1, 2, 4, 8], [2, 4, 8, 12], [-2, -1, 0, 1])
        """
        distance = torch.arange(1, longest + 1)
        number = torch.floor(torch.log2(distance.double() / trained) * per_octave).long()
        numbers, of, size = torch.unique(number, return_inverse=True, return_counts=True)
        end = 1 + size.cumsum(0)
        octave = torch.div(numbers, per_octave, rounding_mode="floor")
        return cls(trained, end - size, end, octave, torch.cat([of[:1], of]))

    @property
    def past(self) -> Bool[Tensor, " bin"]:
        """Bins beyond the training length."""
        return self.octave >= 0

    @property
    def reference(self) -> Bool[Tensor, " bin"]:
        """Bins of the last octave inside training."""
        return self.octave == -1


class ClampedVectors:
    """Queries and keys of some heads of one text, as they are and as they meet when clamped.

    In float64. Holds ``8 * pair * head * pos`` doubles.
    """

    def __init__(
        self,
        rot_q: Float[Tensor, "pos head d_head"],
        rot_k: Float[Tensor, "pos head d_head"],
        geometry: LayerGeometry,
        trained: int,
        scale: Scale = "none",
    ) -> None:
        q, k = rot_q.double(), rot_k.double()
        at = torch.arange(q.shape[0], device=q.device)

        def to(position: float, x: Tensor) -> Tensor:
            there = lambda p: torch.full_like(p.double()[..., None, None], position)
            return move_to(x, at, there, geometry)

        self.bare = PairVectors(q, k, geometry, scale=scale)
        self.held = PairVectors(to(trained - 1, q), to(0, k), geometry, scale=scale)

    def contributions(
        self, q_pos: Int[Tensor, " n"], k_pos: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "head n pair"], Float[Tensor, "head n pair"]]:
        """Contributions of query-key pairs, and those at the last distance that training saw."""
        both = [
            (vectors.q[..., q_pos] * vectors.k[..., k_pos]).sum(0).permute(1, 2, 0)
            for vectors in (self.bare, self.held)
        ]
        return both[0], both[1]


def clamped_dominant(
    rot_q: Float[Tensor, "pos head d_head"],
    rot_k: Float[Tensor, "pos kv_head d_head"],
    geometry: LayerGeometry,
    pairs: Iterable[int],
    *,
    trained: int,
    q_pos: Int[Tensor, " n"],
    k_pos: Int[Tensor, " n"],
    scale: Scale = "none",
) -> Float[Tensor, "head n"]:
    """D of query-key pairs with some rotary pairs' relative distance held at ``trained - 1``.

    The dominant dimension of Hong et al. 2024 (arXiv 2410.08703); at distances below ``trained``
    it is the unclamped one, bit for bit.

    Args:
        rot_q, rot_k, geometry: of one text and layer; :func:`tl_posheads.capture_rotary` gives
            them.
        pairs: rotary pairs to clamp, 0 the fastest.
        trained: tokens of a training text.
        q_pos, k_pos: positions of the queries and keys.
        scale: of the contributions, as in ``dimension_contributions``.

    Memory: ``2 * head * n * pair`` doubles.

    Raises:
        PosheadsError: pairs that the layer doesn't have, a layer that sees other distances, or
            another ``scale``.

    Example:
        >>> import torch
        >>> from tl_posheads import LayerGeometry
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]))
        >>> q, k = torch.randn(2, 9, 1, 4)
        >>> at = torch.tensor([8, 3]), torch.tensor([0, 2])
        >>> bare, held = (clamped_dominant(q, k, g, pairs, trained=4, q_pos=at[0], k_pos=at[1])
        ...               for pairs in ([], [1]))
        >>> (bare == held).tolist()
        [[False, True]]
    """
    if geometry.remapping is not None:
        raise PosheadsError(
            f"layer {geometry.layer} sees other distances than the text's; clamp the unmodified "
            "model"
        )
    chosen = torch.zeros(geometry.n_pairs, dtype=torch.bool, device=rot_q.device)
    chosen[check_pairs(pairs, geometry)] = True
    alone, keys = only_heads(geometry, rot_k, range(geometry.n_heads))
    vectors = ClampedVectors(rot_q, keys, alone, trained, scale)
    bare, held = vectors.contributions(q_pos, k_pos)
    far = (q_pos - k_pos >= trained)[:, None]
    return dominant_dimension(torch.where(far & chosen, held, bare))


def check_pairs(pairs: Iterable[int], geometry: LayerGeometry) -> list[int]:
    """Pairs of the layer, ascending.

    Raises:
        PosheadsError: one that it doesn't have.
    """
    found = sorted({int(pair) for pair in pairs})
    wrong = [pair for pair in found if not 0 <= pair < geometry.n_pairs]
    if wrong:
        raise PosheadsError(
            f"pair {wrong[0]} was given, but layer {geometry.layer} has rotary pairs 0 to "
            f"{geometry.n_pairs - 1}; choose among those"
        )
    return found


@dataclass(eq=False)
class ClampSums:
    """Sums over the query-key pairs of each bin, of one text and some heads of one layer.

    Attributes:
        n_qk_pairs: query-key pairs of one head.
        bare: of the unclamped D.
        paired: beyond training, of the mean unclamped D that the same query has in the last octave
            inside training.
        joint: beyond training, of D with the sets of :data:`JOINT` clamped.
        single: beyond training, of D with one pair clamped.
    """

    n_qk_pairs: Int[Tensor, " bin"]
    bare: Float[Tensor, "head bin"]
    paired: Float[Tensor, "head bin"]
    joint: Float[Tensor, "head set bin"]
    single: Float[Tensor, "head pair bin"]


def bare_by_bin(
    rot_q: Float[Tensor, "pos head d_head"],
    rot_k: Float[Tensor, "pos kv_head d_head"],
    geometry: LayerGeometry,
    heads: list[int],
    bins: DistanceBins,
    rows: Int[Tensor, " row"],
    scale: Scale = "none",
) -> tuple[Float[Tensor, "head bin"], Int[Tensor, " bin"], Float[Tensor, "head pos"]]:
    """Sums of D and numbers of pairs by bin, and each query's mean D in the last octave inside.

    Also of layers that see other distances (``geometry.remapping``).
    """
    vectors = pair_vectors(
        rot_q, rot_k, geometry, heads=heads, scale=scale, precision=torch.float64
    )
    device, n_pos = rot_q.device, rot_q.shape[0]
    of, inside = bins.of.to(device), bins.reference.to(device)
    n_bins = len(bins.start)
    total = torch.zeros(len(heads), n_bins, dtype=torch.float64, device=device)
    count = torch.zeros(n_bins, dtype=torch.long, device=device)
    near = torch.zeros(len(heads), n_pos, dtype=torch.float64, device=device)
    n_near = torch.zeros(n_pos, dtype=torch.long, device=device)
    for dominant, distance, valid, query in rows_of(vectors, rows, geometry.window):
        valid = valid & (distance < len(of))
        number, values, q_pos = of[distance[valid]], dominant[:, valid], query[valid]
        total.index_add_(1, number, values)
        count += torch.bincount(number, minlength=n_bins)
        last = inside[number]
        near.index_add_(1, q_pos[last], values[:, last])
        n_near += torch.bincount(q_pos[last], minlength=n_pos)
    return total.cpu(), count.cpu(), near / n_near.double().masked_fill(n_near == 0, math.nan)


def clamp_by_bin(
    rot_q: Float[Tensor, "pos head d_head"],
    rot_k: Float[Tensor, "pos kv_head d_head"],
    geometry: LayerGeometry,
    heads: list[int],
    bins: DistanceBins,
    rows: Int[Tensor, " row"],
    scale: Scale = "none",
) -> ClampSums:
    """All measurements of one text and layer: D without clamps and with pairs clamped, by bin.

    Args:
        rot_q, rot_k, geometry: of one text and layer, not remapped.
        heads: those wanted. rows: queries, ascending.
        scale: of the contributions, as in ``dimension_contributions``.

    Memory: ``12 * pair * head * pos`` doubles and chunks of 100 MB; linear in the text's length.
    """
    bare, n_qk_pairs, own = bare_by_bin(rot_q, rot_k, geometry, heads, bins, rows, scale)
    alone, keys = only_heads(geometry, rot_k, heads)
    vectors = ClampedVectors(rot_q[:, heads], keys, alone, bins.trained, scale)
    device, n_heads, size = rot_q.device, len(heads), geometry.n_pairs
    of, n_bins = bins.of.to(device), len(bins.start)
    paired = torch.zeros(n_heads, n_bins, dtype=torch.float64, device=device)
    joint = torch.zeros(n_heads, len(JOINT), n_bins, dtype=torch.float64, device=device)
    single = torch.zeros(n_heads, size, n_bins, dtype=torch.float64, device=device)
    ood = ood_pairs(geometry.inv_freq, bins.trained).to(device)
    sets = (ood, ~ood, torch.ones_like(ood))
    q_pos, k_pos = _far(rows, bins.trained, len(of) - 1, geometry.window)
    step = max(1, _AT_ONCE // (n_heads * size))
    for i, j in zip(q_pos.split(step), k_pos.split(step), strict=True):
        number = of[i - j]
        plain, held = vectors.contributions(i, j)
        paired.index_add_(1, number, own[:, i])
        for s, chosen in enumerate(sets):
            joint[:, s].index_add_(1, number, dominant_dimension(torch.where(chosen, held, plain)))
        single.index_add_(2, number, one_replaced(plain, held).transpose(1, 2))
    return ClampSums(n_qk_pairs, bare, paired.cpu(), joint.cpu(), single.cpu())


def _far(
    rows: Int[Tensor, " row"], trained: int, longest: int, window: int | None
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Positions of the queries at ``rows`` and of the keys that are ``trained`` or more away."""
    last = longest if window is None else min(longest, window - 1)
    lists = [
        torch.arange(max(0, row - last), row - trained + 1, device=rows.device)
        for row in rows.tolist()
        if row >= trained
    ]
    keys = torch.cat(lists) if lists else rows[:0]
    sizes = torch.tensor([len(x) for x in lists], device=rows.device, dtype=torch.long)
    return rows[len(rows) - len(lists) :].repeat_interleave(sizes), keys


def one_replaced(
    plain: Float[Tensor, "*rest pair"], other: Float[Tensor, "*rest pair"]
) -> Float[Tensor, "*rest pair"]:
    """D with the contribution of one pair at a time replaced; linear in pairs.

    The other pairs enter as those before and those after, each by its log-sum and mean index:
    nothing is subtracted, so that a pair that holds all the weight leaves no rounding behind.

    Example:
        >>> import torch
        >>> plain, other = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 9.0, 9.0]])
        >>> one_replaced(plain, other).round(decimals=3)
        tensor([[1.0000, 0.5000, 1.0000]], dtype=torch.float64)
    """
    plain, other = plain.double(), other.double()
    n = plain.shape[-1]
    index = torch.arange(n, dtype=torch.float64, device=plain.device)
    before, mean_before = _so_far(plain, index)
    after, mean_after = (x.flip(-1) for x in _so_far(plain.flip(-1), index.flip(0)))
    logs = torch.stack([before, other, after])
    weights = logs.softmax(0)
    return (weights * torch.stack([mean_before, index.expand_as(other), mean_after])).sum(0)


def _so_far(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Of the contributions before each: log of the sum of exponentials, and mean index."""
    log, mean = torch.full_like(x[..., 0], -math.inf), torch.zeros_like(x[..., 0])
    logs, means = [], []
    for m in range(x.shape[-1]):
        logs.append(log)
        means.append(mean)
        log = torch.logaddexp(log, x[..., m])
        mean = mean + (index[m] - mean) * (x[..., m] - log).exp()
    return torch.stack(logs, -1), torch.stack(means, -1)

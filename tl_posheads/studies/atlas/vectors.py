"""Queries and keys of one text and layer: how long they are, where they point before RoPE."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_posheads.rotary.contributions import join_pairs, rotate_by, split_pairs
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.rotary.precision import widened

_POSITIONS = 512  # at a time


def before_rotation(
    rotated: Float[Tensor, "pos head d_head"], geometry: LayerGeometry, *, first: int = 0
) -> Float[Tensor, "pos head d_head"]:
    """Queries or keys of one text as they were before RoPE turned them, in float32 at least.

    Args:
        first: position in the text of the first of them.

    Example:
        >>> import torch
        >>> from tl_posheads.rotary.contributions import rotate_by
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]))
        >>> x = torch.ones(5, 1, 4, dtype=torch.float64)
        >>> back = before_rotation(rotate_by(x, torch.arange(5), g), g)
        >>> torch.allclose(back, x)
        True
    """
    steps = -first - torch.arange(rotated.shape[0], device=rotated.device)
    x = rotate_by(widened(rotated), steps, geometry)
    if geometry.rotation_scale != 1:
        x[..., : geometry.rotary_dim] /= geometry.rotation_scale
    return x


@dataclass(frozen=True, eq=False)
class VectorMeans:
    """Means over the positions of one text's queries or keys; float64.

    Attributes:
        length: of every rotary pair, as rotated.
        centre: of every rotary pair before its rotation, as a complex number, times the factor
            that the rotation has on lengths; NaN where it can't be undone (a Fourier series).
        dimension_norms: L2 norm over the positions of every dimension before its rotation (Jin et
            al. 2025, "Massive values in self-attention modules are the key to contextual knowledge
            understanding", arXiv 2502.01563: their ``M``); NaN where it can't be undone.
        rotated: the vectors as rotated.
        spread: root of the mean squared distance of the rotated vectors from their mean.
    """

    length: Float[Tensor, "head pair"] = field(repr=False)
    centre: Tensor = field(repr=False)  # complex, [head, pair]
    dimension_norms: Float[Tensor, "head d_head"] = field(repr=False)
    rotated: Float[Tensor, "head d_head"] = field(repr=False)
    spread: Float[Tensor, " head"] = field(repr=False)

    @classmethod
    def of(
        cls, rotated: Float[Tensor, "pos head d_head"], geometry: LayerGeometry, *, first: int = 0
    ) -> VectorMeans:
        """Of rotated queries or keys.

        Args:
            first: position in the text of the first of them.

        Memory: some arrays of 512 positions.
        """
        n, heads, width = rotated.shape
        total = rotated.new_zeros(heads, width, dtype=torch.float64)
        still, squares, all_squares = (torch.zeros_like(total) for _ in range(3))
        length = rotated.new_zeros(heads, geometry.n_pairs, dtype=torch.float64)
        for start in range(0, n, _POSITIONS):
            some = widened(rotated[start : start + _POSITIONS])
            back = before_rotation(some, geometry, first=first + start)
            for sums, x in ((total, some), (still, back)):
                sums += x.sum(0, dtype=torch.float64)
            turned, plain = some.square(), back.square_()
            for sums, x in ((all_squares, turned), (squares, plain)):
                sums += x.sum(0, dtype=torch.float64)
            a, b = split_pairs(turned, geometry)
            length += (a + b).sqrt_().sum(0, dtype=torch.float64)
        if not geometry.is_rotation:
            still, squares = (torch.full_like(x, float("nan")) for x in (still, squares))
        centre = torch.complex(*split_pairs(still / n, geometry)) * geometry.rotation_scale
        mean = total / n
        variance = (all_squares / n - mean.square()).clamp_min(0)
        return cls(length / n, centre, squares.sqrt(), mean, variance.sum(-1).sqrt())

    @property
    def concentration(self) -> Float[Tensor, "head pair"]:
        """``|E x| / E|x|`` of every pair: 1 where all vectors before RoPE point the same way.

        "TriAttention", arXiv 2604.04921, which builds on it that scores follow from distance.
        NaN for a pair that is 0 everywhere.
        """
        return self.centre.abs() / self.length

    def of_heads(self, kv_head: tuple[int, ...]) -> VectorMeans:
        """Those of the keys that each query head sees."""
        index = torch.tensor(kv_head, device=self.length.device)
        return VectorMeans(*(value[index] for value in vars(self).values()))


def separation(queries: VectorMeans, keys: VectorMeans) -> Float[Tensor, " head"]:
    """Distance between the mean rotated query and the mean rotated key, in spreads of their clouds.

    "Frayed RoPE and long inputs: a geometric perspective", arXiv 2603.18017, finds that queries
    and keys are two tight clouds apart from each other, and that long texts mix them. The paper
    shows it in pictures and several numbers; here it is ``|E q - E k| / sqrt(s_q^2 + s_k^2)``, with
    ``s^2`` the mean squared distance from the cloud's own mean. NaN where neither varies.
    """
    apart = (queries.rotated - keys.rotated).square().sum(-1).sqrt()
    spread = torch.hypot(queries.spread, keys.spread)
    return apart / spread.masked_fill(spread == 0, float("nan"))


def slow_dimensions(geometry: LayerGeometry, length: int) -> Bool[Tensor, " d_head"]:
    """Dimensions that don't turn once in a text: their pair's wavelength exceeds ``length`` tokens.

    Coordinates that RoPE leaves alone never turn and are among them.

    Example:
        >>> import torch
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]), d_head=5)
        >>> slow_dimensions(g, 40)
        tensor([False,  True, False,  True,  True])
    """
    slow = (geometry.wavelengths > length).double().cpu()
    rest = torch.ones(geometry.d_head - geometry.rotary_dim, dtype=slow.dtype)
    return join_pairs(slow, slow, rest, geometry).bool()


def slow_share(
    weight: Float[Tensor, "head d_head"], slow: Bool[Tensor, " d_head"]
) -> Float[Tensor, " head"]:
    """Share of a head's weight, norms for one, that lies in slow dimensions; NaN without weight.

    Example:
        >>> import torch
        >>> slow_share(torch.tensor([[1.0, 3.0]]), torch.tensor([False, True]))
        tensor([0.7500], dtype=torch.float64)
    """
    weight = weight.double()
    return weight[:, slow.to(weight.device)].sum(-1) / weight.sum(-1)

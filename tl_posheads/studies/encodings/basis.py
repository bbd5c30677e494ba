"""The dimensions of a head under any positional encoding: planes of the q-k space, fast to slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.studies.encodings.diagonalise import (
    diagonal_share,
    joint_diagonalisation,
    symmetric_part,
)
from tl_posheads.studies.encodings.products import DistanceProducts
from tl_posheads.studies.encodings.transport import Transport

Source = Literal["rotation", "transport", "products"]
_STILL = 1e-12  # of 1 - r at the largest shift: what rounding leaves


@dataclass(frozen=True, eq=False)
class QKBasis:
    """Orthonormal directions of a head's q-k space, fastest first; each two form a plane.

    The products of q's and k's coordinates along the directions sum to ``q . k``. A plane is a
    dimension, as a rotary pair is; a bias on scores is a dimension of its own.

    Attributes:
        vectors: a direction in each row.
        speeds: 1 / half-life of each direction, per token, descending; 0 where it stands still.
        survival: how much of each direction is left at each shift, ``r_e(s)``.
        shifts: in tokens.
        explained: how well the basis' premises hold, 0 to 1: R^2 of the operators
            (``"rotation"``: 1, ``"transport"``), or the share of the mean products that the
            basis makes diagonal (``"products"``).
        explained_change: share of the change by moving that the operators describe; NaN for
            ``"products"``.
        diagonal: share of the operators' or products' symmetric parts on their diagonals.
        source: where the order comes from.
        bias_speed: 1 / half-life of the bias on scores; None without one.
    """

    vectors: Float[Tensor, "direction d_head"] = field(repr=False)
    speeds: Float[Tensor, " direction"] = field(repr=False)
    survival: Float[Tensor, "shift direction"] = field(repr=False)
    shifts: Float[Tensor, " shift"] = field(repr=False)
    explained: float
    explained_change: float
    diagonal: float
    source: Source
    bias_speed: float | None = None

    @property
    def plane_speeds(self) -> Float[Tensor, " plane"]:
        """Mean speed of each plane's two directions, per token, descending."""
        return self.speeds.view(-1, 2).mean(1)

    @property
    def moves(self) -> Bool[Tensor, " plane"]:
        """Planes that aren't still: partial rotary's unrotated coordinates are no dimensions."""
        return self.plane_speeds > 0

    @property
    def n_dimensions(self) -> int:
        """Planes, and the bias where there is one."""
        return len(self.plane_speeds) + (self.bias_speed is not None)

    @property
    def bias_at(self) -> int | None:
        """Index of the bias among the dimensions: behind all planes that are at least as fast."""
        if self.bias_speed is None:
            return None
        return int((self.plane_speeds >= self.bias_speed).sum())


def half_lives(
    survival: Float[Tensor, "shift direction"], shifts: Float[Tensor, " shift"]
) -> Float[Tensor, " direction"]:
    """Tokens after which half of a direction is left.

    The first shift with ``r < 1/2``, interpolated linearly from the one before it (``r = 1`` at
    0). A direction that keeps more is extrapolated from ``1 - r ~ c s**2`` at the largest shift,
    which is what a slow rotation does; infinite where nothing is lost.

    Args:
        survival: ``r_e(s)``, 1 where everything is left.
        shifts: ascending, above 0.

    Example:
        >>> import torch
        >>> half_lives(torch.tensor([[0.75, 1.0], [0.25, 0.98]]), torch.tensor([1.0, 2.0]))
        tensor([ 1.5000, 10.0000], dtype=torch.float64)
    """
    r = torch.cat([torch.ones_like(survival[:1]), survival]).double()
    s = torch.cat([torch.zeros(1, dtype=torch.float64), shifts.double()])
    below = r < 0.5
    first = below.int().argmax(0).clamp_min(1)
    at = torch.arange(r.shape[1])
    before, after = r[first - 1, at], r[first, at]
    # Before the first crossing r is at least 1/2, after it less: the difference isn't 0.
    drop = torch.where(below.any(0), before - after, torch.ones_like(before))
    crossed = s[first - 1] + (before - 0.5) / drop * (s[first] - s[first - 1])
    lost = (1 - r[-1]).clamp_min(0)
    far = torch.where(lost > _STILL, s[-1] * (0.5 / lost.clamp_min(_STILL)).sqrt(), torch.inf)
    return torch.where(below.any(0), crossed, far)


def bias_speed(bias: Float[Tensor, " distance"]) -> float:
    """1 / half-life of a bias on scores, per token.

    A bias multiplies the odds of attending to a token by ``exp(bias)``. It survives d tokens to the
    extent that the odds are those of distance 0: ``r(d) = exp(-|b(d) - b(0)|)``, and half of it is
    left where it has halved or doubled the odds. ALiBi with slope m has the half-life
    ``log(2) / m``.

    Args:
        bias: as added to the scores that softmax sees, at distances 0, 1, 2, ...

    Raises:
        PosheadsError: fewer than two distances.

    Example:
        >>> import torch
        >>> round(1 / bias_speed(-0.01 * torch.arange(100)), 1)
        69.3
    """
    if bias.ndim != 1 or len(bias) < 2:
        raise PosheadsError(
            f"a bias of shape {tuple(bias.shape)} was given; expected [distance], 2 or more, from "
            "distance 0 on"
        )
    bias = bias.detach().double().cpu()
    survival = torch.exp(-(bias[1:] - bias[0]).abs())[:, None]
    return float(1 / half_lives(survival, torch.arange(1, len(bias)).double())[0])


def ordered_planes(
    operators: Float[Tensor, "shift d_head d_head"] | Sequence[Transport],
    shifts: Sequence[int],
    *,
    bias: Float[Tensor, " distance"] | None = None,
) -> QKBasis:
    """Planes of an encoding that moves queries and keys, ordered by how fast it moves them.

    The symmetric parts of the operators ``T_s`` are diagonalised together. ``r_e(s) = e^T T_s e``
    is how much of direction e survives s tokens; the sooner half of it is lost, the faster it
    is. Under RoPE the symmetric part of T_s has the eigenvalue ``cos(s theta_m)`` twice, its
    eigenplanes are the rotary pairs, and they come in their order.

    Under encodings that are added to the content (sinusoidal, learned) a direction is position
    only in part: one that is mostly content is slow, because its contribution hardly varies.

    Args:
        operators: T_s, as :func:`~tl_posheads.studies.encodings.transport.transport_operator` or
            ``rotation_operators`` give them.
        shifts: ascending, in tokens; up to twice each other.
        bias: what is added to the scores at distances 0, 1, ..., where an encoding does that too.

    Raises:
        PosheadsError: not one operator per shift, shifts that don't ascend, an odd
            d_head.

    Example:
        >>> import torch
        >>> from tl_posheads import LayerGeometry
        >>> from tl_posheads.studies.encodings import log_shifts, rotation_operators
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1, 0.01]))
        >>> shifts = log_shifts(1024)
        >>> basis = ordered_planes(rotation_operators(g, shifts), shifts)
        >>> (1 / basis.plane_speeds).round(decimals=1).tolist()      # about pi / 3 / theta
        [1.0, 10.4, 103.9]
    """
    described, changed = 1.0, 1.0
    source: Source = "rotation"
    if not isinstance(operators, Tensor):
        described = sum(one.r2 for one in operators) / max(1, len(operators))
        changed = sum(one.r2_change for one in operators) / max(1, len(operators))
        operators, source = torch.stack([one.operator for one in operators]), "transport"
    s = torch.as_tensor(list(shifts), dtype=torch.float64)
    if operators.ndim != 3 or len(s) != len(operators) or s[0] <= 0 or bool((s.diff() <= 0).any()):
        raise PosheadsError(
            f"operators of shape {tuple(operators.shape)} and shifts {list(shifts)} were given; "
            "expected an operator for each shift, and shifts that ascend from 1 or more"
        )
    parts = symmetric_part(operators)
    vectors = joint_diagonalisation(parts)
    survival = (vectors @ parts @ vectors.T).diagonal(dim1=1, dim2=2)
    return _basis(vectors, survival, s, described, changed, parts, source, bias)


def planes_by_products(
    products: DistanceProducts, head: int, *, bias: Float[Tensor, " distance"] | None = None
) -> QKBasis:
    """Planes of an encoding that moves no vector (ALiBi, T5, none), ordered by data.

    There ``T_s`` is the identity and orders nothing. It is replaced by the symmetric parts of
    ``M_d = E[q_i k_{i-d}^T]``, diagonalised together over bins of distance. With
    ``m_e(d) = e^T M_d e``, the mean contribution of direction e,

        ``r_e(d) = 1 - (|m_e(d) - m_e(1)| - 2 se)_+ / max_d |m_e(d)|``,

    se being the standard error of the difference over texts: noise is no variation. Where the mean
    contribution begins with its largest value, ``r_e(d) = m_e(d) / m_e(1)``, as ``cos(d theta)``
    under RoPE. The shift of a distance is counted from distance 1, the nearest pair.

    The bias is not part of ``q . k``; it's put in by its own :func:`bias_speed`.

    Args:
        products: of the layer. head: which.
        bias: what is added to the head's scores at distances 0, 1, ...; None without.

    Example:
        >>> import torch
        >>> from tl_posheads.studies.encodings import distance_products
        >>> q, k = torch.randn(2, 4, 64, 1, 8)
        >>> planes_by_products(distance_products(q, k), 0).source
        'products'
    """
    by_text = symmetric_part(products.products[:, :, head])
    parts = by_text.mean(0)
    vectors = joint_diagonalisation(parts)
    mean = (vectors @ by_text @ vectors.T).diagonal(dim1=2, dim2=3)
    apart = mean[:, 1:] - mean[:, :1]
    noise = torch.zeros_like(apart[0])
    if len(apart) > 1:
        noise = 2 * apart.std(0) / len(apart) ** 0.5
    varied = (apart.mean(0).abs() - noise).clamp_min(0)
    largest = mean.mean(0).abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)
    shifts = products.distance[1:] - products.distance[0]
    share = diagonal_share(parts, vectors)
    return _basis(
        vectors, 1 - varied / largest, shifts, share, float("nan"), parts, "products", bias
    )


def _basis(
    vectors: Tensor,
    survival: Tensor,
    shifts: Tensor,
    explained: float,
    explained_change: float,
    parts: Tensor,
    source: Source,
    bias: Tensor | None,
) -> QKBasis:
    if vectors.shape[1] % 2:
        raise PosheadsError(
            f"d_head={vectors.shape[1]} was given; a plane takes two directions, so expected an "
            "even number"
        )
    speeds = 1 / half_lives(survival, shifts)
    # Those that stand still keep the order in which they were found.
    order = torch.argsort(speeds, descending=True, stable=True)
    return QKBasis(
        vectors=vectors[order].contiguous(),
        speeds=speeds[order],
        survival=survival[:, order].contiguous(),
        shifts=shifts,
        explained=explained,
        explained_change=explained_change,
        diagonal=diagonal_share(parts, vectors),
        source=source,
        bias_speed=None if bias is None else bias_speed(bias),
    )

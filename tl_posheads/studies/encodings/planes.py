"""Contributions of a head's dimensions under any positional encoding, from tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tl_posheads.errors import PosheadsError
from tl_posheads.studies.encodings.basis import QKBasis

Unmoved = Literal["left_out", "last"]
_CHUNK = 1 << 19  # elements of D at a time


def plane_contributions(
    q: Float[Tensor, "q_pos d_head"],
    k: Float[Tensor, "k_pos d_head"],
    basis: QKBasis,
    bias: Float[Tensor, " distance"] | None = None,
    *,
    q_pos: Int[Tensor, " q_pos"] | None = None,
) -> Float[Tensor, "q_pos k_pos dimension"]:
    """Contribution of every dimension of one head to every query-key product, fastest first.

    The coordinates' products, summed over a plane's two directions, as ``dimension_contributions``
    sums them over a rotary pair. With a bias, it is one more dimension, at ``basis.bias_at``. All
    dimensions sum to ``q . k``, or ``q . k + bias``. ``dominant_dimension`` takes the result.

    The result is whole: ``8 * q_pos * k_pos * dimension`` bytes. It is meant for looking at some
    positions; scoring never builds it.

    Args:
        q: queries as they are multiplied with the keys. k: keys, at positions 0, 1, ...
        basis: of the head.
        bias: at distances 0, 1, ..., **in units of q . k**: what is added to the scaled scores,
            divided by the head's attention scale. Keys behind the query get that of 0.
        q_pos: positions of the queries; 0, 1, ... by default.

    Raises:
        PosheadsError: shapes that don't belong together; a basis that has a place for a bias and
            no bias, or the other way round; a bias for fewer distances than there are.

    Example:
        >>> import torch
        >>> from tl_posheads import LayerGeometry
        >>> from tl_posheads.studies.encodings import ordered_planes, rotation_operators
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]))
        >>> basis = ordered_planes(rotation_operators(g, [1, 2, 4, 8]), [1, 2, 4, 8])
        >>> q, k = torch.randn(2, 5, 4)
        >>> c = plane_contributions(q, k, basis)
        >>> c.shape, torch.allclose(c.sum(-1), (q @ k.T).double(), atol=1e-5)
        (torch.Size([5, 5, 2]), True)
    """
    vectors = PlaneVectors(
        q[:, None], k[:, None], [basis], None if bias is None else bias[None], unmoved="last"
    )
    rows = torch.arange(len(q)) if q_pos is None else q_pos
    if len(rows) != len(q):
        raise PosheadsError(f"{len(q)} queries and {len(rows)} positions of them were given")
    return torch.stack(list(vectors.contributions(torch.arange(len(q)), rows, len(k))), -1)[0]


class PlaneVectors:
    """One text's queries and keys of one layer in the heads' bases, for D block by block.

    On the CPU, in float64. Holds ``16 * d_head * head * pos`` bytes for q and k; :meth:`dominant`
    keeps the dimensions in a loop and needs five arrays ``[head, rows, keys]``.

    Args:
        q: queries as they are multiplied with the keys. k: keys, one for each query head.
        bases: one for each head.
        bias: by head and distance, from 0 on, in units of ``q . k``; None without.
        unmoved: planes that stand still under the encoding, like partial rotary's unrotated
            coordinates, are left out, as the paper's score leaves them out, or are the slowest
            dimensions.

    Raises:
        PosheadsError: shapes that don't belong together, see :func:`plane_contributions`.
    """

    def __init__(
        self,
        q: Float[Tensor, "q_pos head d_head"],
        k: Float[Tensor, "k_pos head d_head"],
        bases: Sequence[QKBasis],
        bias: Float[Tensor, "head distance"] | None = None,
        *,
        unmoved: Unmoved = "left_out",
    ) -> None:
        self._check(q, k, bases, bias, unmoved)
        vectors = torch.stack([basis.vectors for basis in bases])
        # [direction of a plane, dimension, head, pos]
        self._q, self._k = (
            torch.einsum("phd,hed->ehp", x.detach().double().cpu(), vectors)
            .unflatten(0, (-1, 2))
            .transpose(0, 1)
            .contiguous()
            for x in (q, k)
        )
        used = torch.stack(
            [basis.moves | (unmoved == "last") for basis in bases], dim=1
        )  # [dimension, head]
        self._bias_at: Int[Tensor, " head"] | None = None
        self._bias = None if bias is None else bias.detach().double().cpu()
        if bias is not None:
            self._bias_at = torch.tensor([basis.bias_at for basis in bases])
            self._q, self._k = (self._with_gap(x) for x in (self._q, self._k))
            used = self._with_gap(used[None, ..., None], fill=True)[0, ..., 0]
        # Dimensions left out weigh nothing in the softmax, and the index counts only the others.
        self._absent = torch.where(used, 0.0, -torch.inf).double()
        self.index: Float[Tensor, "dimension head"] = (used.cumsum(0) - 1).clamp_min(0).double()
        self.n_dimensions, self.n_heads = used.shape
        self.n_keys = k.shape[0]

    @staticmethod
    def _check(
        q: Tensor, k: Tensor, bases: Sequence[QKBasis], bias: Tensor | None, how: str
    ) -> None:
        shape = (q.shape[1:], k.shape[1:])
        d_head = bases[0].vectors.shape[1] if bases else 0
        if q.ndim != 3 or shape[0] != shape[1] or shape[0] != (len(bases), d_head):
            raise PosheadsError(
                f"queries of shape {tuple(q.shape)}, keys of shape {tuple(k.shape)} and "
                f"{len(bases)} bases of d_head={d_head} were given; expected [pos, head, d_head] "
                "with a key and a basis for each query head"
            )
        with_bias = [basis.bias_speed is not None for basis in bases]
        if any(with_bias) != (bias is not None) or not all(x == with_bias[0] for x in with_bias):
            raise PosheadsError(
                f"{sum(with_bias)} of {len(bases)} bases have a place for a bias, and a bias was "
                f"{'not ' if bias is None else ''}given; make the bases with the bias, or neither"
            )
        if bias is not None and (bias.shape[0] != len(bases) or bias.shape[1] < q.shape[0]):
            raise PosheadsError(
                f"a bias of shape {tuple(bias.shape)} was given for {len(bases)} heads and "
                f"{q.shape[0]} positions; expected [head, distance] from distance 0 on"
            )
        if how not in ("left_out", "last"):
            raise PosheadsError(f"unmoved={how!r} was given; expected 'left_out' or 'last'")

    def _with_gap(self, x: Tensor, fill: bool = False) -> Tensor:
        """One dimension more, in each head where its bias belongs; zeros (or ones) there."""
        assert self._bias_at is not None
        longer = pad(x, (0, 0, 0, 0, 1, 1))
        at = torch.arange(x.shape[1] + 1)[:, None]
        before, after = longer[:, 1:], longer[:, :-1]
        first, gap = (mask[None, :, :, None] for mask in (at < self._bias_at, at == self._bias_at))
        out = torch.where(first, before, after)
        return torch.where(gap, torch.full_like(out, fill), out)

    def contributions(
        self, rows: Int[Tensor, " row"], q_pos: Int[Tensor, " row"], n_keys: int
    ) -> Iterator[Float[Tensor, "head row key"]]:
        """One dimension after the other, of the queries at ``rows`` and the first keys; float64.

        Minus infinity where a head leaves the dimension out.
        """
        q, k = self._q[..., rows, None], self._k[..., None, :n_keys]
        bias = None
        if self._bias is not None:
            distance = (q_pos[:, None] - torch.arange(n_keys)).clamp_min(0)
            bias = self._bias[:, distance]
        for m in range(self.n_dimensions):
            out = torch.mul(q[0, m], k[0, m]).addcmul_(q[1, m], k[1, m])
            if bias is not None and self._bias_at is not None:
                out += bias * (self._bias_at == m)[:, None, None]
            yield out.add_(self._absent[m, :, None, None])

    def dominant(self, rows: Int[Tensor, " row"], n_keys: int) -> Float[Tensor, "head row key"]:
        """D of the queries at ``rows`` and the first keys: ``sum_m m softmax_m(c)``; float64."""
        peak = torch.full((1,), -torch.inf, dtype=torch.float64)
        for contribution in self.contributions(rows, rows, n_keys):
            peak = torch.maximum(peak, contribution)
        total = torch.zeros_like(peak)
        moment = torch.zeros_like(peak)
        for m, contribution in enumerate(self.contributions(rows, rows, n_keys)):
            weight = contribution.sub_(peak).exp_()
            total += weight
            moment.addcmul_(weight, self.index[m, :, None, None])
        return moment.div_(total)


def dominant_by_distance(
    vectors: PlaneVectors, window: int | None = None
) -> tuple[Int[Tensor, " n"], Float[Tensor, "head n"]]:
    """Distance and dominant dimension of every pair that attention sees, for rho.

    Args:
        vectors: of one text and layer.
        window: query i sees keys after ``i - window`` alone; None: all before it.

    Memory: ``8 * n * (head + 1)`` bytes, and chunks of half a million values.
    """
    n, start = vectors.n_keys, 1
    distances: list[Tensor] = []
    dominants: list[Tensor] = []
    while start < n:
        step = max(1, _CHUNK // (vectors.n_heads * n))
        rows = torch.arange(start, min(n, start + step))
        start += step
        n_keys = int(rows[-1])
        distance = rows[:, None] - torch.arange(n_keys)
        valid: Bool[Tensor, "row key"] = distance >= 1
        if window is not None:
            valid &= distance < window
        distances.append(distance[valid])
        dominants.append(vectors.dominant(rows, n_keys)[:, valid])
    return torch.cat(distances), torch.cat(dominants, dim=1)

"""What moving a token does to its query: the operator of a positional encoding.

Keep a text and move its positions by s tokens. The query of the same token becomes ``q^(s)``, and
the best linear map ``q^(s) ~ T_s q`` says what the encoding does, whatever it is. Under RoPE T_s
is the rotation by s tokens, exactly. Under sinusoidal or learned positions, which are added to the
content before the projections, it's a regression, and its R^2 says how good a description it is.
Encodings that leave q and k where they are (ALiBi, T5's bias, none) have ``T_s = 1``: they are
described by :mod:`tl_posheads.studies.encodings.products` instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.rotary.contributions import rotate_by
from tl_posheads.rotary.geometry import LayerGeometry

RIDGE = 1e-6  # of the mean variance of a coordinate


@dataclass(frozen=True, eq=False)
class Transport:
    """The best linear map from queries to the same tokens' queries so many tokens further on.

    Attributes:
        operator: ``T_s``; ``moved ~ operator @ q``.
        r2: share of the moved vectors' squared length that it describes.
        r2_change: share of the change ``moved - q`` that it describes; 1 where nothing changes.
            An encoding that hardly moves anything has a high ``r2`` whatever the operator,
            this one says what the operator adds.
    """

    operator: Float[Tensor, "d_head d_head"] = field(repr=False)
    r2: float
    r2_change: float


def log_shifts(longest: int, per_octave: int = 2) -> list[int]:
    """Whole numbers from 1 to ``longest`` in equal ratios.

    Raises:
        PosheadsError: nothing to choose from.

    Example:
        >>> log_shifts(32)
        [1, 2, 3, 4, 6, 8, 11, 16, 23, 32]
    """
    if longest < 1 or per_octave < 1:
        raise PosheadsError(
            f"longest={longest} and per_octave={per_octave} were given; expected 1 or more"
        )
    out, step = {longest}, 0
    while (value := round(2 ** (step / per_octave))) < longest:
        out.add(value)
        step += 1
    return sorted(out)


def transport_operator(
    q: Float[Tensor, "n d_head"], moved: Float[Tensor, "n d_head"], *, ridge: float = RIDGE
) -> Transport:
    """Least-squares operator from vectors to the same tokens' vectors at moved positions.

    Queries and keys of a head may be pooled: the encoding moves both alike.

    Args:
        q: a vector per token. moved: the same tokens', all so many positions further on.
        ridge: pulls T towards the identity, in units of the mean variance of a coordinate.
            Directions that the vectors hardly reach are then taken to stand still.

    Raises:
        PosheadsError: shapes that differ or fewer vectors than 1; a negative ridge.

    Example:
        >>> import torch
        >>> q = torch.randn(50, 4, dtype=torch.float64)
        >>> turn = torch.linalg.matrix_exp(torch.tensor([[0.0, -0.3], [0.3, 0.0]]).double())
        >>> moved = torch.cat([q[:, :2] @ turn.T, q[:, 2:]], dim=1)
        >>> found = transport_operator(q, moved, ridge=0.0)
        >>> torch.allclose(found.operator[:2, :2], turn), round(found.r2, 6)
        (True, 1.0)
    """
    if q.ndim != 2 or q.shape != moved.shape or len(q) < 1:
        raise PosheadsError(
            f"vectors of shape {tuple(q.shape)} and moved ones of shape {tuple(moved.shape)} were "
            "given; expected the same [n, d_head]"
        )
    sums = TransportSums(1, q.shape[1], 1)
    sums.add(q[:, None])
    sums.add_moved(0, q[:, None], moved[:, None])
    return sums.solve(ridge)[0][0]


class TransportSums:
    """Sums over tokens from which the operators of all heads and shifts follow.

    Memory: ``8 * head * (shift + 1) * d_head**2`` bytes.
    """

    def __init__(self, n_heads: int, d_head: int, n_shifts: int) -> None:
        self.n_heads, self.d_head, self.n_shifts = n_heads, d_head, n_shifts
        self._gram = torch.zeros(n_heads, d_head, d_head, dtype=torch.float64)
        self._n = 0
        self._change = torch.zeros(n_heads, n_shifts, d_head, d_head, dtype=torch.float64)
        self._length = torch.zeros(n_heads, n_shifts, dtype=torch.float64)
        self._change_length = torch.zeros(n_heads, n_shifts, dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """All that was added up, for a file."""
        return {name: torch.as_tensor(value) for name, value in vars(self).items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> TransportSums:
        """The inverse of :meth:`tensors`."""
        sums = cls.__new__(cls)
        for name, value in tensors.items():
            setattr(sums, name, value if value.ndim else value.item())
        return sums

    def add(self, x: Float[Tensor, "n head d_head"]) -> None:
        """Vectors where they are. Every one of them is moved by every shift later."""
        x = x.detach().double().cpu()
        self._gram += torch.einsum("nhi,nhj->hij", x, x)
        self._n += len(x)

    def add_moved(
        self, shift: int, x: Float[Tensor, "n head d_head"], moved: Float[Tensor, "n head d_head"]
    ) -> None:
        """The same vectors at the positions of the shift of this index."""
        x, moved = x.detach().double().cpu(), moved.detach().double().cpu()
        change = moved - x
        self._change[:, shift] += torch.einsum("nhi,nhj->hij", change, x)
        self._change_length[:, shift] += change.square().sum((0, 2))
        self._length[:, shift] += moved.square().sum((0, 2))

    def solve(self, ridge: float = RIDGE) -> list[list[Transport]]:
        """Operators by head and shift.

        Raises:
            PosheadsError: a negative ridge; nothing was added.
        """
        if ridge < 0 or not self._n:
            raise PosheadsError(
                f"ridge={ridge} and {self._n} vectors were given; expected 0 or more, and vectors"
            )
        identity = torch.eye(self.d_head, dtype=torch.float64)
        mean = self._gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        # Pseudo-inverse: where the vectors don't reach at all, nothing moves.
        inverse = torch.linalg.pinv(self._gram + ridge * mean * identity, hermitian=True)
        out = []
        for head in range(self.n_heads):
            gram, row = self._gram[head], []
            for shift in range(self.n_shifts):
                cross = self._change[head, shift]
                extra = cross @ inverse[head]
                # |change - extra x|^2, summed, from the sums alone.
                left = float(self._change_length[head, shift])
                left += float((extra @ gram * extra).sum() - 2 * (extra * cross).sum())
                row.append(
                    Transport(
                        identity + extra,
                        _described(left, float(self._length[head, shift])),
                        _described(left, float(self._change_length[head, shift])),
                    )
                )
            out.append(row)
        return out


def _described(left: float, whole: float) -> float:
    return 1.0 - max(0.0, left) / whole if whole > 0 else 1.0


def rotation_operators(
    geometry: LayerGeometry, shifts: Sequence[int]
) -> Float[Tensor, "shift d_head d_head"]:
    """T_s of a layer with RoPE, which is known without any text: the rotation by s tokens.

    Coordinates past ``rotary_dim`` stand still.

    Example:
        >>> import torch
        >>> from tl_posheads import LayerGeometry
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]))
        >>> q = torch.randn(1, 1, 4, dtype=torch.float64)
        >>> (moved,) = rotation_operators(g, [3]) @ q.flatten()
        >>> torch.allclose(moved, rotate_by(q, torch.tensor([3]), g).flatten())
        True
    """
    steps = torch.as_tensor(list(shifts), dtype=torch.long)
    identity = torch.eye(geometry.d_head, dtype=torch.float64)
    # The shifts stand in the place of positions and the basis vectors in that of heads.
    columns = identity.expand(len(steps), -1, -1)
    return rotate_by(columns, steps, geometry).mT.contiguous()

"""No position on some pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import Frequencies, FrequencyMethod, require_positive


@dataclass(frozen=True)
class NoPE(FrequencyMethod):
    """Stop the rotation of some pairs: their contribution no longer depends on distance.

    Without positions: Kazemnejad et al., "The impact of positional encoding on length
    generalization in transformers", NeurIPS 2023, arXiv 2305.19466. On the slow pairs alone:
    Barbero et al., "Round and round we go!", ICLR 2025, arXiv 2410.06205 (p-RoPE).

    Attributes:
        pairs: those that stop, 0 being the fastest.
        slower_than: stop all whose full turn takes more than so many tokens; ``"trained"`` is the
            training length. One of the two is given.

    Example:
        >>> import torch
        >>> own = torch.tensor([1.0, 0.01])
        >>> NoPE(slower_than="trained").frequencies(own, trained=256, length=256).inv_freq
        tensor([1., 0.], dtype=torch.float64)
    """

    pairs: Sequence[int] | None = None
    slower_than: float | Literal["trained"] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if (self.pairs is None) == (self.slower_than is None):
            raise PosheadsError(
                f"NoPE(pairs={self.pairs!r}, slower_than={self.slower_than!r}) was given; expected "
                "one of them, like pairs=range(24, 32) or slower_than='trained'"
            )
        if self.pairs is not None:
            pairs = tuple(self.pairs) if isinstance(self.pairs, Sequence) else ()
            if not pairs or not all(isinstance(pair, int) for pair in pairs):
                raise PosheadsError(
                    f"NoPE(pairs={self.pairs!r}) was given; expected at least one pair's number, "
                    "like pairs=range(24, 32)"
                )
            object.__setattr__(self, "pairs", pairs)
        if self.slower_than != "trained":
            require_positive("NoPE", slower_than=self.slower_than)

    def frequencies(self, inv_freq: Tensor, trained: int, length: int) -> Frequencies:
        own, n = inv_freq.double(), len(inv_freq)
        if self.pairs is not None:
            wrong = [pair for pair in self.pairs if not 0 <= pair < n]
            if wrong:
                raise PosheadsError(
                    f"NoPE was given pair {wrong[0]}, but the model's heads have rotary pairs 0 "
                    f"to {n - 1}; choose among those"
                )
            still = torch.zeros(n, dtype=torch.bool, device=own.device)
            still[list(self.pairs)] = True
        else:
            limit = trained if self.slower_than == "trained" else self.slower_than
            assert isinstance(limit, int | float)
            still = 2 * math.pi / own > limit
        return Frequencies(torch.where(still, 0.0, own))

"""A different base of the RoPE frequencies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import Frequencies, FrequencyMethod


@dataclass(frozen=True)
class Theta(FrequencyMethod):
    """The frequencies of another base: pair ``m`` of ``n`` turns by ``base ** (-m / n)`` a token.

    Su et al., "RoFormer", 2021, arXiv 2104.09864, section 3.2, with the base free. The
    model's weights, learned with its own base, stay.

    Attributes:
        base: of the geometric series, above 1; 10,000 in the paper.

    Example:
        >>> import torch
        >>> Theta(100.0).frequencies(torch.tensor([1.0, 0.01]), trained=256, length=256).inv_freq
        tensor([1.0000, 0.1000], dtype=torch.float64)
    """

    base: float

    def __post_init__(self) -> None:
        known = isinstance(self.base, int | float) and not isinstance(self.base, bool)
        if not known or not 1 < self.base < float("inf"):
            raise PosheadsError(
                f"Theta(base={self.base!r}) was given; expected a number above 1, like 10000.0"
            )

    def frequencies(self, inv_freq: Tensor, trained: int, length: int) -> Frequencies:
        n = len(inv_freq)
        pair = torch.arange(n, dtype=torch.float64, device=inv_freq.device)
        return Frequencies(float(self.base) ** (-pair / n))

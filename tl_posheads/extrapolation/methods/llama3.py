"""Llama 3's scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import (
    Frequencies,
    FrequencyMethod,
    require_factor,
    require_positive,
)


@dataclass(frozen=True)
class Llama3(FrequencyMethod):
    """Interpolate pairs that turn seldom within the training length; keep those that turn often.

    Dubey et al., "The Llama 3 herd of models", 2024, arXiv 2407.21783; ``rope_type="llama3"`` in
    transformers. Between ``low_freq_factor`` and ``high_freq_factor`` turns within the training
    length the two are mixed, in proportion to the turns.

    Attributes:
        factor: how much longer the texts are than those of training, 1 or more.
        low_freq_factor: turns below which a pair is interpolated.
        high_freq_factor: turns above which it is kept.

    Example:
        >>> import torch
        >>> own = torch.tensor([1.0, 0.05, 0.001])
        >>> (Llama3(8).frequencies(own, trained=256, length=2048).inv_freq / own).tolist()
        [1.0, 0.4275..., 0.125...]
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        require_factor("Llama3", self.factor)
        require_positive(
            "Llama3", low_freq_factor=self.low_freq_factor, high_freq_factor=self.high_freq_factor
        )
        if self.high_freq_factor <= self.low_freq_factor:
            raise PosheadsError(
                f"Llama3(low_freq_factor={self.low_freq_factor}, "
                f"high_freq_factor={self.high_freq_factor}) was given; expected turns within the "
                "training length, high_freq_factor the more of them"
            )

    def frequencies(self, inv_freq: Tensor, trained: int, length: int) -> Frequencies:
        own = inv_freq.double()
        turns = trained * own / (2 * math.pi)
        width = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / width).clamp(0, 1)
        return Frequencies(torch.lerp(own / self.factor, own, kept))

"""Linear position interpolation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tl_posheads.extrapolation.base import Frequencies, FrequencyMethod, require_factor


@dataclass(frozen=True)
class Linear(FrequencyMethod):
    """Positions divided by ``factor``: every pair turns slower.

    Chen et al., "Extending context window of large language models via positional interpolation",
    2023, arXiv 2306.15595; ``rope_type="linear"`` in transformers.

    Attributes:
        factor: how much longer the texts are than those of training, 1 or more.

    Example:
        >>> import torch
        >>> Linear(4).frequencies(torch.tensor([1.0, 0.01]), trained=256, length=1024).inv_freq
        tensor([0.2500, 0.0025])
    """

    factor: float

    def __post_init__(self) -> None:
        require_factor("Linear", self.factor)

    def frequencies(self, inv_freq: Tensor, trained: int, length: int) -> Frequencies:
        return Frequencies(inv_freq / self.factor)

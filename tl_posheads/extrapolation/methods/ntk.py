"""NTK-aware scaling, with a factor of its own or one that follows the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tl_posheads.extrapolation.base import Frequencies, FrequencyMethod, require_factor


def raise_base(inv_freq: Tensor, factor: float) -> Tensor:
    """Frequencies whose base is ``factor ** (d / (d - 2))`` times as high, ``d`` coordinates.

    The fastest pair stays, the slowest turns ``factor`` times slower; the model's own base need
    not be known. One pair alone stays.
    """
    n = len(inv_freq)
    pair = torch.arange(n, dtype=torch.float64, device=inv_freq.device)
    return inv_freq.double() * float(factor) ** (-pair / max(1, n - 1))


@dataclass(frozen=True)
class NTK(FrequencyMethod):
    """A higher base: slow pairs turn up to ``factor`` times slower, the fastest doesn't change.

    bloc97, "NTK-aware scaled RoPE", 2023; Peng et al., "YaRN", ICLR 2024, arXiv 2309.00071,
    section 3.1.

    Attributes:
        factor: how much longer the texts are than those of training, 1 or more.

    Example:
        >>> import torch
        >>> NTK(4).frequencies(torch.tensor([1.0, 0.1, 0.01]), trained=256, length=256).inv_freq
        tensor([1.0000, 0.0500, 0.0025], dtype=torch.float64)
    """

    factor: float

    def __post_init__(self) -> None:
        require_factor("NTK", self.factor)

    def frequencies(self, inv_freq: Tensor, trained: int, length: int) -> Frequencies:
        return Frequencies(raise_base(inv_freq, self.factor))


@dataclass(frozen=True)
class DynamicNTK(FrequencyMethod):
    """NTK-aware scaling that grows with the text past the training length.

    With ``L`` tokens so far the base's factor is ``factor * L / trained - (factor - 1)``. Up to the
    training length nothing changes; past it something does even with ``factor=1``. emozilla,
    "Dynamically scaled RoPE", 2023; ``rope_type="dynamic"`` in transformers. With a KV cache, a
    Bridge's cached keys keep the frequencies of the pass that cached them, as in transformers; a
    HookedTransformer rotates them afresh.

    Attributes:
        factor: 1 or more.

    Example:
        >>> import torch
        >>> own = torch.tensor([1.0, 0.1, 0.01])
        >>> DynamicNTK(2).frequencies(own, trained=256, length=512).inv_freq[-1].item()
        0.0033...
    """

    factor: float
    length_matters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_factor("DynamicNTK", self.factor)

    def frequencies(self, inv_freq: Tensor, trained: int, length: int) -> Frequencies:
        so_far = max(length, trained)
        return Frequencies(raise_base(inv_freq, self.factor * so_far / trained - (self.factor - 1)))

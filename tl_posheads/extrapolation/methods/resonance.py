"""Resonance RoPE."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import Frequencies, FrequencyMethod


@dataclass(frozen=True)
class Resonance(FrequencyMethod):
    """Wavelengths rounded to whole tokens: what repeats in training repeats exactly beyond it.

    Wang et al., "Resonance RoPE: improving context length generalization of large language
    models", ACL Findings 2024, arXiv 2403.00071. Composes with another method, whose wavelengths
    are rounded; the attention factor is the other's.

    Attributes:
        inner: the other method, ``Resonance(YaRN(4))``; None is the model's own frequencies.

    Example:
        >>> import torch
        >>> own = torch.tensor([1.0, 0.1])
        >>> new = Resonance().frequencies(own, trained=256, length=256).inv_freq
        >>> (2 * torch.pi / new).round(decimals=6).tolist()
        [6.0, 63.0]
    """

    inner: FrequencyMethod | None = None

    def __post_init__(self) -> None:
        if self.inner is None:
            return
        plain = getattr(type(self.inner), "turns", None) is FrequencyMethod.turns
        if not plain:
            raise PosheadsError(
                f"Resonance({self.inner!r}) was given; expected a method that only changes "
                "frequencies, like YaRN(4)"
            )
        # The inner method decides whether the length matters; it is not a setting of this one.
        object.__setattr__(self, "length_matters", self.inner.length_matters)

    def border(self, trained: int) -> int | None:
        return None if self.inner is None else self.inner.border(trained)

    def frequencies(self, inv_freq: Tensor, trained: int, length: int) -> Frequencies:
        new = Frequencies(inv_freq)
        if self.inner is not None:
            new = self.inner.frequencies(inv_freq, trained, length)
        wavelength = (2 * math.pi / new.inv_freq.double()).round()
        return Frequencies(2 * math.pi / wavelength, new.scale)

"""Fourier position embedding, as far as it goes without training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tl_posheads.extrapolation.base import (
    Frequencies,
    FrequencyMethod,
    require_positive,
    require_whole,
)
from tl_posheads.rotary.geometry import LayerGeometry


@dataclass(frozen=True)
class FoPE(FrequencyMethod):
    """Pairs that never finish a turn in training stop; the others turn at many frequencies at once.

    Hua et al., "Fourier position embedding: enhancing attention's periodic extension for length
    generalization", ICML 2025, arXiv 2412.17739. A pair's rotation ``exp(i w p)`` becomes a
    Fourier series: its own frequency with coefficient 1, and the other kept frequencies with small
    random ones, cosine and sine each their own. This is the evaluation-time variant: the paper
    trains a model with the series, and coefficients that a model was not trained with are noise to
    it; at ``sigma=0`` only the clipping is left. The authors' code draws coefficients for every
    layer and head; here all share one set. A series is no rotation: with ``sigma`` above 0 heads
    get no ``rotation`` and ``content``.

    Attributes:
        sigma: standard deviation of the coefficients, 0 or more; the authors' is about 0.02.
        seed: of the coefficients; the same for all layers, heads, queries and keys.

    Example:
        >>> import torch
        >>> own = torch.tensor([1.0, 0.01])
        >>> FoPE().frequencies(own, trained=256, length=256).inv_freq
        tensor([1., 0.], dtype=torch.float64)
    """

    sigma: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive("FoPE", sigma=self.sigma or None)
        require_whole("FoPE", seed=(self.seed, 0))

    def frequencies(self, inv_freq: Tensor, trained: int, length: int) -> Frequencies:
        own = inv_freq.double()
        return Frequencies(torch.where(own < 2 * math.pi / trained, 0.0, own))

    def layer_geometry(self, layer: LayerGeometry, trained: int, length: int) -> LayerGeometry:
        clipped = super().layer_geometry(layer, trained, length)
        return replace(clipped, is_rotation=self.sigma == 0)

    def turns(
        self, layer: LayerGeometry, position: Tensor, trained: int, length: int
    ) -> tuple[Tensor, Tensor]:
        if self.sigma == 0:
            return super().turns(layer, position, trained, length)
        own = layer.inv_freq.double()
        new = self.frequencies(own, trained, length).inv_freq
        cos_mix, sin_mix = self._coefficients(new)
        at = position[..., None].double()
        angle = at * new.to(position.device)
        cos = angle.cos() @ cos_mix.to(position.device)
        sin = angle.sin() @ sin_mix.to(position.device)
        # The vectors are rotated already: take their own rotation back, then put the series on.
        series = torch.complex(cos, sin) * torch.polar(
            torch.ones_like(angle), -at * own.to(position.device)
        )
        return series.real[..., None, :], series.imag[..., None, :]

    def _coefficients(self, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        """``[frequency, pair]`` for cosine and sine: 1 for the pair's own, small for others."""
        n = len(inv_freq)
        generator = torch.Generator().manual_seed(self.seed)
        mixes = []
        for _ in range(2):
            mix = self.sigma * torch.randn(n, n, generator=generator, dtype=torch.float64)
            mix[inv_freq == 0] = 0.0  # no frequency, no wave
            mix[:, inv_freq == 0] = 0.0  # a pair that stops is constant
            mix.fill_diagonal_(1.0)
            mixes.append(mix)
        return mixes[0], mixes[1]

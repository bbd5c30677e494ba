"""YaRN."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
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
class YaRN(FrequencyMethod):
    """Interpolate slow pairs, keep fast ones, mix those between, and sharpen attention.

    Peng et al., "YaRN: efficient context window extension of large language models", ICLR 2024,
    arXiv 2309.00071, section 3; ``rope_type="yarn"`` in transformers. A pair is kept if it turns
    ``beta_fast`` times or more within the training length, and interpolated if ``beta_slow`` times
    or fewer.

    Attributes:
        factor: how much longer the texts are than those of training, 1 or more.
        beta_fast, beta_slow: full turns within the training length.
        attention_factor: factor on queries and keys both, the square root of the paper's inverse
            temperature; None is the paper's ``0.1 * ln(factor) + 1``.
        mscale, mscale_all_dim: DeepSeek's settings of the attention factor. Its attention's further
            factor on whole scores is no rotation and is left to the model.
        truncate: take whole pairs as the ramp's ends, as transformers does by default.

    Example:
        >>> import torch
        >>> own = 10000.0 ** (-torch.arange(4) / 4)
        >>> inv_freq, scale = YaRN(4).frequencies(own, trained=256, length=1024)
        >>> (inv_freq / own).tolist(), round(scale, 4)
        ([1.0, 0.625, 0.25, 0.25], 1.1386)
    """

    factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        require_factor("YaRN", self.factor)
        require_positive(
            "YaRN",
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            mscale=self.mscale,
            attention_factor=self.attention_factor,
            mscale_all_dim=self.mscale_all_dim,
        )
        if self.beta_fast < self.beta_slow:
            raise PosheadsError(
                f"YaRN(beta_fast={self.beta_fast}, beta_slow={self.beta_slow}) was given; "
                "expected turns within the training length, beta_fast the more of them"
            )

    def frequencies(self, inv_freq: Tensor, trained: int, length: int) -> Frequencies:
        own, n = inv_freq.double(), len(inv_freq)
        low, high = (
            pair_that_turns(own, beta, trained) for beta in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # transformers bounds the upper end by the coordinates, not the pairs.
        low, high = max(low, 0), min(high, 2 * n - 1)
        if low == high:
            high += 0.001
        pair = torch.arange(n, dtype=torch.float64, device=own.device)
        interpolated = ((pair - low) / (high - low)).clamp(0, 1)
        return Frequencies(own * (1 - interpolated * (1 - 1 / self.factor)), self._scale())

    def _scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        log = 0.1 * math.log(self.factor)
        if self.mscale is not None and self.mscale_all_dim is not None:
            return (self.mscale * log + 1) / (self.mscale_all_dim * log + 1)
        return log + 1


def pair_that_turns(inv_freq: Tensor, turns: float, trained: int) -> float:
    """The pair, or the place between two, that turns so often within the training length.

    On the line through the frequencies' logarithms, which is the model's base where they are a
    geometric series, as nearly everywhere; piecewise where they are not.
    """
    log = torch.log(inv_freq.clamp_min(1e-30)).cpu().numpy()
    wanted = math.log(2 * math.pi * turns / trained)
    if len(log) < 2:
        return 0.0
    slopes = np.diff(log)
    if np.allclose(slopes, slopes.mean(), rtol=1e-3):
        return float((wanted - log[0]) / ((log[-1] - log[0]) / (len(log) - 1)))
    if wanted > log[0]:
        return float((wanted - log[0]) / slopes[0])
    if wanted < log[-1]:
        return float(len(log) - 1 + (wanted - log[-1]) / min(slopes[-1], -1e-9))
    return float(np.interp(-wanted, -log, np.arange(len(log))))

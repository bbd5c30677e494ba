"""How much half precision rounds vectors and attention scores."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

MOST_ROUNDED = 0.5  # nats; an attention weight is then off by two thirds
_COMPETES = 10.0  # nats below a row's largest score a weight is 5e-5


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 if it has half precision, which is too coarse for sums and angles."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rounding_of(scores: Float[Tensor, "batch head q_pos k_pos"], kept_as: torch.dtype) -> float:
    """How much storing masked scores as ``kept_as`` rounds a row's decisive ones, in nats.

    Those are a row's largest scores, where more than one key comes near the maximum.

    Example:
        >>> scores = torch.tensor([[[[300.0, 301.0], [900.0, 300.0]]]])
        >>> rounding_of(scores, torch.bfloat16) == 301 * 2**-8
        True
    """
    if kept_as.itemsize > 2:
        return 0.0
    half_digit = torch.finfo(kept_as).eps / 2
    peak = scores.amax(-1, keepdim=True)
    near = peak - _COMPETES - 2 * half_digit * peak.abs()
    decided = (scores >= near).sum(-1, keepdim=True) < 2
    # A row of padding attends to nothing, and mask values are not scores.
    hidden = peak < torch.finfo(kept_as).min / 2
    return half_digit * float(peak.abs().masked_fill(decided | hidden, 0.0).max())

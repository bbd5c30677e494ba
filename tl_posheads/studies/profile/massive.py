"""Massive values in queries and keys."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def massive_share(
    norms: Float[Tensor, "head d_head"], *, factor: float = 5.0
) -> Float[Tensor, " head"]:
    """Share of a head's dimensions that are massive: above ``factor`` times the head's mean norm.

    Jin et al. 2025, whose lambda the factor is. NaN for a head whose norms are all 0.

    Example:
        >>> import torch
        >>> massive_share(torch.tensor([[100.0] + 9 * [1.0], 10 * [1.0]]))
        tensor([0.1000, 0.0000], dtype=torch.float64)
    """
    norms = norms.double()
    mean = norms.mean(-1, keepdim=True)
    share = (norms > factor * mean).double().mean(-1)
    return share.masked_fill(mean[:, 0] == 0, float("nan"))

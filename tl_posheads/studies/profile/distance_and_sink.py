"""How far back a head attends, and how much it attends to the first token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def sink_mass(pattern: Float[Tensor, "*head q_pos k_pos"]) -> Float[Tensor, "*head"]:
    """Mean attention on the first token, over all queries, the first one among them.

    Xiao et al. 2024, "Efficient streaming language models with attention sinks", arXiv 2309.17453;
    Gu et al. 2024, "When attention sink emerges in language models", arXiv 2410.10781, whose
    ``alpha`` of the first key it is (they call a head a sink from 0.3 on).

    Example:
        >>> import torch
        >>> sink_mass(torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
        tensor(0.6250, dtype=torch.float64)
    """
    return pattern[..., 0].double().mean(-1)


def mean_distance(
    pattern: Float[Tensor, "*head q_pos k_pos"], *, first: int = 0
) -> Float[Tensor, "*head"]:
    """Mean token distance of the head's attention, weighted by attention, in tokens.

    Args:
        pattern: attention, ``q_pos`` and ``k_pos`` the same positions.
        first: keys before this one are left out: 1 leaves out the first token, an attention sink
            rather than a distant token.

    Returns:
        ``sum A (i - j) / sum A`` over all queries and the keys that are left; NaN where no
        attention is left.

    Example:
        >>> import torch
        >>> pattern = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.25, 0.25]])
        >>> mean_distance(pattern), mean_distance(pattern, first=1)
        (tensor(0.5833, dtype=torch.float64), tensor(0.2500, dtype=torch.float64))
    """
    n_pos = pattern.shape[-1]
    at = torch.arange(n_pos, device=pattern.device)
    weight = pattern[..., first:].double()
    distance = (at[:, None] - at)[:, first:]
    return (weight * distance).sum((-2, -1)) / weight.sum((-2, -1))

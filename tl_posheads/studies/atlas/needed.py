"""Which rotary pairs of a head need their rotation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def needed_order(
    change: Float[Tensor, "n head pair"],
) -> tuple[Float[Tensor, "head pair"], Float[Tensor, "head pair"]]:
    """The order in which pairs are given their rotation back, and the error that each step leaves.

    RoPElite of "EliteKV", arXiv 2503.01586: without any rotation, rotate one pair after the other,
    each time the one that brings the scores nearest to those with all pairs rotated, in the mean
    absolute difference.

    Args:
        change: what each pair's rotation adds to each of ``n`` scores.

    Returns:
        The rank of every pair, from 1; the error when it is rotated, as a share of the error with
        none rotated. NaN for a head whose scores the rotation doesn't change.

    Time: ``n * head * pair^2 / 2`` additions. Memory: two times one head's ``[n, pair]``.

    Example:
        >>> import torch
        >>> rank, error = needed_order(torch.tensor([[[1.0, 3.0]], [[1.0, -3.0]]]))
        >>> rank.tolist(), [round(x, 2) for x in error[0].tolist()]
        ([[2.0, 1.0]], [0.0, 0.33])
    """
    n_heads, n_pairs = change.shape[1:]
    rank = torch.full((n_heads, n_pairs), float("nan"), dtype=torch.float64, device=change.device)
    error = torch.full_like(rank, float("nan"))
    for head in range(n_heads):
        own = change[:, head].contiguous()
        left = own.sum(1)  # difference of the scores while nothing is rotated
        whole = left.abs().mean()
        if not bool(whole > 0):
            continue
        open_pairs = list(range(n_pairs))
        for step in range(n_pairs):
            after = (left[:, None] - own[:, open_pairs]).abs().mean(0)
            pair = open_pairs.pop(int(after.argmin()))
            left = left - own[:, pair]
            rank[head, pair] = step + 1
            # What is left when all pairs are rotated is rounding.
            error[head, pair] = after.min() / whole if open_pairs else 0.0
    return rank, error

"""How many of its dimensions a head needs: a sparse mask that keeps its output."""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError

_LEARNING_RATE = 0.05


def dimension_utility(
    q: Float[Tensor, "row head d_head"],
    k: Float[Tensor, "pos head d_head"],
    v: Float[Tensor, "pos head d_v"],
    q_pos: Int[Tensor, " row"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    penalty: float = 0.1,
    steps: int = 100,
) -> tuple[Float[Tensor, "head d_head"], Float[Tensor, " head"]]:
    """How much of each query-key dimension a head needs to keep its output, from 0 to 1.

    Chiang and Yogatama 2025, "The rotary position embedding may cause dimension inefficiency in
    attention heads for long-distance retrieval", arXiv 2502.11276, section 5.2: a sparse mask is
    trained that masks as many dimensions as possible while the head's output is preserved; the
    mask of a dimension is its utility. Here, for every head apart, the mask ``m`` in ``[0, 1]``
    that makes ::

        |O(m) - O(1)|^2 / |O(0) - O(1)|^2  +  penalty * mean(m)

    small, where ``O(m)`` is the attention output for some queries with scores
    ``scale * sum_d m_d q_d k_d``: ``O(1)`` is the head's own output and ``O(0)`` that of even
    attention. Adam from ``m = 1``, clamped to ``[0, 1]`` after each step, at a learning rate that
    falls from 0.05 to 0. Loss, penalty and number of steps are this function's; the paper trains
    on 7B models and thousands of questions. It is a local optimum, the same at every call.

    Args:
        q: rotated queries of some positions. k, v: rotated keys and values of all positions, one
            head for each query head.
        q_pos: the positions of the queries; each sees the keys up to its own.
        scale, softcap, window: the layer's (``LayerGeometry.attention_scale`` and so on).
        penalty: of a mask of ones, in units of what even attention would do to the output.
        steps: of the optimiser.

    Returns:
        The mask, and how much of the output it loses: the first term above. NaN for a head whose
        output is that of even attention.

    Memory: some ``[head, row, pos]`` tensors in float32.

    Raises:
        PosheadsError: shapes that don't fit together.

    Example:
        >>> import torch
        >>> k = torch.zeros(8, 1, 4)
        >>> k[:, 0, 2] = torch.arange(8.0)                  # nothing but dimension 2 matters
        >>> m, lost = dimension_utility(torch.ones(1, 1, 4), k, k, torch.tensor([7]), scale=1.0)
        >>> (m[0] > 0.1).tolist()
        [False, False, True, False]
    """
    n_heads, d_head = q.shape[1:]
    fits = k.shape[1:] == q.shape[1:] and v.shape[:2] == k.shape[:2] and q_pos.shape == q.shape[:1]
    if not fits:
        raise PosheadsError(
            f"q, k, v and q_pos of shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} and "
            f"{tuple(q_pos.shape)} were given; expected [row, head, d_head], "
            "[pos, head, d_head], [pos, head, d_v] and [row]"
        )
    q, k, v = (x.detach().float() for x in (q, k, v))
    distance = q_pos.to(k.device)[:, None] - torch.arange(k.shape[0], device=k.device)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window

    def output(mask: Tensor) -> Tensor:
        scores = scale * einsum(q * mask, k, "row head d, pos head d -> head row pos")
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        pattern = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return einsum(pattern, v, "head row pos, pos head d -> head row d")

    with torch.enable_grad():
        mask = torch.ones(n_heads, d_head, device=q.device, requires_grad=True)
        with torch.no_grad():
            own = output(mask)
            whole = (output(torch.zeros_like(mask)) - own).square().sum((1, 2))
        even = whole <= 1e-12 * own.square().sum((1, 2))
        over = torch.where(even, 1.0, whole)
        optimiser = torch.optim.Adam([mask], lr=_LEARNING_RATE)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = _LEARNING_RATE * (1 - step / steps)
            lost = (output(mask) - own).square().sum((1, 2)) / over
            (gradient,) = torch.autograd.grad((lost + penalty * mask.mean(1)).sum(), mask)
            mask.grad = gradient
            optimiser.step()
            with torch.no_grad():
                mask.clamp_(0.0, 1.0)
    with torch.no_grad():
        lost = (output(mask) - own).square().sum((1, 2)) / over
    nothing = float("nan")
    return (
        mask.detach().double().masked_fill(even[:, None], nothing),
        lost.double().masked_fill(even, nothing),
    )

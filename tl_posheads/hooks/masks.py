"""Which keys a query attends to, derived from its attention scores."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_posheads.errors import PosheadsError


def lowest_score(
    q: Float[Tensor, "*batch head q_pos d"],
    k: Float[Tensor, "*batch head k_pos d"],
    scale: float,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch head q_pos 1"]:
    """Lower bound on ``scale * q . k``, with room for rounding: scores below it are masked.

    No fixed threshold works: Pythia has scores of -1.1e5, and fp16 masks with -65504.
    """
    norms: Tensor = q.float().norm(dim=-1) * k.float().norm(dim=-1).amax(-1, keepdim=True)
    bound = -1.05 * abs(scale) * norms - 1000
    # Only fp16's range is small enough to matter; float64's lowest doesn't fit into float32.
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min) / 2
    return bound.clamp_min(lowest)[..., None]


def visible_keys(
    q: Float[Tensor, "head pos d"],
    k: Float[Tensor, "head pos d"],
    scores: Float[Tensor, "1 head pos pos"] | None,
    declared: float,
    where: str,
) -> Bool[Tensor, "head pos pos"] | None:
    """Which keys each query attends to; None without scores, or if they are the pattern.

    Args:
        q, k: the vectors whose products are the attention scores.
        declared: the layer's factor on their product.
        where: layer and model, for the error message.

    Raises:
        PosheadsError: queries attend to later tokens.
    """
    if scores is None or scores.shape[1:] != (*q.shape[:2], k.shape[1]) or _is_pattern(scores):
        return None
    # Every query attends to its own key, which shows the true scale of the scores.
    own = float((q.double() * k.double()).sum(-1).abs().sum())
    told = float(scores[0].double().diagonal(dim1=-2, dim2=-1).abs().sum())
    scale = max(declared, told / own) if own > 0 else declared
    visible = scores[0] > lowest_score(q, k, scale, scores.dtype)
    later = torch.ones(visible.shape[-2:], dtype=torch.bool, device=visible.device).triu(1)
    if bool(visible[..., later].any()):
        raise PosheadsError(
            f"the queries of {where} see later tokens, as in an encoder or a wrapper without its "
            "causal mask (TransformerLens 3.9 on DeepSeek: install 4.3); only causal attention "
            "can be scored"
        )
    return visible


def _is_pattern(scores: Tensor) -> bool:
    """GPT-J on the Bridge: the scores' hook gets the pattern."""
    sums = scores[0, :, -1].double().sum(-1)
    return float(scores.min()) >= 0 and bool(((sums - 1).abs() < 1e-2).all())


def window_of(
    visible: Bool[Tensor, "head pos pos"], declared: int | None, where: str
) -> int | None:
    """The sliding window found in :func:`visible_keys`, or the declared one if it is longer.

    Raises:
        PosheadsError: keys are masked by something other than a window.
    """
    n = visible.shape[-1]
    shown = int(visible[0, -1].sum())
    at = torch.arange(n, device=visible.device)
    apart = at[:, None] - at
    if not bool((visible == (apart >= 0) & (apart < shown)).all()):
        raise PosheadsError(
            f"not every query in {where} sees exactly the last {shown} keys, as in sparse or "
            "chunked attention; only attention to all keys before, or to the last ones in a "
            "sliding window, can be scored"
        )
    if shown < n:
        return shown
    # Nothing was masked, so no window shorter than the measured pass is active.
    return None if declared is not None and declared < n else declared

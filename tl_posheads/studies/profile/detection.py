"""How much of a head's attention follows a fixed pattern: induction and previous token."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError


def detection_patterns(tokens: Int[Tensor, " pos"]) -> dict[str, Float[Tensor, "q_pos k_pos"]]:
    """TransformerLens' own detection patterns of one text, ones where such a head attends.

    ``induction``: the token behind each earlier copy of the query's token. ``previous_token``: the
    token before the query. From ``transformer_lens.head_detector``.

    Memory: two ``[pos, pos]`` tensors in float32, and some more while they are made.
    """
    # The lens takes seconds to import, and the command's help need not wait for it.
    from transformer_lens import head_detector

    row = tokens[None].cpu()
    return {
        "induction": head_detector.get_induction_head_detection_pattern(row),
        "previous_token": head_detector.get_previous_token_head_detection_pattern(row),
    }


def detected_share(
    pattern: Float[Tensor, "*head q_pos k_pos"], detection: Float[Tensor, "q_pos k_pos"]
) -> Float[Tensor, "*head"]:
    """Share of all attention that lies where the detection pattern is one.

    ``transformer_lens.head_detector.detect_head`` with its defaults (``error_measure="mul"``),
    which runs the model itself and keeps every activation of it.

    Raises:
        PosheadsError: the two have different positions.

    Example:
        >>> import torch
        >>> pattern = torch.tensor([[1.0, 0.0], [0.3, 0.7]])
        >>> detected_share(pattern, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        tensor(0.1500, dtype=torch.float64)
    """
    if pattern.shape[-2:] != detection.shape:
        raise PosheadsError(
            f"a pattern of shape {tuple(pattern.shape)} and a detection pattern of shape "
            f"{tuple(detection.shape)} were given; expected the same positions"
        )
    weight = pattern.double()
    return (weight * detection.to(weight)).sum((-2, -1)) / weight.sum((-2, -1))

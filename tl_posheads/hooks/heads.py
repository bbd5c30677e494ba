"""Heads as ``(layer, head)`` pairs."""

from __future__ import annotations

from collections.abc import Sequence

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.model import LensModel, attention_of, model_name, require_lens

Head = tuple[int, int]


def heads_of(model: LensModel, heads: Sequence[Head]) -> list[Head]:
    """``heads`` as ``(layer, head)`` pairs of the model, in the order given.

    Raises:
        PosheadsError: no TransformerLens model, a head that it doesn't have, the same head twice,
            no pairs.
    """
    require_lens(model)
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    try:
        pairs = [(int(layer), int(head)) for layer, head in heads]
    except (TypeError, ValueError):
        raise PosheadsError(
            f"heads={heads!r} was given; expected pairs like [(7, 8), (6, 6)], as scores.top gives"
        ) from None
    for layer, head in pairs:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise PosheadsError(
                f"layer {layer} head {head} was given, but {model_name(model)} has layers 0 to "
                f"{n_layers - 1} with heads 0 to {n_heads - 1}; choose among those"
            )
        if attention_of(model, layer) is None:
            raise PosheadsError(
                f"layer {layer} head {head} was given, but layer {layer} of {model_name(model)} "
                "has no attention; leave it out"
            )
    if len(set(pairs)) < len(pairs):
        twice = next(pair for pair in pairs if pairs.count(pair) > 1)
        raise PosheadsError(
            f"layer {twice[0]} head {twice[1]} was given twice; name every head once"
        )
    return pairs


def by_layer(heads: Sequence[Head]) -> dict[int, list[int]]:
    """Heads of each layer, layers and heads ascending.

    Example:
        >>> by_layer([(3, 1), (0, 2), (3, 0)])
        {0: [2], 3: [0, 1]}
    """
    out: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        out.setdefault(layer, []).append(head)
    return out

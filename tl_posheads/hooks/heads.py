"""Heads as ``(layer, head)`` pairs, from every form in which they may be given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.model import LensModel, attention_of, model_name, require_lens

Head = tuple[int, int]
_NAME = re.compile(r"\s*L?(\d+)\s*[.H]\s*(\d+)\s*", re.IGNORECASE)
_SHARE = 0.05  # of the heads, where scores are given as ``heads``


@runtime_checkable
class Ranked(Protocol):
    """Scores of heads that can rank them."""

    def top(self, k: float, /) -> list[Head]: ...


Heads = Sequence[Head | str] | Head | str | Ranked
"""``[(6, 6), (7, 8)]``, ``["L6H6", "7.8"]``, a single head, or scores (their top 5 %)."""


def as_heads(heads: Heads) -> list[Head]:
    """Heads as ``(layer, head)`` pairs, not checked against a model.

    Raises:
        PosheadsError: the value can't be read as heads.

    Example:
        >>> as_heads("L6H6"), as_heads((6, 6)), as_heads(["L6H6", (7, 8), "7.9"])
        ([(6, 6)], [(6, 6)], [(6, 6), (7, 8), (7, 9)])
    """
    if isinstance(heads, Ranked):
        return list(heads.top(_SHARE))
    one = isinstance(heads, str) or (isinstance(heads, tuple) and _numbers(heads))
    try:
        return [_pair(head) for head in ([heads] if one else heads)]
    except (TypeError, ValueError):
        raise PosheadsError(
            f"heads={heads!r} was given; expected pairs like [(7, 8), (6, 6)], names like 'L7H8', "
            "or scores"
        ) from None


def as_head(head: Head | str) -> Head:
    """A single head as a ``(layer, head)`` pair, not checked against a model.

    Raises:
        PosheadsError: the value isn't exactly one head.

    Example:
        >>> as_head("L6H6"), as_head((6, 6)), as_head(["L6H6"])
        ((6, 6), (6, 6), (6, 6))
    """
    heads = as_heads(head)
    if len(heads) != 1:
        raise PosheadsError(
            f"{len(heads)} heads were given; expected one, like (7, 8) or 'L7H8', so choose one"
        )
    return heads[0]


def _numbers(pair: tuple[object, ...]) -> bool:
    return len(pair) == 2 and all(hasattr(number, "__index__") for number in pair)


def _pair(head: Any) -> Head:
    if isinstance(head, str):
        found = _NAME.fullmatch(head)
        if found is None:
            raise ValueError
        return int(found[1]), int(found[2])
    layer, index = head
    return int(layer), int(index)


def heads_of(model: LensModel, heads: Heads) -> list[Head]:
    """``heads`` as ``(layer, head)`` pairs that the model has, in the order given.

    Raises:
        PosheadsError: not a TransformerLens model, a head that it doesn't have, a duplicate, no
            heads.
    """
    require_lens(model)
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    pairs = as_heads(heads)
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


def count_of(k: object, n: int) -> int:
    """Number of heads that a count, or a share of ``n``, stands for.

    Raises:
        PosheadsError: ``k`` is neither.
    """
    number = isinstance(k, int | float | np.integer | np.floating) and not isinstance(k, bool)
    if number and isinstance(k, int | np.integer) and k >= 1:
        return min(n, int(k))
    if number and isinstance(k, float | np.floating) and 0 < k <= 1:
        return min(n, max(1, round(float(k) * n)))
    raise PosheadsError(
        f"{k!r} heads were asked for; expected a count of at least 1, like 20, or a share above 0 "
        "and at most 1, like 0.05"
    )

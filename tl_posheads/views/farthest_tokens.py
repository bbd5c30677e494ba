"""The positions that attend farthest back, with the words around them."""

from __future__ import annotations

from tl_posheads.errors import PosheadsError
from tl_posheads.scoring.maps import HeadMaps
from tl_posheads.views.page import View, as_html, page

_SCRIPT = """
draw(view, "TopkSamples", data);
"""


def farthest_tokens(maps: HeadMaps, *, k: int = 10, around: int = 12) -> View:
    """The ``k`` positions of each head that attend farthest back, each with the tokens before it.

    Tokens are coloured by each query's mean attention distance, in tokens, or dominant dimension,
    both weighted by attention.
    ``circuitsvis.topk_samples`` draws it.

    Args:
        maps: what :func:`tl_posheads.head_maps` returned.
        k: samples per head, at least 1; overlapping ones are shown once.
        around: tokens before and after the position.

    Raises:
        PosheadsError: ``k`` below 1 or ``around`` below 0.

    Example:
        >>> farthest_tokens(maps, k=5)                                  # doctest: +SKIP
    """
    if k < 1 or around < 0:
        raise PosheadsError(
            f"k={k!r} and around={around!r} were given; expected k of at least 1 and around of at "
            "least 0"
        )
    tokens: list[list[list[list[str]]]] = []
    values: list[list[list[list[float]]]] = []
    for distance, dimension in zip(maps.distance, maps.dimension):
        stretches = [
            slice(max(0, position - around), position + around + 1)
            for position in _apart(distance.tolist(), k, around)
        ]
        tokens.append([[as_html(maps.tokens[stretch]) for stretch in stretches]] * 2)
        measures = (distance, dimension.nan_to_num(0.0))
        values.append([[of[stretch].tolist() for stretch in stretches] for of in measures])
    return page(
        f"Tokens that attend farthest back: {maps.model}",
        f"The queries that attend farthest back among {len(maps.tokens):,} tokens, in context. "
        "Each token's value is its own mean attention distance, or its mean dominant dimension.",
        {
            "tokens": tokens,
            "activations": values,
            "zerothDimensionName": "Head",
            "firstDimensionName": "Value",
            "zerothDimensionLabels": maps.names,
            "firstDimensionLabels": ["tokens back", "dominant dimension"],
        },
        _SCRIPT,
        height=600,
    )


def _apart(distance: list[float], k: int, around: int) -> list[int]:
    """The positions that attend farthest back, none in another's context."""
    chosen: list[int] = []
    for position in sorted(range(len(distance)), key=lambda i: -distance[i]):
        if all(abs(position - other) > around for other in chosen):
            chosen.append(position)
        if len(chosen) == k:
            break
    return chosen

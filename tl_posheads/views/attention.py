"""Attention of chosen heads beside the rotary dimension that each query-key pair rests on."""

from __future__ import annotations

from tl_posheads.scoring.maps import HeadMaps
from tl_posheads.views.page import View, page

_SCRIPT = """
draw(view, "AttentionHeads", data);
"""


def attention(maps: HeadMaps) -> View:
    """Each head twice: its attention pattern, and its dominant dimension (0 the fastest pair).

    ``circuitsvis.attention.attention_heads`` draws them; a head is opened by a click, and a pair's
    number is shown under the pointer. Dominant dimensions are divided by the last pair's number,
    so that 1 is the slowest pair.

    Args:
        maps: what :func:`tl_posheads.head_maps` returned.

    Example:
        >>> attention(maps)                                             # doctest: +SKIP
    """
    last = [n - 1 for n in maps.n_pairs]
    panels, names = [], []
    for i, name in enumerate(maps.names):
        panels += [maps.pattern[i], maps.dominant[i].nan_to_num(0.0) / last[i]]
        names += [name, f"{name} D"]
    return page(
        f"Attention and dominant dimension: {maps.model}",
        said_of_cells(maps) + " Rows are queries, columns are keys. D: the dominant "
        f"dimension, divided by {' or '.join(map(str, sorted(set(last))))}. Choose a head.",
        {
            "attention": [panel.tolist() for panel in panels],
            "attentionHeadNames": names,
            "tokens": maps.cell_tokens(),
            "maxValue": 1,
            "minValue": -1,
            "maskUpperTri": True,
        },
        _SCRIPT,
        height=1000,
    )


def said_of_cells(maps: HeadMaps) -> str:
    """How the text was put together, if it was."""
    n = len(maps.tokens)
    if maps.step == 1:
        return f"{n:,} tokens."
    return (
        f"{n:,} tokens, {maps.step} a side put together into one cell (attention from a cell's "
        "queries to all of its keys, mean dimension of its pairs)."
    )

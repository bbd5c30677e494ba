"""Attention of chosen heads beside the dominant dimension of each query-key pair."""

from __future__ import annotations

from tl_posheads.scoring.maps import HeadMaps
from tl_posheads.views.page import View, page
from tl_posheads.views.scales import own_range, pair_bar, shades

_SCRIPT = """
blues(view, data.bars);
draw(view, "AttentionHeads", data.shown);
"""


def attention(maps: HeadMaps) -> View:
    """Each head twice: its attention pattern, and its dominant dimension (0 the fastest pair).

    ``circuitsvis.attention.attention_heads`` draws them: click a head to open it, hover over a
    cell to see its value. Dominant dimensions are scaled to the head's own range: its 2nd
    percentile is 0 (white), its 98th is 1 (blue), values beyond are clipped, and cells without a
    query-key pair are white. Colour bars show the rotary pairs and wavelengths.

    Args:
        maps: what :func:`tl_posheads.head_maps` returned.

    Example:
        >>> attention(maps)                                             # doctest: +SKIP
    """
    panels, names, bars = [], [], []
    for i, name in enumerate(maps.names):
        low, high = own_range(maps.dominant[i])
        panels += [maps.pattern[i], shades(maps.dominant[i], low, high)]
        names += [name, f"{name} D"]
        bars.append(pair_bar(f"{name} D", low, high, maps.wavelengths[i, : maps.n_pairs[i]]))
    return page(
        f"Attention and dominant dimension: {maps.model}",
        said_of_cells(maps)
        + " Rows are queries, columns are keys. D: the dominant dimension, scaled to "
        "the head's own range (2nd to 98th percentile; see the colour bar). Choose a head.",
        {
            "bars": bars,
            "shown": {
                "attention": [panel.tolist() for panel in panels],
                "attentionHeadNames": names,
                "tokens": maps.cell_tokens(),
                "maxValue": 1,
                "minValue": -1,
                "maskUpperTri": True,
            },
        },
        _SCRIPT,
        height=1000 + 60 * len(bars),
    )


def said_of_cells(maps: HeadMaps) -> str:
    """How tokens were merged into cells, if they were."""
    n = len(maps.tokens)
    if maps.step == 1:
        return f"{n:,} tokens."
    return (
        f"{n:,} tokens; each cell merges {maps.step} by {maps.step} of them (attention from its "
        "queries to all of its keys, mean dimension of its pairs)."
    )

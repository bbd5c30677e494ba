"""Tokens coloured by mean attention distance and by mean dominant dimension."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.scoring.maps import HeadMaps
from tl_posheads.views.page import View, as_html, page
from tl_posheads.views.scales import own_range, pair_bar, shades

_SCRIPT = """
blues(view, data.bars);
draw(view, "ColoredTokensMulti", data.shown);
"""
_LONGEST = 2048  # tokens of a page


def attention_distance(maps: HeadMaps, *, start: int = 0, length: int = 512) -> View:
    """Tokens of a passage, coloured by each query's mean attention distance or dominant dimension.

    A button for each head and measure; both measures are means weighted by attention. Distances
    (tokens back) are divided by their maximum in the passage; dimensions are scaled to the head's
    own range in it, from its 2nd percentile (0, white) to its 98th (1, blue), as the colour bar
    shows. ``circuitsvis.tokens`` draws it.

    Args:
        maps: what :func:`tl_posheads.head_maps` returned.
        start, length: passage of the text; a longer one is cut, and the note says so.

    Raises:
        PosheadsError: the passage holds no token.

    Example:
        >>> attention_distance(maps, start=1000)                        # doctest: +SKIP
    """
    stop = min(start + length, len(maps.tokens))
    if not 0 <= start < stop:
        raise PosheadsError(
            f"start={start!r} and length={length!r} were given; expected a stretch of the "
            f"{len(maps.tokens):,} tokens"
        )
    labels, columns, bars = [], [], []
    for i, name in enumerate(maps.names):
        back = maps.distance[i, start:stop].nan_to_num(0.0)
        top = float(back.max())
        shaded, bar = _dimensions(maps, i, maps.dimension[i, start:stop])
        labels += [f"{name} tokens back / {top:.3g}", str(bar["name"])]
        columns += [(back / top if top > 0 else back).tolist(), shaded]
        bars.append(bar)
    whole = stop - start == len(maps.tokens)
    return page(
        f"Attention distance and dominant dimension of each token: {maps.model}",
        ("" if whole else f"Tokens {start:,} to {stop - 1:,} of {len(maps.tokens):,}. ")
        + "Each token is coloured by its value as a query; choose a head and a measure.",
        {"bars": bars, "shown": _shown(maps.tokens[start:stop], columns, labels)},
        _SCRIPT,
        height=600 + 60 * len(bars),
    )


def attention_from(maps: HeadMaps, q_pos: int | None = None) -> View:
    """What one query attends to: tokens coloured by attention weight or by dominant dimension.

    ``circuitsvis.tokens`` draws it; a button for every head and measure. Attention weights are
    divided by their maximum; dimensions are scaled to the head's own range there, as in
    :func:`attention_distance`; tokens that the query can't attend to are 0.

    Args:
        maps: what :func:`tl_posheads.head_maps` returned.
        q_pos: one of the positions that it kept; the first of them by default.

    Raises:
        PosheadsError: a position that was not kept.

    Example:
        >>> attention_from(head_maps(model, tokens[0], heads, q_pos=[700]))         # doctest: +SKIP
    """
    at = maps.q_pos[0] if q_pos is None and maps.q_pos else q_pos
    if at not in maps.q_pos:
        raise PosheadsError(
            f"q_pos={q_pos!r} was given, but the maps hold {maps.q_pos}; ask head_maps for it"
        )
    row = maps.q_pos.index(at)
    first = max(0, at + 1 - _LONGEST)
    labels, columns, bars = [], [], []
    for i, name in enumerate(maps.names):
        pattern = maps.row_pattern[i, row, first : at + 1]
        top = float(pattern.max())
        shaded, bar = _dimensions(maps, i, maps.row_dominant[i, row, first : at + 1])
        labels += [f"{name} attention / {top:.3g}", str(bar["name"])]
        columns += [(pattern / top if top > 0 else pattern).tolist(), shaded]
        bars.append(bar)
    return page(
        f"What position {at:,} attends to: {maps.model}",
        f"Tokens {first:,} to {at:,}, coloured by the last one's attention to each or by the "
        "pair's dominant dimension; choose a head and a measure.",
        {"bars": bars, "shown": _shown(maps.tokens[first : at + 1], columns, labels)},
        _SCRIPT,
        height=600 + 60 * len(bars),
    )


def _dimensions(
    maps: HeadMaps, i: int, values: Float[Tensor, " pos"]
) -> tuple[list[float], dict[str, Any]]:
    """Dimensions of a head scaled to their own range, and the range's colour bar."""
    low, high = own_range(values)
    wavelengths = maps.wavelengths[i, : maps.n_pairs[i]]
    bar = pair_bar(f"{maps.names[i]} dimension", low, high, wavelengths)
    return shades(values, low, high).tolist(), bar


def _shown(tokens: list[str], columns: list[list[float]], labels: list[str]) -> dict[str, Any]:
    """Input of ColoredTokensMulti; 1 is the darkest, even if no token reaches it."""
    return {
        "tokens": as_html(tokens),
        "values": [list(values) for values in zip(*columns)],
        "labels": labels,
        "positiveBounds": [1] * len(labels),
    }

"""Tokens coloured by how far back, and by which dimension, heads attend."""

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
    """Tokens of a stretch, coloured by what each one does as a query; a button for every measure.

    Of each head how far back the token attends, in tokens, and by which dimension, both means
    weighted by attention. Tokens back are divided by their largest in the stretch; dimensions are
    shades of the head's own range in it, its 2nd percentile white and 0, its 98th blue and 1, as
    the colour bar says. ``circuitsvis.tokens`` draws it.

    Args:
        maps: what :func:`tl_posheads.head_maps` returned.
        start, length: stretch of the text; a longer one is cut, and the note says so.

    Raises:
        PosheadsError: the stretch holds no token.

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
        f"How far back, and by which dimension: {maps.model}",
        ("" if whole else f"Tokens {start:,} to {stop - 1:,} of {len(maps.tokens):,}. ")
        + "Each token is coloured by what it attends to as a query; choose a head and a measure.",
        {"bars": bars, "shown": _shown(maps.tokens[start:stop], columns, labels)},
        _SCRIPT,
        height=600 + 60 * len(bars),
    )


def attention_from(maps: HeadMaps, q_pos: int | None = None) -> View:
    """What one position attends to: tokens coloured by attention, and by the dimension it uses.

    ``circuitsvis.tokens`` draws it; a button for every head and measure. Attention is divided by
    its largest; dimensions are shades of the head's own range there, as in
    :func:`attention_distance`; tokens that the position doesn't see are 0.

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
        f"Tokens {first:,} to {at:,}, coloured by what the last of them sees in each; choose a "
        "head and a measure.",
        {"bars": bars, "shown": _shown(maps.tokens[first : at + 1], columns, labels)},
        _SCRIPT,
        height=600 + 60 * len(bars),
    )


def _dimensions(
    maps: HeadMaps, i: int, values: Float[Tensor, " pos"]
) -> tuple[list[float], dict[str, Any]]:
    """Dimensions of a head as shades of their own range, and the range's colour bar."""
    low, high = own_range(values)
    wavelengths = maps.wavelengths[i, : maps.n_pairs[i]]
    bar = pair_bar(f"{maps.names[i]} dimension", low, high, wavelengths)
    return shades(values, low, high).tolist(), bar


def _shown(tokens: list[str], columns: list[list[float]], labels: list[str]) -> dict[str, Any]:
    """What ColoredTokensMulti is given; 1 is the darkest, also where no token reaches it."""
    return {
        "tokens": as_html(tokens),
        "values": [list(values) for values in zip(*columns)],
        "labels": labels,
        "positiveBounds": [1] * len(labels),
    }

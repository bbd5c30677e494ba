"""Tokens coloured by how far back, and by which dimension, heads look."""

from __future__ import annotations

from tl_posheads.errors import PosheadsError
from tl_posheads.scoring.maps import HeadMaps
from tl_posheads.views.page import View, as_html, page

_SCRIPT = """
draw(view, "ColoredTokensMulti", data);
"""
_LONGEST = 2048  # tokens of a page


def looks(maps: HeadMaps, *, start: int = 0, length: int = 512) -> View:
    """Tokens of a stretch, coloured by what each one does as a query; a button for every measure.

    Of each head how far back the token looks, in tokens, and by which dimension, both means
    weighted by attention; divided by their largest in the stretch. ``circuitsvis.tokens`` draws it.

    Args:
        maps: what :func:`tl_posheads.head_maps` returned.
        start, length: stretch of the text; a longer one is cut, and the note says so.

    Raises:
        PosheadsError: the stretch holds no token.

    Example:
        >>> looks(maps, start=1000)                                     # doctest: +SKIP
    """
    stop = min(start + length, len(maps.tokens))
    if not 0 <= start < stop:
        raise PosheadsError(
            f"start={start!r} and length={length!r} were given; expected a stretch of the "
            f"{len(maps.tokens):,} tokens"
        )
    labels, columns = [], []
    for i, name in enumerate(maps.names):
        for label, values in (("tokens back", maps.distance), ("dimension", maps.dimension)):
            part = values[i, start:stop].nan_to_num(0.0)
            top = float(part.max())
            labels.append(f"{name} {label} / {top:.3g}")
            columns.append((part / top if top > 0 else part).tolist())
    whole = stop - start == len(maps.tokens)
    return page(
        f"How far back, and by which dimension: {maps.model}",
        ("" if whole else f"Tokens {start:,} to {stop - 1:,} of {len(maps.tokens):,}. ")
        + "Each token is coloured by where it looks as a query; choose a head and a measure.",
        {
            "tokens": as_html(maps.tokens[start:stop]),
            "values": [list(row) for row in zip(*columns)],
            "labels": labels,
        },
        _SCRIPT,
        height=600,
    )


def looks_from(maps: HeadMaps, q_pos: int | None = None) -> View:
    """Where one position looks: tokens coloured by its attention, and by the dimension it uses.

    ``circuitsvis.tokens`` draws it; a button for every head and measure. Attention is divided by
    its largest, dimensions by the last pair's number; tokens that the position doesn't see are 0.

    Args:
        maps: what :func:`tl_posheads.head_maps` returned.
        q_pos: one of the positions that it kept; the first of them by default.

    Raises:
        PosheadsError: a position that was not kept.

    Example:
        >>> looks_from(head_maps(model, tokens[0], heads, q_pos=[700]))         # doctest: +SKIP
    """
    at = maps.q_pos[0] if q_pos is None and maps.q_pos else q_pos
    if at not in maps.q_pos:
        raise PosheadsError(
            f"q_pos={q_pos!r} was given, but the maps hold {maps.q_pos}; ask head_maps for it"
        )
    row = maps.q_pos.index(at)
    first = max(0, at + 1 - _LONGEST)
    labels, columns = [], []
    for i, name in enumerate(maps.names):
        pattern = maps.row_pattern[i, row, first : at + 1]
        top = float(pattern.max())
        labels += [f"{name} attention / {top:.3g}", f"{name} dimension / {maps.n_pairs[i] - 1}"]
        dominant = maps.row_dominant[i, row, first : at + 1].nan_to_num(0.0)
        columns += [
            (pattern / top if top > 0 else pattern).tolist(),
            (dominant / (maps.n_pairs[i] - 1)).tolist(),
        ]
    return page(
        f"Where position {at:,} looks: {maps.model}",
        f"Tokens {first:,} to {at:,}, coloured by what the last of them sees in each; choose a "
        "head and a measure.",
        {
            "tokens": as_html(maps.tokens[first : at + 1]),
            "values": [list(values) for values in zip(*columns)],
            "labels": labels,
        },
        _SCRIPT,
        height=600,
    )

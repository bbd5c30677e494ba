"""One self-contained page about a run: a map of the heads, the best heads, all scores.

The page loads nothing from anywhere, and its content policy forbids it to: whatever a model's name
or a corpus' name holds, it is shown as text.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from tl_posheads.io.files import write_text
from tl_posheads.views.page import policy_hash
from tl_posheads.views.report_page import PROSE, SCRIPT, STYLE

if TYPE_CHECKING:
    from tl_posheads.extrapolation.comparison import ExtrapolationComparison
    from tl_posheads.scoring.curves import DominantDimensionCurve
    from tl_posheads.scoring.head_scores import HeadScores
    from tl_posheads.scoring.maps import HeadMaps
    from tl_posheads.studies.ablation.results import AblationStudy
    from tl_posheads.studies.atlas.results import RotaryAtlas

Row = dict[str, Any]

# Colours of the map, by class: -_STEPS .. _STEPS. Orange and blue stay apart for every common kind
# of colour blindness; the middle takes the page's own shade in light and dark.
_STEPS = 8
_NEGATIVE, _POSITIVE = (179, 88, 6), (33, 92, 165)
_MIDDLE = {"light": (246, 246, 244), "dark": (38, 40, 44)}
_NEGATIVE_DARK, _POSITIVE_DARK = (253, 174, 97), (116, 173, 240)
_DRAWN = ["rho", "ci_low", "ci_high", "rotation", "content"]
_COUNTS = ["layer", "head", "n_documents", "window"]
_COLUMNS = [*_DRAWN, *_COUNTS, "p_adjusted", "d_near", "d_far"]
_ARROW = "\N{RIGHTWARDS ARROW}"
_NAMES = ["layer", "head", "rho", "95% interval", "p (adjusted)", "rotation", "content"]
_NAMES += [f"D near {_ARROW} far", "window"]
_BEST = 20
# Above this many heads a cell is too narrow for its number.
_NUMBERS_UP_TO = 16


def write_report(
    scores: HeadScores,
    path: str | os.PathLike[str],
    *,
    curve: DominantDimensionCurve | None = None,
    maps: HeadMaps | None = None,
    ablation: AblationStudy | None = None,
    extrapolation: ExtrapolationComparison | None = None,
    atlas: RotaryAtlas | None = None,
) -> None:
    """Write the page about ``scores`` to ``path``, whole or not at all.

    Args:
        scores: what ``score_heads`` returned or ``HeadScores.load`` read.
        path: the HTML file; an old one is replaced.
        curve: of ``dominant_dimension_curve``, to show the best heads' dominant dimension.
        maps: of ``head_maps``, to show what they attend to; 1.3 MB more.
        ablation: of ``ablation_study``, to show its verdicts.
        extrapolation: of ``compare_extrapolations``.
        atlas: of ``rotary_atlas``, to show which frequencies the heads use.

    Raises:
        OSError: the file can't be written.
    """
    from tl_posheads.views.report_sections import (
        ablation_section,
        atlas_section,
        curve_section,
        extrapolation_section,
        maps_section,
        spread_section,
    )

    parts = [spread_section(scores)] if scores.top(1) else []
    scripts: list[str] = []
    if curve is not None:
        parts.append(curve_section(curve))
    if maps is not None:
        part, scripts = maps_section(maps)
        parts.append(part)
    if atlas is not None:
        parts.append(atlas_section(atlas))
    if ablation is not None:
        parts.append(ablation_section(ablation))
    if extrapolation is not None:
        parts.append(extrapolation_section(extrapolation))
    write_text(path, render(scores, parts, scripts))


def scored_rows(scores: HeadScores) -> list[Row]:
    """What is shown of the heads that have a rho, best first, with None for every NaN."""
    rows = [_plain(row) for row in scores.to_pandas()[_COLUMNS].to_dict("records")]
    scored = [row for row in rows if row["rho"] is not None]
    return sorted(scored, key=lambda row: (-row["rho"], row["layer"], row["head"]))


def render(scores: HeadScores, parts: Sequence[str] = (), scripts: Sequence[str] = ()) -> str:
    """The page about ``scores`` as text, with sections about other results.

    Args:
        parts: sections, as HTML.
        scripts: hashes of the scripts that frames in them run.
    """
    rows = scored_rows(scores)
    n_layers, n_heads = (int(size) for size in scores.rho.shape)
    name = _text(scores.provenance.get("model") or scores.provenance.get("model_name") or "a model")
    limit = _limit(rows)
    style, data = STYLE + _colours(), _json({"rows": rows})
    # A frame is under this policy, too, and circuitsvis makes styles while it draws.
    styles = "'unsafe-inline'" if scripts else policy_hash(style)
    allowed = " ".join([policy_hash(SCRIPT), *scripts])
    policy = f"default-src 'none'; img-src data:; style-src {styles}; script-src {allowed}"
    best = f"{_label(rows[0])}, {_signed(rows[0]['rho'])}" if rows else "none"
    found, *more = map(_text, scores.summary().splitlines())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>Positional Heads of {name}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>Positional Heads of <bdi>{name}</bdi></h1>
<p class="lead">{len(rows)} of {n_layers * n_heads} heads scored; highest: {best}. {found}</p>
{"".join(f"<p>{line}</p>" for line in more)}
</header>
{_map(rows, n_layers, n_heads, limit)}
{_best(rows)}
{"".join(parts)}
{PROSE}
{_provenance(scores.provenance)}
</main>
<script type="application/json" id="data">{data}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _plain(row: Mapping[Any, Any]) -> Row:
    """A row in Python's own types, so that json takes it; None where pandas says NaN or NA."""
    plain: Row = {}
    for key, value in row.items():
        try:
            number = float(value)
        except (TypeError, ValueError):  # None and pandas.NA
            number = math.nan
        count = key in _COUNTS
        plain[str(key)] = None if not math.isfinite(number) else int(number) if count else number
    return plain


def _text(value: object) -> str:
    # Control characters have no place in HTML, not even escaped.
    shown = "".join(
        c if c.isprintable() or c == " " else "\N{REPLACEMENT CHARACTER}" for c in str(value)
    )
    return escape(shown, quote=True)


def _json(value: object) -> str:
    """JSON that no string in it can end the script element with."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _signed(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "\N{EN DASH}"
    text = f"{abs(value):.{digits}f}"
    sign = "" if not float(text) else "+" if value > 0 else "\N{MINUS SIGN}"
    return sign + text


def _p(value: float | None) -> str:
    if value is None:
        return "\N{EN DASH}"
    return "&lt;0.001" if value < 0.001 else f"{value:.3f}"


def _tenths(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.1f}"


def _label(row: Row) -> str:
    return f"layer {row['layer']} head {row['head']}"


def _limit(rows: Sequence[Row]) -> float:
    """End of the colour scale: the largest absolute rho, rounded up to a tenth."""
    largest = max((abs(row["rho"]) for row in rows), default=1.0)
    return min(1.0, max(0.1, math.ceil(largest * 10 - 1e-9) / 10))


def _step(rho: float, limit: float) -> int:
    return max(-_STEPS, min(_STEPS, round(rho / limit * _STEPS)))


def _class(step: int) -> str:
    return f"p{step}" if step >= 0 else f"n{-step}"


def _colours() -> str:
    """CSS rules of the map's colours with a text colour that can be read on each."""

    def rules(middle: tuple[int, ...], negative: tuple[int, ...], positive: tuple[int, ...]) -> str:
        text = ""
        for step in range(-_STEPS, _STEPS + 1):
            end, part = (positive if step > 0 else negative), abs(step) / _STEPS
            colour = [round(a + (b - a) * part) for a, b in zip(middle, end, strict=True)]
            linear = [(c / 255) ** 2.2 for c in colour]
            bright = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
            ink = "#000" if bright > 0.18 else "#fff"
            back = "#" + "".join(f"{c:02x}" for c in colour)
            text += f".{_class(step)}{{background:{back};fill:{back};color:{ink}}}"
        return text

    light = rules(_MIDDLE["light"], _NEGATIVE, _POSITIVE)
    dark = rules(_MIDDLE["dark"], _NEGATIVE_DARK, _POSITIVE_DARK)
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}"


def _map(rows: Sequence[Row], n_layers: int, n_heads: int, limit: float) -> str:
    place = {(row["layer"], row["head"]): index for index, row in enumerate(rows)}
    numbers = n_heads <= _NUMBERS_UP_TO

    def cell(layer: int, head: int) -> str:
        if (layer, head) not in place:
            return '<td class="none"><span class="vh">not scored</span></td>'
        index = place[layer, head]
        rho = rows[index]["rho"]
        said = f"layer {layer} head {head}: rho {_signed(rho)}"
        return (
            f'<td><button type="button" class="{_class(_step(rho, limit))}" data-i="{index}" '
            f'title="{said}" aria-label="{said}">{_signed(rho, 2) if numbers else ""}</button></td>'
        )

    head_row = "".join(f'<th scope="col">{head}</th>' for head in range(n_heads))
    body = "".join(
        f'<tr><th scope="row">{layer}</th>{"".join(cell(layer, head) for head in range(n_heads))}</tr>'
        for layer in range(n_layers)
    )
    swatches = "".join(f'<i class="{_class(step)}"></i>' for step in range(-_STEPS, _STEPS + 1))
    return f"""<section aria-labelledby="map-title">
<h2 id="map-title">Positional score of every head</h2>
<p>A row is a layer, a column a head. Choose a cell to see that head's numbers;
the arrow keys move from cell to cell.</p>
<p class="legend"><span>rho {_signed(-limit, 1)}</span><span class="bar" aria-hidden="true">{swatches}</span>
<span>{_signed(limit, 1)}</span><span class="blank"><i class="none" aria-hidden="true"></i> not scored</span></p>
<div class="scroll" tabindex="0" role="region" aria-label="map of the heads">
<table class="map{" numbers" if numbers else ""}" id="map">
<caption class="vh">Positional score rho by layer (rows) and head (columns)</caption>
<thead><tr><th scope="col"><span class="vh">layer</span></th>{head_row}</tr></thead>
<tbody>{body}</tbody>
</table></div>
<div id="detail" role="status" hidden></div>
</section>"""


def _best(rows: Sequence[Row]) -> str:
    best = rows[:_BEST]
    if not best:
        return "<section><h2>Best heads</h2><p>No head has a score.</p></section>"
    figures = [row[key] for row in best for key in _DRAWN]
    known = [0.0, *(value for value in figures if value is not None)]
    low, high = min(known), max(known)
    lines = "".join(_best_line(rank, row, low, high) for rank, row in enumerate(best, 1))
    columns = "".join(f'<th scope="col">{name}</th>' for name in _NAMES)
    return f"""<section aria-labelledby="best-title">
<h2 id="best-title">The {len(best)} highest scores</h2>
<p>In the last column, the dot and bar show rho and its interval, the ring rotation, the square
content, and the thin vertical line zero.</p>
<div class="scroll" tabindex="0" role="region" aria-label="table: best heads">
<table class="rows"><thead><tr><th scope="col">rank</th>{columns}
<th scope="col"><span class="vh">picture</span></th></tr></thead>
<tbody>{lines}</tbody></table></div>
</section>"""


def _best_line(rank: int, row: Row, low: float, high: float) -> str:
    def x(value: float) -> str:
        return f"{6 + 94 * (value - low) / ((high - low) or 1.0):.1f}"

    marks = f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="2" y2="18"/>'
    interval = "\N{EN DASH}"
    if row["ci_low"] is not None and row["ci_high"] is not None:
        interval = f"{_signed(row['ci_low'])} to {_signed(row['ci_high'])}"
        marks += f'<line x1="{x(row["ci_low"])}" x2="{x(row["ci_high"])}" y1="10" y2="10"/>'
    if row["content"] is not None:
        corner = float(x(row["content"])) - 3.5
        marks += f'<rect class="content" x="{corner:.1f}" y="6.5" width="7" height="7"/>'
    if row["rotation"] is not None:
        marks += f'<circle class="rotation" cx="{x(row["rotation"])}" cy="10" r="4"/>'
    marks += f'<circle cx="{x(row["rho"])}" cy="10" r="4"/>'
    window = "\N{EN DASH}" if row["window"] is None else f"{row['window']:,}"
    near, far = (_tenths(row[name]) for name in ("d_near", "d_far"))
    return (
        f'<tr><th scope="row">{rank}</th><td>{row["layer"]}</td><td>{row["head"]}</td>'
        f"<td><b>{_signed(row['rho'])}</b></td><td>{interval}</td>"
        f"<td>{_p(row['p_adjusted'])}</td><td>{_signed(row['rotation'])}</td>"
        f"<td>{_signed(row['content'])}</td><td>{near} {_ARROW} {far}</td>"
        f'<td>{window}</td><td><svg class="dot" viewBox="0 0 106 20" width="106" height="20" '
        f'aria-hidden="true">{marks}</svg></td></tr>'
    )


def _provenance(provenance: Mapping[str, Any]) -> str:
    lines = "".join(
        f'<tr><th scope="row"><bdi>{_text(key)}</bdi></th><td><bdi>{_text(value)}</bdi></td></tr>'
        for key, value in _flat(provenance)
    )
    return f"""<section aria-labelledby="run-title">
<h2 id="run-title">Run settings</h2>
<div class="scroll" tabindex="0" role="region" aria-label="table: run settings">
<table class="facts"><tbody>{lines}</tbody></table></div>
</section>"""


def _flat(facts: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{above}{key}.")
        elif isinstance(value, list | tuple):
            pairs.append((f"{above}{key}", ", ".join(map(str, value))))
        else:
            pairs.append((f"{above}{key}", "\N{EN DASH}" if value is None else str(value)))
    return pairs

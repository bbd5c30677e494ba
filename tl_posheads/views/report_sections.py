"""Parts of the report that other results than scores bring: an ablation study, a comparison."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, Any

from tl_posheads.figures.style import png

if TYPE_CHECKING:
    import pandas as pd

    from tl_posheads.extrapolation.comparison import ExtrapolationComparison
    from tl_posheads.scoring.curves import DominantDimensionCurve
    from tl_posheads.scoring.head_scores import HeadScores
    from tl_posheads.scoring.maps import HeadMaps
    from tl_posheads.studies.ablation.results import AblationStudy
    from tl_posheads.studies.atlas.results import RotaryAtlas

_RANKED, _SPECTRA = 20, 2  # heads of an atlas in the table, and those with a picture
_OF_A_HEAD = {
    "centroid": "mean rotary pair, weighted by usage, 0 the fastest",
    "entropy": "of usage, 1 where it is even",
    "slow_text": "share of usage in pairs that do not turn once in a text",
    "slow_trained": "the same, in a training text",
    "preferred": "distance at which mean query and mean key agree most, in tokens",
    "curve_correlation": "of that curve with the measured mean scores, over distance",
    "separation": "of queries from keys, in units of their spread",
    "pairs_needed": "pairs that have to be rotated for an error of 10 %",
}


def curve_section(curve: DominantDimensionCurve) -> str:
    """Dominant dimension of some heads by token distance, and the first one's softmax weights."""
    names = ", ".join(f"layer {layer} head {head}" for layer, head in curve.heads)
    ends = "; ".join(
        f"layer {layer} head {head}: {_number(curve.mean[i, 0])} at distance 1, "
        f"{_number(curve.mean[i, curve.mean.shape[1] // 2])} at {curve.mean.shape[1] // 2 + 1:,}"
        for i, (layer, head) in enumerate(curve.heads)
    )
    layer, head = curve.heads[0]
    return _section(
        "curves",
        "Dominant dimension by token distance",
        f"<p>Mean dominant dimension by token distance of {escape(names)}, with the band that "
        "holds the middle of the pairs; below, the first head's softmax weights.</p>"
        + _image(curve.plot(), f"Mean dominant dimension by token distance. {ends}.")
        + _image(
            curve.plot_allocation(),
            f"Softmax weight of layer {layer} head {head} on every rotary pair, by distance.",
        ),
    )


def maps_section(maps: HeadMaps) -> tuple[str, list[str]]:
    """Attention of some heads beside their dominant dimension, and the scripts that draw it."""
    from tl_posheads.views import attention

    view = attention(maps)
    return _section(
        "views",
        "What the heads attend to",
        f"<p>In the first {len(maps.tokens):,} tokens of the first text. Choose a head; D is its "
        f"dominant dimension.</p>{view.frame('attention beside dominant dimension')}",
    ), view.scripts


def atlas_section(atlas: RotaryAtlas) -> str:
    """Which rotary pairs the heads use, two heads in detail, and the first heads as a table."""
    table = atlas.ranked()
    by = "positional score" if "rho" in table else "share of usage in slow pairs"
    sort = "rho" if "rho" in table else "layer"
    found = " ".join(f"{line[0].upper()}{line[1:]}." for line in atlas._finding())
    said = f"Share of usage in every rotary pair of {len(table)} heads, by {sort}. {found}"
    spectra = ""
    for row in table.head(_SPECTRA).itertuples():
        head = int(row.layer), int(row.head)
        spectra += _image(atlas.plot_head(head), _spectrum_in_words(atlas, head, row))
    terms = "; ".join(f"{x.replace('_', ' ')}: {_OF_A_HEAD[x]}" for x in table if x in _OF_A_HEAD)
    rows = table.head(_RANKED).rename(columns=lambda name: str(name).replace("_", " "))
    return _section(
        "atlas",
        "Which frequencies the heads use",
        f"<p>{escape(found)}</p><p>A row of the map is a head, bright where its queries and keys "
        "are large: pairs on the left turn within a few tokens and can tell positions, those on "
        "the right hardly turn in a text and can carry content.</p>"
        + _image(atlas.plot(sort=sort), said)
        + f"<p>The heads with the highest {by}, in detail:</p>{spectra}<details><summary>The "
        f"{len(rows)} heads with the highest {by}</summary><p>{escape(terms.capitalize())}.</p>"
        f"{_table(rows, 'heads of the atlas')}</details>",
    )


def _spectrum_in_words(atlas: RotaryAtlas, head: tuple[int, int], row: Any) -> str:
    pairs = atlas.to_pandas()
    own = pairs[(pairs["layer"] == head[0]) & (pairs["head"] == head[1])]
    most = own.loc[own["usage_share"].idxmax()]
    return (
        f"Layer {head[0]} head {head[1]}: usage, realised share and concentration of its rotary "
        f"pairs, and its mean curve. Most usage, {_number(most['usage_share'])} of it, in the pair "
        f"with a wavelength of {most['wavelength']:,.0f} tokens; the mean curve is highest at "
        f"{_number(row.preferred)} tokens."
    )


def ablation_section(study: AblationStudy) -> str:
    """The study's verdicts in its own words, its picture and its table."""
    verdicts = "".join(f"<li>{escape(text)}</li>" for text in study.verdict().values())
    table = study.to_pandas()
    columns = [
        "task",
        "variant",
        "fraction",
        "n_heads",
        "control",
        "effect",
        "ci_low",
        "ci_high",
        "control_effect",
        "p_adjusted",
    ]
    said = f"Effects of ablating the top heads and {', '.join(study.controls)} heads, by task."
    return _section(
        "ablation",
        "Effect of ablating the top heads",
        f"<ul>{verdicts}</ul><p>{escape(_positive_control(study))}</p>{_image(study.plot(), said)}"
        "<details><summary>Every effect: change of the scored tokens' mean log-probability, in "
        f"nats per token</summary>{_table(table[columns], 'effects of ablation')}</details>",
    )


def _positive_control(study: AblationStudy) -> str:
    """Effect of ablating the same number of retrieval heads."""
    table = study.positive_control()
    if table.empty:
        return "There is no positive control: no retrieval heads were ablated."
    said = "; ".join(
        f"{row.task} {row.effect:+.2f} (p = {row.p_adjusted:.3f}) without {row.n_heads} heads"
        for row in table.itertuples()
    )
    return f"Positive control, the model's retrieval heads: {said}."


def spread_section(scores: HeadScores) -> str:
    """Distribution of the heads' scores, beside that of the rotation alone."""
    rho = scores.rho[scores.rho.isfinite()]
    said = (
        f"{len(rho)} heads; lowest {float(rho.min()):+.3f}, median {float(rho.median()):+.3f}, "
        f"highest {float(rho.max()):+.3f}."
    )
    return _section(
        "spread", "Distribution of the scores", f"<p>{said}</p>{_image(scores.plot(), said)}"
    )


def extrapolation_section(comparison: ExtrapolationComparison) -> str:
    """The comparison's verdict on each method, its picture and its table."""
    verdicts = "".join(f"<li>{escape(text)}</li>" for text in comparison.verdict().values())
    said = (
        f"Curves, loss and answers of {', '.join(comparison.methods)} beyond a training length of "
        f"{comparison.trained:,} tokens."
    )
    return _section(
        "extrapolation",
        "Extrapolation beyond the training length",
        f"<p>{escape(said)}</p><ul>{verdicts}</ul>{_image(comparison.plot(), said)}"
        + _table(comparison.to_pandas(), "methods compared"),
    )


def _section(name: str, title: str, body: str) -> str:
    return (
        f'<section aria-labelledby="{name}-title">\n<h2 id="{name}-title">{title}</h2>\n{body}\n'
        "</section>"
    )


def _image(figure: Any, said: str) -> str:
    data = base64.b64encode(png(figure, dpi=110)).decode()
    # Figures are drawn on white, also where the page is dark.
    return f'<p><img class="figure" alt="{escape(said)}" src="data:image/png;base64,{data}"></p>'


def _table(table: pd.DataFrame, name: str) -> str:
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_number(value))}</td>" for value in row) + "</tr>"
        for row in table.itertuples(index=False)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table: {name}">'
        f'<table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _number(value: Any) -> str:
    if isinstance(value, str) or not hasattr(value, "__float__"):
        return "\N{EN DASH}" if value is None else str(value)
    number = float(value)
    if number != number:
        return "\N{EN DASH}"
    whole = number == int(number) and abs(number) < 1e15
    return f"{number:,.0f}" if whole else f"{number:.3g}"

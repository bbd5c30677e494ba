"""Layer by head, coloured by score; a click opens a head."""

from __future__ import annotations

from math import isfinite
from typing import Any

from tl_posheads.hooks.heads import Heads, as_heads
from tl_posheads.scoring.head_scores import HeadScores
from tl_posheads.scoring.maps import HeadMaps
from tl_posheads.views.attention import said_of_cells
from tl_posheads.views.page import View, page
from tl_posheads.views.scales import own_range, pair_bar, shades

_SCRIPT = """
const table = element("table", {"aria-label": "positional score by layer and head"});
const head = element("tr");
head.append(element("th", {scope: "col"}, "layer"));
data.rho[0].forEach((_, h) => head.append(element("th", {scope: "col"}, h)));
table.append(head);
const panel = element("section", {id: "head", "aria-live": "polite",
                                  "aria-label": "the chosen head"});
const known = data.rho.flat().filter(r => r !== null);
const limit = Math.max(0, ...known.map(Math.abs));
let pressed = null;
function open(button, layer, h) {
  if (pressed) pressed.setAttribute("aria-pressed", "false");
  pressed = button;
  button.setAttribute("aria-pressed", "true");
  panel.replaceChildren(element("h2", {}, `Layer ${layer}, head ${h}`));
  const facts = data.facts[layer][h];
  panel.append(element("p", {}, facts === null ? "Not scored." : facts));
  const found = data.maps[`${layer},${h}`];
  if (!found) return;
  panel.append(element("p", {}, data.said));
  for (const [name, values] of Object.entries(found.panels)) {
    panel.append(element("h2", {}, name));
    if (name === found.bar.of) blues(panel, [found.bar]);
    draw(panel, "AttentionPattern",
         {attention: values, tokens: data.tokens, maxValue: 1, minValue: -1, maskUpperTri: true});
  }
}
data.rho.forEach((row, layer) => {
  const line = element("tr");
  line.append(element("th", {scope: "row"}, layer));
  row.forEach((rho, h) => {
    const cell = element("td");
    const shown = rho === null ? "\\u2013" : rho.toFixed(2);
    const button = element("button", {type: "button", "aria-pressed": "false",
      "aria-label": `layer ${layer} head ${h}, score ${shown}`}, shown);
    paint(button, rho, limit);
    if (data.highlight.some(([l, i]) => l === layer && i === h)) button.className = "marked";
    button.addEventListener("click", () => open(button, layer, h));
    cell.append(button);
    line.append(cell);
  });
  table.append(line);
});
const wide = element("div", {tabindex: "0", role: "region", "aria-label": "map of the heads",
                             style: "overflow-x:auto"});
bar(wide, "positional score", `rgb(${BELOW}), white, rgb(${ABOVE})`,
    [-1, -0.5, 0, 0.5, 1].map(share => (share * limit).toFixed(2)));
wide.append(table);
view.className = "beside";
view.append(wide, panel);
"""


def score_map(
    scores: HeadScores, maps: HeadMaps | None = None, *, highlight: Heads | None = None
) -> View:
    """The positional score of every head; click a head for details.

    Args:
        scores: what ``score_heads`` returned or ``HeadScores.load`` read.
        maps: of :func:`tl_posheads.head_maps`: those heads open with their attention and
            dominant-dimension map.
        highlight: heads to outline in the map: ``"L6H6"``, ``(6, 6)`` or a list.

    Raises:
        PosheadsError: a head of ``highlight`` has no score.

    Example:
        >>> score_map(scores, head_maps(model, tokens[0], scores.top(4)))       # doctest: +SKIP
        >>> score_map(scores, highlight=["L6H6", (7, 8)])                       # doctest: +SKIP
    """
    marked = [] if highlight is None else as_heads(highlight)
    for place in marked:
        scores[place]  # refuses heads that it hasn't
    facts: list[list[str | None]] = [[None] * scores.rho.shape[1] for _ in scores.rho]
    for row in scores.to_pandas().to_dict("records"):
        if row["rho"] == row["rho"]:
            facts[int(row["layer"])][int(row["head"])] = _facts(row)
    opened = {}
    for i, (layer, head) in enumerate(maps.heads if maps else []):
        assert maps is not None
        low, high = own_range(maps.dominant[i])
        bar = pair_bar(f"{maps.names[i]} D", low, high, maps.wavelengths[i, : maps.n_pairs[i]])
        name = "Dominant dimension (D), scaled to the head's own range"
        panels = {"Attention": maps.pattern[i], name: shades(maps.dominant[i], low, high)}
        opened[f"{layer},{head}"] = {"bar": {**bar, "of": name}, "panels": panels}
    return page(
        f"Positional scores: {scores.provenance.get('model')}",
        "Spearman's correlation between token distance and dominant dimension: red above zero, "
        "white at it, blue below. Choose a head"
        + (f"; {', '.join(maps.names)} open with their maps." if maps else ".")
        + (f" Outlined: {', '.join(f'L{layer}H{head}' for layer, head in marked)}." * bool(marked)),
        {
            "rho": scores.rho,
            "facts": facts,
            "highlight": marked,
            "maps": opened,
            "tokens": maps.cell_tokens() if maps else [],
            "said": said_of_cells(maps) if maps else "",
        },
        _SCRIPT,
        height=720,
    )


def _facts(row: dict[Any, Any]) -> str:
    """Text of a chosen head's panel; unknown values are left out."""
    n = row["n_documents"]
    said = f"Score {row['rho']:.3f}" + (f", the mean over {n} documents" if n > 1 else "")
    if isfinite(row["p_adjusted"]):
        said += (
            f", 95 % interval {row['ci_low']:.3f} to {row['ci_high']:.3f}, p "
            f"{row['p_adjusted']:.3g} corrected for the number of heads"
        )
    if isfinite(row["rotation"]):
        said += f"; rotation alone {row['rotation']:.3f}, content alone {row['content']:.3f}"
    return f"{said}. Mean dominant dimension: {row['d_near']:.1f} near, {row['d_far']:.1f} far."

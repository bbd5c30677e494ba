"""A page around circuitsvis that embeds its data and needs no network.

circuitsvis writes tokens unescaped into an inline script, so that one holding ``</script>`` ends
it, shows some of them as HTML, and checks for an internet connection at every display.
Here its JavaScript is inlined whole, with that HTML escaped; everything shown is JSON without a
character that could leave its element; and the page's content policy allows the scripts of this
package and of circuitsvis by their hash alone.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from tl_posheads.io.files import write_bytes


@dataclass(frozen=True)
class View:
    """One HTML page: the last expression of a notebook's cell shows it.

    Attributes:
        html: the page.
        height: of its frame in a notebook, in pixels.
        scripts: hash of each script in it, as a content policy names them.
    """

    html: str = field(repr=False)
    height: int = 600
    scripts: list[str] = field(repr=False, default_factory=list)

    def _repr_html_(self) -> str:
        return self.frame("tl_posheads")

    def frame(self, title: str) -> str:
        """The page in a sandboxed frame, isolated from the page around it.

        A page with a content policy must allow :attr:`scripts`.
        """
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{escape(self.html)}" title="{_text(title)}" '
            f'style="width:100%;height:{self.height}px;border:0"></iframe>'
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, whole or not at all; an old file is replaced.

        Raises:
            OSError: the file can't be written.
        """
        write_bytes(Path(path), self.html.encode())
        return Path(path)


def page(title: str, note: str, data: Mapping[str, Any], script: str, *, height: int) -> View:
    """A view: ``script`` draws ``data`` into the element ``view``, with circuitsvis at hand.

    Args:
        title: shown as the heading.
        note: what the view shows, in a sentence or two.
        data: JSON values; NaN becomes null.
        script: JavaScript of this package; it must contain nothing from a model or text.
        height: of its frame in a notebook.
    """
    library = _circuitsvis()[0]
    packed = _packed(library)
    start = f"{_START}unpacked.then(() => {{{script}}});\n"
    hashes = [policy_hash(library), policy_hash(start)]
    allowed = f"script-src {' '.join(hashes)}; style-src 'unsafe-inline'; img-src data:"
    policy = f"default-src 'none'; {allowed}"
    return View(
        f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
<p>{_text(note)}</p>
<div id="view"></div>
</main>
<script type="application/json" id="data">{_json(data)}</script>
<script type="text/plain" id="library">{packed}</script>
<script>{start}</script>
</body>
</html>
""",
        height,
        hashes,
    )


def policy_hash(text: str) -> str:
    """A script or style as a content policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _packed(script: str) -> str:
    # circuitsvis is a third as long so, and a notebook with a view stays under a megabyte.
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


# The function that makes a token HTML: f(t){return t.replace(/\\s/g,"&nbsp;") ...
_TO_HTML = re.compile(r'(\{return (\w)(?=\.replace\(/\\s/g,"&nbsp;"\)))')


@cache
def _circuitsvis() -> tuple[str, bool]:
    """Its script, and whether that escapes the tokens that it shows as HTML."""
    bundle = files("circuitsvis") / "dist" / "cdn" / "iife.js"
    script = bundle.read_text(encoding="utf-8")
    # A page shouldn't ask for the map of its sources either.
    script = script.replace("//# sourceMappingURL=iife.js.map", "")
    script, found = _TO_HTML.subn(r'\1.replace(/&/g,"&amp;").replace(/</g,"&lt;")', script)
    return script, found > 0


def as_html(tokens: Sequence[str]) -> list[str]:
    """Tokens for a drawing that shows them as HTML.

    Unchanged where circuitsvis' script could be patched; for unknown versions HTML entities keep
    them text, and show as entities on hover.
    """
    _, escapes = _circuitsvis()
    return list(tokens) if escapes else [escape(token, quote=False) for token in tokens]


def _json(value: Any) -> str:
    text = json.dumps(_plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    # In an element of its own, data can do harm only by ending it or by opening a comment.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        # Four digits are more than a colour shows, and keep the file small.
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def _text(text: str) -> str:
    # Lone surrogates can't be written to a file; everything else stays as it is.
    return escape(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; font: 15px/1.45 system-ui, sans-serif; color: #1b1f24; background: #fff; }
main { max-width: 72rem; margin: 0 auto; padding: 0.8rem 1rem 2rem; }
h1 { font-size: 1.15rem; margin: 0 0 0.3rem; unicode-bidi: isolate; overflow-wrap: anywhere; }
p { margin: 0 0 0.8rem; color: #4a5460; max-width: 48rem; }
table { border-collapse: separate; border-spacing: 2px; }
th { font-weight: 400; font-size: 0.75rem; color: #4a5460; padding: 0 3px; }
td button { width: 2.1rem; height: 1.35rem; border: 0; padding: 0; border-radius: 3px;
            font: 0.68rem system-ui, sans-serif; cursor: pointer; }
td button.marked { outline: 2px dashed #111; }
td button:focus-visible, td button[aria-pressed="true"] { outline: 2px solid #111; }
.bar { max-width: 44rem; margin: 0 0 0.8rem; font-size: 0.78rem; color: #4a5460; }
.bar .strip { height: 0.8rem; border: 1px solid #8a949e; }
.bar .ticks { display: flex; justify-content: space-between; height: 2.4rem; }
.bar .ticks span { width: 0; display: flex; justify-content: center; text-align: center;
                   white-space: pre; }
.bar .ticks span:first-child { justify-content: flex-start; text-align: left; }
.bar .ticks span:last-child { justify-content: flex-end; text-align: right; }
@media (max-width: 30rem) {
  .bar .ticks span:not(:first-child, :last-child) { visibility: hidden; }
}
.beside { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
#head { flex: 1 1 24rem; min-width: 0; }
#head h2 { font-size: 1rem; margin: 0 0 0.2rem; }
"""

# React's own rendering keeps text as text.
_START = """"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const view = document.getElementById("view");
const packed = Uint8Array.from(atob(document.getElementById("library").textContent),
                               letter => letter.charCodeAt(0));
const unpacked = new Response(
  new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text()
  .then(text => document.head.append(element("script", {}, text)));
function element(name, attributes, text) {
  const made = document.createElement(name);
  for (const key in attributes || {}) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}
let drawings = 0;
function draw(parent, component, properties) {
  const place = element("div", {id: "drawing" + drawings++});
  parent.append(place);
  CircuitsVis.render(place.id, CircuitsVis[component], properties);
  return place;
}
function inkOn(r, g, b) {
  const linear = [r, g, b].map(c => Math.pow(c / 255, 2.2));
  const light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  return light > 0.18 ? "rgb(0, 0, 0)" : "rgb(255, 255, 255)";
}
// circuitsvis names neither its pictures nor its fields, and writes white on yellow.
function mend(drawn) {
  if (drawn.nodeType !== Node.ELEMENT_NODE) return;
  for (const part of [drawn, ...drawn.querySelectorAll("canvas, input, [style]")]) {
    if (part.matches("canvas:not([aria-label])")) part.setAttribute("aria-label", "heat map");
    if (part.matches("input:not([aria-label])")) {
      part.setAttribute("aria-label", part.parentNode.textContent.trim() || "number");
    }
    const ground = /^rgb\\((\\d+), (\\d+), (\\d+)\\)$/.exec(part.style.backgroundColor);
    if (!ground || !part.style.color) continue;
    const ink = inkOn(...ground.slice(1).map(Number));
    // Only a change is written, for every writing is another change.
    if (part.style.color !== ink) part.style.color = ink;
  }
}
new MutationObserver(changes => changes.forEach(change => {
  if (change.type === "attributes") mend(change.target);
  else change.addedNodes.forEach(mend);
})).observe(view, {childList: true, subtree: true, attributes: true, attributeFilter: ["style"]});
// A colour bar: what it is of, its colours as CSS has them, and what evenly spread places mean.
function bar(parent, name, colours, ticks, space = "in srgb") {
  const made = element("div", {class: "bar", role: "img",
                               "aria-label": `colour bar of ${name}: ${ticks.join("; ")}`});
  const strip = element("div", {class: "strip"});
  strip.style.background = `linear-gradient(to right, ${colours})`;  // where Lab isn't known
  strip.style.background = `linear-gradient(to right ${space}, ${colours})`;
  const line = element("div", {class: "ticks"});
  ticks.forEach(tick => line.append(element("span", {}, tick.replace(": ", "\\n"))));
  made.append(element("div", {}, name), strip, line);
  parent.append(made);
}
// circuitsvis mixes white and blue in the Lab colour space.
function blues(parent, bars) {
  bars.forEach(one => bar(parent, one.name, "white, blue", one.ticks, "in lab"));
}
// Blue below zero, white at it, red above: ColorBrewer's RdBu, told apart by colour-blind readers.
const BELOW = [33, 102, 172], ABOVE = [178, 24, 43], WHITE = [255, 255, 255];
function diverging(value, limit) {
  const share = Math.min(Math.abs(value) / (limit || 1), 1);
  const end = value < 0 ? BELOW : ABOVE;
  return WHITE.map((c, i) => Math.round(c + share * (end[i] - c)));
}
function paint(target, value, limit) {
  if (value === null) {
    target.style.background = "#eceef0";
    target.style.color = "#1b1f24";
    return;
  }
  const [r, g, b] = diverging(value, limit);
  target.style.background = `rgb(${r},${g},${b})`;
  target.style.color = inkOn(r, g, b);
}
"""

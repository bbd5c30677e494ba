"""Style, script and prose of the page that ``report.py`` writes; no data comes in here."""

from __future__ import annotations

STYLE = """
:root{--bg:#fff;--ink:#1c1d20;--soft:#5a5e66;--line:#d9dbe0;--panel:#f5f6f8;--focus:#b3006b;
--accent:#215ca5}
@media (prefers-color-scheme:dark){:root{--bg:#16171a;--ink:#e8e9ec;--soft:#a5aab4;--line:#3a3d44;
--panel:#202227;--focus:#ff8ad0;--accent:#74adf0}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
p{margin:.3rem 0 .7rem;max-width:44rem}
.lead{color:var(--soft)}
a{color:var(--accent)}
:focus-visible{outline:3px solid var(--focus);outline-offset:1px}
.vh{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.scroll{overflow-x:auto;position:relative}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.map{border-collapse:separate;border-spacing:1px;font-size:.75rem}
.map.numbers{width:100%}
.map th{font-weight:400;color:var(--soft);padding:0 .3rem;text-align:center}
.map tbody th{position:sticky;left:0;background:var(--bg);text-align:right;z-index:1}
.map td{padding:0;height:1.45rem;min-width:1.05rem}
.map.numbers td{min-width:2.9rem}
.map button{display:block;width:100%;height:1.45rem;min-width:1.05rem;padding:0;border:0;font:inherit;
border-radius:2px;cursor:pointer}
.map button[aria-pressed=true]{box-shadow:inset 0 0 0 2px var(--focus)}
.map button:focus-visible{position:relative;z-index:2}
td.none,i.none{border:1px dashed var(--line);border-radius:2px}
.legend{display:flex;flex-wrap:wrap;align-items:center;gap:.3rem .5rem;font-size:.85rem;
color:var(--soft)}
.legend i{display:inline-block;width:.8rem;height:.9rem;vertical-align:-.1rem}
.legend .bar{display:inline-flex;border:1px solid var(--line)}
.legend .blank{margin-left:.8rem}
#detail{position:sticky;bottom:0;z-index:3;background:var(--panel);border:1px solid var(--line);
border-radius:6px;padding:.6rem .8rem;margin-top:.6rem}
#detail b{display:block}
#detail span{display:inline-block;margin-right:1.2rem;font-size:.9rem;white-space:nowrap}
#detail em{font-style:normal;color:var(--soft)}
.rows{width:100%;font-size:.88rem}
.rows th,.rows td{padding:.25rem .35rem;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap}
.rows thead th{color:var(--soft);font-weight:600}
.rows tbody th{font-weight:400;color:var(--soft)}
.dot{display:block}
.dot line{stroke:var(--accent);stroke-width:2}
.dot .zero{stroke:var(--line);stroke-width:1.5}
.dot circle{fill:var(--accent)}
.dot .rotation,.dot .content{fill:none;stroke:var(--soft);stroke-width:1.5}
.facts{font-size:.88rem}
summary{cursor:pointer;max-width:44rem}
.figure{max-width:100%;height:auto;background:#fff;border-radius:4px}
.facts th{font-weight:400;color:var(--soft);text-align:left;vertical-align:top;white-space:nowrap;
padding:.15rem 1rem .15rem 0}
.facts td{overflow-wrap:anywhere;padding:.15rem 0}
dt{font-weight:600}
dd{margin:0 0 .6rem;max-width:44rem}
"""

# Text goes in through textContent alone, so data stays data. Without the script the map still
# tells its values: as text, tooltips and labels.
SCRIPT = """
(function () {
  var rows = JSON.parse(document.getElementById('data').textContent).rows;
  var map = document.getElementById('map'), detail = document.getElementById('detail');
  var buttons = Array.prototype.slice.call(map.querySelectorAll('button'));
  var pressed = null, last = buttons[0];
  function signed(x, digits) {
    if (x === null) { return '\\u2013'; }
    var text = Math.abs(x).toFixed(digits);
    return Number(text) === 0 ? text : (x > 0 ? '+' : '\\u2212') + text;
  }
  function plain(x) { return x === null ? '\\u2013' : x.toFixed(1); }
  function add(name, value) {
    var span = document.createElement('span'), em = document.createElement('em');
    em.textContent = name + ' ';
    span.appendChild(em);
    span.appendChild(document.createTextNode(value));
    detail.appendChild(span);
  }
  function show(button) {
    var index = Number(button.dataset.i), row = rows[index];
    if (pressed) { pressed.removeAttribute('aria-pressed'); }
    pressed = button;
    button.setAttribute('aria-pressed', 'true');
    detail.hidden = false;
    detail.textContent = '';
    var title = document.createElement('b');
    title.textContent = 'Layer ' + row.layer + ', head ' + row.head + ' (rank ' + (index + 1) +
      ' of ' + rows.length + ')';
    detail.appendChild(title);
    add('rho', signed(row.rho, 3));
    add('95% interval', row.ci_low === null || row.ci_high === null ? '\\u2013' :
      signed(row.ci_low, 3) + ' to ' + signed(row.ci_high, 3));
    add('p (adjusted)', row.p_adjusted === null ? '\\u2013' : row.p_adjusted < 0.001 ? '<0.001' :
      row.p_adjusted.toFixed(3));
    add('rotation', signed(row.rotation, 3));
    add('content', signed(row.content, 3));
    add('D near \\u2192 far', plain(row.d_near) + ' \\u2192 ' + plain(row.d_far));
    add('documents', row.n_documents.toLocaleString('en'));
    add('window', row.window === null ? '\\u2013' : row.window.toLocaleString('en'));
  }
  // One stop of the Tab key for the whole map; the arrow keys move inside it.
  function enter(button) {
    last.tabIndex = -1;
    last = button;
    last.tabIndex = 0;
  }
  buttons.forEach(function (button) { button.tabIndex = -1; });
  if (last) { last.tabIndex = 0; }
  map.addEventListener('click', function (event) {
    var button = event.target.closest('button');
    if (button) { enter(button); show(button); }
  });
  map.addEventListener('keydown', function (event) {
    var step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    var button = event.target.closest('button');
    if (!step || !button) { return; }
    event.preventDefault();
    var cell = button.parentNode, y = cell.parentNode.rowIndex, x = cell.cellIndex;
    // Blank cells, of layers that were not scored, are stepped over.
    for (;;) {
      y += step[0]; x += step[1];
      var line = map.rows[y], next = line && line.cells[x];
      if (!next || y < 1 || x < 1) { return; }
      var target = next.querySelector('button');
      if (target) { enter(target); target.focus(); return; }
    }
  });
})();
"""

PROSE = """<section aria-labelledby="read-title">
<h2 id="read-title">How to read the numbers</h2>
<dl>
<dt>rho</dt><dd>The positional score: the mean over documents of Spearman's rank correlation between
token distance and the head's dominant dimension D, over the query-key pairs that attention allows,
except a token with itself. D is the mean index of the head's rotary pairs, weighted by the softmax
of their contributions to the query-key product. Above zero: the dominant dimension shifts from fast
to slow rotary pairs as token distance grows. Below zero: it shifts from slow to fast, which is a
finding like any other. Near zero: it doesn't follow distance.</dd>
<dt>95% interval</dt><dd>Of the mean over documents, by Student's t. Query-key pairs of one text are
not independent, so their number says nothing about certainty; one document gives no interval.</dd>
<dt>p (adjusted)</dt><dd>Two-sided t test over documents of a mean rho of zero, corrected for the
number of heads (Benjamini-Hochberg).</dd>
<dt>rotation</dt><dd>rho of the rotation alone: the same contents at positions drawn from other
query-key pairs, so that content carries no information about distance. It is exact, since rotated
vectors can be rotated further.</dd>
<dt>content</dt><dd>rho of the content alone: the same D against the distance that the contents came
from, about which the rotation carries no information. The rest of rho is their interaction.</dd>
<dt>D near → far</dt><dd>Mean D of tokens 1 or 2 apart, and in the farthest octave of distances that
the layer sees. rho measures only order: it can be high where D hardly changes.</dd>
<dt>window</dt><dd>The layer's sliding window, where it has one.</dd>
</dl>
<p>A high score says that a head is positional, not that it is important; ablate it to find out.</p>
<h2>How to cite</h2>
<p>The score is that of Hong et al., <cite>On the token distance modeling ability of higher RoPE
attention dimension</cite>, Findings of EMNLP 2024,
<a href="https://arxiv.org/abs/2410.08703">arXiv 2410.08703</a>.</p>
</section>"""

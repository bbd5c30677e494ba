"""``tl-posheads atlas``: how every head uses every rotary frequency."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_posheads.cli.command import Run, aligned, new_command, number
from tl_posheads.cli.options import (
    add_model_options,
    add_scale,
    add_skip_first,
    add_texts,
    add_top,
    layers,
    whole,
)

if TYPE_CHECKING:
    from tl_posheads.studies.atlas.results import RotaryAtlas

_TEXTS = dict(
    help="how every head uses every rotary frequency",
    description="""\
Measure, in one pass per document, how every head of MODEL uses every rotary pair and which distance
its mean query and key prefer, and write the results to the folder --out. The same command on the
same folder resumes a stopped run, and shows a finished one.
""",
    epilog="""\
examples:
  tl-posheads atlas smollm2-135m --out atlas
  tl-posheads atlas ./my-model --scores scores --needed --layers 0-9 --out atlas

what comes out, in the folder --out:
  pairs.csv    a row per head and rotary pair: wavelength, usage, concentration, weights, ...
  heads.csv    a row per head: centroid, entropy, share of slow pairs, preferred distance, ...
  atlas.png    heads x pairs, by layer; with --scores by_score.png, by positional score
  head.png     spectrum and mean curve of the first head in the printed table
  atlas.*      everything, for RotaryAtlas.load("FOLDER") in Python
  run.json     what was asked for
""",
)


def add_command(commands: Any) -> None:
    """Add ``atlas`` to the parser's commands."""
    add = new_command(commands, "atlas", _atlas, table_lines, "RotaryAtlas", _TEXTS)
    add_texts(add, docs=8, length=1024)
    add("--layers", metavar="LIST", type=layers, help="like 0-9 or 0,3,5-7 (all)")
    text = "also find the pairs that need their rotation"
    add("--needed", action="store_true", help=text)
    add("--trained", metavar="N", type=whole(2), help="training length in tokens (the model's own)")
    text = "a folder that score wrote; adds its scores to the columns"
    add("--scores", metavar="DIR", type=Path, help=text)
    add_scale(add)
    add_skip_first(add)
    add_model_options(add)
    add_top(add)


def _atlas(run: Run) -> RotaryAtlas:
    from tl_posheads import HeadScores, rotary_atlas

    model = run.model()
    tokens, scores = run.texts(model), run.args.scores and HeadScores.load(run.args.scores)
    with run.started() as checkpoint:
        options = run.options("layers", "needed", "trained", "scale", "skip_first", "seed")
        found = rotary_atlas(model, tokens, scores=scores, checkpoint=checkpoint, **options)
        first = found.ranked().iloc[0]
        files = {
            "pairs.csv": found.to_pandas(),
            "heads.csv": found.heads(),
            "atlas.png": found.plot(),
            "head.png": found.plot_head((int(first["layer"]), int(first["head"]))),
        }
        if scores is not None:
            files["by_score.png"] = found.plot(sort="rho")
        run.save(found, files)
    return found


def table_lines(found: RotaryAtlas, top: int) -> list[str]:
    """The first heads with their columns, as lines of text; ``-`` for unknown values."""
    table = found.ranked()
    names = list(table.columns[2:])
    cells = [["head", *names]]
    for row in table.head(top).to_dict("records"):
        place = f"L{row['layer']:.0f}H{row['head']:.0f}"
        forms = (".0f" if name == "preferred" else ".2f" for name in names)
        values = (number(row[name], form) for name, form in zip(names, forms, strict=True))
        cells.append([place, *values])
    by = "rho" if "rho" in table else "slow_text"
    return [repr(found), f"Of {len(table)} heads, those with the highest {by}:", *aligned(cells, 1)]

"""``tl-posheads score`` and ``show``: scores of a model's heads, and their table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_posheads.cli.command import Run, aligned, new_command, number, tell
from tl_posheads.cli.options import (
    add_model_options,
    add_qk_pairs,
    add_skip_first,
    add_texts,
    add_top,
    layers,
    ranges,
    whole,
)
from tl_posheads.cli.report import CURVE, MAPS, finished_scores, write_page
from tl_posheads.errors import PosheadsError
from tl_posheads.io.files import write_text

if TYPE_CHECKING:
    from tl_posheads.hooks.model import LensModel
    from tl_posheads.scoring.head_scores import HeadScores

COLUMNS = ("layer", "head", "rho", "ci", "p_adj", "rotation", "content", "D near->far", "window")
_SHOWN, _CELLS = 256, 64  # tokens whose attention the page shows, and cells a side

_TEXTS = dict(
    help="score the heads of a model",
    description="""\
Score the heads of MODEL on a corpus and write the results to the folder --out.
The same command on the same folder resumes a stopped run, and shows a finished one.
""",
    epilog="""\
examples:
  tl-posheads score smollm2-135m --out scores
  tl-posheads score EleutherAI/pythia-160m --corpus book.txt --weighting distance --out pythia
  tl-posheads score model.gguf --layers 0,3,5-7 --qk-pairs 1000 --out quick

columns of the table:
  rho          the positional score, -1 to 1: in each document Spearman's rho between distance and
               dominant dimension D, over queries and the keys before them; the mean over documents
  ci           95 % interval of that mean (Student's t over the n documents; give 8 or more)
  p_adj        p-value of a mean of zero (t test over documents), corrected for the number of heads
  rotation     rho of the rotation alone: of the same contents at other positions, with the distance
               between these
  content      rho of the content alone: of the same D with the distance that the contents came from
  D near->far  mean D of tokens 1 or 2 apart, and in the farthest octave of distances: rho
               measures the order of D, not how far it moves
  window       the layer's sliding window, - without one
Below zero, faster pairs take over as distance grows. With one document there is no ci and no p.
""",
)


def add_command(commands: Any) -> None:
    """Add ``score`` and ``show`` to the parser's commands."""
    add = new_command(commands, "score", _score, _lines, "HeadScores", _TEXTS)
    add_texts(add, docs=16, length=1024)
    add_qk_pairs(add)
    add("--layers", metavar="LIST", type=layers, help="like 0-9 or 0,3,5-7 (every layer)")
    add_skip_first(add)
    add_model_options(add)
    add(
        "--best",
        metavar="N",
        type=whole(0),
        default=3,
        help="best heads whose curves and attention the page shows; adds two passes (3)",
    )
    add_top(add)

    show = commands.add_parser(
        "show", help="print the table of a finished run", description="Print the best heads in DIR."
    )
    show.add_argument("dir", metavar="DIR", type=Path, help="a folder that score wrote")
    add_top(show.add_argument)
    show.set_defaults(action=_show)


def _check_layers(layers: Sequence[int] | None, model: LensModel) -> None:
    n_layers = int(model.cfg.n_layers)
    missing = [layer for layer in layers or () if layer >= n_layers]
    if missing:
        raise PosheadsError(
            f"--layers asks for {ranges(missing)}, but the model has {n_layers} layers;"
            f" choose from {ranges(range(n_layers))}"
        )


def _score(run: Run) -> HeadScores:
    from tl_posheads.scoring.score import score_heads

    args = run.args
    if args.skip_first > args.length - 2:
        raise PosheadsError(
            f"--skip-first {args.skip_first} leaves no pair of tokens in texts of {args.length};"
            f" give at most {args.length - 2}"
        )
    model = run.model()
    _check_layers(args.layers, model)
    tokens = run.texts(model)
    with run.started() as checkpoint:
        facts = {**run.request, "model_class": type(model).__name__}
        options = run.options("layers", "qk_pairs", "weighting", "scale", "skip_first", "seed")
        options.update(checkpoint=checkpoint, provenance=facts)
        scores = score_heads(model, tokens, **options)
        scores.save(run.folder)
        write_text(run.folder / "table.csv", scores.to_pandas().to_csv(index=False))
        if args.best and bool(scores.rho.isfinite().any()):
            _save_best(run, model, tokens, scores.top(args.best))
        write_page(run.folder, scores)
    return scores


def _save_best(run: Run, model: LensModel, tokens: Any, heads: list[tuple[int, int]]) -> None:
    """Details of the best heads for the page: curves over all texts, attention in the first one."""
    from tl_posheads import dominant_dimension_curve, head_maps

    options = run.options("scale", "skip_first")
    maps = head_maps(model, tokens[0][:_SHOWN], heads, max_cells=_CELLS, scale=run.args.scale)
    maps.save(run.folder / MAPS)
    # Heads of different geometry have no curve in common; the best one has.
    for some in (heads, heads[:1]):
        with suppress(PosheadsError):
            curve = dominant_dimension_curve(model, tokens, heads=some, **options)
            curve.save(run.folder / CURVE)
            return


def _show(args: argparse.Namespace) -> None:
    tell(_lines(finished_scores(args.dir), args.top), args.dir)


def _lines(scores: HeadScores, top: int) -> list[str]:
    return [*table_lines(scores, top), *scores.summary().splitlines()]


def table_lines(scores: HeadScores, top: int) -> list[str]:
    """The ``top`` best heads as lines of text with fixed columns, NaN as ``-``; none without."""
    from tl_posheads.views.report import scored_rows

    rows = scored_rows(scores)
    if not rows:
        return []

    cells: list[tuple[str, ...]] = [COLUMNS]
    for row in rows[:top]:
        low, high = number(row["ci_low"], "+.3f"), number(row["ci_high"], "+.3f")
        near, far = number(row["d_near"], ".1f"), number(row["d_far"], ".1f")
        interval = "-" if low == high == "-" else f"{low} .. {high}"
        measured = (number(row[name], "+.3f") for name in ("rotation", "content"))
        rho, p = number(row["rho"], "+.3f"), number(row["p_adjusted"], ".2g")
        place, window = (str(row["layer"]), str(row["head"])), number(row["window"], ".0f")
        cells.append((*place, rho, interval, p, *measured, f"{near} -> {far}", window))
    title = f"The {len(cells) - 1} highest positional scores of {len(rows)} heads:"
    return [title, *aligned(cells)]

"""The command ``tl-posheads``: scores heads, shows what was scored, ablates."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tl_posheads.cli import ablate as cli_ablate
from tl_posheads.cli import encodings as cli_codes
from tl_posheads.cli import profile as cli_profile
from tl_posheads.cli import run_folder
from tl_posheads.cli import track as cli_track
from tl_posheads.cli import unseen as cli_unseen
from tl_posheads.cli.command import Run, aligned, new_command, number, tell
from tl_posheads.cli.options import add_model_options, add_pairs, add_texts, layers, ranges, whole
from tl_posheads.errors import PosheadsError
from tl_posheads.io.files import write_text

if TYPE_CHECKING:
    from tl_posheads.scoring.head_scores import HeadScores

_STUDIES = ("codes", "profile", "track", "unseen")  # they say how long they took
_COLUMNS = ("layer", "head", "rho", "ci", "p_adj", "rotation", "content", "D near->far", "window")
_FILES = (run_folder.TABLE, run_folder.PAGE, run_folder.RUN_FILE)
_SHOWN, _CELLS = 256, 64  # tokens whose attention the page shows, and cells a side

_ABOUT = """\
Find the Positional Heads of a transformer with rotary position embedding (RoPE).

RoPE turns each pair of coordinates of a head's queries and keys by an angle that grows with the
position: the first pairs fast, the last ones slowly. In a Positional Head the pair that weighs most
in query times key moves, with the distance between two tokens, from the fast pairs to the slow
ones, so that the head can tell far from near. A head's positional score is Spearman's rho between
that distance and the head's dominant dimension, over the query-key pairs that attention sees:
the mean over documents, whose spread gives its interval and p-value.
Hong et al., Findings of EMNLP 2024, https://arxiv.org/abs/2410.08703
"""

_EXAMPLES = """\
examples:
  tl-posheads score smollm2-135m --out scores
      every head of SmolLM2-135M on the documentation of Python
  tl-posheads score ./my-model --corpus essays/ --docs 32 --length 2048 --layers 0-9 --out scores
      ten layers of a model of your own, on 32 stretches of your own texts
  tl-posheads show scores --top 50
      the table again, longer
  tl-posheads ablate smollm2-135m scores --tasks passkey,copying --budget 20min --out ablation
      whether the heads that scored highest matter

what comes out, in the folder --out:
  run.json     what was asked for; tells this run's results from another's
  scores.*     the scores, for HeadScores.load("FOLDER") in Python
  table.csv    one row per head, for a spreadsheet
  curve/       what the best heads rest on by distance, for DominantDimensionCurve.load
  maps/        what they attend to in the first text's beginning, for HeadMaps.load
  index.html   a page with all of this; needs no network

Stopped by Ctrl-C, the same command goes on from there.
"Positional" is not "important": ablate the heads before you claim that.
"""

_SCORE_TEXTS = dict(
    help="score the heads of a model",
    description="""\
Score the heads of MODEL on a corpus and write the results to the folder --out.
The same command on the same folder goes on with a stopped run, and shows a finished one.
""",
    epilog="""\
examples:
  tl-posheads score smollm2-135m --out scores
  tl-posheads score EleutherAI/pythia-160m --corpus book.txt --weighting distance --out pythia
  tl-posheads score model.gguf --layers 0,3,5-7 --pairs 1000 --out quick

columns of the table:
  rho          the positional score, -1 to 1: in each document Spearman's rho between distance and
               dominant dimension D, over queries and the keys before them; the mean over documents
  ci           95 % interval of that mean (Student's t over the n documents; give 8 or more)
  p_adj        p-value of a mean of zero (t test over documents), corrected for the number of heads
  rotation     what the rotation alone does: rho of the same contents put at other positions, with
               the distance that they are put at
  content      what contents alone do: rho of the same D with the distance that they came from
  D near->far  mean D of tokens 1 or 2 apart, and in the farthest octave of distances: rho says in
               which order D goes, not how far
  window       the layer's sliding window, - where it sees everything before it
Below zero, faster pairs take over as distance grows. With one document there is no ci and no p.
""",
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other refusal of the command does."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tl-posheads: error: {_one_line(message)} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("tl-posheads")
        except PackageNotFoundError:
            number = "(not installed)"
        print(f"tl-posheads {number}")
        parser.exit()


def _one_line(text: object) -> str:
    line = " ".join(str(text).split())
    # A name may hold escape sequences; the terminal must not obey them.
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tl-posheads", description=_ABOUT, epilog=_EXAMPLES)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    add = new_command(commands, "score", _score, _lines, "HeadScores", _FILES, _SCORE_TEXTS)
    add_texts(add, docs=16, length=1024)
    add_pairs(add)
    add("--layers", metavar="LIST", type=layers, help="like 0-9 or 0,3,5-7 (every layer)")
    add(
        "--skip-first",
        metavar="N",
        type=whole(0),
        default=0,
        help="leave out the first N positions, the attention sink for one (0)",
    )
    add_model_options(add)
    add(
        "--best",
        metavar="N",
        type=whole(0),
        default=3,
        help="best heads whose curves and attention the page shows; two more passes (3)",
    )
    add("--top", metavar="N", type=whole(1), default=20, help="heads to print (20)")

    for module in (cli_ablate, cli_codes, cli_profile, cli_track, cli_unseen):
        module.add_command(commands)
    show = commands.add_parser(
        "show", help="print the table of a finished run", description="Print the best heads in DIR."
    )
    show.add_argument("dir", metavar="DIR", type=Path, help="a folder that score wrote")
    show.add_argument("--top", metavar="N", type=whole(1), default=20, help="heads to print (20)")
    show.set_defaults(action=_show)

    report = commands.add_parser(
        "report", help="make a run's index.html again", description="Make DIR/index.html again."
    )
    report.add_argument("dir", metavar="DIR", type=Path, help="a folder that score wrote")
    report.add_argument(
        "--ablation",
        metavar="DIR2",
        type=Path,
        help="with the verdicts of a study: a folder that ablate or AblationStudy.save wrote",
    )
    report.add_argument(
        "--extrapolation",
        metavar="DIR3",
        type=Path,
        help="with a comparison of methods: a folder that ExtrapolationComparison.save wrote",
    )
    report.set_defaults(action=_report)
    return parser


def _check_layers(layers: Sequence[int] | None, model: Any) -> None:
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
    with run.started() as folder:
        facts = {**run.request, "model_class": type(model).__name__}
        options = run.options("layers", "pairs", "weighting", "scale", "skip_first", "seed")
        scores = score_heads(
            model,
            tokens,
            checkpoint=folder / run_folder.CHECKPOINT,
            progress=True,
            provenance=facts,
            **options,
        )
        scores.save(folder)
        write_text(folder / run_folder.TABLE, scores.to_pandas().to_csv(index=False))
        if args.best and bool(scores.rho.isfinite().any()):
            _save_best(run, folder, model, tokens, scores.top(args.best))
        _write_page(folder, scores)
    return scores


def _save_best(
    run: Run, folder: Path, model: Any, tokens: Any, heads: list[tuple[int, int]]
) -> None:
    """What the page shows of the best heads: curves over all texts, attention in the first one."""
    from tl_posheads import dominant_dimension_curve, head_maps

    options = run.options("scale", "skip_first")
    maps = head_maps(model, tokens[0][:_SHOWN], heads, max_cells=_CELLS, scale=run.args.scale)
    maps.save(folder / run_folder.MAPS)
    # Heads of different geometry have no curve in common; the best one has.
    for some in (heads, heads[:1]):
        with suppress(PosheadsError):
            curve = dominant_dimension_curve(model, tokens, heads=some, **options)
            curve.save(folder / run_folder.CURVE)
            return


def _require_finished(folder: Path) -> None:
    if not folder.is_dir():
        raise PosheadsError(f"{folder} is no folder; give one that tl-posheads score wrote")
    if run_folder.was_stopped(folder):
        raise PosheadsError(
            f"the run in {folder} was stopped before it finished; the same score command goes on"
        )


def _finished_scores(folder: Path) -> HeadScores:
    from tl_posheads.scoring.head_scores import HeadScores

    _require_finished(folder)
    return HeadScores.load(folder)


def _show(args: argparse.Namespace) -> None:
    tell(_lines(_finished_scores(args.dir), args.top), args.dir, _FILES)


def _report(args: argparse.Namespace) -> None:
    from tl_posheads import AblationStudy, ExtrapolationComparison

    more: dict[str, Any] = {}
    if args.ablation is not None:
        more["ablation"] = AblationStudy.load(args.ablation)
    if args.extrapolation is not None:
        more["extrapolation"] = ExtrapolationComparison.load(args.extrapolation)
    _require_finished(args.dir)
    with run_folder.locked(args.dir):  # so that the page is about the scores beside it
        _write_page(args.dir, _finished_scores(args.dir), **more)
    print(f"wrote {args.dir / run_folder.PAGE}")


def _write_page(folder: Path, scores: HeadScores, **more: Any) -> None:
    """The page about everything that the folder holds, and more."""
    from tl_posheads.scoring.curves import DominantDimensionCurve
    from tl_posheads.scoring.maps import HeadMaps
    from tl_posheads.views.report import write_report

    if (folder / run_folder.CURVE).exists():
        more["curve"] = DominantDimensionCurve.load(folder / run_folder.CURVE)
    if (folder / run_folder.MAPS).exists():
        more["maps"] = HeadMaps.load(folder / run_folder.MAPS)
    write_report(scores, folder / run_folder.PAGE, **more)


def _lines(scores: HeadScores, top: int) -> list[str]:
    return [*table_lines(scores, top), *scores.summary().splitlines()]


def table_lines(scores: HeadScores, top: int) -> list[str]:
    """The ``top`` best heads as lines of text with fixed columns, NaN as ``-``; none without."""
    from tl_posheads.views.report import scored_rows

    rows = scored_rows(scores)
    if not rows:
        return []

    cells: list[tuple[str, ...]] = [_COLUMNS]
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the return value is its exit status (0, 2 for bad input, 130 for Ctrl-C)."""
    try:
        args, begun = build_parser().parse_args(argv), time.perf_counter()
        args.action(args)
        sys.stdout.flush()
        if args.command in _STUDIES:
            print(f"{time.perf_counter() - begun:.0f} s", file=sys.stderr)
    except SystemExit as stop:
        return int(stop.code or 0)
    except (PosheadsError, OSError) as problem:
        if isinstance(problem, BrokenPipeError):  # the reader (`| head`) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"tl-posheads: error: {_one_line(problem)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        what = str(stop) or "stopped; nothing was computed yet"
        print(f"\ntl-posheads: {_one_line(what)}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

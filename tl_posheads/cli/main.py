"""The command ``tl-posheads``: its parser, and how it ends."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from tl_posheads import __version__
from tl_posheads.cli import ablate, atlas, encodings, ood_angles, profile, report, score, track
from tl_posheads.errors import PosheadsError

_STUDIES = ("atlas", "encodings", "ood-angles", "profile", "track")  # they say how long they took

_ABOUT = """\
Find the Positional Heads of a transformer with rotary position embedding (RoPE).

RoPE turns each pair of coordinates of a head's queries and keys by an angle that grows with the
position: the first pairs fast, the last ones slowly. In a Positional Head the dominant rotary pair,
the one that contributes most to the query-key product, shifts from fast to slow as token distance
grows, so that the head can tell far from near. A head's positional score is Spearman's rho between
token distance and the head's dominant dimension, over the query-key pairs that attention allows:
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
  run.json     what was asked for; identifies the run
  scores.*     the scores, for HeadScores.load("FOLDER") in Python
  table.csv    one row per head, for a spreadsheet
  curve/       dominant dimension of the best heads by distance, for DominantDimensionCurve.load
  maps/        their attention at the beginning of the first text, for HeadMaps.load
  index.html   a page with all of this; needs no network

After Ctrl-C, the same command resumes the run.
"Positional" is not "important": ablate the heads before you claim that.
"""


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, like every other error of the command."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tl-posheads: error: {_one_line(message)} (see {self.prog} --help)\n")


def _one_line(text: object) -> str:
    line = " ".join(str(text).split())
    # A name may hold escape sequences; the terminal must not obey them.
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tl-posheads", description=_ABOUT, epilog=_EXAMPLES)
    parser.add_argument(
        "--version",
        action="version",
        version=f"tl-posheads {__version__}",
        help="show the version and exit",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    for module in (score, ablate, atlas, encodings, ood_angles, profile, track, report):
        module.add_command(commands)
    return parser


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

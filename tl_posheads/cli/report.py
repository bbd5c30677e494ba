"""``tl-posheads report``: the page about a scoring run, alone or with other results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_posheads.cli import run_folder
from tl_posheads.errors import PosheadsError

if TYPE_CHECKING:
    from tl_posheads.scoring.head_scores import HeadScores

PAGE, CURVE, MAPS = "index.html", "curve", "maps"


def add_command(commands: Any) -> None:
    """Add ``report`` to the parser's commands."""
    report = commands.add_parser(
        "report", help="rebuild a run's index.html", description="Make DIR/index.html again."
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
    report.add_argument(
        "--atlas",
        metavar="DIR4",
        type=Path,
        help="with a rotary atlas: a folder that atlas or RotaryAtlas.save wrote",
    )
    report.set_defaults(action=_report)


def _report(args: argparse.Namespace) -> None:
    from tl_posheads import AblationStudy, ExtrapolationComparison, RotaryAtlas

    more: dict[str, Any] = {}
    if args.ablation is not None:
        more["ablation"] = AblationStudy.load(args.ablation)
    if args.extrapolation is not None:
        more["extrapolation"] = ExtrapolationComparison.load(args.extrapolation)
    if args.atlas is not None:
        more["atlas"] = RotaryAtlas.load(args.atlas)
    _require_finished(args.dir)
    with run_folder.locked(args.dir):  # so that the page is about the scores beside it
        write_page(args.dir, finished_scores(args.dir), **more)
    print(f"wrote {args.dir / PAGE}")


def _require_finished(folder: Path) -> None:
    if not folder.is_dir():
        raise PosheadsError(f"{folder} is no folder; give one that tl-posheads score wrote")
    if run_folder.was_stopped(folder):
        raise PosheadsError(
            f"the run in {folder} was stopped before it finished; the same score command goes on"
        )


def finished_scores(folder: Path) -> HeadScores:
    from tl_posheads.scoring.head_scores import HeadScores

    _require_finished(folder)
    return HeadScores.load(folder)


def write_page(folder: Path, scores: HeadScores, **more: Any) -> None:
    """The page about everything that the folder holds, and more."""
    from tl_posheads.scoring.curves import DominantDimensionCurve
    from tl_posheads.scoring.maps import HeadMaps
    from tl_posheads.views.report import write_report

    if (folder / CURVE).exists():
        more["curve"] = DominantDimensionCurve.load(folder / CURVE)
    if (folder / MAPS).exists():
        more["maps"] = HeadMaps.load(folder / MAPS)
    write_report(scores, folder / PAGE, **more)

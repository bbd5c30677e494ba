"""``tl-posheads profile``: the positional score beside other measures of every head."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_posheads.cli.command import Run, aligned, new_command, number
from tl_posheads.cli.options import add_model_options, add_scale, add_texts, add_top, names, whole
from tl_posheads.errors import PosheadsError

if TYPE_CHECKING:
    from tl_posheads.studies.profile.results import HeadProfile

# As profile.settings.MEASURES has them; named here so that --help needs no torch.
MEASURES = (
    "retrieval",
    "induction",
    "previous_token",
    "sink",
    "distance",
    "long_context",
    "massive",
    "utility",
)

_TEXTS = dict(
    help="positional heads beside retrieval, induction and other heads",
    description="""\
Measure every head of MODEL by other measures than the positional score, on the same texts, and
write how they correlate with it to the folder --out. The same command on the same folder resumes a
stopped run, and shows a finished one.
""",
    epilog=f"""\
examples:
  tl-posheads profile smollm2-135m --docs 2 --length 512 --out profile
  tl-posheads profile ./my-model --scores scores --measures retrieval,sink,induction --out profile

measures: {", ".join(MEASURES)}

what comes out, in the folder --out:
  table.csv      one row per head, a column per measure
  profile.png    rank correlations between the measures
  profile.json, profile.parquet   the profile, for HeadProfile.load("FOLDER") in Python
  run.json       what was asked for
""",
)


def add_command(commands: Any) -> None:
    """Add ``profile`` to the parser's commands."""
    more = {"scale": _scale}
    add = new_command(commands, "profile", _profile, table_lines, "HeadProfile", _TEXTS, **more)
    add_texts(add, docs=2, length=512)
    add(
        "--measures",
        metavar="LIST",
        type=names(MEASURES),
        default=list(MEASURES),
        help="comma-separated, see below (all)",
    )
    add(
        "--needles",
        metavar="N",
        type=whole(0),
        default=6,
        help="needle questions for the retrieval score (6)",
    )
    text = "a folder that score wrote, with the scale it has, instead of scoring these texts"
    add("--scores", metavar="DIR", type=Path, help=text)
    add_scale(add)
    add_model_options(add)
    add_top(add, "highest heads of each measure whose overlap is printed")


def _scale(args: argparse.Namespace) -> Any:
    """The scale in force: given scores come with their own."""
    if args.scores is None:
        return args.scale
    from tl_posheads.scoring.head_scores import HeadScores

    return HeadScores.load(args.scores).provenance.get("scale")


def _profile(run: Run) -> HeadProfile:
    from tl_posheads import HeadScores, profile_heads

    args, scale = run.args, run.request["scale"]
    if scale != args.scale:
        print(f"scale: {scale}, which the scores in {args.scores} have", file=sys.stderr)
    model = run.model()
    tokens, scores = run.texts(model), args.scores and HeadScores.load(args.scores)
    with run.started() as checkpoint:
        options = run.options("measures", "needles", "scale", "seed")
        found = profile_heads(model, tokens, scores=scores, checkpoint=checkpoint, **options)
        files = {"table.csv": found.to_pandas()}
        try:
            files["profile.png"] = found.plot()
        except PosheadsError as problem:  # nothing to draw; the table is written all the same
            print(f"no picture: {problem}", file=sys.stderr)
        run.save(found, files)
    return found


def table_lines(profile: HeadProfile, top: int) -> list[str]:
    """Every measure's correlation and overlap with the positional score, as lines of text.

    ``-`` stands for unknown values; the reasons follow.
    """
    overlap = profile.overlap(top)
    everywhere = profile.correlation()["positional"]
    within = profile.correlation(within_layers=True)["positional"]
    needles = profile.provenance.get("needles") or {}
    cells = [["measure", "rho", "rho_in_layer", "overlap", "of", "chance", "p_adjusted"]]
    for row in overlap.to_dict("records"):
        name = str(row["measure"])
        known = row["overlap"] == row["overlap"]
        cells.append(
            [
                name,
                number(everywhere[name], "+.3f"),
                number(within[name], "+.3f"),
                number(row["overlap"], ".0f"),
                str(row["n_top"]) if known else "-",
                number(row["chance"], ".1f"),
                number(row["p_adjusted"], ".2g"),
            ]
        )
    out = [
        f"Correlation with the positional score over {len(profile.table)} heads, and overlap of the {top} highest:",
        *aligned(cells, left=1),
    ]
    if needles.get("n_prompts"):
        out.append(
            f"needles: {needles['n_answered']} of {needles['n_prompts']} answered by the model"
        )
    missing = profile.provenance.get("missing", {})
    return out + [f"{name} has gaps: {why}" for name, why in missing.items()]

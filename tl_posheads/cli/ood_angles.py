"""``tl-posheads ood-angles``: why dominant dimensions change past the training length."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from tl_posheads.cli.command import Run, new_command
from tl_posheads.cli.options import add_model_options, add_scale, add_texts, whole

if TYPE_CHECKING:
    from tl_posheads.studies.ood_angles.results import OODAngles

LIVE = ("pairs", "joint", "none")
TABLES = ("summary", "by_pair", "losses", "pairs", "change")

_TEXTS = dict(
    help="test whether out-of-distribution angles cause the change past the training length",
    description="""\
Read texts longer than MODEL was trained on, clamp the angles of rotary pairs to those of training,
and write how much of the change in dominant dimension and loss they explain to the folder --out.
The same command on the same folder resumes a stopped run, and shows a finished one.
""",
    epilog="""\
examples:
  tl-posheads ood-angles ./small-llama --trained 256 --corpus held-out.txt --out ood
  tl-posheads ood-angles smollm2-135m --trained 8192 --factor 2 --docs 4 --live joint --out ood

A rotary pair with a wavelength above the training length never completed a turn in training. Longer
texts rotate it to angles outside the training distribution: it is an out-of-distribution pair.

what comes out, in the folder --out:
  summary.csv     change, and the parts of out-of-distribution and of other pairs, with 95 % intervals
  by_pair.csv, losses.csv, pairs.csv, change.csv   pair by pair, loss, wavelengths, head by head
  ood_angles.png  curves with and without clamps, each pair's part, and the loss
  ood_angles.*    everything, for OODAngles.load("FOLDER") in Python
  run.json        what was asked for
""",
)


def heads(text: str) -> list[tuple[int, int]]:
    """Heads like ``"0.1,3.2"``, each a layer and a head.

    >>> heads("0.1, 3.2")
    [(0, 1), (3, 2)]
    """
    found = [re.fullmatch(r"\s*([0-9]{1,4})\.([0-9]{1,4})\s*", part) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} names no heads; write layer.head, like 0.1,3.2, counted from 0"
        )
    return [(int(match[1]), int(match[2])) for match in found if match]


def above_one(text: str) -> float:
    """A number above 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 1")
    return value


def add_command(commands: Any) -> None:
    """Add ``ood-angles`` to the parser's commands."""
    add = new_command(commands, "ood-angles", _ood_angles, _lines, "OODAngles", _TEXTS)
    add_texts(add, docs=8)
    add(
        "--trained",
        metavar="N",
        type=whole(2),
        help="training length in tokens (from the model's configuration)",
    )
    add(
        "--factor",
        metavar="X",
        type=above_one,
        default=4.0,
        help="length of the texts, in training lengths (4)",
    )
    add("--heads", metavar="LIST", type=heads, help="layer.head, like 0.1,3.2 (every head)")
    add("--queries", metavar="N", type=whole(1), default=256, help="queries per text (256)")
    add(
        "--live",
        choices=LIVE,
        default="pairs",
        help="clamp as the model reads: sets of pairs and each out-of-distribution pair, sets alone, or nothing (pairs)",
    )
    add_scale(add)
    add_model_options(add)


def _ood_angles(run: Run) -> OODAngles:
    from tl_posheads.extrapolation.methods.unchanged import Unchanged
    from tl_posheads.hooks.changes import trained_of
    from tl_posheads.hooks.model import require_rotary
    from tl_posheads.studies.ood_angles.measure import ood_angles

    args, model = run.args, run.model()
    require_rotary(model)
    with Unchanged()(model):
        tokens = run.texts(model, length=int(args.factor * trained_of(model, args.trained)))
    with run.started() as checkpoint:
        options = run.options("trained", "heads", "factor", "scale", "live", "seed")
        options.update(n_queries=args.queries, checkpoint=checkpoint)
        found = ood_angles(model, tokens, **options)
        tables = {f"{name}.csv": getattr(found, name)() for name in TABLES}
        run.save(found, {**tables, "ood_angles.png": found.plot()})
    return found


def _lines(found: OODAngles) -> list[str]:
    return found.sentences()

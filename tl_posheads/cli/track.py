"""``tl-posheads track``: scores over a model's checkpoints, from the command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_posheads.cli.command import Run, new_command
from tl_posheads.cli.options import add_model_options, add_scale, add_texts
from tl_posheads.errors import PosheadsError

if TYPE_CHECKING:
    from tl_posheads.studies.emergence.results import Emergence

_TEXTS = dict(
    help="score a training run's checkpoints",
    description="""\
Score every head at each checkpoint of a training run, and report when scores rise and when the loss
on far tokens falls. The same command on the same folder resumes a stopped run, and shows a finished
one.
""",
    epilog="""\
examples:
  tl-posheads track EleutherAI/pythia-160m --steps 0,16,128,512,1000,4000,16000,143000 --out pythia
      revisions step0, step16 ... of the hub (--revision says how another model names them)
  tl-posheads track runs/my-model --corpus held-out.txt --out track
      folders checkpoint-500, checkpoint-1000 ... in runs/my-model, as transformers' Trainer makes

what comes out, in the folder --out:
  emergence.*    scores, curves and losses by step, for Emergence.load("FOLDER") in Python
  lags.csv       a row per head: when its score rises, beside the loss
  training.png   scores, losses and the best head's curve over training
  run.json       what was asked for

Use a text that is not in the training data, or its loss says little.
""",
)


def steps(text: str) -> list[int]:
    """Ascending steps, ``"0,16,128"``.

    >>> steps("0, 16,128")
    [0, 16, 128]
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,12}", part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of steps like 0,16,128")
    return sorted({int(part) for part in parts})


def add_command(commands: Any) -> None:
    """Add ``track`` to the parser's commands."""
    more = {"steps": lambda args: sorted(_checkpoints(args))}
    add = new_command(commands, "track", _track, _lines, "Emergence", _TEXTS, **more)
    add_texts(add, 16, length=512, least=8, model="a hub id, or a folder of checkpoints")
    add(
        "--steps",
        metavar="LIST",
        type=steps,
        help="like 0,16,128 (a folder's: all; a hub id's: Pythia's 154)",
    )
    add("--revision", metavar="NAME", default="step{}", help="of a step on the hub (step{})")
    add_scale(add)
    add_model_options(add, cls=False)


def _checkpoints(args: argparse.Namespace) -> Mapping[int, Any]:
    from functools import partial

    from tl_posheads.io.models import load_model
    from tl_posheads.studies.emergence.sources import (
        PYTHIA_STEPS,
        folder_checkpoints,
        hub_checkpoints,
    )

    options = {"device": args.device, "dtype": args.dtype}
    if not Path(args.model).exists():
        wanted = args.steps or PYTHIA_STEPS
        return hub_checkpoints(args.model, wanted, revision=args.revision, **options)
    found = folder_checkpoints(args.model)
    missing = sorted(set(args.steps or ()) - set(found))
    if missing:
        raise PosheadsError(
            f"--steps asks for {', '.join(map(str, missing))}, but {args.model} holds "
            f"{', '.join(map(str, found))}"
        )
    return {step: partial(load_model, str(found[step]), **options) for step in args.steps or found}


def _track(run: Run) -> Emergence:
    from tl_posheads.studies.emergence.tracker import track_emergence

    checkpoints = _checkpoints(run.args)
    first = min(checkpoints)
    model = checkpoints[first]()
    tokens, sources = run.texts(model), {**checkpoints, first: model}
    with run.started() as checkpoint:
        found = track_emergence(sources, tokens, folder=checkpoint, **run.options("scale", "seed"))
        lags = {"lags.csv": found.lead_lag()} if len(found.steps) >= 3 else {}
        run.save(found, {**lags, "training.png": found.plot()})
    return found


def _lines(found: Emergence) -> list[str]:
    out, far = [], found.losses().groupby("step")["loss"].last()
    for step, rows in found.to_pandas().groupby("step"):
        best = rows.nlargest(3, "rho")
        heads = ", ".join(f"L{r.layer}H{r.head} {r.rho:+.3f}" for r in best.itertuples())
        out.append(f"step {step:>8,}  loss on far tokens {far[step]:6.3f}  best {heads}")
    if len(found.steps) < 3:
        return out
    columns = [
        "layer",
        "head",
        "rho",
        "rise",
        "step_score",
        "step_loss",
        "lag_loss",
        "lag_loss_low",
        "lag_loss_high",
    ]
    lags = found.lead_lag()[columns].dropna(subset="lag_loss").head(10)
    if not len(lags):
        return [*out, "\nNo head's score rose by 0.1 or more."]
    about = "\nHeads whose score rose, and how many octaves of steps after the far loss fell"
    return [*out, about, lags.round(3).to_string(index=False)]

"""``tl-posheads track``: scores over a model's checkpoints, from the command line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import rundir
from .cli_options import local_files, resumable, whole
from .errors import PosheadsError

if TYPE_CHECKING:
    from .emergence.results import Emergence

_ABOUT = """\
Score every head at each checkpoint of a training run, and tell when scores rise and when the loss
on far tokens falls. The same command on the same folder goes on with a stopped run, and shows a
finished one.
"""

_EXAMPLES = """\
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

The text that is read must not be in the training data, or its loss says little.
"""


def steps(text: str) -> list[int]:
    """Ascending steps, ``"0,16,128"``.

    >>> steps("0, 16,128")
    [0, 16, 128]
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,12}", part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of steps like 0,16,128")
    return sorted({int(part) for part in parts})


def add_command(commands: Any) -> None:
    """Add ``track`` to the parser's commands."""
    parser = commands.add_parser(
        "track", help="score a training run's checkpoints", description=_ABOUT, epilog=_EXAMPLES
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a hub id, or a folder of checkpoints")
    add("--out", metavar="DIR", type=Path, required=True, help="folder for the results")
    add("--steps", metavar="LIST", type=steps,
        help="like 0,16,128 (a folder's: all; a hub id's: Pythia's 154)")  # fmt: skip
    add("--revision", metavar="NAME", default="step{}", help="of a step on the hub (step{})")
    add("--corpus", metavar="NAME-OR-PATH", default="python-docs", help="as score takes it")
    add("--length", metavar="N", type=whole(8), default=512, help="tokens a document (512)")
    add("--docs", metavar="N", type=whole(1), default=16,
        help="number of documents, over which intervals and p-values are (16)")  # fmt: skip
    add("--scale", choices=("none", "attention"), default="none",
        help="contributions as they are, or times the factor on the model's scores (none)")  # fmt: skip
    add("--seed", metavar="N", type=whole(0), default=0, help="for everything drawn (0)")
    add("--device", help="cpu, cuda, cuda:1, mps (the best there is)")
    add("--dtype", help="float32, bfloat16 or float16 (the loader's choice)")
    add("--overwrite", action="store_true", help="replace another run's results in DIR")
    parser.set_defaults(action=_track)


def _checkpoints(args: argparse.Namespace) -> Mapping[int, Any]:
    from functools import partial

    from .emergence.sources import PYTHIA_STEPS, folder_checkpoints, hub_checkpoints
    from .models import load_model

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


def _track(args: argparse.Namespace) -> None:
    from .corpora import corpus_provenance, load_corpus
    from .emergence.results import Emergence
    from .emergence.tracker import track_emergence

    checkpoints = _checkpoints(args)
    corpus = corpus_provenance(args.corpus)
    request = {
        "command": "track", "model": args.model, "model_files": local_files(args.model),
        "steps": sorted(checkpoints), "revision": args.revision, "dtype": args.dtype,
        "corpus": corpus["name"], "corpus_sha256": corpus["sha256"], "length": args.length,
        "docs": args.docs, "scale": args.scale, "seed": args.seed,
    }  # fmt: skip
    out: Path = args.out
    state = rundir.look(out, request, overwrite=args.overwrite)
    if state == "finished":
        print(f"{out} already holds this run, finished; --overwrite computes it again.\n")
        _print(Emergence.load(out), out)
        return
    first = min(checkpoints)
    model = checkpoints[first]()
    tokens = load_corpus(args.corpus, model, n_docs=args.docs, length=args.length, seed=args.seed)
    if state == "resume":
        print(f"Going on with the run that was stopped in {out}.", file=sys.stderr)
    with resumable(out, args.overwrite), rundir.running(out, request, state) as kept:
        found = track_emergence(
            {**checkpoints, first: model}, tokens, folder=kept, scale=args.scale, seed=args.seed
        )
        found.provenance["request"] = request
        _write(found, out)
    _print(found, out)


def _write(found: Emergence, out: Path) -> None:
    from .pictures import png

    found.save(out)
    if len(found.steps) >= 3:
        rundir.write_whole(out / rundir.LAGS, found.lead_lag().to_csv(index=False))
    rundir.write_bytes(out / rundir.TRAINING, png(found.plot()))


def _print(found: Emergence, out: Path) -> None:
    far = found.losses().groupby("step")["loss"].last()
    for step, rows in found.to_pandas().groupby("step"):
        best = rows.nlargest(3, "rho")
        heads = ", ".join(f"L{r.layer}H{r.head} {r.rho:+.3f}" for r in best.itertuples())
        print(f"step {step:>8,}  loss on far tokens {far[step]:6.3f}  best {heads}")
    if len(found.steps) >= 3:
        columns = ["layer", "head", "rho", "rise", "step_score", "step_loss", "lag_loss",
                   "lag_loss_low", "lag_loss_high"]  # fmt: skip
        lags = found.lead_lag()[columns].dropna(subset="lag_loss").head(10)
        if len(lags):
            print("\nHeads whose score rose, and how many octaves of steps after the far loss fell")
            print(lags.round(3).to_string(index=False))
        else:
            print("\nNo head's score rose by 0.1 or more.")
    written = [out / name for name in (rundir.LAGS, rundir.TRAINING) if (out / name).exists()]
    print(f"\nfiles: {', '.join(str(path) for path in written)}")

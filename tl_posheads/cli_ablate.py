"""``tl-posheads ablate``: the study of a finished scoring run, from the command line."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import rundir
from .cli_options import add_model_options, local_files, names, resumable, shares, whole
from .errors import PosheadsError

if TYPE_CHECKING:
    from .study.results import AblationStudy

# As tasks.TASKS and controls.CONTROLS have them; named here so that --help needs no torch.
TASKS = (
    "passkey", "needle", "key-value", "multi-key", "variable-tracking", "copying", "perplexity",
    "longppl",
)  # fmt: skip
CONTROLS = ("random", "layer_matched", "lowest", "norm_matched")

_ABOUT = """\
Ablate the top heads of SCORES in MODEL, and other heads for comparison, and write what each does
to long-context tasks to the folder --out. The same command on the same folder goes on with a
stopped run, and shows a finished one.
"""

_EXAMPLES = f"""\
examples:
  tl-posheads ablate smollm2-135m scores --tasks passkey,copying --budget 20min --out ablation
  tl-posheads ablate ./my-model scores --tasks needle,longppl --length 4096 --mode mean --out abl

tasks: {", ".join(TASKS)}
  each has a short-context control beside it
controls: {", ".join(CONTROLS)}
  heads that are ablated instead of the top ones; p is the top heads' rank among their draws

what comes out, in the folder --out:
  verdict.txt  a sentence per task
  effects.csv  a row per task, variant, share of heads and control; effects.png shows it
  study.json, *.parquet   every answer, for AblationStudy.load("FOLDER") in Python
  run.json     what was asked for
"""


def add_command(commands: Any) -> None:
    """Add ``ablate`` to the parser's commands."""
    parser = commands.add_parser(
        "ablate", help="ablate the top heads, and others beside them", description=_ABOUT,
        epilog=_EXAMPLES,
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help="the model that was scored, as score takes it")
    add("scores", metavar="SCORES", type=Path, help="a folder that score wrote")
    add("--out", metavar="DIR", type=Path, required=True, help="folder for the results")
    add("--tasks", metavar="LIST", type=names(TASKS), default=["passkey", "copying"],
        help="comma-separated, see below (passkey,copying)")  # fmt: skip
    add("--length", metavar="N", type=whole(16), default=1024, help="tokens a prompt (1024)")
    add("--prompts", metavar="N", type=whole(1), default=20, help="prompts a task, at most (20)")
    add("--fractions", metavar="LIST", type=shares, default=[0.02, 0.05],
        help="shares of the heads to ablate, ascending (0.02,0.05)")  # fmt: skip
    add("--controls", metavar="LIST", type=names(CONTROLS), default=list(CONTROLS),
        help="comma-separated, see below (all)")  # fmt: skip
    add("--draws", metavar="N", type=whole(12), default=32,
        help="draws of each random control, at most (32)")  # fmt: skip
    add("--mode", choices=("zero", "mean", "resample"), default="zero",
        help="what replaces a head's output; the mean and the other texts are the corpus's (zero)")  # fmt: skip
    add("--budget", metavar="TIME", help="like 60min or 2h: prompts and draws are chosen to fit")
    add("--corpus", metavar="NAME-OR-PATH", default="python-docs",
        help="text between the needles, as score takes it (python-docs)")  # fmt: skip
    add_model_options(add)
    add("--overwrite", action="store_true", help="replace another run's results in DIR")
    parser.set_defaults(action=_ablate)


def _request(args: argparse.Namespace) -> dict[str, Any]:
    from .corpora import corpus_provenance

    label = args.scores / "scores.json"
    if not label.is_file():
        raise PosheadsError(
            f"{args.scores} holds no scores; give a folder that tl-posheads score wrote"
        )
    corpus = corpus_provenance(args.corpus)
    wanted = (
        "model", "cls", "dtype", "tasks", "length", "prompts", "fractions", "controls", "draws",
        "mode", "budget", "seed",
    )  # fmt: skip
    return {
        "command": "ablate",
        **{name: getattr(args, name) for name in wanted},
        "model_files": local_files(args.model),
        "scores_sha256": hashlib.sha256(label.read_bytes()).hexdigest(),
        "corpus": corpus["name"],
        "corpus_sha256": corpus["sha256"],
    }


def _tasks(args: argparse.Namespace) -> list[Any]:
    from .tasks import TASKS as classes

    out = []
    for name in args.tasks:
        options = {"n": args.prompts, "seed": args.seed, "corpus": args.corpus}
        if name == "needle":
            out.append(classes[name](lengths=(args.length // 2, args.length), **options))
        else:
            out.append(classes[name](length=args.length, **options))
    return out


def _ablate(args: argparse.Namespace) -> None:
    from .results import HeadScores
    from .study.budget import seconds_of

    seconds_of(args.budget)
    out: Path = args.out
    request = _request(args)
    state = rundir.look(out, request, overwrite=args.overwrite)
    if state == "finished":
        from .study.results import AblationStudy

        print(f"{out} already holds this run, finished; --overwrite computes it again.\n")
        _print(AblationStudy.load(out), out)
        return
    scores, tasks = HeadScores.load(args.scores), _tasks(args)

    from .corpora import load_corpus
    from .models import load_model
    from .study.run import ablation_study

    model = load_model(args.model, cls=args.cls, device=args.device, dtype=args.dtype)
    reference = None
    if args.mode != "zero":
        reference = load_corpus(
            args.corpus, model, n_docs=4, length=args.length, seed=args.seed + 1
        )
    if state == "resume":
        print(f"Going on with the run that was stopped in {out}.", file=sys.stderr)
    with resumable(out, args.overwrite), rundir.running(out, request, state) as checkpoint:
        study = ablation_study(
            model, scores, tasks=tasks, fractions=args.fractions, controls=args.controls,
            n_control=args.draws, mode=args.mode, reference=reference, budget=args.budget,
            seed=args.seed, checkpoint=checkpoint, provenance={"request": request},
        )  # fmt: skip
        _write(study, out)
    _print(study, out)


def _write(study: AblationStudy, out: Path) -> None:
    from .pictures import png

    study.save(out)
    rundir.write_whole(out / rundir.EFFECTS, study.to_pandas().to_csv(index=False))
    rundir.write_whole(out / rundir.VERDICT, "\n".join(study.verdict().values()) + "\n")
    rundir.write_bytes(out / rundir.PICTURE, png(study.plot()))


def _print(study: AblationStudy, out: Path) -> None:
    print("\n".join(table_lines(study)), end="\n\n")
    for sentence in study.verdict().values():
        print(sentence)
    written = [out / name for name in (rundir.VERDICT, rundir.EFFECTS, rundir.PICTURE)]
    print(f"\nfiles: {', '.join(str(path) for path in written)}")


def table_lines(study: AblationStudy) -> list[str]:
    """The study's effects as lines of text: a row per task, variant, share and control."""
    table = study.to_pandas()
    columns = [
        "task", "variant", "fraction", "n_heads", "unablated", "effect", "control",
        "control_effect", "n_draws", "p", "p_adjusted", "p_screen", "screen_rho",
    ]  # fmt: skip
    forms = {"fraction": "{:.3g}", "p": "{:.3f}", "p_adjusted": "{:.3f}", "p_screen": "{:.4f}"}
    shown = table[columns].apply(
        lambda column: [
            value if isinstance(value, str | int)
            else "-" if value != value
            else forms.get(column.name, "{:+.2f}").format(value)
            for value in column.tolist()
        ]
    )  # fmt: skip
    lines = shown.to_string(index=False).splitlines()
    n = sorted(set(table["n_prompts"]))
    counts = str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}"
    about = "Change of the answers' log-probability, nats a token, and its rank among the controls'"
    note = (
        "p_screen ranks estimates from attribution patching; screen_rho is their rank correlation "
        "with the ablations done."
    )
    return [f"{about} ({counts} prompts a task):", *lines, note]

"""``tl-posheads ablate``: the study of a finished scoring run, from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_posheads.cli.command import Run, new_command
from tl_posheads.cli.options import add_model_options, names, shares, whole

if TYPE_CHECKING:
    from tl_posheads.studies.ablation.results import AblationStudy

# As tasks.TASKS and controls.CONTROLS have them; named here so that --help needs no torch.
TASKS = (
    "passkey",
    "needle",
    "key-value",
    "multi-key",
    "variable-tracking",
    "copying",
    "perplexity",
    "longppl",
)
CONTROLS = ("random", "layer_matched", "lowest", "norm_matched")

_TEXTS = dict(
    help="ablate the top heads and control heads",
    description="""\
Ablate the top heads of SCORES in MODEL, other heads for comparison, and retrieval heads as a
positive control, and write what each does to long-context tasks to the folder --out. Each task is
first made as hard as the model can still do. The same command on the same folder resumes a
stopped run, and shows a finished one.
""",
    epilog=f"""\
examples:
  tl-posheads ablate smollm2-135m scores --tasks passkey,multi-key --budget 20min --out ablation
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
""",
)


def add_command(commands: Any) -> None:
    """Add ``ablate`` to the parser's commands."""
    add = new_command(commands, "ablate", _ablate, _lines, "AblationStudy", _TEXTS)
    add("model", metavar="MODEL", help="the model that was scored, as score takes it")
    add("scores", metavar="SCORES", type=Path, help="a folder that score wrote")
    add(
        "--tasks",
        metavar="LIST",
        type=names(TASKS),
        default=["passkey", "multi-key"],
        help="comma-separated, see below (passkey,multi-key)",
    )
    add(
        "--length",
        metavar="N",
        type=whole(16),
        default=1024,
        help="tokens per prompt, at most (1024)",
    )
    add("--prompts", metavar="N", type=whole(1), default=20, help="prompts per task, at most (20)")
    _add_sets(add)
    add("--budget", metavar="TIME", help="like 60min or 2h: prompts and draws are chosen to fit")
    add(
        "--corpus",
        metavar="NAME-OR-PATH",
        default="python-docs",
        help="text between the needles, as score takes it (python-docs)",
    )
    add_model_options(add)


def _add_sets(add: Callable[..., Any]) -> None:
    """Which heads are ablated, and how."""
    add(
        "--fractions",
        metavar="LIST",
        type=shares,
        default=[0.02, 0.05],
        help="shares of the heads to ablate, ascending (0.02,0.05)",
    )
    add(
        "--controls",
        metavar="LIST",
        type=names(CONTROLS),
        default=list(CONTROLS),
        help="comma-separated, see below (all)",
    )
    add(
        "--draws",
        metavar="N",
        type=whole(12),
        default=32,
        help="draws of each random control, at most; 12 or more (32)",
    )
    add(
        "--mode",
        choices=("zero", "mean", "resample"),
        default="zero",
        help="what replaces a head's output; mean and resample take it from the corpus (zero)",
    )
    add(
        "--on",
        choices=("z", "pattern"),
        default="z",
        help="ablate the heads' outputs, or mask their patterns as the paper does (z)",
    )
    add(
        "--as-they-are",
        dest="calibrated",
        action="store_false",
        help="use the tasks as they are, without calibrating their difficulty",
    )
    add(
        "--needles",
        metavar="N",
        type=whole(0),
        default=12,
        help="questions used to find the retrieval heads; 0 skips the positive control (12)",
    )


def _tasks(args: argparse.Namespace) -> list[Any]:
    from tl_posheads.tasks import TASKS as classes

    options = {"n": args.prompts, "seed": args.seed, "corpus": args.corpus}
    lengths = {"needle": {"lengths": (args.length // 2, args.length)}}
    one = {"length": args.length}
    return [classes[name](**lengths.get(name, one), **options) for name in args.tasks]


def _ablate(run: Run) -> AblationStudy:
    from tl_posheads import HeadScores, ablation_study, load_corpus
    from tl_posheads.studies.ablation.budget import seconds_of

    args, reference = run.args, None
    seconds_of(args.budget)
    scores, tasks, model = HeadScores.load(args.scores), _tasks(args), run.model()
    if args.mode != "zero":
        reference = load_corpus(
            args.corpus, model, n_docs=4, length=args.length, seed=args.seed + 1
        )
    with run.started() as checkpoint:
        options = run.options(
            "fractions", "controls", "mode", "on", "calibrated", "needles", "budget", "seed"
        )
        options.update(tasks=tasks, n_control=args.draws, reference=reference)
        study = ablation_study(model, scores, checkpoint=checkpoint, **options)
        verdict = "\n".join(study.verdict().values()) + "\n"
        tables = {"effects.csv": study.to_pandas(), "verdict.txt": verdict}
        run.save(study, {**tables, "effects.png": study.plot()})
    return study


def _lines(study: AblationStudy) -> list[str]:
    return [*table_lines(study), "", *study.verdict().values()]


def table_lines(study: AblationStudy) -> list[str]:
    """The study's effects as lines of text: a row per task, variant, share and control."""
    table = study.to_pandas()
    columns = [
        "task",
        "variant",
        "fraction",
        "n_heads",
        "unablated",
        "effect",
        "control",
        "control_effect",
        "n_draws",
        "p",
        "p_adjusted",
        "smallest_detectable",
    ]
    forms = {"fraction": "{:.3g}", "p": "{:.3f}", "p_adjusted": "{:.3f}"}
    shown = table[columns].apply(
        lambda column: [
            value
            if isinstance(value, str | int)
            else "-"
            if value != value
            else forms.get(column.name, "{:+.2f}").format(value)
            for value in column.tolist()
        ]
    )
    lines = shown.to_string(index=False).splitlines()
    n = sorted(set(table["n_prompts"]))
    counts = str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}"
    about = "Change in the answers' log-probability (nats per token), its rank among the controls"
    return [f"{about} ({counts} prompts per task):", *lines]

"""``tl-posheads profile``: the positional score beside other measures of every head."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import rundir
from .cli_options import add_model_options, local_files, names, resumable, whole
from .errors import PosheadsError

if TYPE_CHECKING:
    from .profile.results import HeadProfile
    from .results import HeadScores

# As profile.settings.MEASURES has them; named here so that --help needs no torch.
MEASURES = (
    "retrieval", "induction", "previous_token", "sink", "distance", "long_context", "massive",
    "utility",
)  # fmt: skip
PICTURE = "profile.png"
FILES = ("profile.json", "profile.parquet", PICTURE)  # beside rundir.TABLE and rundir.RUN_FILE

_ABOUT = """\
Measure every head of MODEL in other ways than the positional score, on the same texts, and write
how these go together to the folder --out. The same command on the same folder shows a finished
run; one that was stopped goes on where its scores are done.
"""

_EXAMPLES = f"""\
examples:
  tl-posheads profile smollm2-135m --docs 2 --length 512 --out profile
  tl-posheads profile ./my-model --scores scores --measures retrieval,sink,induction --out profile

measures: {", ".join(MEASURES)}

what comes out, in the folder --out:
  table.csv      one row per head, a column per measure
  profile.png    rank correlations between the measures
  profile.json, profile.parquet   the profile, for HeadProfile.load("FOLDER") in Python
  run.json       what was asked for
"""


def add_command(commands: Any) -> None:
    """Add ``profile`` to the parser's commands."""
    parser = commands.add_parser(
        "profile", help="positional heads beside retrieval, induction and other heads",
        description=_ABOUT, epilog=_EXAMPLES,
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model, as score takes it")
    add("--out", metavar="DIR", type=Path, required=True, help="folder for the results")
    add("--corpus", metavar="NAME-OR-PATH", default="python-docs",
        help="texts, as score takes them (python-docs)")  # fmt: skip
    add("--length", metavar="N", type=whole(2), default=512, help="tokens a document (512)")
    add("--docs", metavar="N", type=whole(1), default=2, help="number of documents (2)")
    add("--measures", metavar="LIST", type=names(MEASURES), default=list(MEASURES),
        help="comma-separated, see below (all)")  # fmt: skip
    add("--needles", metavar="N", type=whole(0), default=6,
        help="questions whose answers the model has to find, for retrieval (6)")  # fmt: skip
    add("--scores", metavar="DIR", type=Path,
        help="a folder that score wrote, instead of scoring these texts")  # fmt: skip
    add("--scale", choices=("none", "attention"), default="none",
        help="contributions as they are, or times the factor on the model's scores; with --scores as these have it (none)")  # fmt: skip
    add_model_options(add)
    add("--top", metavar="K", type=whole(1), default=20,
        help="highest heads of each measure whose overlap is printed (20)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace another run's results in DIR")
    parser.set_defaults(action=_profile)


def _request(args: argparse.Namespace) -> dict[str, Any]:
    from .corpora import corpus_provenance

    digest = None
    if args.scores is not None:
        label = args.scores / "scores.json"
        if not label.is_file():
            raise PosheadsError(
                f"{args.scores} holds no scores; give a folder that tl-posheads score wrote"
            )
        digest = hashlib.sha256(label.read_bytes()).hexdigest()
    corpus = corpus_provenance(args.corpus)
    wanted = ("model", "cls", "dtype", "length", "docs", "measures", "needles", "scale", "seed")
    return {
        "command": "profile",
        **{name: getattr(args, name) for name in wanted},
        "model_files": local_files(args.model),
        "scores_sha256": digest,
        "corpus": corpus["name"],
        "corpus_sha256": corpus["sha256"],
    }


def _profile(args: argparse.Namespace) -> None:
    out: Path = args.out
    request = _request(args)
    state = rundir.look(out, request, overwrite=args.overwrite)
    if state == "finished":
        from .profile.results import HeadProfile

        print(f"{out} already holds this run, finished; --overwrite computes it again.\n")
        _print(HeadProfile.load(out), out, args.top)
        return

    from .corpora import load_corpus
    from .models import load_model
    from .profile.driver import profile_heads

    model = load_model(args.model, cls=args.cls, device=args.device, dtype=args.dtype)
    tokens = load_corpus(args.corpus, model, n_docs=args.docs, length=args.length, seed=args.seed)
    if state == "resume":
        print(f"Going on with the run that was stopped in {out}.", file=sys.stderr)
    with resumable(out, args.overwrite), rundir.running(out, request, state) as checkpoint:
        profile = profile_heads(
            model, tokens, scores=_scores(args, model, tokens, checkpoint), needles=args.needles,
            measures=args.measures, scale=args.scale, seed=args.seed,
        )  # fmt: skip
        profile.provenance["request"] = request
        _write(profile, out)
    _print(profile, out, args.top)


def _scores(args: argparse.Namespace, model: Any, tokens: Any, checkpoint: Path) -> HeadScores:
    from .results import HeadScores
    from .scoring import score_heads

    if args.scores is not None:
        return HeadScores.load(args.scores)
    return score_heads(model, tokens, scale=args.scale, seed=args.seed, checkpoint=checkpoint)


def _write(profile: HeadProfile, out: Path) -> None:
    from .pictures import png

    profile.save(out)
    rundir.write_whole(out / rundir.TABLE, profile.to_pandas().to_csv(index=False))
    try:
        figure = profile.plot()
    except PosheadsError as problem:  # nothing to draw; the table is there all the same
        print(f"no picture: {problem}", file=sys.stderr)
        return
    rundir.write_bytes(out / PICTURE, png(figure))


def _print(profile: HeadProfile, out: Path, top: int) -> None:
    print("\n".join(table_lines(profile, top)))
    written = [out / name for name in (rundir.TABLE, PICTURE, rundir.RUN_FILE)]
    print(f"\nfiles: {', '.join(str(path) for path in written if path.exists())}")


def table_lines(profile: HeadProfile, top: int) -> list[str]:
    """Every measure's correlation and overlap with the positional score, as lines of text.

    ``-`` stands for what isn't known; the reasons follow.
    """
    overlap = profile.overlap(top)
    everywhere = profile.correlation()["positional"]
    within = profile.correlation(within_layers=True)["positional"]
    needles = profile.provenance.get("needles") or {}
    cells = [["measure", "rho", "rho_in_layer", "overlap", "of", "chance", "p_adjusted"]]
    for row in overlap.to_dict("records"):
        name = str(row["measure"])
        known = row["overlap"] == row["overlap"]
        cells.append([
            name, _number(everywhere[name], "+.3f"), _number(within[name], "+.3f"),
            _number(row["overlap"], ".0f"), str(row["n_top"]) if known else "-",
            _number(row["chance"], ".1f"), _number(row["p_adjusted"], ".2g"),
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths))
        )
        for row in cells
    ]
    out = [
        f"Kin of the positional score over {len(profile.table)} heads, and overlap of the {top} highest:",
        *lines,
    ]
    if needles.get("n_prompts"):
        out.append(
            f"needles: {needles['n_answered']} of {needles['n_prompts']} answered by the model"
        )
    missing = profile.provenance.get("missing", {})
    return out + [f"{name} has gaps: {why}" for name, why in missing.items()]


def _number(value: float, form: str) -> str:
    return "-" if value != value else format(value, form)

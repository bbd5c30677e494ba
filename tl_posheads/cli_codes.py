"""``tl-posheads codes``: positional scores under other position codes than RoPE, too."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from . import rundir
from .cli_options import add_model_options, add_scale, local_files, resumable, whole

if TYPE_CHECKING:
    from .codes.results import CodeScores

_ABOUT = """\
Score the heads of MODEL, with RoPE or with learned positions, by planes of their query-key space
that are ordered by how fast they change with distance. With RoPE these are the rotary pairs, and
the scores are those of `score --pairs all`. The same command on the same folder shows a finished run.
"""

_EXAMPLES = """\
examples:
  tl-posheads codes gpt2 --corpus essays/ --docs 16 --length 512 --out gpt2-codes
  tl-posheads codes smollm2-135m --length 128 --out codes

what comes out, in the folder --out:
  table.csv     a row per head: rho, its interval over documents, half-lives of its planes
  codes.*       everything, for CodeScores.load("FOLDER") in Python
  run.json      what was asked for
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``codes`` to the parser's commands."""
    parser = commands.add_parser(
        "codes", help="score heads under learned positions, too", description=_ABOUT,
        epilog=_EXAMPLES,
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help="as score takes it")
    add("--out", metavar="DIR", type=Path, required=True, help="folder for the results")
    add("--corpus", metavar="NAME-OR-PATH", default="python-docs", help="as score takes it")
    add("--length", metavar="N", type=whole(2), default=256, help="tokens a document (256)")
    add("--docs", metavar="N", type=whole(1), default=8,
        help="number of documents, over which intervals and p-values are (8)")  # fmt: skip
    add("--skip-first", metavar="N", type=whole(0), default=0,
        help="leave out the first N positions (0)")  # fmt: skip
    add_scale(add)
    add_model_options(add)
    add("--top", metavar="N", type=whole(1), default=20, help="heads to print (20)")
    add("--overwrite", action="store_true", help="replace another run's results in DIR")
    parser.set_defaults(action=_codes)


def _codes(args: argparse.Namespace) -> None:
    from .codes.results import CodeScores
    from .codes.scoring import score_any_code
    from .corpora import corpus_provenance, load_corpus
    from .models import load_model

    corpus, out = corpus_provenance(args.corpus), args.out
    request = {
        "command": "codes", "model": args.model, "model_files": local_files(args.model),
        "cls": args.cls, "dtype": args.dtype, "corpus": corpus["name"],
        "corpus_sha256": corpus["sha256"], "length": args.length, "docs": args.docs,
        "skip_first": args.skip_first, "scale": args.scale, "seed": args.seed,
    }  # fmt: skip
    state = rundir.look(out, request, overwrite=args.overwrite)
    if state == "finished":
        print(f"{out} already holds this run, finished; --overwrite computes it again.\n")
        _print(CodeScores.load(out), out, args.top)
        return
    model = load_model(args.model, cls=args.cls, device=args.device, dtype=args.dtype)
    tokens = load_corpus(args.corpus, model, n_docs=args.docs, length=args.length, seed=args.seed)
    with resumable(out, args.overwrite), rundir.running(out, request, state):
        scores = score_any_code(model, tokens, skip_first=args.skip_first, scale=args.scale)
        scores.provenance["request"] = request
        scores.save(out)
        rundir.write_whole(out / rundir.TABLE, scores.to_pandas().to_csv(index=False))
    _print(scores, out, args.top)


def _print(scores: CodeScores, out: Path, top: int) -> None:
    columns = ["layer", "head", "rho", "ci_low", "ci_high", "p_adjusted", "n_planes",
               "shortest_half_life", "longest_half_life", "explained_change"]  # fmt: skip
    table = scores.to_pandas()
    print(f"The highest of {len(table)} scores; half-lives in tokens")
    print(table.nlargest(top, "rho")[columns].round(3).to_string(index=False))
    print(f"\nfiles: {out / rundir.TABLE}")

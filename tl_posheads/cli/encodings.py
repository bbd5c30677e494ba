"""``tl-posheads codes``: positional scores under other position codes than RoPE, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tl_posheads.cli import run_folder
from tl_posheads.cli.command import Run, new_command
from tl_posheads.cli.options import add_model_options, add_scale, add_texts, whole

if TYPE_CHECKING:
    from tl_posheads.studies.encodings.results import CodeScores

_TEXTS = dict(
    help="score heads under learned positions, too",
    description="""\
Score the heads of MODEL, with RoPE or with learned positions, by planes of their query-key space
that are ordered by how fast they change with distance. With RoPE these are the rotary pairs, and
the scores are those of `score --pairs all`. The same command on the same folder shows a finished run.
""",
    epilog="""\
examples:
  tl-posheads codes gpt2 --corpus essays/ --docs 16 --length 512 --out gpt2-codes
  tl-posheads codes smollm2-135m --length 128 --out codes

what comes out, in the folder --out:
  table.csv     a row per head: rho, its interval over documents, half-lives of its planes
  codes.*       everything, for CodeScores.load("FOLDER") in Python
  run.json      what was asked for
""",
)


def add_command(commands: Any) -> None:
    """Add ``codes`` to the parser's commands."""
    add = new_command(commands, "codes", _codes, _lines, "CodeScores", (run_folder.TABLE,), _TEXTS)
    add_texts(add, docs=8, length=256)
    add(
        "--skip-first",
        metavar="N",
        type=whole(0),
        default=0,
        help="leave out the first N positions (0)",
    )
    add_scale(add)
    add_model_options(add)
    add("--top", metavar="N", type=whole(1), default=20, help="heads to print (20)")


def _codes(run: Run) -> CodeScores:
    from tl_posheads.studies.encodings.scoring import score_any_code

    args, model = run.args, run.model()
    tokens = run.texts(model)
    with run.started(resumes=False) as folder:
        scores = score_any_code(model, tokens, skip_first=args.skip_first, scale=args.scale)
        run.save(scores, folder, {run_folder.TABLE: scores.to_pandas()})
    return scores


def _lines(scores: CodeScores, top: int) -> list[str]:
    columns = [
        "layer",
        "head",
        "rho",
        "ci_low",
        "ci_high",
        "p_adjusted",
        "n_planes",
        "shortest_half_life",
        "longest_half_life",
        "explained_change",
    ]
    table = scores.to_pandas()
    best = table.nlargest(top, "rho")[columns].round(3)
    about = f"The highest of {len(table)} scores; half-lives in tokens"
    return [about, best.to_string(index=False)]

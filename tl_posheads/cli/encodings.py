"""``tl-posheads encodings``: positional scores under RoPE or learned positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tl_posheads.cli.command import Run, new_command
from tl_posheads.cli.options import add_model_options, add_scale, add_skip_first, add_texts, add_top

if TYPE_CHECKING:
    from tl_posheads.studies.encodings.results import EncodingScores

_TEXTS = dict(
    help="score heads under RoPE or learned positions",
    description="""\
Score the heads of MODEL, with RoPE or with learned positions, by planes of their query-key space
that are ordered by how fast they change with distance. With RoPE these are the rotary pairs, and
the scores are those of `score --qk-pairs all`. The same command on the same folder resumes a
stopped run, and shows a finished one.
""",
    epilog="""\
examples:
  tl-posheads encodings gpt2 --corpus essays/ --docs 16 --length 512 --out gpt2-encodings
  tl-posheads encodings smollm2-135m --length 128 --out encodings

what comes out, in the folder --out:
  table.csv     a row per head: rho, its interval over documents, half-lives of its planes
  encodings.*   everything, for EncodingScores.load("FOLDER") in Python
  run.json      what was asked for
""",
)


def add_command(commands: Any) -> None:
    """Add ``encodings`` to the parser's commands."""
    add = new_command(commands, "encodings", _encodings, _lines, "EncodingScores", _TEXTS)
    add_texts(add, docs=8, length=256)
    add_skip_first(add)
    add_scale(add)
    add_model_options(add)
    add_top(add)


def _encodings(run: Run) -> EncodingScores:
    from tl_posheads.studies.encodings.scoring import score_encoding

    model = run.model()
    tokens = run.texts(model)
    with run.started() as checkpoint:
        options = run.options("skip_first", "scale")
        scores = score_encoding(model, tokens, checkpoint=checkpoint, **options)
        run.save(scores, {"table.csv": scores.to_pandas()})
    return scores


def _lines(scores: EncodingScores, top: int) -> list[str]:
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

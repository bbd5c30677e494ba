"""``tl-posheads unseen``: why dominant dimensions change past the training length."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from tl_posheads.cli.command import Run, new_command
from tl_posheads.cli.options import add_model_options, add_scale, add_texts, whole
from tl_posheads.errors import PosheadsError

if TYPE_CHECKING:
    from tl_posheads.studies.unseen.results import UnseenAngles

LIVE = ("pairs", "joint", "none")
TABLES = ("summary", "by_pair", "losses", "pairs", "change")
PICTURE = "unseen.png"

_TEXTS = dict(
    help="ask whether unseen angles make the change past the training length",
    description="""\
Read texts longer than MODEL was trained on, hold the angles of rotary pairs at what training saw,
and write how much of the change in dominant dimension and loss goes with them to the folder --out.
""",
    epilog=f"""\
examples:
  tl-posheads unseen ./small-llama --trained 256 --corpus held-out.txt --out unseen
  tl-posheads unseen smollm2-135m --trained 8192 --factor 2 --docs 4 --live joint --out unseen

A pair with a wavelength above the training length has not turned once in training: it is unseen.

what comes out, in the folder --out:
  summary.csv  change, and the parts of unseen and of other pairs, with 95 % intervals
  by_pair.csv, losses.csv, pairs.csv, change.csv   pair by pair, loss, wavelengths, head by head
  {PICTURE}   curves bare and clamped, each pair's part, and the loss
  unseen.*     everything, for UnseenAngles.load("FOLDER") in Python
  run.json     what was asked for
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
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 1")
    return value


def add_command(commands: Any) -> None:
    """Add ``unseen`` to the parser's commands."""
    files = ("summary.csv", "by_pair.csv", "losses.csv", PICTURE)
    add = new_command(commands, "unseen", _unseen, sentences, "UnseenAngles", files, _TEXTS)
    add_texts(add, docs=8)
    add(
        "--trained",
        metavar="N",
        type=whole(2),
        help="tokens of a training text (as the model's configuration says)",
    )
    add(
        "--factor",
        metavar="X",
        type=above_one,
        default=4.0,
        help="texts of so many times the training length (4)",
    )
    add("--heads", metavar="LIST", type=heads, help="layer.head, like 0.1,3.2 (every head)")
    add("--queries", metavar="N", type=whole(1), default=256, help="queries of a text (256)")
    add(
        "--live",
        choices=LIVE,
        default="pairs",
        help="clamp as the model reads: sets of pairs and each unseen pair, sets alone, or nothing (pairs)",
    )
    add_scale(add)
    add_model_options(add)


def _unseen(run: Run) -> UnseenAngles:
    from tl_posheads.extrapolation.base import trained_of
    from tl_posheads.extrapolation.methods.unchanged import Unchanged
    from tl_posheads.hooks.model import require_rotary
    from tl_posheads.studies.unseen.measure import unseen_angles

    args, model = run.args, run.model()
    require_rotary(model)
    with Unchanged()(model):
        tokens = run.texts(model, length=int(args.factor * trained_of(model, args.trained)))
    with run.started(resumes=False) as folder:
        options = run.options("trained", "heads", "factor", "scale", "live", "seed")
        found = unseen_angles(model, tokens, n_queries=args.queries, **options)
        tables = {f"{name}.csv": getattr(found, name)() for name in TABLES}
        run.save(found, folder, {**tables, PICTURE: found.plot()})
    return found


def sentences(found: UnseenAngles) -> list[str]:
    """What was found, in words: the change, whose it is, and the loss."""
    table = found.summary()
    if table.empty:
        raise PosheadsError("the texts reach no distance past the training length")
    last = table.iloc[-1]
    span = (table["start"] == last["start"]) & (table["end"] == last["end"])
    rows = table[span].set_index("quantity")

    def said(quantity: str, form: str = "{:+.2f}") -> str:
        value, low, high = (rows.loc[quantity, name] for name in ("value", "ci_low", "ci_high"))
        known = low == low
        shown = [form.format(x) for x in (value, low, high)]
        return f"{shown[0]} ({shown[1]} to {shown[2]})" if known else shown[0]

    n_unseen = sorted(set(found.unseen.sum(1).tolist()))
    out = [
        f"{len(found.heads)} heads, {found.bare.shape[0]} texts, trained on {found.trained} tokens; "
        f"unseen pairs of a head: {', '.join(map(str, n_unseen))}.",
        f"Change of the mean dominant dimension at distances {last['start']} to {last['end']}: "
        f"{said('change')}.",
        f"Of it, unseen pairs: {said('change_from_unseen')}; other pairs: "
        f"{said('change_from_seen')}; both together on top: {said('interaction')}; what stays with "
        f"all angles held: {said('other')}.",
        f"Share of each head's own change: unseen pairs {said('head_share', '{:.2f}')}, other "
        f"pairs {said('head_share_seen', '{:.2f}')}.",
    ]
    losses = found.losses()
    past = losses[losses["start"] == losses["start"].max()].set_index("condition")
    if "unseen" in past.index:
        names = {
            "bare": "bare",
            "unseen": "unseen pairs clamped",
            "seen": "other pairs clamped",
            "all": "all clamped",
            "hidden": "far keys hidden",
        }
        told = ", ".join(f"{text} {past.loc[name, 'loss']:.2f}" for name, text in names.items())
        out.append(f"Loss from position {past['start'].iloc[0]} on, nats a token: {told}.")
    return out

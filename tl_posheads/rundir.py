"""The folder that a ``tl-posheads`` run fills: whose it is, what may be removed, what goes on.

``run.json`` is the folder's label. It is there before anything is computed, so that a run that was
stopped can be told from another run's results, and nothing is removed from a folder without it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from .errors import PosheadsError
from .files import write_bytes

CHECKPOINT = "checkpoint"
RUN_FILE = "run.json"
TABLE = "table.csv"
PAGE = "index.html"
CURVE, MAPS = "curve", "maps"
EFFECTS, VERDICT, PICTURE = "effects.csv", "verdict.txt", "effects.png"
LAGS, TRAINING = "lags.csv", "training.png"
# Everything that a run writes, the label last. --overwrite touches these names and no others.
MADE_BY_US = (
    "scores.json", "scores.safetensors", "table.parquet", CURVE, MAPS,
    "study.json", "conditions.parquet", "cells.parquet", "screen.parquet", "screen_tests.parquet",
    EFFECTS, VERDICT, PICTURE,
    "emergence.json", "emergence.safetensors", "emergence.parquet", LAGS, TRAINING,
    "codes.json", "codes.safetensors", "profile.json", "profile.parquet", "profile.png",
    "unseen.json", "unseen.safetensors", "loss.parquet", "unseen.png", "summary.csv",
    "by_pair.csv", "losses.csv", "pairs.csv", "change.csv", TABLE, PAGE, CHECKPOINT, RUN_FILE,
)  # fmt: skip
_SET_ASIDE = ".replaced"
_PROGRAM = "tl-posheads"

State = Literal["new", "resume", "finished", "replace"]


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` so that a reader finds the old file or the new one, never a half.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(Path(folder) / "a.txt", "whole")
    ...     print((Path(folder) / "a.txt").read_text())
    whole
    """
    # A path from the command line may hold bytes that are no text; they are shown escaped.
    write_bytes(Path(path), text.encode("utf-8", "backslashreplace"))


def read_run(out: Path) -> dict[str, Any] | None:
    """What ``out/run.json`` says: ``{"program", "finished", "request"}``; None if there is none.

    Raises:
        PosheadsError: the file can't be read, or another program wrote it.
    """
    try:
        run = json.loads((out / RUN_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as problem:
        raise PosheadsError(
            f"{out / RUN_FILE} can't be read as the label of a run ({problem}); "
            "choose another --out"
        ) from problem
    is_ours = isinstance(run, dict) and run.get("program") == _PROGRAM
    if not (is_ours and isinstance(run.get("request"), dict)):
        raise PosheadsError(
            f"{out / RUN_FILE} was not written by tl-posheads; choose another --out"
        )
    return dict(run)


def look(out: Path, request: dict[str, Any], *, overwrite: bool = False) -> State:
    """Decide what a run with ``request`` may do in ``out``; changes nothing.

    Raises:
        PosheadsError: ``out`` is no folder, holds files that aren't ours, or another run's results.
    """
    if out.exists() and not out.is_dir():
        raise PosheadsError(f"--out {out} is a file; give a folder, new or empty")
    if not out.exists() or not any(out.iterdir()):
        return "new"
    run = read_run(out)
    if run is None and (out / _SET_ASIDE / RUN_FILE).is_file():
        # Killed between setting the old run aside and writing the new label.
        if overwrite:
            return "replace"
        raise PosheadsError(f"an --overwrite of {out} was cut off; pass --overwrite once more")
    if run is None:
        raise PosheadsError(
            f"--out {out} is not empty and holds no {RUN_FILE}, so its files are not ours to touch;"
            " choose another --out"
        )
    if overwrite:
        return "replace"
    old = run["request"]
    differs = [key for key in {**request, **old} if old.get(key) != request.get(key)]
    if differs:
        raise PosheadsError(
            f"--out {out} holds another run's results (differs in: {', '.join(differs)});"
            " choose another --out or pass --overwrite"
        )
    return "finished" if run.get("finished") else "resume"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _move_ours(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    # MADE_BY_US ends with the label: cut off half-way, the folder is still known as ours.
    for name in MADE_BY_US:
        if os.path.lexists(source / name):
            _remove(target / name)
            os.replace(source / name, target / name)


def _label(out: Path, request: dict[str, Any], *, finished: bool) -> None:
    run = {"program": _PROGRAM, "finished": finished, "request": request}
    write_whole(out / RUN_FILE, json.dumps(run, indent=2) + "\n")


@contextmanager
def running(out: Path, request: dict[str, Any], state: State) -> Iterator[Path]:
    """Label ``out``, run the body, mark the folder finished.

    The body gets the checkpoint folder's path. What ``--overwrite`` replaces is set aside until the
    new run is finished, and comes back if the new run fails. A run that is interrupted stays, to be
    gone on with; a new one that failed before it had computed anything leaves nothing behind.
    """
    aside, checkpoint, existed = out / _SET_ASIDE, out / CHECKPOINT, out.exists()
    out.mkdir(parents=True, exist_ok=True)
    if state == "replace":
        if (aside / RUN_FILE).exists():  # what --overwrite replaced before, still unfinished
            for name in MADE_BY_US:
                _remove(out / name)
        else:
            _move_ours(out, aside)
    if state != "resume":
        _label(out, request, finished=False)
    try:
        yield checkpoint
        _label(out, request, finished=True)
    except Exception:
        computed = checkpoint.is_dir() and any(checkpoint.iterdir())
        if state == "replace":
            for name in MADE_BY_US:
                _remove(out / name)
            _move_ours(aside, out)
            aside.rmdir()
        elif state == "new" and not computed:
            for name in MADE_BY_US:
                _remove(out / name)
            if not existed:
                out.rmdir()
        raise
    _remove(checkpoint)
    _remove(aside)

"""The folder that a ``tl-posheads`` run writes to: who owns it, who may write there, resuming.

A run writes to ``.unfinished`` in its folder and is moved out of it when finished. Until then, old
results stay. ``run.json`` labels both. It is written before anything is computed, so that a stopped
run can be told from another run's, and nothing is removed without it. That of a finished run lists
the files that the run wrote: --overwrite removes these.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from tl_posheads.errors import PosheadsError
from tl_posheads.io.files import is_leftover, read_bytes, write_text

CHECKPOINT, RUN_FILE = "checkpoint", "run.json"
_UNFINISHED, _LOCK = ".unfinished", ".tl-posheads.lock"
_PROGRAM = "tl-posheads"

State = Literal["new", "resume", "finished"]


def read_run(out: Path) -> dict[str, Any] | None:
    """What ``out/run.json`` says: ``{"program", "finished", "request"}``, of a finished run
    ``"files"``, too; None if there is none.

    Raises:
        PosheadsError: the file can't be read, or another program wrote it.
    """
    try:
        run = json.loads(read_bytes(out / RUN_FILE, largest=2**26))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as problem:
        raise PosheadsError(
            f"{out / RUN_FILE} can't be read as the label of a run ({problem}); "
            "choose another --out"
        ) from problem
    kinds = {"program": str, "finished": bool, "request": dict}
    fits = isinstance(run, dict) and all(isinstance(run.get(k), kinds[k]) for k in kinds)
    if not fits or run["program"] != _PROGRAM:
        raise PosheadsError(
            f"{out / RUN_FILE} was not written by tl-posheads; choose another --out"
        )
    if run["finished"] and not _are_names(run.get("files")):
        raise PosheadsError(
            f"{out / RUN_FILE} doesn't list what its run wrote, as an earlier tl-posheads left it; "
            "choose another --out, or remove the folder"
        )
    return dict(run)


def _are_names(files: Any) -> bool:
    """Whether these are paths of files in a folder, and none of them leads out of it."""

    def fits(name: Any) -> bool:
        if not isinstance(name, str) or not name.isprintable():
            return False
        path = Path(name)
        return bool(path.parts) and ".." not in path.parts and not path.anchor

    return isinstance(files, list) and all(map(fits, files))


def folder_begun(out: Path) -> Path:
    """Where a run in ``out`` writes until it is finished."""
    return out / _UNFINISHED


def was_stopped(out: Path) -> bool:
    """Whether ``out`` holds an unfinished run and no finished one."""
    return read_run(out) is None and read_run(out / _UNFINISHED) is not None


def state_of(out: Path, request: dict[str, Any], *, overwrite: bool = False) -> State:
    """Decide what a run with ``request`` may do in ``out``; changes nothing.

    Raises:
        PosheadsError: ``out`` is no folder, holds files that aren't ours, or another run's results.
    """
    if out.exists() and not out.is_dir():
        raise PosheadsError(f"--out {out} is a file; give a folder, new or empty")
    begun, finished = read_run(out / _UNFINISHED), read_run(out)
    if begun is None and finished is None:
        if others := sorted(path.name for path in _not_ours(out)):
            raise PosheadsError(
                f"--out {out} is not empty ({', '.join(others[:3])}) and holds no {RUN_FILE}, so "
                "its files are not ours to touch; choose another --out"
            )
        return "new"
    if overwrite:
        return "new"
    # An unfinished run beside finished results is resumed.
    if begun is not None and begun["request"] == request:
        return "resume"
    if finished is not None and finished["request"] == request:
        return "finished"
    old = (finished or begun or {})["request"]
    differs = [key for key in {**request, **old} if old.get(key) != request.get(key)]
    raise PosheadsError(
        f"--out {out} holds another run's results (differs in: {', '.join(differs)});"
        " choose another --out or pass --overwrite"
    )


def _not_ours(out: Path) -> list[Path]:
    """Files in a folder without a label that a killed run can't have left."""
    begun = out / _UNFINISHED
    left = [path for path in out.iterdir() if path.name != _LOCK] if out.exists() else []
    if begun.is_dir() and not begun.is_symlink():  # without a label, too: nothing is in it yet
        left.remove(begun)
        left += begun.iterdir()
    return [path for path in left if not is_leftover(path)]


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other processes out of ``out``; finish moving results if a kill interrupted that.

    Removes the folder again if it made it and nothing was put in.

    Raises:
        PosheadsError: another process is at work there.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise PosheadsError(
            f"another tl-posheads is at work in {out}; wait for it, or choose another --out"
        ) from None
    try:
        begun = read_run(out / _UNFINISHED)
        if begun is not None and begun["finished"]:
            _move(out / _UNFINISHED, out)
        yield
    finally:
        # While it is held: one who waits for a lock whose file is gone doesn't get it.
        with suppress(OSError):
            (out / _LOCK).unlink()
        lock.release()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(begun: Path) -> None:
    """Remove an unfinished run; a kill in between leaves no part of it under its name."""
    left = begun.with_name(f"{_UNFINISHED}.part")
    _remove(left)
    if begun.exists():
        os.replace(begun, left)
        _remove(left)


def _move(begun: Path, out: Path) -> None:
    """Replace another run by a finished one; if interrupted, it can be called again.

    The label goes last both times: while ``out`` has one, what it holds is the old run's.

    Raises:
        PosheadsError: something else has the name of a file; nothing is moved.
    """
    new, old = (_files_of(folder) for folder in (begun, out))
    waiting = [name for name in new if os.path.lexists(begun / name)]
    for name in waiting:
        _require_free(out / name, ours=name in old)
    _remove(begun / CHECKPOINT)
    for name in old:
        if not (out / name).is_dir():
            (out / name).unlink(missing_ok=True)
        with suppress(OSError):  # other files are in it, or it is gone
            if (out / name).parent != out:
                (out / name).parent.rmdir()
    (out / RUN_FILE).unlink(missing_ok=True)
    for name in waiting:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(begun / name, out / name)
    os.replace(begun / RUN_FILE, out / RUN_FILE)
    _remove(begun)


def _files_of(folder: Path) -> list[str]:
    return list((read_run(folder) or {}).get("files", ()))


def _require_free(place: Path, *, ours: bool) -> None:
    taken = os.path.lexists(place) and not (ours and not place.is_dir())
    if taken or (os.path.lexists(place.parent) and not place.parent.is_dir()):
        raise PosheadsError(
            f"{place} is in the way of the finished run and not ours to touch; move it elsewhere "
            "and give the same command again"
        )


def _label(folder: Path, request: dict[str, Any], files: list[str] | None = None) -> None:
    """Write the run's label, and for a finished run its files."""
    run = {"program": _PROGRAM, "finished": files is not None, "request": request}
    listed = {} if files is None else {"files": files}
    write_text(folder / RUN_FILE, json.dumps(run | listed, indent=2) + "\n")


def _written(begun: Path) -> list[str]:
    """What a run wrote beside its label and its checkpoint."""
    files = (path.relative_to(begun) for path in begun.rglob("*") if path.is_file())
    own = (RUN_FILE, CHECKPOINT)
    return sorted(x.as_posix() for x in files if x.parts[0] not in own and not is_leftover(x))


@contextmanager
def running(out: Path, request: dict[str, Any], state: State) -> Iterator[Path]:
    """Run the body, which fills the folder it gets, and put what it made into ``out``.

    Results in ``out`` stay until then. What was computed before a failure or a stop stays in
    ``.unfinished``, to be resumed; a run that computed nothing leaves nothing. The caller holds the
    lock.
    """
    begun = out / _UNFINISHED
    checkpoint = begun / CHECKPOINT
    if state == "new":
        _discard(begun)
        begun.mkdir()
        _label(begun, request)
    else:  # without what it was saving when it was stopped
        for path in begun.iterdir():
            if path.name not in (RUN_FILE, CHECKPOINT):
                _remove(path)
    try:
        yield begun
    except BaseException:
        if not (checkpoint.is_dir() and any(checkpoint.iterdir())):
            _discard(begun)
        raise
    _label(begun, request, _written(begun))
    _move(begun, out)

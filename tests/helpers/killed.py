"""A stub of a run in a folder, and what is there after a kill at each of its steps on files.

A script, which starts processes and kills them; without torch, so that there may be many. Prints
what went wrong.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tl_posheads.cli import run_folder
from tl_posheads.errors import PosheadsError
from tl_posheads.io.files import write_text

FILES = ("scores.json", "table.csv")
ONLY_OF = {"old": "verdict.txt", "new": "maps/maps.json"}
STEPS = "replace", "unlink", "rmdir", "mkdir", "fsync"


def command(out: Path, name: str, *, overwrite: bool = False, wait: bool = False) -> str:
    """What a command does in its folder, computing nothing."""
    request = {"name": name}
    run_folder.state_of(out, request, overwrite=overwrite)
    with run_folder.locked(out):
        state = run_folder.state_of(out, request, overwrite=overwrite)
        if state == "finished":
            return state
        with run_folder.running(out, request, state) as folder:
            if wait:
                print("begun", flush=True)
                sys.stdin.readline()
            (folder / run_folder.CHECKPOINT).mkdir(exist_ok=True)
            for unit in "ab":
                write_text(folder / run_folder.CHECKPOINT / unit, name)
            (folder / "maps").mkdir()
            write_text(folder / "maps" / "maps.json", name)
            for file in (*FILES, *([ONLY_OF["old"]] if name == "old" else [])):
                write_text(folder / file, name)
    return state


def whole(out: Path, name: str) -> bool:
    """Whether the folder holds this run's results and nothing else."""
    files = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file()}
    expected = {*FILES, "maps/maps.json", "run.json", *([ONLY_OF["old"]] if name == "old" else [])}
    run = run_folder.read_run(out)
    if files.keys() != expected or run is None or not run["finished"]:
        return False
    return run["request"] == {"name": name} and all(
        file.read_text() == name for at, file in files.items() if at != "run.json"
    )


def killed(run: Callable[[], Any], at: int) -> bool:
    """Whether a process that runs this was killed before its step of that number."""
    pid = os.fork()
    if pid == 0:
        steps = 0

        def counted(step: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*args, **options)

            return call

        code = 1
        try:
            for name in STEPS:
                setattr(os, name, counted(getattr(os, name)))
            run()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"killed at {at}: it failed by itself")
    return os.WIFSIGNALED(status)


def kill_at_each_step(before: Callable[[Path], None], overwrite: bool) -> None:
    """Kill the run ``new`` at each step; afterwards it, or another one, can be run."""
    at = 0
    while True:
        at += 1
        for then in ("new", "other"):
            with tempfile.TemporaryDirectory() as place:
                out = Path(place) / "out"
                before(out)
                was_killed = killed(partial(command, out, "new", overwrite=overwrite), at)
                begun, there = run_folder.read_run(out / ".unfinished"), run_folder.read_run(out)
                if there is not None and not (begun is not None and begun["finished"]):
                    found = {(out / name).read_text() for name in FILES}
                    assert found == {there["request"]["name"]}, f"{at}: {found}"
                if not was_killed:
                    assert whole(out, "new"), f"{at}: {sorted(out.rglob('*'))}"
                state = command(out, then, overwrite=overwrite or then == "other")
                if then == "new" and not overwrite and begun is not None and begun["finished"]:
                    assert state == "finished", f"{at}: it was computed again"
                assert whole(out, then), f"{at}, {then}: {sorted(out.rglob('*'))}"
        if not was_killed:
            break
    assert at > 20, at
    print(f"killed at {at - 1} steps")


def nothing(out: Path) -> None:
    pass


def finished(out: Path) -> None:
    command(out, "old")


def stopped(out: Path) -> None:
    assert killed(lambda: command(out, "new"), 12)


def finished_and_stopped(out: Path) -> None:
    finished(out)
    assert killed(lambda: command(out, "new", overwrite=True), 12)


if __name__ == "__main__":
    os.fsync = lambda _: None  # a killed process loses nothing that it wrote
    if sys.argv[1] == "command":
        try:
            print(command(Path(sys.argv[2]), sys.argv[3], overwrite=True, wait="wait" in sys.argv))
        except PosheadsError as refusal:
            print(refusal, file=sys.stderr)
            sys.exit(2)
    else:
        kill_at_each_step(globals()[sys.argv[1]], overwrite="overwrite" in sys.argv)

"""Several processes on one folder, and processes that are killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from helpers import killed
from helpers.killed import FILES, command, whole
from tl_posheads import PosheadsError
from tl_posheads.cli import run_folder

SCRIPT = [sys.executable, killed.__file__]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes of its own")
@pytest.mark.parametrize(
    "words",
    [
        ("nothing",),
        ("finished", "overwrite"),
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in (
                ("nothing", "overwrite"),
                ("stopped",),
                ("stopped", "overwrite"),
                ("finished_and_stopped",),
                ("finished_and_stopped", "overwrite"),
            )
        ),
    ],
    ids=lambda words: " ".join(words),
)
def test_after_a_kill_at_any_step_the_folder_can_be_used(words):
    done = subprocess.run([*SCRIPT, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "killed at" in done.stdout


def start(out, name, *more):
    return subprocess.Popen(
        [*SCRIPT, "command", out, name, *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_while_a_run_is_at_work_another_is_refused_and_takes_nothing_away(tmp_path):
    out = tmp_path / "out"
    command(out, "old")
    first = start(out, "first", "wait")
    assert first.stdout.readline() == "begun\n"
    second = start(out, "second")
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2
    assert "another tl-posheads is at work in" in said
    assert {(out / name).read_text() for name in FILES} == {"old"}
    first.communicate("go on\n", timeout=60)
    assert first.returncode == 0
    assert whole(out, "first")


def test_a_run_that_is_killed_gives_its_folder_back(tmp_path):
    out = tmp_path / "out"
    command(out, "old")
    first = start(out, "first", "wait")
    assert first.stdout.readline() == "begun\n"
    first.kill()
    first.communicate()
    assert {(out / name).read_text() for name in FILES} == {"old"}
    assert command(out, "old") == "finished"
    assert command(out, "first") == "resume"
    assert whole(out, "first")


@pytest.mark.parametrize("time", range(7))
def test_of_processes_that_start_at_once_one_or_more_finish(tmp_path, time):
    out = tmp_path / "out"
    command(out, "old")
    processes = {name: start(out, name) for name in "abc"}
    said = {name: process.communicate(timeout=60) for name, process in processes.items()}
    codes = {name: process.returncode for name, process in processes.items()}
    assert set(codes.values()) <= {0, 2}
    winners = [name for name in codes if codes[name] == 0]
    assert any(whole(out, name) for name in winners), (codes, said, sorted(out.rglob("*")))


def test_what_is_left_of_a_kill_is_no_others_file(tmp_path):
    for name in (
        ".run.json.0123abcd.part",
        ".unfinished/.run.json.0123abcd.part",
        ".tl-posheads.lock",
        ".unfinished.part/checkpoint/a",
    ):
        out = tmp_path / name.replace("/", "_")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("{")
        assert run_folder.state_of(out, {}) == "new"
    (out / ".replaced").mkdir()
    with pytest.raises(PosheadsError, match=r"is not empty \(\.replaced\) and holds no run.json"):
        run_folder.state_of(out, {})


def test_folders_that_nothing_was_put_in_are_taken_away(tmp_path):
    out = tmp_path / "a" / "b"

    def fail(computed):
        with run_folder.locked(out), run_folder.running(out, {}, "new") as folder:
            if computed:
                (folder / run_folder.CHECKPOINT).mkdir()
                (folder / run_folder.CHECKPOINT / "unit").write_text("kept")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail(computed=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        fail(computed=True)
    assert run_folder.was_stopped(out)
    assert run_folder.state_of(out, {}) == "resume"
    assert [p.name for p in out.iterdir()] == [".unfinished"]


def test_labels_that_were_edited_are_refused_or_labels(tmp_path):
    good = {"program": "tl-posheads", "finished": True, "request": {"seed": 0, "model": "m"}}
    good["files"] = ["scores.json", "maps/maps.json"]
    draw = random.Random(0)
    odd = [None, True, 1, -1, 2**80, float("nan"), "", "x", [], {}, [[]], "/dev/zero"]
    texts = ["", "[" * 100_000, "null", "[]", "1" * 5000, "\ud800", "{}"]
    texts += [json.dumps({**good, key: value}) for key in good for value in odd]
    texts += [json.dumps({k: v for k, v in good.items() if k != key}) for key in good]
    whole = json.dumps(good)
    for _ in range(300):
        i = draw.randrange(len(whole))
        texts.append(whole[:i] + chr(ord(whole[i]) ^ 1 << draw.randrange(7)) + whole[i + 1 :])
    refused = 0
    for text in texts:
        (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            run = run_folder.read_run(tmp_path)
            assert run["program"] == "tl-posheads"
            assert isinstance(run["finished"], bool)
            run_folder.state_of(tmp_path, good["request"])
        except PosheadsError:
            refused += 1
    assert refused > len(texts) / 2
    (tmp_path / "run.json").unlink()
    os.mkfifo(tmp_path / "run.json")  # reading it would wait for ever
    with pytest.raises(PosheadsError, match="is no file"):
        run_folder.state_of(tmp_path, {})

"""``tl-posheads profile`` as a person types it."""

from __future__ import annotations

import argparse
import json

import pandas as pd
import pytest

from helpers.commands import SCORE
from tl_posheads import HeadScores
from tl_posheads.cli.profile import MEASURES, add_command, table_lines
from tl_posheads.errors import PosheadsError
from tl_posheads.studies.profile import HeadProfile
from tl_posheads.studies.profile import settings as profile_settings

pytestmark = pytest.mark.lens

PROFILE = (
    "profile",
    "PLACE/llama",
    "--corpus",
    "PLACE/text.txt",
    "--docs",
    2,
    "--length",
    60,
    "--needles",
    2,
)


@pytest.fixture
def call(place, tmp_path, capsys, monkeypatch):
    """The command by itself: its output, or the error that it raised."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        parser = argparse.ArgumentParser()
        add_command(parser.add_subparsers(required=True))
        args = parser.parse_args([str(word).replace("PLACE", str(place)) for word in words])
        args.action(args)
        return capsys.readouterr()

    return call


def test_names_are_those_of_the_library():
    assert tuple(profile_settings.MEASURES) == MEASURES


def test_writes_everything_and_shows_it_again(call, tmp_path):
    out, err = call(*PROFILE, "--out", "p")
    folder = tmp_path / "p"
    assert sorted(path.name for path in folder.iterdir()) == [
        "profile.json",
        "profile.parquet",
        "profile.png",
        "run.json",
        "table.csv",
    ]
    profile = HeadProfile.load(folder)
    table = pd.read_csv(folder / "table.csv")
    assert len(table) == len(profile.table) == 8
    assert list(table.columns) == list(profile.table.columns)
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    request = json.loads((folder / "run.json").read_text())
    assert request["finished"]
    assert profile.provenance["request"] == request["request"]
    assert request["request"]["measures"] == list(MEASURES)
    lines = table_lines(profile, 20)
    assert all(line in out for line in lines)
    assert any(line.startswith("needles: 0 of 2 answered") for line in lines)
    assert any(line.startswith("retrieval has gaps: ") for line in lines)
    again, _ = call(*PROFILE, "--out", "p")
    assert "already holds this run" in again
    assert all(line in again for line in lines)
    with pytest.raises(PosheadsError, match="differs in: measures"):
        call(*PROFILE, "--measures", "sink", "--out", "p")
    call(*PROFILE, "--measures", "sink", "--scale", "attention", "--out", "p", "--overwrite")
    again = HeadProfile.load(folder)
    assert again.columns == ["positional", "sink"]
    assert again.provenance["scores"]["scale"] == "attention"
    assert (again.table["positional"] != profile.table["positional"]).any()


def test_takes_the_scores_of_a_finished_run(run, call, tmp_path):
    assert run(*SCORE, "--out", "s", "--best", 0)[0] == 0
    call(*PROFILE, "--scores", "s", "--measures", "sink,distance", "--out", "p")
    rho = HeadScores.load(tmp_path / "s").rho.flatten().tolist()
    profile = HeadProfile.load(tmp_path / "p")
    assert profile.to_pandas()["positional"].tolist() == rho
    assert profile.provenance["scores"]["same_texts"] is False
    with pytest.raises(PosheadsError, match="holds no scores"):
        call(*PROFILE, "--scores", "nowhere", "--out", "q")


def test_a_stopped_run_keeps_its_scores(call, tmp_path, monkeypatch):
    from tl_posheads.scoring import score as scoring
    from tl_posheads.studies.profile import run

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    words = (*PROFILE, "--measures", "sink", "--out", "p")
    with monkeypatch.context() as patch:
        patch.setattr(run, "measure_text", stop)
        with pytest.raises(KeyboardInterrupt, match="the same command resumes from there"):
            call(*words)
    monkeypatch.setattr(scoring, "capture_rotary", stop)
    _, err = call(*words)
    assert "Resuming the run" in err


def test_nothing_to_draw_is_told_and_the_table_is_there(call, tmp_path):
    _, err = call(*PROFILE, "--measures", "retrieval", "--out", "p")
    assert "no picture: " in err
    assert not (tmp_path / "p" / "profile.png").exists()
    assert (tmp_path / "p" / "table.csv").exists()

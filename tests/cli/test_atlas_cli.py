"""``tl-posheads atlas`` as a person types it."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from helpers.commands import SCORE
from tl_posheads import HeadScores
from tl_posheads.cli.atlas import table_lines
from tl_posheads.studies.atlas import RotaryAtlas
from tl_posheads.studies.atlas import run as atlas_run

pytestmark = pytest.mark.lens

ATLAS = ("atlas", "PLACE/llama", "--corpus", "PLACE/text.txt", "--docs", 2, "--length", 40)


def test_writes_everything_and_shows_it_again(run, tmp_path):
    code, out, err = run(*ATLAS, "--trained", 32, "--out", "a")
    assert code == 0, err
    folder = tmp_path / "a"
    assert sorted(path.name for path in folder.iterdir()) == [
        "atlas.json",
        "atlas.png",
        "atlas.safetensors",
        "head.png",
        "heads.csv",
        "pairs.csv",
        "run.json",
    ]
    found = RotaryAtlas.load(folder)
    heads, pairs = (pd.read_csv(folder / f"{name}.csv") for name in ("heads", "pairs"))
    assert heads["slow_trained"].tolist() == pytest.approx(found.heads()["slow_trained"].tolist())
    assert pairs["usage"].tolist() == pytest.approx(found.to_pandas()["usage"].tolist())
    assert found.trained == 32
    request = json.loads((folder / "run.json").read_text())["request"]
    assert found.provenance["request"] == request
    lines = table_lines(found, 20)
    assert all(line in out for line in lines)
    table = found.heads().sort_values("slow_text", ascending=False)
    first = table.iloc[0]
    assert lines[3].split()[0] == f"L{first['layer']:.0f}H{first['head']:.0f}"
    assert f"{first['centroid']:.2f}" in lines[3]
    _, again, _ = run(*ATLAS, "--trained", 32, "--out", "a")
    assert "already holds this run" in again
    code, _, err = run(*ATLAS, "--needed", "--out", "a")
    assert code == 2
    assert "differs in: needed, trained" in err


def test_scores_of_a_finished_run_stand_beside(run, tmp_path):
    assert run(*SCORE, "--out", "s", "--best", 0)[0] == 0
    code, out, err = run(*ATLAS, "--scores", "s", "--needed", "--layers", 1, "--out", "a")
    assert code == 0, err
    heads = pd.read_csv(tmp_path / "a" / "heads.csv")
    assert heads["rho"].tolist() == pytest.approx(HeadScores.load(tmp_path / "s").rho[1].tolist())
    assert heads["pairs_needed"].between(1, 4).all()
    assert heads["layer"].tolist() == [1, 1, 1, 1]
    assert (tmp_path / "a" / "by_score.png").read_bytes().startswith(b"\x89PNG")
    assert run("report", "s", "--atlas", "a")[0] == 0
    page = (tmp_path / "s" / "index.html").read_text()
    assert "Which frequencies the heads use" in page
    code, _, err = run("report", "s", "--atlas", "s")
    assert code == 2
    assert "s holds no atlases" in err
    best = heads.loc[heads["rho"].idxmax()]
    assert f"L1H{best['head']:.0f}" in out.split("highest rho:")[1].splitlines()[2]


def test_a_stopped_run_goes_on(run, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atlas_run, "capture_rotary", stop)
        code, _, err = run(*ATLAS, "--out", "a")
        assert code == 130
        assert "the same command resumes from there" in err
    code, _, err = run(*ATLAS, "--out", "a")
    assert code == 0
    assert "Resuming the run" in err

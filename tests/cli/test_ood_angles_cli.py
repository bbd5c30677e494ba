"""``tl-posheads ood-angles`` as a person types it."""

from __future__ import annotations

import argparse
import json

import pandas as pd
import pytest

from tl_posheads import PosheadsError
from tl_posheads.cli.ood_angles import LIVE, TABLES, add_command
from tl_posheads.studies.ood_angles import OODAngles

pytestmark = pytest.mark.lens

OOD_ANGLES = (
    "ood-angles",
    "PLACE/llama",
    "--trained",
    24,
    "--corpus",
    "PLACE/text.txt",
    "--docs",
    4,
    "--factor",
    3,
    "--live",
    "joint",
    "--scale",
    "attention",
)


@pytest.fixture
def run(place, tmp_path, monkeypatch, capsys):
    """The command alone, without the program that it is wired into."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        parser = argparse.ArgumentParser(prog="tl-posheads", allow_abbrev=False)
        add_command(parser.add_subparsers(dest="command", required=True))
        args = parser.parse_args([str(w).replace("PLACE", str(place)) for w in words])
        args.action(args)
        return capsys.readouterr().out

    return call


def test_writes_everything_and_shows_it_again(run, tmp_path):
    out = run(*OOD_ANGLES, "--out", "u")
    found = OODAngles.load(tmp_path / "u")
    assert all(sentence in out for sentence in found.sentences())
    assert "8 heads, 4 texts, trained on 24 tokens; out-of-distribution pairs" in out
    assert "(wavelength above training length): 3." in out
    names = {path.name for path in (tmp_path / "u").iterdir()}
    assert names == {
        *(f"{name}.csv" for name in TABLES),
        "ood_angles.png",
        "ood_angles.json",
        "ood_angles.safetensors",
        "loss.parquet",
        "run.json",
    }
    assert (tmp_path / "u" / "ood_angles.png").read_bytes().startswith(b"\x89PNG")
    summary = pd.read_csv(tmp_path / "u" / "summary.csv")
    pd.testing.assert_frame_equal(summary, found.summary(), check_dtype=False)
    request = json.loads((tmp_path / "u" / "run.json").read_text())["request"]
    assert request["trained"] == 24
    assert found.provenance["request"] == request
    assert found.provenance["scale"] == request["scale"] == "attention"
    again = run(*OOD_ANGLES, "--out", "u")
    assert "already holds this run" in again
    with pytest.raises(PosheadsError, match="differs in: seed"):
        run(*OOD_ANGLES, "--seed", 1, "--out", "u")
    assert "layer" not in run(
        *OOD_ANGLES, "--seed", 1, "--heads", "0.1,1.2", "--out", "u", "--overwrite"
    )
    assert OODAngles.load(tmp_path / "u").heads == [(0, 1), (1, 2)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--factor", "1"), "not a number above 1"),
        (("--heads", "3"), "write layer.head"),
        (("--live", "some"), f"choose from {LIVE[0]}"),
    ],
)
def test_bad_words(run, capsys, words, message):
    with pytest.raises(SystemExit):
        run(*OOD_ANGLES, *words, "--out", "u")
    assert message in capsys.readouterr().err.replace("'", "")


def test_refusals_leave_nothing(run, tmp_path):
    with pytest.raises(PosheadsError, match="layer 9 head 0"):
        run(*OOD_ANGLES, "--heads", "9.0", "--out", "u")
    with pytest.raises(PosheadsError, match="learned absolute positions"):
        run("ood-angles", "PLACE/gpt2", *OOD_ANGLES[2:], "--out", "u")
    assert not (tmp_path / "u").exists()

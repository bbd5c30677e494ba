"""``tl-posheads track`` as a person types it: a folder of checkpoints, stopped and gone on with."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from helpers import architectures, small_models
from tl_posheads import Emergence
from tl_posheads.cli.main import main

pytestmark = pytest.mark.lens


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three checkpoints of a tiny Llama, and a text."""
    path = tmp_path_factory.mktemp("place")
    for step in (0, 50, 100):
        hf_model = small_models.build("Llama", architectures.BASE, seed=step)
        hf_model.save_pretrained(path / "run" / f"checkpoint-{step}")
        small_models.tiny_tokenizer().save_pretrained(path / "run" / f"checkpoint-{step}")
    numbers = torch.randint(3, 90, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    (path / "text.txt").write_text(" ".join(f"w{n}" for n in numbers))
    return path


def test_track_writes_everything_and_shows_a_finished_run(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "track",
        f"{place}/run",
        "--corpus",
        f"{place}/text.txt",
        "--docs",
        "3",
        "--length",
        "40",
        "--scale",
        "attention",
        "--out",
        "out",
    ]
    assert main([*words, "--steps", "0,7"]) == 2
    assert "--steps asks for 7, but" in capsys.readouterr().err
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "step      100  loss on far tokens" in first
    found = Emergence.load("out")
    assert found.steps.tolist() == [0, 50, 100]
    assert found.provenance["request"]["steps"] == [0, 50, 100]
    assert found.provenance["scale"] == found.provenance["request"]["scale"] == "attention"
    assert len(pd.read_csv("out/lags.csv")) == 8
    assert (tmp_path / "out" / "training.png").stat().st_size > 10_000
    assert main(words) == 0
    again = capsys.readouterr().out
    assert "already holds this run" in again
    assert first in again

"""``tl-posheads ablate`` as a person types it."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from helpers.commands import SCORE
from tl_posheads import AblationStudy
from tl_posheads.cli.ablate import CONTROLS, TASKS
from tl_posheads.studies.ablation import run as study_run

pytestmark = pytest.mark.lens

ABLATE = (
    "ablate",
    "PLACE/llama",
    "s",
    "--tasks",
    "copying,perplexity",
    "--length",
    200,
    "--prompts",
    2,
    "--fractions",
    "0.125,0.25",
    "--draws",
    12,
    "--corpus",
    "PLACE/text.txt",
    "--needles",
    0,
)
AS_THEY_ARE = (*ABLATE, "--as-they-are")


@pytest.fixture
def scored(run):
    assert run(*SCORE, "--out", "s")[0] == 0
    return run


def test_names_are_those_of_the_library():
    from tl_posheads import tasks
    from tl_posheads.studies.ablation import controls

    assert tuple(tasks.TASKS) == TASKS
    assert tuple(controls.CONTROLS) == CONTROLS


def test_writes_everything_and_shows_it_again(scored, tmp_path):
    code, out, err = scored(*AS_THEY_ARE, "--controls", "random,lowest", "--out", "a")
    assert code == 0, err
    assert "ablating: 100%" in err
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "calibration.parquet",
        "cells.parquet",
        "conditions.parquet",
        "effects.csv",
        "effects.png",
        "run.json",
        "study.json",
        "verdict.txt",
    ]
    result = AblationStudy.load(tmp_path / "a")
    assert result.tasks == ["copying", "perplexity"]
    sentences = (tmp_path / "a" / "verdict.txt").read_text().splitlines()
    assert sentences == list(result.verdict().values())
    assert all(sentence in out for sentence in sentences)
    table = pd.read_csv(tmp_path / "a" / "effects.csv")
    assert len(table) == 2 * 3 * 2 * 2  # tasks, variants, shares, controls
    assert (tmp_path / "a" / "effects.png").read_bytes().startswith(b"\x89PNG")
    request = json.loads((tmp_path / "a" / "run.json").read_text())
    assert request["finished"]
    assert request["request"]["tasks"] == ["copying", "perplexity"]
    assert result.provenance["request"] == request["request"]
    again = scored(*AS_THEY_ARE, "--controls", "random,lowest", "--out", "a")
    assert again[0] == 0
    assert "already holds this run" in again[1]
    assert all(sentence in again[1] for sentence in sentences)
    refused = scored(*ABLATE, "--controls", "random", "--out", "a")
    assert refused[0] == 2
    assert "differs in: controls, calibrated" in refused[2]


def test_tasks_that_the_model_cannot_do_are_left_out(scored, tmp_path):
    """A model of random weights copies nothing; running text has no floor."""
    code, out, err = scored(*ABLATE, "--controls", "random", "--on", "pattern", "--out", "a")
    assert code == 0, err
    result = AblationStudy.load(tmp_path / "a")
    assert result.tasks == ["perplexity"]
    assert result.provenance["on"] == "pattern"
    assert "copying: left out, at its floor on the easiest rung (" in out
    assert len(result.calibration) == 2
    alone = scored(*ABLATE, "--tasks", "copying", "--out", "b")
    assert alone[0] == 2
    assert "no task could show harm" in alone[2]


def test_retrieval_heads_are_looked_for(scored, tmp_path):
    code, _, err = scored(*AS_THEY_ARE, "--controls", "random", "--needles", 2, "--out", "a")
    assert code == 0, err
    facts = AblationStudy.load(tmp_path / "a").provenance["positive_control"]
    assert facts["n_prompts"] == 2
    assert facts["n_answered"] == facts["n_heads"] == 0


def test_goes_on_with_a_stopped_run(scored, tmp_path, monkeypatch):
    words = (*AS_THEY_ARE, "--controls", "random", "--mode", "mean", "--out", "a")
    started = []
    passes = study_run.Trial.run

    def stop(self, *args, **options):
        started.append(args[1])
        if len(started) == 3:
            raise KeyboardInterrupt
        return passes(self, *args, **options)

    monkeypatch.setattr(study_run.Trial, "run", stop)
    code, _, err = scored(*words)
    assert code == 130
    assert "the same command resumes from there" in err
    code, out, err = scored(*words)
    assert code == 0, err
    assert "Resuming the run that was stopped" in err
    assert len(started) == 5  # the third again and the fourth; two were kept
    assert AblationStudy.load(tmp_path / "a").provenance["mode"] == "mean"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "poetry"), "not a list of some of passkey"),
        (("--tasks", "copying,copying"), "each once"),
        (("--fractions", "0.2,0.1"), "ascending shares"),
        (("--draws", "11"), "at least 12"),
        (("--budget", "soon"), "expected a time like"),
        (("--length", "300"), "at most 256"),
        (("--needles", "-1"), "0"),
        (("--on", "scores"), "invalid choice: 'scores'"),
        (("--fractions", "0.125,0.13"), "both give 1 of 8"),
        (("--controls", "best"), "not a list of some of random"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(scored, tmp_path, words, message):
    code, out, err = scored(*ABLATE, *words, "--out", "a")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err
    assert not (tmp_path / "a").exists()


def test_no_scores(run):
    code, _, err = run(*ABLATE, "--out", "a")
    assert code == 2
    assert "holds no scores" in err

"""The command as a person types it: what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import get_args

import pandas as pd
import pytest
import torch
from scipy import stats

from helpers.commands import SCORE
from helpers.scores_by_hand import head_scores
from tl_posheads import HeadScores, load_corpus, load_model, score_heads
from tl_posheads.cli import run_folder
from tl_posheads.cli.options import add_qk_pairs, layers
from tl_posheads.cli.score import COLUMNS, table_lines
from tl_posheads.io import models
from tl_posheads.rotary.contributions import Scale
from tl_posheads.scoring import score as scoring
from tl_posheads.scoring.curves import DominantDimensionCurve
from tl_posheads.scoring.draws import Weighting
from tl_posheads.scoring.maps import HeadMaps

pytestmark = pytest.mark.lens


def test_score_writes_everything_and_show_and_report_read_it(run, tmp_path):
    code, out, err = run(*SCORE, "--out", "s", "--top", 3)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "The 3 highest positional scores of 8 heads:"
    assert lines[1].split() == [
        "layer",
        "head",
        "rho",
        "ci",
        "p_adj",
        "rotation",
        "content",
        "D",
        "near->far",
        "window",
    ]
    names = sorted(p.name for p in (tmp_path / "s").iterdir())
    assert names == [
        "curve",
        "index.html",
        "maps",
        "run.json",
        "scores.json",
        "scores.safetensors",
        "table.csv",
        "table.parquet",
    ]
    scores = HeadScores.load(tmp_path / "s")
    assert scores.top(1) == [tuple(int(x) for x in lines[2].split()[:2])]
    assert "\n".join(lines[5:]).startswith(scores.summary() + "\n\nfiles: ")
    assert "over 3 documents" in lines[5]
    assert len(pd.read_csv(tmp_path / "s" / "table.csv")) == 8
    for key in (
        "corpus_sha256",
        "tokens_sha256",
        "versions",
        "seed",
        "qk_pairs",
        "layers",
        "model",
    ):
        assert key in scores.provenance
    curve = DominantDimensionCurve.load(tmp_path / "s" / "curve")
    assert curve.heads == HeadMaps.load(tmp_path / "s" / "maps").heads == scores.top(3)
    assert run("show", "s", "--top", 3) == (0, out, "")
    page = (tmp_path / "s" / "index.html").read_text()
    assert page.count('<img class="figure"') == 3
    assert page.count("<iframe") == 1
    (tmp_path / "s" / "index.html").unlink()
    assert run("report", "s")[0] == 0
    assert (tmp_path / "s" / "index.html").read_text() == page
    again = run(*SCORE, "--out", "s", "--top", 3)
    assert again[0] == 0
    assert "already holds this run" in again[1]


@pytest.mark.parametrize(
    ("qk_pairs", "weighting", "scale"),
    [
        ("auto", "pair", "none"),
        ("all", "distance", "attention"),
        ("300", "distance", "none"),
    ],
)
def test_options_reach_the_scores(run, place, tmp_path, qk_pairs, weighting, scale):
    code, _, err = run(
        *SCORE,
        "--out",
        "s",
        "--qk-pairs",
        qk_pairs,
        "--weighting",
        weighting,
        "--scale",
        scale,
        "--layers",
        "1",
        "--skip-first",
        2,
        "--seed",
        5,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--cls",
        "bridge",
    )
    assert code == 0, err
    scores = HeadScores.load(tmp_path / "s")
    facts = scores.provenance
    expected = int(qk_pairs) if qk_pairs.isdigit() else qk_pairs
    found = [
        facts[name] for name in ("qk_pairs", "weighting", "scale", "layers", "skip_first", "seed")
    ]
    assert found == [expected, weighting, scale, [1], 2, 5]
    assert facts["model_class"] == "TransformerBridge"
    assert bool(torch.isnan(scores.rho[0]).all())
    request = json.loads((tmp_path / "s" / "run.json").read_text())["request"]
    assert (request["weighting"], request["scale"]) == (weighting, scale)
    model = load_model(str(place / "llama"), cls="bridge", device="cpu", dtype="float32")
    tokens = load_corpus(str(place / "text.txt"), model, n_docs=3, length=60, seed=5)
    direct = score_heads(
        model,
        tokens,
        layers=[1],
        qk_pairs=expected,
        weighting=weighting,
        scale=scale,
        skip_first=2,
        seed=5,
        progress=False,
    )
    assert torch.equal(direct.values.nan_to_num(9), scores.values.nan_to_num(9))
    assert HeadMaps.load(tmp_path / "s" / "maps").scale == scale
    assert DominantDimensionCurve.load(tmp_path / "s" / "curve").scale == scale


def test_one_document_is_told_to_be_few(run):
    code, out, err = run(*SCORE[:4], "--docs", 1, "--length", 60, "--best", 0, "--out", "s")
    assert code == 0, err
    assert "give 8 or more shorter ones" in out
    assert out.splitlines()[2].split()[3:5] == ["-", "-"]  # neither interval nor p


def test_results_of_an_earlier_version_are_refused_in_one_line(run, tmp_path):
    assert run(*SCORE, "--best", 0, "--out", "s")[0] == 0
    label = json.loads((tmp_path / "s" / "scores.json").read_text())
    (tmp_path / "s" / "scores.json").write_text(json.dumps({**label, "version": 1}))
    for words in (("show", "s"), ("report", "s"), (*SCORE, "--best", 0, "--out", "s")):
        code, out, err = run(*words)
        assert code == 2
        assert err.count("\n") == 1
        assert "score again" in err
    # What an earlier version asked for is another run.
    run_json = json.loads((tmp_path / "s" / "run.json").read_text())
    del run_json["request"]["weighting"]
    (tmp_path / "s" / "run.json").write_text(json.dumps(run_json))
    code, _, err = run(*SCORE, "--best", 0, "--out", "s")
    assert code == 2
    assert "differs in: weighting" in err
    assert "--overwrite" in err


def test_the_table_shows_the_measures_of_the_best_heads_and_a_dash_for_what_is_not_known():
    scores = head_scores([[0.5, -0.2], [0.9, float("nan")]], windows=(None, 64))
    lines = table_lines(scores, 2)
    assert lines[0] == "The 2 highest positional scores of 3 heads:"
    first, second = lines[2].split(), lines[3].split()
    rows = scores.by_document("rho")[:, 1, 0].numpy()
    low, high = stats.t.interval(0.95, 7, rows.mean(), stats.sem(rows))
    assert first[:6] == ["1", "0", "+0.900", f"{low:+.3f}", "..", f"{high:+.3f}"]
    assert first[7:] == ["+0.540", "+0.270", "2.1", "->", "3.9", "64"]
    assert second[7:] == ["+0.300", "+0.150", "2.5", "->", "3.5", "-"]
    p = stats.ttest_1samp(scores.by_document("rho").flatten(1)[:, :3].numpy(), 0.0).pvalue
    adjusted = stats.false_discovery_control(p)
    assert [float(first[6]), float(second[6])] == pytest.approx(
        [adjusted[2], adjusted[0]], rel=0.05
    )
    assert table_lines(head_scores([[float("nan")]]), 2) == []


def test_choices_are_those_of_the_library():
    parser = argparse.ArgumentParser()
    add_qk_pairs(parser.add_argument)
    choices = {action.dest: action.choices for action in parser._actions}
    assert choices["weighting"] == get_args(Weighting)
    assert choices["scale"] == get_args(Scale)


def test_ctrl_c_keeps_what_was_done_and_the_same_command_goes_on(run, tmp_path, monkeypatch):
    assert run(*SCORE, "--out", "whole")[0] == 0
    count, passes = scoring.capture_rotary, []

    def stop_in_the_third(*args, **kwargs):
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return count(*args, **kwargs)

    monkeypatch.setattr(scoring, "capture_rotary", stop_in_the_third)
    code, _, err = run(*SCORE, "--out", "s")
    assert code == 130
    assert "the same command resumes from there" in err
    code, _, err = run("show", "s")
    assert code == 2
    assert "stopped before it finished" in err
    code, _, err = run(*SCORE, "--out", "s")
    assert code == 0
    assert "Resuming" in err
    assert len(passes) == 4  # two finished documents were not computed again
    one, two = (HeadScores.load(tmp_path / name) for name in ("whole", "s"))
    assert torch.equal(one.rho, two.rho)
    assert not (tmp_path / "s" / "checkpoint").exists()


def test_another_runs_results_are_kept_until_overwrite(run, tmp_path):
    assert run(*SCORE, "--out", "s")[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}
    code, _, err = run(*SCORE, "--out", "s", "--seed", 1)
    assert code == 2
    assert "another run's results (differs in: seed)" in err
    assert {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()} == before
    assert run(*SCORE, "--out", "s", "--seed", 1, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "s" / "run.json").read_text())["request"]["seed"] == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for more in ((), ("--overwrite",)):
        code, _, err = run(*SCORE, "--out", "mine", *more)
        assert code == 2
        assert "not ours to touch" in err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_one_folder_has_one_run_at_a_time(run, tmp_path):
    assert run(*SCORE, "--best", 0, "--out", "s")[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    with run_folder.locked(tmp_path / "s"):
        for words in ((*SCORE, "--seed", 1, "--overwrite", "--out", "s"), ("report", "s")):
            code, _, err = run(*words)
            assert code == 2
            assert err.count("\n") == 1
            assert "another tl-posheads is at work in s; wait for it" in err
        assert run("show", "s")[0] == 0
        assert run(*SCORE, "--best", 0, "--out", "s")[0] == 0  # finished: it is only shown
    assert {p: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before


def test_an_overwrite_that_fails_or_is_stopped_keeps_the_results_before(run, tmp_path, monkeypatch):
    assert run(*SCORE, "--best", 0, "--out", "s")[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    count, passes = scoring.capture_rotary, []

    def fails(problem):
        def call(*args, **kwargs):
            passes.append(1)
            if len(passes) == 3:
                raise problem
            return count(*args, **kwargs)

        return call

    other = (*SCORE, "--best", 0, "--seed", 1, "--out", "s")
    for problem, expected in ((OSError("disk full"), 2), (KeyboardInterrupt(), 130)):
        passes.clear()
        monkeypatch.setattr(scoring, "capture_rotary", fails(problem))
        assert run(*other, "--overwrite")[0] == expected
        assert {p: p.read_bytes() for p in before} == before
        assert run("show", "s")[0] == 0
    code, _, err = run(*other)
    assert code == 0, err
    assert "Resuming" in err
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == sorted(p.name for p in before)
    assert json.loads((tmp_path / "s" / "run.json").read_text())["request"]["seed"] == 1


def test_a_corpus_that_changes_while_the_model_loads_is_refused(run, place, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text((place / "text.txt").read_text())
    real = models.load_model

    def changes(*args, **kwargs):
        text.write_text("w4 " + text.read_text())
        return real(*args, **kwargs)

    monkeypatch.setattr(models, "load_model", changes)
    code, _, err = run("score", "PLACE/llama", "--corpus", text, *SCORE[4:], "--out", "s")
    assert code == 2
    assert "text.txt was changed while the model was loaded" in err
    assert not (tmp_path / "s").exists()


BAD = [
    (("score", "PLACE/gpt2", "--corpus", "PLACE/text.txt", "--length", 50), "not RoPE"),
    ((*SCORE, "--layers", "5-99"), "has 2 layers; choose from 0-1"),
    ((*SCORE, "--layers", "9-5"), "names no layers"),
    ((*SCORE, "--qk-pairs", "per_distance"), "none of: auto, all, a number of at least 3"),
    ((*SCORE, "--qk-pairs", "2"), "none of: auto, all, a number of at least 3"),
    ((*SCORE, "--weighting", "token"), "invalid choice"),
    ((*SCORE, "--scale", "softmax"), "invalid choice"),
    ((*SCORE, "--exact"), "unrecognized arguments"),
    ((*SCORE[:4], "--length", 1), "at least 2"),
    ((*SCORE[:4], "--length", 250, "--docs", 9), "has 900 tokens, but 9 documents of 250"),
    ((*SCORE, "--skip-first", 59), "leaves no pair"),
    ((*SCORE, "--device", "abacus"), "can't be used here"),
    (("score", "PLACE/llama", "--corpus", "EMPTY"), "is empty"),
    (("score", "PLACE/llama", "--corpus", "LATIN"), "isn't UTF-8"),
    (("score", "PLACE/llama", "--corpus", "./missing.txt"), "there is no file"),
    (("score", "HALF.gguf", "--corpus", "PLACE/text.txt"), "isn't a whole GGUF file"),
    (("score", "nobody/no-model", "--corpus", "PLACE/text.txt"), "the hub didn't give it"),
    (("show", "nothing-there"), "is no folder"),
    (("paint",), "invalid choice"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_one_line_and_code_2_and_writes_nothing(run, tmp_path, words, message):
    (tmp_path / "EMPTY").write_bytes(b"")
    (tmp_path / "LATIN").write_bytes(b"caf\xe9")
    (tmp_path / "HALF.gguf").write_bytes(b"GGUF\x03\x00\x00\x00half")
    before = sorted(p.name for p in tmp_path.iterdir())
    more = ("--out", "s") if words[0] == "score" else ()
    code, out, err = run(*words, *more)
    last = err.strip().splitlines()[-1]
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    assert last.startswith("tl-posheads: error: ")
    assert message in last
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_layers_are_read_as_written():
    assert layers("0,3,5-7") == [0, 3, 5, 6, 7]


def test_help_teaches_without_waiting_for_torch():
    script = (
        "import sys; from tl_posheads.cli.main import main; code = main(['score', '--help']);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in (
        "--corpus",
        "--qk-pairs",
        "--weighting",
        "--scale",
        "--layers",
        "--overwrite",
        "examples:",
        *COLUMNS[2:],
    ):
        assert word in done.stdout

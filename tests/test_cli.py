"""The command as a person types it: what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import architectures
import pandas as pd
import pytest
import torch

from tl_posheads import HeadScores, scoring
from tl_posheads.cli import main
from tl_posheads.cli_options import layers
from tl_posheads.curves import DominantDimensionCurve
from tl_posheads.maps import HeadMaps

pytestmark = [pytest.mark.lens, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny Llama, a tiny GPT-2 and a text."""
    path = tmp_path_factory.mktemp("place")
    llama = architectures.build(*architectures.ROTARY["Llama"])
    gpt2 = architectures.build(*architectures.OTHER["GPT-2"][:2])
    for name, hf_model in (("llama", llama), ("gpt2", gpt2)):
        hf_model.save_pretrained(path / name)
        architectures.tiny_tokenizer().save_pretrained(path / name)
    numbers = torch.randint(3, 90, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    (path / "text.txt").write_text(" ".join(f"w{n}" for n in numbers))
    return path


@pytest.fixture
def run(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        words = [str(word).replace("PLACE", str(place)) for word in words]
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return call


SCORE = ("score", "PLACE/llama", "--corpus", "PLACE/text.txt", "--docs", 3, "--length", 60)


def test_score_writes_everything_and_show_and_report_read_it(run, tmp_path):
    code, out, err = run(*SCORE, "--out", "s", "--top", 3)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "The 3 highest positional scores of 8 heads:"
    assert lines[1].split() == ["layer", "head", "rho", "ci", "rho_geometry", "p_null", "n_pairs",
                                "window"]  # fmt: skip
    names = sorted(p.name for p in (tmp_path / "s").iterdir())
    assert names == ["curve", "index.html", "maps", "run.json", "scores.json", "scores.safetensors", "table.csv",
                     "table.parquet"]  # fmt: skip
    scores = HeadScores.load(tmp_path / "s")
    assert scores.top(1) == [tuple(int(x) for x in lines[2].split()[:2])]
    assert len(pd.read_csv(tmp_path / "s" / "table.csv")) == 8
    for key in ("corpus_sha256", "tokens_sha256", "versions", "seed", "pairs", "layers", "model"):
        assert key in scores.provenance
    curve = DominantDimensionCurve.load(tmp_path / "s" / "curve")
    assert curve.heads == HeadMaps.load(tmp_path / "s" / "maps").heads == scores.top(3)
    assert run("show", "s", "--top", 3) == (0, out, "")
    page = (tmp_path / "s" / "index.html").read_text()
    assert page.count('<img class="figure"') == 2
    assert page.count("<iframe") == 1
    (tmp_path / "s" / "index.html").unlink()
    assert run("report", "s")[0] == 0
    assert (tmp_path / "s" / "index.html").read_text() == page
    again = run(*SCORE, "--out", "s", "--top", 3)
    assert again[0] == 0
    assert "already holds this run" in again[1]


@pytest.mark.parametrize("pairs", ["all", "per_distance", "300"])
def test_options_reach_the_scores(run, tmp_path, pairs):
    code, _, err = run(*SCORE, "--out", "s", "--pairs", pairs, "--layers", "1", "--skip-first", 2,
                       "--seed", 5, "--dtype", "float32", "--device", "cpu", "--cls", "bridge")  # fmt: skip
    assert code == 0, err
    scores = HeadScores.load(tmp_path / "s")
    facts = scores.provenance
    expected = int(pairs) if pairs.isdigit() else pairs
    assert (facts["pairs"], facts["layers"], facts["skip_first"], facts["seed"]) == (
        expected, [1], 2, 5
    )  # fmt: skip
    assert facts["model_class"] == "TransformerBridge"
    assert bool(torch.isnan(scores.rho[0]).all())


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
    assert "the same command goes on from there" in err
    code, _, err = run("show", "s")
    assert code == 2
    assert "stopped before it finished" in err
    code, _, err = run(*SCORE, "--out", "s")
    assert code == 0
    assert "Going on" in err
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


BAD = [
    (("score", "PLACE/gpt2", "--corpus", "PLACE/text.txt", "--length", 50), "not RoPE"),
    ((*SCORE, "--layers", "5-99"), "has 2 layers; choose from 0-1"),
    ((*SCORE, "--layers", "9-5"), "names no layers"),
    ((*SCORE, "--pairs", "most"), "none of: all, per_distance"),
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
        "import sys; from tl_posheads.cli import main; code = main(['score', '--help']);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("--corpus", "--pairs", "--layers", "--overwrite", "rho_geometry", "examples:"):
        assert word in done.stdout

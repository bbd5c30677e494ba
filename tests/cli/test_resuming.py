"""Every command is stopped somewhere and given again, and ends as if it had not been stopped."""

from __future__ import annotations

import json
from importlib import import_module

import pytest

from helpers.commands import SCORE
from tl_posheads import PosheadsError, score_encoding
from tl_posheads.cli import run_folder
from tl_posheads.io.models import load_model
from tl_posheads.studies.profile import needles

pytestmark = pytest.mark.lens

TEXTS = ("--corpus", "PLACE/text.txt", "--docs", 3)
ENCODINGS = ("encodings", "PLACE/llama", *TEXTS, "--length", 40)
LEARNED = ("encodings", "PLACE/gpt2", *TEXTS, "--length", 24, "--scale", "attention")
PROFILE = ("profile", "PLACE/llama", *TEXTS, "--length", 60, "--needles", 3)
OOD_ANGLES = ("ood-angles", "PLACE/llama", *TEXTS, "--trained", 24, "--factor", 2)

# The command, what it calls once for each thing that it does, in which call it is stopped, and how
# many calls of those before are not made again.
STOPS = {
    "score": (SCORE, "scoring.score.capture_rotary", 3, 2),
    "encodings": (ENCODINGS, "studies.encodings.scoring.capture_rotary", 3, 2),
    "encodings, moved": (LEARNED, "studies.encodings.positions._add_moved", 3, 2),
    "encodings, learned": (LEARNED, "studies.encodings.scoring.midranks", 12, 10),
    "profile, scores": (PROFILE, "scoring.score.capture_rotary", 2, 1),
    "profile, texts": (PROFILE, "studies.profile.run.measure_text", 3, 2),
    "profile, needles": (PROFILE, "studies.profile.needles._answered", 2, 1),
    "ood-angles, first text": (OOD_ANGLES, "studies.ood_angles.measure.target_logprobs", 3, 2),
    "ood-angles, second text": (OOD_ANGLES, "studies.ood_angles.measure.target_logprobs", 10, 9),
}


class Stopped:
    """A function that counts its calls, and raises KeyboardInterrupt in one of them."""

    def __init__(self, monkeypatch, place):
        module, _, name = f"tl_posheads.{place}".rpartition(".")
        self.calls, self.at = 0, None
        self.function = getattr(import_module(module), name)
        monkeypatch.setattr(import_module(module), name, self)

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.function(*args, **options)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("words", "function", "at", "kept"), STOPS.values(), ids=STOPS)
def test_the_same_command_goes_on(run, tmp_path, monkeypatch, words, function, at, kept):
    # A random model finds no needle; this one is told that it does.
    monkeypatch.setattr(needles, "recall", lambda *_: 1.0)
    calls = Stopped(monkeypatch, function)
    code, _, err = run(*words, "--out", "whole")
    assert code == 0, err
    whole, calls.calls, calls.at = calls.calls, 0, at
    code, _, err = run(*words, "--out", "out")
    assert code == 130
    assert "what was done is in out, and the same command resumes from there" in err
    code, _, err = run(*words, "--out", "out")
    assert code == 0, err
    assert "Resuming the run" in err
    assert calls.calls - at == whole - kept
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "words", [SCORE, ENCODINGS, PROFILE, OOD_ANGLES], ids=lambda words: words[0]
)
def test_stopped_before_anything_was_done_it_says_so_and_leaves_nothing(
    run, tmp_path, monkeypatch, words
):
    Stopped(monkeypatch, "io.corpora.load_corpus").at = 1
    code, _, err = run(*words, "--out", "out")
    assert code == 130
    assert "nothing was computed yet" in err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_texts_or_options_is_refused(place, tmp_path):
    from tl_posheads import load_corpus

    model = load_model(str(place / "llama"))
    tokens = load_corpus(str(place / "text.txt"), model, n_docs=2, length=30)
    options = {"checkpoint": tmp_path / "kept", "progress": False}
    score_encoding(model, tokens, **options)
    for more in ({"tokens": tokens[:1]}, {"skip_first": 3}, {"scale": "attention"}):
        with pytest.raises(PosheadsError, match="belongs to another run"):
            score_encoding(model, **{"tokens": tokens, **options, **more})


def test_profile_records_the_scale_that_given_scores_have(run, tmp_path):
    assert run(*SCORE, "--best", 0, "--scale", "attention", "--out", "s")[0] == 0
    words = (*PROFILE, "--measures", "sink", "--scores", "s")
    code, _, err = run(*words, "--out", "p")
    assert code == 0, err
    assert "scale: attention, which the scores in s have" in err
    assert run_folder.read_run(tmp_path / "p")["request"]["scale"] == "attention"
    # Typed or not, it is the same run.
    assert "already holds this run" in run(*words, "--scale", "attention", "--out", "p")[1]


def test_overwrite_takes_away_what_the_run_wrote_and_nothing_else(run, tmp_path):
    assert run(*SCORE, "--out", "s")[0] == 0
    files = run_folder.read_run(tmp_path / "s")["files"]
    assert {*files, "run.json"} == contents(tmp_path / "s").keys()
    assert {"scores.json", "maps/maps.json", "index.html"} <= {*files}
    for mine in ("verdict.txt", "maps/mine.txt"):
        (tmp_path / "s" / mine).write_text("mine")
    other = (*ENCODINGS, "--out", "s", "--overwrite")
    code, out, err = run(*other)
    assert code == 0, err
    assert "files: s/table.csv" in out
    found = contents(tmp_path / "s")
    assert found.keys() == {
        "encodings.json",
        "encodings.safetensors",
        "table.csv",
        "table.parquet",
        "run.json",
        "verdict.txt",
        "maps/mine.txt",
    }
    assert found["verdict.txt"] == found["maps/mine.txt"] == b"mine"


def test_a_file_in_the_way_is_kept_and_so_are_the_results(run, tmp_path):
    assert run(*ENCODINGS, "--out", "s")[0] == 0
    (tmp_path / "s" / "index.html").write_text("mine")
    before = contents(tmp_path / "s")
    words = (*SCORE, "--best", 0, "--out", "s", "--overwrite")
    code, _, err = run(*words)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("tl-posheads: error: s/index.html is in the way")
    found = contents(tmp_path / "s")
    assert {name: found[name] for name in before} == before
    (tmp_path / "s" / "index.html").rename(tmp_path / "mine.html")
    assert "already holds this run" in run(*words[:-1])[1]
    assert run_folder.read_run(tmp_path / "s")["request"]["command"] == "score"


@pytest.mark.parametrize("files", [None, [1], ["../thesis.txt"], ["/etc/hosts"], [""], ["a\0b"]])
def test_a_label_without_the_files_of_its_run_is_refused(run, tmp_path, files):
    label = {"program": "tl-posheads", "finished": True, "request": {}, "files": files}
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "run.json").write_text(json.dumps(label))
    (tmp_path / "thesis.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        code, _, err = run(*SCORE, "--out", "s", *more)
        assert code == 2
        assert err.count("\n") == 1
        assert "choose another --out, or remove the folder" in err
    assert (tmp_path / "thesis.txt").read_text() == "mine"

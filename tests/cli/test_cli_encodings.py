"""``tl-posheads encodings`` as a person types it, on learned positions and on RoPE."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from helpers import architectures, small_models
from tl_posheads import EncodingScores, load_corpus, load_model, score_heads
from tl_posheads.cli.main import main

pytestmark = pytest.mark.lens


def test_encodings_scores_both_kinds_and_shows_a_finished_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numbers = torch.randint(3, 90, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{n}" for n in numbers))
    for family, config in (("Llama", architectures.BASE), ("GPT2", architectures.GPT)):
        small_models.build(family, config).save_pretrained(tmp_path / family)
        small_models.tiny_tokenizer().save_pretrained(tmp_path / family)
        words = [
            "encodings",
            family,
            "--corpus",
            "text.txt",
            "--length",
            "40",
            "--out",
            f"{family}-out",
            "--cls",
            "bridge",
            "--scale",
            "attention",
        ]
        assert main(words) == 0, capsys.readouterr().err
        first = capsys.readouterr().out
        assert "The highest of 8 scores" in first
        assert len(pd.read_csv(f"{family}-out/table.csv")) == 8
        assert main(words) == 0
        assert first in capsys.readouterr().out
    model = load_model("Llama", cls="bridge")
    tokens = load_corpus("text.txt", model, n_docs=8, length=40)
    true = score_heads(model, tokens, qk_pairs="all", scale="attention", progress=False)
    found = EncodingScores.load("Llama-out")
    for name in ("rho", "ci_low", "ci_high"):
        torch.testing.assert_close(getattr(found, name), getattr(true, name), atol=1e-6, rtol=0)
    assert EncodingScores.load("GPT2-out").provenance["encoding"] == "learned"

"""A place with models and a text, and the command run there."""

from __future__ import annotations

import pytest
import torch

from helpers import architectures, small_models
from tl_posheads.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny Llama, a tiny GPT-2 and a text."""
    path = tmp_path_factory.mktemp("place")
    llama = small_models.build(*architectures.ROTARY["Llama"])
    gpt2 = small_models.build(*architectures.OTHER["GPT-2"][:2])
    for name, hf_model in (("llama", llama), ("gpt2", gpt2)):
        hf_model.save_pretrained(path / name)
        small_models.tiny_tokenizer().save_pretrained(path / name)
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

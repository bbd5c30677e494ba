"""Tokenizers without a model, a tiny model in and out of the lens, and texts."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers import architectures, small_models
from helpers.task_prompts import namespace


@pytest.fixture(scope="session")
def model(tokenizer):
    return namespace(tokenizer)


@pytest.fixture(scope="session")
def plain(tokenizer):
    """The same without a chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    return namespace(tokenizer)


@pytest.fixture(scope="session")
def numbered(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "numbered.txt"
    path.write_text(" ".join(f"Sentence {i:05} says little." for i in range(6000)))
    return str(path)


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """Words of the tiny tokenizer, in an order that repeats far back."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(3, 97, (4000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text(" ".join(f"w{i}" for i in drawn))
    return str(path)


@pytest.fixture(scope="session")
def tiny():
    return small_models.rotary_model("Llama")


@pytest.fixture(scope="session")
def reference():
    """The same model, untouched by the lens."""
    return small_models.build(*architectures.ROTARY["Llama"])

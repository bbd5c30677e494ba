"""Heads, texts and layers in the forms that people give them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tl_posheads as ph
from helpers import small_models
from tl_posheads import PosheadsError
from tl_posheads.hooks.heads import as_head, as_heads, heads_of
from tl_posheads.hooks.inputs import documents_of, layers_of


class Best:
    """Scores, as far as heads go."""

    def top(self, k):
        return [(1, 2), (0, 3)] if k == 0.05 else []


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("L1H2", [(1, 2)]),
        ("l1h2", [(1, 2)]),
        ("1.2", [(1, 2)]),
        ((1, 2), [(1, 2)]),
        (np.array([[1, 2], [0, 3]]), [(1, 2), (0, 3)]),
        ([torch.tensor([1, 2])], [(1, 2)]),
        (["L1H2", (0, 3), [0, 1]], [(1, 2), (0, 3), (0, 1)]),
        ((("L1H2"), (0, 3)), [(1, 2), (0, 3)]),
        (Best(), [(1, 2), (0, 3)]),
        ([], []),
    ],
)
def test_forms_of_heads(given, found):
    assert as_heads(given) == found
    assert heads_of(small_models.rotary_model("Llama"), given) == found


@pytest.mark.parametrize("given", ["H2", "L1", "1", 7, [7], [(1, 2, 3)], None, ["L-1H2"]])
def test_what_is_no_head(given):
    with pytest.raises(PosheadsError, match="expected pairs like"):
        as_heads(given)


@pytest.mark.parametrize("given", ["L1H2", (1, 2), [(1, 2)], np.array([[1, 2]])])
def test_one_head(given):
    assert as_head(given) == (1, 2)


@pytest.mark.parametrize("given", [["L1H2", (0, 3)], [], Best()])
def test_one_head_where_none_or_more_are_given(given):
    with pytest.raises(PosheadsError, match=r"(0|2) heads were given; expected one"):
        as_head(given)


def test_named_heads_are_the_pairs_everywhere():
    model = small_models.rotary_model("Llama")
    tokens = torch.arange(3, 23)[None]
    by_name, by_pair = (
        ph.dominant_dimension_curve(model, tokens, heads=heads, progress=False).mean
        for heads in ("L1H2", [(1, 2)])
    )
    assert torch.equal(by_name, by_pair)
    with ph.ablate(model, "L1H2"):
        ablated = model(tokens)
    with ph.ablate(model, [(1, 2)]):
        assert torch.equal(model(tokens), ablated)
    assert ph.head_maps(model, tokens[0], "1.2", q_pos=[7]).heads == [(1, 2)]


class Words:
    """A tokenizer of words, as far as texts go."""

    bos_token_id, eos_token_id, pad_token_id, init_kwargs = 1, 2, None, {"bos_token": "<s>"}

    def __call__(self, text, **options):
        assert options["add_special_tokens"] is False
        return {"input_ids": [3 + len(word) for word in text.split()]}


def test_texts_are_read_behind_bos():
    cfg = SimpleNamespace(d_vocab=100, n_ctx=64, model_name="words")
    model = SimpleNamespace(cfg=cfg, tokenizer=Words())
    one = documents_of(model, "a fine text", None, 0)
    assert [x.tolist() for x in one] == [[1, 4, 7, 7]]
    both = documents_of(model, ["a fine text", "of two"], None, 0)
    assert [x.tolist() for x in both] == [[1, 4, 7, 7], [1, 5, 6]]
    whole = documents_of(model, np.array([[1, 4, 7], [1, 5, 6]]), None, 0)
    assert [x.tolist() for x in whole] == [[1, 4, 7], [1, 5, 6]]


def test_texts_need_a_tokenizer(monkeypatch):
    model = small_models.rotary_model("Llama")
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(PosheadsError, match="no tokenizer"):
        documents_of(model, "a fine text", None, 0)


def test_one_layer():
    model = small_models.rotary_model("Llama")
    assert layers_of(model, 1) == [1]
    with pytest.raises(PosheadsError, match="layers 0 to"):
        layers_of(model, 7)
    with pytest.raises(PosheadsError, match=r"layers='0-1' was given; expected numbers"):
        layers_of(model, "0-1")


def test_a_list_of_ids_is_refused_in_one_line():
    model = SimpleNamespace(cfg=SimpleNamespace(d_vocab=9, n_ctx=8, model_name="m"))
    with pytest.raises(PosheadsError, match=r"tokens of shape \(4,\), in a list, were given"):
        documents_of(model, [torch.tensor(i) for i in range(4)], None, 0)

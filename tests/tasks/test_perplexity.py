"""Perplexity, loss by position and LongPPL, against a forward pass for each token."""

from __future__ import annotations

import re

import pytest
import torch

from helpers import architectures, small_models
from tl_posheads.errors import PosheadsError
from tl_posheads.io.corpora import _text
from tl_posheads.tasks import (
    LongPPL,
    Perplexity,
    loss_by_position,
)


def test_perplexity(model):
    corpus = _text("python-docs")
    for prompt in Perplexity(length=300, n=3, short_length=64).prompts(model):
        assert prompt.targets.tolist() == list(range(150, 300))
        assert prompt.facts == {"length": 300, "first": 150}
        assert model.tokenizer.decode(prompt.tokens[1:]) in corpus
        short = prompt.short
        assert len(short.tokens) == 64
        assert torch.equal(short.tokens[1:], prompt.tokens[-63:])
        assert short.tokens[0] == prompt.tokens[0] == model.tokenizer.bos_token_id
        assert short.targets.tolist() == list(range(32, 64))
    [whole] = Perplexity(length=300, n=1, last=1.0).prompts(model)
    assert whole.targets.tolist() == list(range(1, 300))


def test_stretches_do_not_overlap(model, numbered):
    seen: set[int] = set()
    for prompt in Perplexity(length=1024, n=20, corpus=numbered, seed=5).prompts(model):
        text = model.tokenizer.decode(prompt.tokens)
        found = {int(number) for number in re.findall(r"Sentence (\d{5}) says", text)}
        assert len(found) > 80
        assert not seen & found
        seen |= found


def slow_logprob(reference, tokens: torch.Tensor) -> float:
    """Of the last token, by a whole forward pass."""
    with torch.no_grad():
        logits = reference(tokens[None]).logits
    return float(logits[0, -2].log_softmax(-1)[tokens[-1]])


@pytest.mark.lens
def test_loss_by_position(tiny, reference, words):
    task = Perplexity(length=60, n=2, corpus=words, short_length=16)
    edges = [20, 35, 40, 60, 70]
    table = loss_by_position(tiny, task, edges=edges)
    assert list(table.columns) == ["start", "end", "loss", "n"]
    prompts = task.prompts(tiny)
    for row, start, end in zip(table.itertuples(), edges, edges[1:]):
        losses = [
            -slow_logprob(reference, prompt.tokens[: t + 1])
            for prompt in prompts
            for t in range(max(30, start), min(60, end))
        ]
        assert (row.start, row.end, row.n) == (start, end, len(losses))
        if losses:
            assert row.loss == pytest.approx(sum(losses) / len(losses), abs=1e-4)
        else:
            assert row.loss != row.loss
    default = loss_by_position(tiny, prompts)
    assert (default.start.iloc[0], default.end.iloc[-1], len(default)) == (30, 60, 8)
    assert default.n.sum() == 60
    mean = (default.loss * default.n).sum() / 60
    assert mean == pytest.approx((table.loss * table.n).sum() / 60)


def slow_keys(reference, tokens: torch.Tensor, alpha: float, beta: float) -> list[int]:
    """By a forward pass for each token and context; short ones of 12 tokens, stride 5."""
    found = []
    for t in range(1 + 12, len(tokens)):
        left = 1 + (t - 1 - 12) // 5 * 5
        near = torch.cat([tokens[:1], tokens[left : t + 1]])
        assert 12 <= len(near) - 2 < 12 + 5
        long = slow_logprob(reference, tokens[: t + 1])
        if long - slow_logprob(reference, near) > alpha and long > beta:
            found.append(t)
    return found


LONGPPL = dict(length=32, short_length=12, stride=5)


@pytest.mark.lens
def test_longppl_finds_key_tokens(tiny, reference, words):
    stretches = Perplexity(length=32, n=8, corpus=words, short_length=12).prompts(tiny)
    keys = [slow_keys(reference, prompt.tokens, 0.6, -4.5) for prompt in stretches]
    places = [i for i, found in enumerate(keys) if found]
    assert places[:5] == [0, 1, 2, 4, 5]  # one without key tokens is passed over
    prompts = LongPPL(n=5, alpha=0.6, beta=-4.5, corpus=words, **LONGPPL).prompts(tiny)
    assert [prompt.facts["stretch"] for prompt in prompts] == places[:5]
    for prompt, i in zip(prompts, places):
        assert prompt.targets.tolist() == keys[i]
        assert torch.equal(prompt.tokens, stretches[i].tokens)
        assert torch.equal(prompt.short.tokens, stretches[i].short.tokens)
        assert torch.equal(prompt.short.targets, stretches[i].short.targets)
        assert prompt.facts["key_tokens"] == len(keys[i])


@pytest.mark.lens
def test_longppl_with_an_evaluator(tiny, words, model):
    judge = small_models.bridge(small_models.build(*architectures.ROTARY["Llama"], seed=5))
    options = dict(n=2, alpha=0.5, beta=-6.0, corpus=words, **LONGPPL)

    def targets(model, **more):
        return [prompt.targets.tolist() for prompt in LongPPL(**options, **more).prompts(model)]

    assert targets(tiny, evaluator=judge) == targets(judge) != targets(tiny)
    with pytest.raises(PosheadsError, match="a different vocabulary"):
        targets(tiny, evaluator=model)


@pytest.mark.lens
def test_longppl_with_too_few_or_no_key_tokens(tiny, words, monkeypatch):
    options = dict(n=2, corpus=words, **LONGPPL)
    with pytest.raises(PosheadsError, match=r"none of 8 passages .*alpha=500.*lower alpha"):
        LongPPL(alpha=500, **options).prompts(tiny)
    found = iter([[], [], [20, 22], [], [], [], [], []])
    monkeypatch.setattr(LongPPL, "key_tokens", lambda *_: torch.tensor(next(found)))
    with pytest.warns(UserWarning, match=r"only 1 of 2 prompts have key tokens, of 8 tried"):
        [prompt] = LongPPL(**options).prompts(tiny)
    assert prompt.targets.tolist() == [20, 22]
    assert prompt.facts["stretch"] == 2
    assert next(found, None) is None

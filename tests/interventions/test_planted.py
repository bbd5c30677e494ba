"""The hand-made models do what the tests that use them rely on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import architectures, planted
from tl_posheads.tasks.base import Task

pytestmark = pytest.mark.lens


def logprobs(model, prompts, off=()):
    """Log-probability of each answer, with z of the heads in ``off`` zero; prompts of one length."""

    def silence(heads):
        def hook(z, hook):
            z = z.clone()
            z[:, :, heads] = 0
            return z

        return hook

    hooks = [
        (f"blocks.{layer}.attn.hook_z", silence([h for m, h in off if m == layer]))
        for layer in sorted({layer for layer, _ in off})
    ]
    tokens = torch.stack([p.tokens for p in prompts])
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits = model(tokens, return_type="logits")[:, -2].double()
    return logits.log_softmax(-1).gather(-1, tokens[:, -1:])[:, 0]


@pytest.fixture(scope="module")
def model():
    return planted.planted_retriever()


@pytest.mark.parametrize("length", [64, 200])
def test_the_planted_head_alone_carries_retrieval(model, length):
    long = planted.Retrieval(n=10, length=length).prompts(model)
    for prompts in (long, [p.short for p in long]):
        assert logprobs(model, prompts).min() > np.log(0.6)
        without = logprobs(model, prompts, [(3, 5)])
        assert abs(without.mean() - planted.CHANCE) < 0.15
        assert without.max() < planted.CHANCE + 0.5


def test_no_other_head_matters_much_and_each_matters_a_little(model):
    prompts = planted.Retrieval(n=10, length=32).prompts(model)
    clean = logprobs(model, prompts)
    generator = np.random.default_rng(0)
    others = [(layer, head) for layer in range(8) for head in range(16) if (layer, head) != (3, 5)]
    effects = []
    for i in generator.choice(len(others), 16, replace=False):
        effects.append((logprobs(model, prompts, [others[i]]) - clean).mean().item())
    sets = [generator.choice(len(others), 13, replace=False) for _ in range(8)]
    effects_of_sets = [
        (logprobs(model, prompts, [others[i] for i in chosen]) - clean).mean().item()
        for chosen in sets
    ]
    # Far above rounding, far below the planted head's 2.2, and of both signs.
    assert np.std(effects) > 1e-4
    assert min(effects) < 0 < max(effects)
    assert np.abs(effects).max() < 0.03
    assert np.std(effects_of_sets) > 3e-4
    assert np.abs(effects_of_sets).max() < 0.1
    everyone = logprobs(model, prompts, others)
    assert everyone.min() > np.log(0.5)


def test_the_planted_place_size_and_seed_are_free():
    small = planted.planted_retriever(n_layers=2, n_heads=4, planted=(1, 2), seed=3)
    prompts = planted.Retrieval(n=10, length=24).prompts(small)
    assert logprobs(small, prompts).min() > np.log(0.5)
    assert logprobs(small, prompts, [(1, 2)]).max() < np.log(0.25)
    again = planted.planted_retriever(n_layers=2, n_heads=4, planted=(1, 2), seed=3)
    assert torch.equal(logprobs(small, prompts), logprobs(again, prompts))


def test_equal_heads_have_equal_effects():
    model = planted.equal_heads()
    prompts = planted.Retrieval(n=10, length=32).prompts(model)
    clean = logprobs(model, prompts)
    assert clean.min() > np.log(0.6)

    def effect(first, second):
        off = [(0, h) for h in first] + [(1, h) for h in second]
        return (logprobs(model, prompts, off) - clean).mean().item()

    assert effect([0, 1], [2]) == pytest.approx(effect([9, 14], [7]), abs=1e-6)
    assert effect([0, 1], [2]) < effect([0], [1, 2]) < -1e-3
    everyone = effect(range(16), range(16))
    assert everyone + clean.mean().item() == pytest.approx(planted.CHANCE, abs=0.1)


def test_the_task_is_what_it_says():
    task = planted.Retrieval(n=20, length=40, short_length=8, seed=1)
    assert isinstance(task, Task)
    prompts = task.prompts(None)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(prompts, task.prompts(None)))
    values = []
    for prompt in prompts:
        assert prompt.short.short is None
        for one, length in ((prompt, 40), (prompt.short, 8)):
            tokens = one.tokens.tolist()
            assert len(tokens) == length
            assert max(tokens) < architectures.N_VOCAB
            needles = [i for i, t in enumerate(tokens) if planted.NEEDLE <= t < planted.QUESTION]
            assert len(needles) == 1
            value = tokens[needles[0]] - planted.NEEDLE
            assert tokens[-2:] == [planted.QUESTION, planted.ANSWER + value]
            assert one.targets.tolist() == [length - 1]
            assert one.facts["distance"] == length - 2 - needles[0]
            assert 0 <= one.facts["depth"] <= 1
        assert prompt.tokens[-1] == prompt.short.tokens[-1]
        values.append(value)
    assert sorted(values) == sorted(list(range(planted.N_VALUES)) * 2)
    assert len({p.facts["distance"] for p in prompts}) > 5


def test_scores_start_with_the_given_heads(model):
    best = [(3, 5), (0, 1), (7, 15)]
    scores = planted.scores_with_top(model, best, seed=0)
    assert scores.top(3) == best
    assert len(scores.top(1.0)) == 8 * 16
    other = planted.scores_with_top(model, best, seed=1)
    assert other.top(3) == best
    assert other.top(1.0) != scores.top(1.0)
    assert scores.provenance == {"model": model.cfg.model_name}

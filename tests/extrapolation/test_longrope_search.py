"""The search of LongRoPE's factors: what it finds, and that the model stays as it was."""

from __future__ import annotations

import pytest
import torch

from helpers import architectures, small_models
from helpers.traces import state, warm
from tl_posheads import PosheadsError
from tl_posheads import extrapolation as ex
from tl_posheads.extrapolation.methods.longrope_search import search_longrope
from tl_posheads.hooks.logprobs import target_logprobs

pytestmark = pytest.mark.lens

TRAINED = 32
CONFIG = {**architectures.BASE, "max_position_embeddings": TRAINED}


@pytest.fixture(scope="module")
def llama():
    return warm(small_models.bridge(small_models.build("Llama", CONFIG)))


@pytest.fixture(scope="module")
def texts(llama):
    """What the model itself writes under factors that neither PI, NTK nor YaRN gives."""
    with ex.LongRoPE((1.0, 1.3, 1.9, 4.6), factor=4)(llama):
        start = torch.randint(3, 90, (2, 4), generator=torch.Generator().manual_seed(0))
        for _ in range(60):
            with torch.no_grad():
                # short texts have other factors: let all be read as long ones
                padded = torch.cat([start, start.new_full((2, 64 - start.shape[1]), 5)], 1)
                following = llama(padded)[:, start.shape[1] - 1].argmax(-1, keepdim=True)
            start = torch.cat([start, following], 1)
    return start


def loss(model, method, texts):
    with method(model):
        found = [target_logprobs(model, t, torch.arange(1, len(t)))[0] for t in texts]
    return -float(torch.cat(found).double().mean())


def test_search_beats_its_beginning_and_leaves_the_model(llama, texts):
    before, bare = state(llama), llama(texts)
    options = dict(factor=4, population=12, generations=6, progress=False)
    found = search_longrope(llama, texts, seed=1, **options)
    after = state(llama)
    assert before[:2] == after[:2]
    assert all(torch.equal(after[2][name], weight) for name, weight in before[2].items())
    assert torch.equal(llama(texts), bare)
    factors = torch.tensor(found.long_factor)
    assert (factors.diff() >= 0).all()
    assert factors.min() >= 1
    assert factors.max() <= 5
    pi = loss(llama, ex.LongRoPE((4.0,) * 4, factor=4), texts)
    best = loss(llama, found, texts)
    start = loss(
        llama, search_longrope(llama, texts, seed=1, **{**options, "generations": 0}), texts
    )
    assert best < start <= pi + 1e-4
    assert search_longrope(llama, texts, seed=1, **options) == found
    print(f"loss: PI {pi:.4f}, first generation {start:.4f}, found {best:.4f} {found.long_factor}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(factor=0.5), "number of 1 or more"),
        (dict(population=3), "whole number of 4 or more"),
        (dict(generations=1.5), "whole number of 0 or more"),
        (dict(seed=-1), "whole number of 0 or more"),
        (dict(trained=200), "text of 64 tokens .* trained on 200"),
        (dict(trained=1), "2 or more"),
    ],
)
def test_bad_settings_are_refused(llama, texts, change, message):
    with pytest.raises(PosheadsError, match=message):
        search_longrope(llama, texts, **{"factor": 4, "progress": False, **change})


def test_a_method_in_force_is_refused(llama, texts):
    with ex.Linear(2)(llama), pytest.raises(PosheadsError, match="nested"):
        search_longrope(llama, texts, factor=4, progress=False)


def test_smollm2(smollm2):
    tokens = torch.randint(3, 40000, (1, 80), generator=torch.Generator().manual_seed(1))
    found = search_longrope(
        smollm2, tokens, factor=2, trained=48, population=4, generations=1, progress=False
    )
    assert len(found.long_factor) == 32

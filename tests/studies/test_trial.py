"""Many ablations of one prompt in a batch: the numbers of one by one, and of ``ablate``."""

from __future__ import annotations

import pytest
import torch

from helpers import architectures, small_models
from helpers.traces import assert_same, state, warm
from tl_posheads import PosheadsError, ablate
from tl_posheads.hooks import logprobs
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.studies.ablation import trial
from tl_posheads.studies.ablation.trial import Trial
from tl_posheads.tasks import Prompt

pytestmark = pytest.mark.lens

DRAW = torch.Generator().manual_seed(5)
TOKENS = torch.randint(3, 90, (30,), generator=DRAW)
REFERENCE = torch.randint(3, 90, (4, 34), generator=DRAW)
PROMPT = Prompt(
    TOKENS,
    torch.tensor([7, 20, 29]),
    {},
    Prompt(TOKENS[-9:], torch.tensor([5, 8])),
)
# Sets over several layers, sets of one layer, the same set twice.
SETS = [[(1, 0)], [(0, 1), (1, 2)], [(1, 3), (1, 1)], [(0, 0)], [(1, 0)], [(1, 2), (0, 1), (0, 3)]]
HOW = [
    {"mode": "zero"},
    {"mode": "mean", "reference": REFERENCE},
    {"mode": "mean", "reference": REFERENCE, "per_position": True},
    {"mode": "resample", "reference": REFERENCE},
]
NUMBER = 3  # of the prompt: resampled texts are each prompt's own


MODELS = {
    "hooked": small_models.small_hooked,
    **{name: lambda name=name: small_models.rotary_model(name) for name in architectures.ROTARY},
}
FEW = ["hooked", "Llama", "GPT-J", "Gemma 2"]


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(name):
        if name not in made:
            made[name] = warm(MODELS[name]())
        return made[name]

    return get


def tried(model, *, mode="zero", reference=None, per_position=False, on="z"):
    found = Trial.of(model, mode, reference, per_position, on, seed=2)
    found.prepare()
    return found


def batched(model, monkeypatch, rows, **how):
    if rows is not None:
        monkeypatch.setattr(trial, "rows_at_once", lambda *args: rows)
    heard = []
    found = tried(model, **how).run(PROMPT, NUMBER, SETS, heard.append)
    assert sum(heard) == 1 + len(SETS)
    return found


def by_hand(model, how):
    """What a loop with ``ablate`` gives: log-probability, accuracy and exact match."""
    out = {}
    seed = {"seed": 2 + NUMBER} if how["mode"] == "resample" else {}
    for name, one in {"long": PROMPT, "short": PROMPT.short}.items():
        columns = []
        for heads in [[], *SETS]:
            with ablate(model, heads, **how, **seed):
                logprob, hit = target_logprobs(model, one.tokens, one.targets)
            columns.append([logprob.mean(), hit.double().mean(), hit.all()])
        out[name] = torch.tensor(columns, dtype=torch.float64).T
    return out


def assert_close(found, expected, atol=1e-4):
    assert found.keys() == expected.keys()
    for name, table in expected.items():
        torch.testing.assert_close(found[name], table, atol=atol, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_one_by_one_in_threes_and_all_at_once_is_what_ablate_gives(models, name, monkeypatch):
    model = models(name)
    before = state(model)
    expected = by_hand(model, {"mode": "zero"})
    for rows in (1, 3, None):
        assert_close(batched(model, monkeypatch, rows), expected)
    assert (expected["long"][0, 1:] - expected["long"][0, 0]).abs().max() > 1e-3
    assert_same(before, state(model))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("how", HOW[1:], ids=["mean", "per position", "resample"])
def test_what_is_put_in_the_place_of_z_is_what_ablate_puts(models, name, how, monkeypatch):
    model = models(name)
    found = [batched(model, monkeypatch, rows, **how) for rows in (1, 3, 64)]
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
    if name != "GPT-J" or how is HOW[1]:  # ablate can't tell positions there
        assert_close(found[0], by_hand(model, how))


def test_a_mean_on_gpt_j_by_position_is_its_own_mean(models, monkeypatch):
    """A text's whole pass has no need to tell positions."""
    model = models("GPT-J")
    found = batched(model, monkeypatch, 3, **HOW[2])["long"]
    with torch.no_grad():
        z = torch.stack(
            [model.run_with_cache(row[None])[1]["blocks.1.attn.hook_z"][0] for row in REFERENCE]
        )

    def put(value, hook):
        value = value.clone()
        value[0, :, 0] = z.mean(0)[: len(TOKENS), 0]
        return value

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", put)]):
        logprob, _ = target_logprobs(model, TOKENS, PROMPT.targets)
    assert float(found[0, 1]) == pytest.approx(float(logprob.mean()), abs=1e-4)


@pytest.mark.parametrize("name", ["hooked", "Llama", "Gemma 2", "GPT-NeoX, Pythia"])
def test_no_pattern_is_no_z(models, name, monkeypatch):
    model = models(name)
    zero = batched(model, monkeypatch, 3)
    pattern = batched(model, monkeypatch, 3, on="pattern")
    assert_close(pattern, zero)
    assert (pattern["long"][0, 1:] - pattern["long"][0, 0]).abs().max() > 1e-3
    with ablate(model, SETS[1], on="pattern"):
        logprob, _ = target_logprobs(model, TOKENS, PROMPT.targets)
    assert float(pattern["long"][0, 2]) == pytest.approx(float(logprob.mean()), abs=1e-4)


def test_patterns_that_cannot_be_set_are_refused_before_a_pass(models):
    with pytest.raises(PosheadsError, match="on='pattern' was asked of tiny-GPTJ.*use on='z'"):
        Trial.of(models("GPT-J"), "zero", None, False, "pattern", 0)


def test_how_many_rows_a_pass_takes(models):
    model = models("Llama")
    assert [logprobs.rows_at_once(model, n, 1) for n in (10, 100, 1000, 5000)] == [102, 10, 1, 1]


def test_sets_of_a_layer_are_one_pass_and_blocks_below_do_not_run(models):
    model, ran = models("Llama"), []
    hooks = [
        (f"blocks.{i}.attn.hook_z", lambda z, hook, i=i: ran.append((i, len(z)))) for i in (0, 1)
    ]
    with model.hooks(fwd_hooks=hooks):
        tried(model).run(PROMPT, 0, SETS, lambda n: None, short=False)
    # The unablated pass, three sets that begin in layer 0, three that begin in layer 1.
    assert ran == [(0, 1), (1, 1), (0, 3), (1, 3), (1, 3)]


def test_a_task_that_evaluates_itself_is_ablated_in_every_row_and_step(models):
    """It may ask in batches, and with a cache."""
    model = models("Llama")

    def evaluate(model, prompt):
        rows = prompt.tokens.repeat(2, 1)
        with torch.no_grad():
            both = model(rows, return_type="logits")[:, -1].log_softmax(-1)[:, 5]
        torch.testing.assert_close(both[0], both[1])
        return float(both.sum())

    for how in HOW[:2]:
        heard = []
        got = tried(model, **how).run(PROMPT, 0, SETS, heard.append, evaluate=evaluate)
        assert list(got) == ["long"]
        assert heard == [1] * 7
        expected = []
        for heads in [[], *SETS]:
            with ablate(model, heads, **how):
                expected.append(evaluate(model, PROMPT))
        torch.testing.assert_close(got["long"][0], torch.tensor(expected).double())
        assert torch.equal(got["long"][0], got["long"][2])
        assert got["long"][0].std() > 1e-3


def test_the_model_is_as_it_was_after_an_exception_in_the_middle(models):
    model = models("Llama")
    before = state(model)

    def bad(n):
        if n == 3:  # behind the first batch
            raise KeyboardInterrupt

    for on in ("z", "pattern"):
        with pytest.raises(KeyboardInterrupt):
            tried(model, on=on).run(PROMPT, 0, SETS, bad)
        assert_same(before, state(model))


def test_numbers_that_are_none_are_refused():
    model = small_models.rotary_model("Llama")
    with torch.no_grad():
        model.blocks[1].attn.W_O.fill_(float("nan"))
    with pytest.raises(PosheadsError, match="NaN or infinite log-probabilities; load it with"):
        tried(model).run(PROMPT, 0, SETS, lambda n: None)

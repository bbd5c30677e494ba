"""How hard a task is made: a stand-in whose probabilities are given, and models."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.tasks import (
    Calibrated,
    Passkey,
    Perplexity,
    Prompt,
    Task,
    VariableTracking,
    calibrate,
    calibration,
)

FINDS = {9: (0.99, 0.97), 5: (0.5, 0.5), 6: (0.9, 0.4), 1: (0.1, 0.2), 0: (0.2, 1e-9)}


@dataclass(frozen=True)
class Stairs:
    """Rungs whose tokens are keys of ``FINDS``; -1 is a rung that can't be built."""

    steps: tuple[int, ...]
    step: int = 0
    n: int = 7
    seed: int = 5
    name: str = "stairs"

    def rungs(self) -> list[Stairs]:
        return [replace(self, step=k) for k in range(len(self.steps))]

    def prompts(self, model) -> list[Prompt]:
        kind = self.steps[self.step]
        if kind < 0:
            raise PosheadsError("too short")
        rows = [[1, self.seed, i, kind, kind] for i in range(self.n)]
        model.append((self.step, self.n, self.seed))
        return [Prompt(torch.tensor(row), torch.tensor([3, 4])) for row in rows]


@pytest.fixture
def passes(monkeypatch):
    """Fills with the tokens of each pass; there is no model."""
    seen = []

    def given(model, tokens, targets):
        seen.append(tokens.tolist())
        p = torch.tensor(FINDS[int(tokens[3])])
        return p.log(), p > 0.45

    monkeypatch.setattr(calibration, "target_logprobs", given)
    monkeypatch.setattr(calibration, "fused_attention", lambda model: nullcontext(False))
    return seen


def step_of(task: Stairs, **options):
    found = calibrate([], [task], progress=False, **options)
    assert len(found.tasks) + len(found.left_out) == 1
    return found.tasks[0].step if found.tasks else found.left_out["stairs"]


def test_the_hardest_between_is_taken(passes):
    task = Stairs((9, 5, 6, 9))
    assert step_of(task) == 2
    assert step_of(Stairs((9, 5, 6, 1, 5))) == 2  # what follows the first below isn't tried
    assert max(row[3] for row in passes[-4:]) == 1
    assert step_of(Stairs((5,))) == step_of(Stairs((5, 1))) == 0
    assert step_of(Stairs((9, 5, 1)), low=0.1, high=0.2) == 2
    assert step_of(Stairs((9, 6)), low=0.6 - 1e-6, high=0.6 + 1e-6) == 1
    [taken] = calibrate([], [task], progress=False).tasks
    assert (taken.n, taken.seed) == (7, 5)


def test_why_a_task_is_left_out(passes):
    assert step_of(Stairs((9, 9))) == (
        "at its ceiling on every rung, the hardest too (step=1: probability .98, accuracy 1.00, "
        "exact 1.00)"
    )
    # the second token is all but impossible, though on average the two have 0.1
    assert step_of(Stairs((0, 9))) == (
        "at its floor on the easiest rung (step=0: probability .00, accuracy .00, exact .00)"
    )
    assert step_of(Stairs((9, 1, 9))) == "jumps from probability .98 (step=0) to .14 (step=1)"
    assert step_of(Stairs((-1, 9, -1, 1))) == (
        "jumps from probability .98 (step=1) to .14 (step=3)"
    )


def test_other_prompts_than_the_studys(passes):
    model: list = []
    task = Stairs((9, 5))
    calibrate(model, [task], n=3, progress=False)
    assert [(step, n) for step, n, _ in model] == [(0, 3), (1, 3)]
    [shifted] = {seed for *_, seed in model}
    assert (shifted - task.seed) % 2 == 1
    assert len({tuple(row[:3]) for row in passes}) == 3
    assert not {tuple(p.tokens.tolist()) for p in task.prompts([])} & {*map(tuple, passes)}


def test_table(passes):
    plain = Perplexity()
    found = calibrate([], [Stairs((9, -1, 6, 1, 5)), plain, Stairs((9, 9))], progress=False)
    assert found.tasks == (Stairs((9, -1, 6, 1, 5), step=2), plain)
    assert list(found.left_out) == ["stairs#2"]
    table = found.table
    assert list(table.columns) == [
        "task",
        "rung",
        "settings",
        "n_tokens",
        "probability",
        "accuracy",
        "exact",
        "taken",
        "note",
    ]
    assert table.task.tolist() == ["stairs"] * 4 + ["perplexity"] + ["stairs#2"] * 2
    assert table.rung.tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert table.settings.tolist() == [*(f"step={k}" for k in range(4)), "", "step=0", "step=1"]
    assert table.taken.tolist() == [False, False, True, False, True, False, False]
    assert table.note.tolist() == ["", "too short", "", "", "taken as it is", "", ""]
    assert table.n_tokens.fillna(0).tolist() == [5, 0, 5, 5, 0, 5, 5]
    ceiling, middle, floor = (np.sqrt(np.prod(FINDS[k])) for k in (9, 6, 1))
    expected = [ceiling, np.nan, middle, floor, np.nan, ceiling, ceiling]
    np.testing.assert_allclose(table.probability, expected, atol=1e-6)
    np.testing.assert_allclose(table.accuracy, [1, np.nan, 0.5, 0, np.nan, 1, 1])
    np.testing.assert_allclose(table.exact, [1, np.nan, 0, 0, np.nan, 1, 1])
    assert repr(found).splitlines() == [
        "Calibration(2 of 3 tasks taken)",
        "stairs: step=2: probability .60, accuracy .50, exact .00",
        "perplexity: taken as it is",
        "stairs#2: left out, at its ceiling on every rung, the hardest too (step=1: probability "
        ".98, accuracy 1.00, exact 1.00)",
    ]
    assert "<pre>Calibration(2 of 3" in found._repr_html_()
    assert found._repr_html_().count("<tr") == 8


@dataclass(frozen=True)
class Bare:
    name: str = "bare"

    def prompts(self, model) -> list[Prompt]:
        raise AssertionError("it was asked")


@dataclass(frozen=True)
class Unseeded(Bare):
    def rungs(self) -> list[Unseeded]:
        return [self]


def test_refused_before_any_pass(passes):
    assert isinstance(Bare(), Task)
    assert not isinstance(Bare(), Calibrated)
    for tasks, message in [
        ([Stairs((5,)), Bare()], r"the task bare has no rungs; add .* or go without calibration"),
        ([Stairs((5,)), Unseeded()], r"the task bare has rungs without the fields n and seed"),
        ([Stairs((5,)), Stairs((-1, -1))], r"no rung of stairs#2 can be run: too short"),
        ([], r"tasks=\[\] was given; expected at least one"),
        (Stairs((5,)), r"tasks=Stairs.* was given"),
        ([Stairs((5,)), "passkey"], r"tasks=\['passkey'\] was given"),
    ]:
        with pytest.raises(PosheadsError, match=message):
            calibrate([], tasks, progress=False)
    for options in ({"n": 0}, {"n": 1.5}, {"low": 0.9}, {"low": -0.1}, {"high": 1.1}):
        with pytest.raises(PosheadsError, match=f"{next(iter(options))}=.* given; expected"):
            calibrate([], [Stairs((5,))], **options)
    assert not passes


def test_no_numbers(passes, monkeypatch):
    monkeypatch.setattr(
        calibration, "target_logprobs", lambda *_: (torch.tensor([math.nan]), torch.tensor([True]))
    )
    with pytest.raises(PosheadsError, match=r"answers to stairs \(step=0\) .* not numbers"):
        calibrate([], [Stairs((5, 9))], progress=False)


@dataclass(frozen=True)
class Words:
    """A text of the tiny tokenizer's words, of which the last few are asked for."""

    length: int
    n: int = 5
    seed: int = 0
    name: str = "words"

    def rungs(self) -> list[Words]:
        return [replace(self, length=length) for length in (self.length // 2, self.length, 5000)]

    def prompts(self, model) -> list[Prompt]:
        drawn = torch.Generator().manual_seed(self.seed)
        rows = [torch.randint(3, 97, (self.length,), generator=drawn) for _ in range(self.n)]
        return [Prompt(row, torch.arange(self.length - 3, self.length)) for row in rows]


@pytest.mark.lens
def test_figures_against_the_model_itself(tiny, reference):
    task = Words(40)
    found = calibrate(tiny, [task], n=3, low=0.0, high=1.0, progress=False)
    assert found.tasks == (task,)
    assert found.table.note[2].startswith("length=5000 was given, but the model reads at most")
    for row, length in zip(found.table.itertuples(), (20, 40)):
        prompts = Words(length, n=3, seed=1_000_003).prompts(tiny)
        geometric, hits = [], []
        for prompt in prompts:
            with torch.no_grad():
                logits = reference(prompt.tokens[None]).logits[0, -4:-1].double().numpy()
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            told = prompt.tokens[-3:].numpy()
            geometric.append(np.prod(p[range(3), told]) ** (1 / 3))
            hits.append(p.argmax(1) == told)
        assert row.probability == pytest.approx(np.mean(geometric), rel=1e-3)
        assert row.accuracy == pytest.approx(np.mean(hits))
        assert row.exact == np.mean([hit.all() for hit in hits])
        assert row.n_tokens == length


@pytest.mark.lens
@pytest.mark.slow
def test_a_real_model(smollm2_bridge):
    asked = [Passkey(length=256, n=6), VariableTracking(length=256)]
    found = calibrate(smollm2_bridge, asked, n=2, progress=False)
    # it names no variable of a chain, though the letters follow once the first is told
    assert found.left_out["variable_tracking"].startswith("at its floor on the easiest rung")
    rows = found.table[found.table.task == "passkey"]
    [taken] = found.tasks
    assert rows.probability.iloc[0] > 0.9
    assert taken.distractors >= 1
    assert (taken.length, taken.n, taken.seed) == (256, 6, 0)
    prompts = replace(taken, n=2, seed=1_000_003).prompts(smollm2_bridge)
    seen = [target_logprobs(smollm2_bridge, p.tokens, p.targets)[0] for p in prompts]
    mean = float(torch.stack(seen).mean(1).exp().mean())
    assert 0.3 <= mean <= 0.9
    assert mean == pytest.approx(rows.probability[rows.taken].item(), rel=1e-3)
    again = calibrate(smollm2_bridge, asked[:1], n=2, progress=False)
    assert again.table.equals(rows.reset_index(drop=True))

"""Whether a study could find harm: calibrated tasks, and retrieval heads as a positive control."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from helpers import planted
from helpers.traces import warm
from tl_posheads import AblationStudy, PosheadsError, ablation_study
from tl_posheads.studies.ablation import positive_control, run
from tl_posheads.studies.ablation.positive_control import retrieval_heads

pytestmark = pytest.mark.lens

TOP = (3, 5)
IDLE = [(5, 14), (0, 10)]  # without them the model does a little better


@dataclass(frozen=True)
class Copies(planted.Retrieval):
    """The answer is the needle's own token; ``wrong`` asks for another one."""

    wrong: bool = False
    name: str = "copies"

    def _prompt(self, length, value, generator):
        found = super()._prompt(length, value, generator)
        found["tokens"][-1] = planted.NEEDLE + (value + self.wrong) % planted.N_VALUES
        return found

    def rungs(self):
        return [replace(self, length=self.length // 2), self]


@pytest.fixture(scope="module")
def model():
    model = planted.planted_retriever(planted=TOP)
    needle, answer = (
        slice(first, first + planted.N_VALUES) for first in (planted.NEEDLE, planted.ANSWER)
    )
    with torch.no_grad():
        words = model.original_model.lm_head.weight
        words[needle], words[answer] = words[answer].clone(), words[needle].clone()
    return warm(model)


def study(model, top, **options):
    options = {
        "tasks": [Copies(n=4, length=24)],
        "fractions": [1 / 128],
        "controls": ["random"],
        "n_control": 20,
        "needles": Copies(n=2, length=24, seed=7),
        "progress": False,
        **options,
    }
    return ablation_study(model, planted.scores_with_top(model, [top]), **options)


def test_the_head_that_copies_is_the_first_retrieval_head(model):
    heads, facts = retrieval_heads(model, Copies(n=2, length=24, seed=7).prompts(model))
    assert heads[0] == TOP
    assert facts["n_answered"] == 2
    wrong = Copies(n=2, length=24, wrong=True).prompts(model)
    assert retrieval_heads(model, wrong)[0] == []


def test_retrieval_heads_are_those_above_zero_the_best_first(monkeypatch):
    found = torch.tensor([[0.0, 0.5, float("nan")], [0.2, 0.5, 0.9]])
    monkeypatch.setattr(positive_control, "retrieval_scores", lambda *args, **how: (found, {}))
    assert retrieval_heads(None, [])[0] == [(1, 2), (0, 1), (1, 1), (1, 0)]


def test_harm_by_retrieval_heads_says_that_harm_can_be_found(model):
    found = study(model, IDLE[0])
    said = found.verdict()["copies"]
    assert "no evidence that these heads matter more than random heads, on these prompts" in said
    assert "; the study can find harm: without 1 retrieval heads it is -" in said
    row = found.positive_control().iloc[0]
    assert row["effect"] < -1.5
    assert row["p_adjusted"] == 1 / 21
    # the same head as the top one: the same numbers
    top = study(model, TOP)
    table = top.to_pandas().query("variant == 'long'").iloc[0]
    both = ["effect", "ci_low", "ci_high", "exact_ablated"]
    np.testing.assert_allclose(table[both].astype(float), row[both].astype(float), atol=1e-4)
    assert ": evidence" in top.verdict()["copies"]
    assert found.provenance["positive_control"]["n_answered"] == 2


def test_without_harm_by_retrieval_heads_nothing_could_have_been_found(model, monkeypatch):
    monkeypatch.setattr(run, "retrieval_heads", lambda *args: (IDLE[:1], {}))
    found = study(model, IDLE[1])
    said = found.verdict()["copies"]
    assert "this study could not have detected harm from these heads, as the 1 best" in said
    assert "no evidence" not in said
    assert "best retrieval heads show no harm either" in repr(found)


def test_without_needles_there_is_no_positive_control(model):
    found = study(model, IDLE[0], needles=0)
    assert found.positive_control().empty
    assert (
        "there is no positive control, because no needles were asked" in found.verdict()["copies"]
    )


def test_tasks_are_made_as_hard_as_the_model_can_do(model, tmp_path):
    found = study(model, TOP, tasks=[Copies(n=3, length=30)], needles=0)
    table = found.calibration
    assert table["taken"].tolist() == [False, True]
    assert table["n_tokens"].tolist() == [15, 30]
    assert table["probability"].between(0.3, 0.9).all()
    assert found.provenance["tasks"]["copies"]["length"] == 30
    assert np.exp(found.unablated("copies")) == pytest.approx(table["probability"].iloc[1], abs=0.2)
    back = AblationStudy.load(found.save(tmp_path / "study"))
    assert back.calibration.astype(object).equals(table.astype(object))
    assert back.verdict() == found.verdict()


def test_tasks_that_could_show_nothing_are_left_out_by_name(model):
    """The second of a name keeps its number where the first is left out."""
    wrong, right = Copies(n=3, length=24, wrong=True), Copies(n=3, length=24)
    found = study(model, TOP, tasks=[wrong, right], needles=0)
    assert found.tasks == ["copies#2"]
    said = found.verdict()
    assert said["copies"].startswith("copies: left out, at its floor on the easiest rung (")
    assert said["copies#2"].startswith("copies#2 (3 prompts): without the top")
    assert not found.provenance["tasks"]["copies#2"]["wrong"]
    with pytest.raises(PosheadsError, match="no task could show harm in planted.*copies at its fl"):
        study(model, TOP, tasks=[wrong], needles=0)


def test_a_task_at_its_ceiling_taken_as_it_is(model):
    """Twice as sure, the model answers with a probability of almost 1."""
    with torch.no_grad():
        model.original_model.lm_head.weight.mul_(2)
    try:
        found = study(model, IDLE[0], calibrated=False)
        said = found.verdict()["copies"]
        assert (
            "could not have detected harm from these heads, as the task is at its ceiling" in said
        )
        with pytest.raises(PosheadsError, match="at its ceiling on every rung"):
            study(model, IDLE[0])
    finally:
        with torch.no_grad():
            model.original_model.lm_head.weight.div_(2)

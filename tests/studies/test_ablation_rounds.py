"""What a study does with its time: prompts, then draws; the same after it was stopped."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import planted
from helpers.traces import assert_same, state, warm
from tl_posheads import AblationStudy, PosheadsError, ablation_study
from tl_posheads.studies.ablation import budget, rounds
from tl_posheads.studies.ablation.conditions import Condition, conditions_of
from tl_posheads.studies.ablation.rounds import Rounds
from tl_posheads.studies.ablation.trial import Trial

pytestmark = pytest.mark.lens

N_FIRST = 1 + 19 + 1  # top, 19 random draws, lowest


@pytest.fixture(scope="module")
def model():
    return warm(planted.planted_retriever(n_layers=3, n_heads=6, planted=(1, 2)))


@pytest.fixture(scope="module")
def scores(model):
    return planted.scores_with_top(model, [(1, 2)])


def run(model, scores, *, n=6, n_control=12, **options):
    return ablation_study(
        model,
        scores,
        tasks=[planted.Retrieval(n=n, length=12, short_length=6)],
        fractions=[1 / 6],
        controls=["random", "lowest"],
        n_control=n_control,
        calibrated=False,
        needles=0,
        progress=False,
        **options,
    )


@pytest.fixture
def clock(monkeypatch):
    """A pass takes a second, or ``clock.second``; ``clock.runs`` holds the numbers of ablations."""
    passes, told = Trial.run, SimpleNamespace(now=0.0, second=1.0, runs=[], stop_at=None)

    def counted(self, prompt, number, sets, *args, **options):
        if sets and len(told.runs) == told.stop_at:
            raise KeyboardInterrupt
        told.now += told.second * (1 + len(sets))
        told.runs += [len(sets)] if sets else []
        return passes(self, prompt, number, sets, *args, **options)

    monkeypatch.setattr(Trial, "run", counted)
    for module in (rounds, budget):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: told.now))
    return told


def n_prompts(study):
    return study.cells["prompt"].nunique()


def seconds(of, n):
    """A budget for so much work, the pass that is timed first included."""
    return (of * n + 1.5) / 0.95


def test_as_many_prompts_as_fit_and_no_others_when_it_is_run_again(model, scores, clock, tmp_path):
    options = dict(budget=seconds(15, 4.5), checkpoint=tmp_path / "kept")
    study = run(model, scores, **options)
    assert clock.runs == [14] * 4
    assert n_prompts(study) == 4
    assert study.provenance["seconds"] == 1 + 4 * 15
    clock.runs.clear()
    clock.second = 0.1  # a quicker machine, or one with less to do
    again = run(model, scores, **options)
    assert not clock.runs
    assert again.cells.equals(study.cells)
    everything = run(model, scores)
    assert n_prompts(everything) == 6
    some = everything.cells[everything.cells["prompt"] < 4]
    assert some.reset_index(drop=True).equals(study.cells)


def test_after_a_stop_it_ends_where_it_would_have_ended(model, scores, clock, tmp_path):
    options = dict(budget=seconds(15, 4.5), checkpoint=tmp_path / "kept")
    clock.stop_at = 2
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, scores, **options)
    assert_same(before, state(model))
    clock.stop_at = None
    study = run(model, scores, **options)
    assert clock.runs == [14] * 4  # two before, two after
    assert n_prompts(study) == 4


def test_a_budget_below_three_prompts_is_refused_after_one_pass(model, scores, clock):
    with pytest.raises(PosheadsError, match="3 prompts a task under 14 ablations needs") as refusal:
        run(model, scores, budget=10.0)
    assert "a budget of 0.167 min was given" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not clock.runs
    assert clock.now == 1


def test_draws_beyond_19_come_once_the_intervals_are_narrow(model, scores, clock, tmp_path):
    wide = run(model, scores, n_control=24, budget=seconds(22, 5.5))
    assert clock.runs == [N_FIRST] * 5
    assert wide.to_pandas()["n_draws"].max() == 19


def with_more_draws(model, scores, clock, monkeypatch, **options):
    monkeypatch.setattr(Rounds, "_narrow", lambda self, n: True)
    return run(model, scores, n_control=24, budget=1000.0, **options)


def test_more_draws_then_more_prompts(model, scores, clock, monkeypatch, tmp_path):
    study = with_more_draws(model, scores, clock, monkeypatch)
    # Five prompts, the other five ablations of these, then a prompt under all of them.
    assert clock.runs == [N_FIRST] * 5 + [5] * 5 + [N_FIRST + 5]
    assert n_prompts(study) == 6
    study._check()
    assert set(study.to_pandas()["n_draws"]) == {24, 1}
    plain = run(model, scores, n_control=24)
    assert study.conditions.equals(plain.conditions)
    keys = ["prompt", "variant", "condition"]
    both = [x.cells.sort_values(keys).reset_index(drop=True) for x in (study, plain)]
    assert both[0][keys].equals(both[1][keys])
    np.testing.assert_allclose(both[0]["value"], both[1]["value"], atol=1e-4)
    back = AblationStudy.load(study.save(tmp_path / "study"))
    assert back.to_pandas().equals(study.to_pandas())
    assert back.verdict() == study.verdict()


@pytest.mark.parametrize("stop_at", [3, 7, 10])
def test_stopped_anywhere_the_numbers_are_the_same(
    model, scores, clock, monkeypatch, tmp_path, stop_at
):
    whole = with_more_draws(model, scores, clock, monkeypatch)
    done, clock.runs[:] = list(clock.runs), []
    clock.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        with_more_draws(model, scores, clock, monkeypatch, checkpoint=tmp_path / "kept")
    clock.stop_at, clock.second = None, 3.0
    again = with_more_draws(model, scores, clock, monkeypatch, checkpoint=tmp_path / "kept")
    assert clock.runs == done
    assert again.cells.equals(whole.cells)
    assert again.conditions.equals(whole.conditions)


def test_draws_that_do_not_fit_are_left_out(model, scores, clock, monkeypatch):
    monkeypatch.setattr(Rounds, "_narrow", lambda self, n: True)
    study = run(model, scores, n_control=32, budget=seconds(22, 6.2))
    # Five prompts; 13 more ablations of each don't fit into what a prompt takes, so a prompt.
    assert clock.runs == [N_FIRST] * 6
    assert study.to_pandas()["n_draws"].max() == 19


def test_conditions_of_fewer_draws_are_the_first_of_those_of_more(scores):
    options = dict(seed=0, norms=torch.arange(18.0).view(3, 6), retrieval=[(0, 0), (2, 2)])
    kinds = ["random", "layer_matched", "norm_matched", "lowest"]
    few, many = (conditions_of(scores, [0.1, 0.4], kinds, n=n, **options) for n in (3, 9))
    assert many[: len(few)] == few
    assert len(few) == 2 * (1 + 1 + 3 * 3 + 1)
    assert [(c.kind, c.heads) for c in few[2:4]] == [
        ("retrieval", ((0, 0), (2, 2))),
        ("retrieval", ((0, 0), (2, 2))),  # there are no more
    ]


def rounds_of(top, draws):
    """Rounds in which these effects, ``[prompt]`` and ``[prompt, draw]``, were found."""
    conditions = [Condition("top", 0, 0.1, ((0, 0),)), Condition("lowest", 0, 0.1, ((0, 1),))]
    kinds = [Condition("random", i, 0.1, ((0, i),)) for i in range(draws.shape[1])]
    found = Rounds(None, {"a": []}, {}, [*conditions, *kinds], len(kinds) + 2, None, None, False)
    for i, row in enumerate(np.column_stack([0 * top, top, top, draws])):
        found.done["a", i] = {"long": torch.tensor(row - 1).expand(3, -1)}
    return found


def test_narrow_is_narrower_than_the_draws_differ():
    rng = np.random.default_rng(0)
    draws = np.tile(rng.normal(0, 0.3, 19), (8, 1))
    for noise, expected in ((0.05, True), (2.0, False)):
        top = rng.normal(-1, noise, 8)
        half = 2.365 * top.std(ddof=1) / 8**0.5  # Student's t of seven degrees of freedom
        assert (half < draws[0].std(ddof=1)) == expected
        assert rounds_of(top, draws)._narrow(21) == expected

"""The ablation study: its numbers, its verdict on planted truths, its refusals, its files."""

from __future__ import annotations

import dataclasses
import json
from datetime import timedelta

import numpy as np
import pytest
import torch

from helpers import planted
from helpers.traces import state
from tl_posheads import AblationStudy, PosheadsError, ablate, ablation_study
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.studies.ablation.budget import seconds_of
from tl_posheads.studies.ablation.results import UNABLATED
from tl_posheads.tasks import Prompt

TOP = (3, 5)
ONE_HEAD = 1 / 128


@pytest.fixture(scope="module")
def model():
    model = planted.planted_retriever(planted=TOP)
    with torch.no_grad():
        model(torch.tensor([[1, 30, 31]]))
        model.hook_dict  # noqa: B018
    return model


@pytest.fixture(scope="module")
def scores(model):
    return planted.scores_with_top(model, [TOP])


def run(model, scores, *, n=3, **options):
    options = {
        "tasks": [planted.Retrieval(n=n, length=32)],
        "fractions": [ONE_HEAD, 0.05],
        "controls": ["random", "lowest"],
        "n_control": 12,
        "calibrated": False,
        "needles": planted.Retrieval(n=2, length=32, seed=9),
        "progress": False,
        **options,
    }
    return ablation_study(model, scores, **options)


@pytest.fixture(scope="module")
def study(model, scores):
    return run(model, scores, n_control=24, controls=["random", "lowest", "layer_matched"])


@pytest.mark.lens
def test_the_planted_head_is_found(study):
    table = study.to_pandas()
    row = table[(table["variant"] == "long") & (table["fraction"] == ONE_HEAD)]
    row = row[row["control"] == "random"].iloc[0]
    assert row["effect"] < -1.5
    assert row["p"] == 1 / 25
    assert row["p_adjusted"] <= 0.05
    assert row["exact"] == 1
    assert row["exact_ablated"] < 0.7


@pytest.mark.lens
def test_the_verdict_of_the_planted_head(model, scores):
    found = run(model, scores, n_control=24, controls=["random"]).verdict()["planted-retrieval"]
    assert ": evidence that these heads matter more than every control" in found
    assert "no evidence" not in found
    # the planted head retrieves at every distance, and the sentence doesn't claim more
    assert "at short range it changes by -2" in found


def test_copies_are_not_found():
    """Which of equal heads is called the top one makes no difference."""
    model = planted.equal_heads()
    scores = planted.scores_with_top(model, [(0, 3)])
    study = run(model, scores, fractions=[1 / 32, 0.1], controls=["layer_matched"], n_control=24)
    table = study.to_pandas()
    assert (table["p"] == 1).all()
    assert (table["p_adjusted"] == 1).all()
    assert (table[table["variant"] == "long"]["effect"].abs() > 1e-3).all()
    assert "no evidence" in study.verdict()["planted-retrieval"]


@pytest.mark.lens
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"on": "pattern"},
        {"mode": "mean"},
        {"mode": "mean", "per_position": True},
        {"mode": "resample"},
    ],
)
def test_cells_are_what_ablate_gives(model, scores, how):
    if "mode" in how:
        generator = torch.Generator().manual_seed(0)
        how = {**how, "reference": torch.randint(24, 90, (4, 40), generator=generator)}
    study = run(model, scores, **how)
    prompts = planted.Retrieval(n=3, length=32).prompts(model)
    rng = np.random.default_rng(0)
    for condition in rng.choice(len(study.conditions), 5, replace=False):
        heads = [tuple(head) for head in json.loads(study.conditions["heads"][condition])]
        for i, variant in [(0, "long"), (2, "long"), (1, "short")]:
            prompt = prompts[i] if variant == "long" else prompts[i].short
            seed = {"seed": i} if how.get("mode") == "resample" else {}
            with ablate(model, heads, **{"mode": "zero", **how}, **seed):
                logprob, hit = target_logprobs(model, prompt.tokens, prompt.targets)
            clean, _ = target_logprobs(model, prompt.tokens, prompt.targets)
            cell = study.cells[
                (study.cells["variant"] == variant)
                & (study.cells["prompt"] == i)
                & (study.cells["condition"] == condition)
            ].iloc[0]
            assert cell["value"] == pytest.approx(float(logprob.mean()), abs=1e-4)
            assert cell["exact"] == bool(hit.all())
            effect = study.effects("planted-retrieval", variant).loc[i, condition]
            assert effect == pytest.approx(float(logprob.mean() - clean.mean()), abs=2e-4)


def test_sets_are_nested_and_of_one_size(study):
    for (_, _), rows in study.conditions.groupby(["kind", "draw"]):
        sets = [set(map(tuple, json.loads(heads))) for heads in rows["heads"]]
        assert [len(heads) for heads in sets] == [1, 6]
        assert sets[0] < sets[1]


def test_difference_is_far_less_near(study):
    far, near, gap = (
        study.effects("planted-retrieval", v) for v in ("long", "short", "long - short")
    )
    assert np.allclose(gap, far - near)
    assert study.unablated("planted-retrieval") == pytest.approx(
        study.cells.query("variant == 'long' and condition == @UNABLATED")["value"].mean()
    )
    assert UNABLATED not in far.columns


def test_same_seed_same_numbers_and_the_model_as_it_was(model, scores):
    warm_state = state(model)
    first, second = run(model, scores), run(model, scores)
    assert first.cells.equals(second.cells)
    assert first.to_pandas().equals(second.to_pandas())
    other = run(model, scores, seed=1)
    assert not other.conditions.equals(first.conditions)
    after = state(model)
    assert warm_state[:2] == after[:2]
    assert all(torch.equal(after[2][name], weight) for name, weight in warm_state[2].items())


def test_goes_on_where_it_stopped(model, scores, tmp_path):
    passes = []

    def stop_after(count):
        def hook(value, hook):
            passes.append(1)
            if len(passes) > count:
                raise KeyboardInterrupt

        return hook

    counted = [("hook_embed", stop_after(10**9))]
    with model.hooks(fwd_hooks=counted):
        whole = run(model, scores)
    total = len(passes)
    passes.clear()
    with (
        pytest.raises(KeyboardInterrupt),
        model.hooks(fwd_hooks=[("hook_embed", stop_after(total * 3 // 4))]),
    ):
        run(model, scores, checkpoint=tmp_path / "kept")
    passes.clear()
    with model.hooks(fwd_hooks=counted):
        again = run(model, scores, checkpoint=tmp_path / "kept")
    assert 0 < len(passes) < total * 0.7
    assert again.cells.equals(whole.cells)
    with pytest.raises(PosheadsError, match="belongs to another run"):
        run(model, scores, checkpoint=tmp_path / "kept", seed=5)


def test_saved_and_loaded(study, tmp_path):
    folder = study.save(tmp_path / "study")
    back = AblationStudy.load(folder)
    assert back.to_pandas().equals(study.to_pandas())
    assert back.verdict() == study.verdict()
    assert back.provenance == study.provenance
    versions = back.provenance["versions"]
    assert set(versions) == {"tl-posheads", "torch", "transformers", "transformer-lens"}
    data = (folder / "cells.parquet").read_bytes()
    (folder / "cells.parquet").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(PosheadsError, match="damaged"):
        AblationStudy.load(folder)
    with pytest.raises(PosheadsError, match="no study"):
        AblationStudy.load(tmp_path)


def test_plot_shows_every_draw(study):
    figure = study.plot()
    left, right = figure.axes[:2]
    assert left.get_title(loc="left") == "planted-retrieval, long context"
    assert right.get_title(loc="left") == "planted-retrieval, short context"
    drawn = sum(
        len(points.get_offsets()) for points in left.collections if len(points.get_offsets())
    )
    assert drawn >= 2 * (24 + 1 + 24)
    assert left.get_ylabel() == "change (nats per token)"
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook asks for


def test_without_short_controls(model, scores):
    class Plain:
        name = "plain"

        def prompts(self, model):
            these = planted.Retrieval(n=2, length=32).prompts(model)
            return [dataclasses.replace(prompt, short=None) for prompt in these]

    study = run(model, scores, tasks=[Plain(), Plain()], controls=["random"], n_control=24)
    assert study.tasks == ["plain", "plain#2"]
    assert set(study.to_pandas()["variant"]) == {"long"}
    assert "there is no short-context control" in study.verdict()["plain#2"]


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("60min", 3600),
        ("1.5h", 5400),
        ("90s", 90),
        ("90", 90),
        (90, 90),
        (0.5, 0.5),
        (timedelta(minutes=2), 120),
    ],
)
def test_times(given, seconds):
    assert seconds_of(given) == seconds


@pytest.mark.parametrize("given", ["soon", "", "-3min", 0, -1, True, float("nan"), "3 weeks"])
def test_what_is_no_time(given):
    with pytest.raises(PosheadsError, match="expected a time like"):
        seconds_of(given)


class Odd:
    name = "odd"

    def __init__(self, *prompts):
        self.list = list(prompts)

    def prompts(self, model):
        return self.list


def prompt(tokens, targets):
    return Prompt(torch.tensor(tokens), torch.tensor(targets))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tasks=[]), "expected at least one"),
        (dict(tasks=["passkey"]), "expected at least one"),
        (dict(tasks=planted.Retrieval()), "expected at least one"),
        (dict(calibrated=True), "planted-retrieval has no rungs; add a method rungs"),
        (dict(needles=-1), "expected a number of prompts"),
        (dict(on="pattern", mode="mean", reference=torch.full((2, 40), 30)), "only be set to zero"),
        (dict(tasks=[Odd()]), "has no prompts"),
        (dict(tasks=[Odd(prompt([3, 4], [2]))]), "positions from 1 to 1"),
        (dict(tasks=[Odd(prompt([3, 4], [0]))]), "positions from 1 to 1"),
        (dict(tasks=[Odd(prompt([3, 400], [1]))]), "ids 0 to 96"),
        (dict(tasks=[planted.Retrieval(n=1, length=4000)]), "at most"),
        (dict(n_control=11), "at least 12"),
        (dict(controls=["best"]), "expected some of"),
        (dict(controls=[]), "expected some of"),
        (dict(fractions=[0.05, 0.02]), "ascending"),
        (dict(fractions=[0.02, 0.0201]), "both give"),
        (dict(fractions=[1.5]), "at most 1"),
        (dict(mode="mean"), "without a reference"),
        (
            dict(mode="resample", reference=torch.full((2, 20), 30)),
            "text of 32 tokens .* 20 positions",
        ),
        (dict(mode="mean", per_position=True, reference=torch.full((2, 20), 30)), "20 positions"),
        (dict(budget="soon"), "expected a time"),
    ],
)
def test_bad_input_is_refused_before_any_pass(model, scores, change, message):
    ran = []
    with (
        model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: ran.append(1))]),
        pytest.raises(PosheadsError, match=message),
    ):
        run(model, scores, **change)
    assert not ran


def test_scores_of_another_model_are_refused(model):
    other = planted.scores_with_top(planted.equal_heads(), [(0, 1)])
    with pytest.raises(PosheadsError, match="8 layers of 16 heads"):
        run(model, other)
    with pytest.raises(PosheadsError, match="give what score_heads returned"):
        run(model, [(0, 1)])


def test_forgotten_hooks_are_refused(model, scores):
    model.add_hook("blocks.0.attn.hook_z", lambda z, hook: z)
    try:
        with pytest.raises(PosheadsError, match="reset_hooks"):
            run(model, scores)
    finally:
        model.reset_hooks()

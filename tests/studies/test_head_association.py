"""Harm beside scores, heads ablated one by one: planted truth is found, copies are not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from helpers import planted
from helpers.scores_by_hand import head_scores
from tl_posheads import HeadEffects, HeadProfile, PosheadsError, association, head_effects

SHAPE = (6, 8)
FACTS = {"model": "by hand"}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def scores_of(rho, **facts):
    return head_scores(rho, spread=0.0, provenance={**FACTS, **facts})


def effects_of(harm, n=12, noise=0.02, short=None, seed=5, tasks=("passkey",)):
    """Of a model in which ablating a head does this harm, prompt by prompt with noise."""
    n_all = n * len(tasks)
    long = -harm + noise * random(n_all, *harm.shape, seed=seed)
    near = np.full(long.shape, np.nan) if short is None else np.broadcast_to(-short, long.shape)
    prompts = pd.DataFrame(
        [(task, i, 64, -0.5, 1.0, True, -0.1) for task in tasks for i in range(n)],
        columns=["task", "prompt", "n_tokens", "clean", "accuracy", "exact", "clean_short"],
    )
    norms = torch.tensor(np.abs(random(*harm.shape, seed=9)) + 1).float()
    tensors = (torch.tensor(np.array(x)) for x in (long, near))
    return HeadEffects(prompts, *tensors, norms, pd.DataFrame(), dict(FACTS))


RHO = np.clip(0.3 * random(*SHAPE), -0.9, 0.9)


def test_planted_truth_is_found_and_chance_is_not():
    depth = np.arange(6)[:, None] / 10  # harm goes with the layer, too
    effects = effects_of(0.05 * RHO + depth)
    found = association(scores_of(RHO), effects)
    assert found["column"].tolist() == ["rho", "rotation", "content"]
    assert set(found["task"]) == {"passkey"}
    assert set(found["variant"]) == {"long"}
    row = found.iloc[0]
    assert row["rho"] > 0.4
    assert row["p"] < 0.01
    assert row["ci_low"] > 0.2
    assert row["ci_high"] >= row["rho"]
    assert (row["n_heads"], row["n_prompts"]) == (48, 12)
    harm = -effects.long.mean(0).numpy().ravel()
    raw = stats.spearmanr(RHO.ravel(), harm).statistic
    assert row["raw_rho"] == pytest.approx(raw)
    np.testing.assert_allclose(
        found["p_adjusted"], stats.false_discovery_control(found["p"].to_numpy())
    )
    chance = {f"s{i}": random(48, seed=100 + i) for i in range(40)}
    other = association(profile_of(**chance), effects, columns=list(chance), n_permutations=400)
    assert (other["p"] <= 0.05).sum() <= 6
    assert (other["p_adjusted"] > 0.05).all()
    with_less_harm = association(scores_of(-RHO), effects).iloc[0]
    assert with_less_harm["rho"] == pytest.approx(-row["rho"])


def test_the_norm_of_what_a_head_writes_is_allowed_for():
    """Heads that write more do more harm and score higher; given the norm nothing is left."""
    effects = effects_of(np.zeros(SHAPE))
    norms = effects.norms.numpy().astype(float)
    effects = effects_of(0.1 * norms)
    scores = scores_of(np.clip((norms - 2) / 4, -0.9, 0.9))
    row = association(scores, effects).iloc[0]
    assert row["raw_rho"] > 0.8
    assert np.isnan(row["rho"])
    assert np.isnan(row["p"])


def test_far_near_and_their_difference():
    effects = effects_of(0.05 * RHO, short=0.05 * RHO, tasks=("passkey", "copying"))
    found = association(scores_of(RHO), effects, columns=["rho"])
    assert found["variant"].tolist() == ["long", "short", "long - short"] * 2
    assert found["task"].tolist() == ["passkey"] * 3 + ["copying"] * 3
    by_variant = found.groupby("variant")
    assert (by_variant["p"].max()[["long", "short"]] < 0.01).all()
    assert by_variant["p"].min()["long - short"] > 0.05


def profile_of(**columns):
    layer, head = np.indices(SHAPE)
    table = {"layer": layer.ravel(), "head": head.ravel(), "positional": RHO.ravel()}
    return pd.DataFrame({**table, **columns})


def test_columns_of_a_profile_and_of_any_table():
    effects, sink = effects_of(0.05 * RHO), random(48, seed=3)
    table = profile_of(sink=sink, retrieval=np.nan, note="a word")
    found = association(table, effects, seed=4)
    assert found["column"].tolist() == ["positional", "sink"]  # no head has a retrieval score
    assert found.set_index("column")["p"].between([0, 0.05], [0.01, 1]).all()
    profile = HeadProfile(table.drop(columns="note"), dict(FACTS))
    assert association(profile, effects, seed=4).equals(found)
    shuffled = table.sample(frac=1, random_state=0)
    assert association(shuffled, effects, seed=4).equals(found)
    one = association(profile, effects, columns=["sink"])
    assert one["p_adjusted"].tolist() == one["p"].tolist()
    some = association(profile.to_pandas()[:20], effects, columns=["positional"])
    assert some["n_heads"].item() == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scores=scores_of(RHO, model="another")), "scores of another and effects of by hand"),
        (dict(scores=head_scores(np.zeros((9, 8)), provenance={})), "6 layers of 8 heads"),
        (dict(scores=profile_of()[:0]), "scores of 0 heads"),
        (dict(scores=RHO), "expected what score_heads or profile_heads returns"),
        (dict(scores=pd.DataFrame({"rho": [0.1]})), "columns layer and head"),
        (dict(scores=pd.concat([profile_of()] * 2)), "with a head twice"),
        (dict(columns=["rhos"]), r"columns=\['rhos'\] was given; expected some of rho"),
        (dict(scores=profile_of()[:5]), "expected at least 8"),
        (dict(n_permutations=0), "expected at least 1"),
    ],
)
def test_bad_input_is_one_line(change, message):
    options = {"scores": scores_of(RHO), "effects": effects_of(0.05 * RHO), **change}
    with pytest.raises(PosheadsError, match=message) as refusal:
        association(options.pop("scores"), options.pop("effects"), **options)
    assert "\n" not in str(refusal.value)


@pytest.mark.lens
def test_in_a_model_of_copies_no_score_goes_with_harm():
    """Within a layer every head does the same harm, whatever its score."""
    model = planted.equal_heads(n_layers=2, n_heads=8)
    effects = head_effects(model, [planted.Retrieval(n=3, length=32)], progress=False)
    assert (effects.long < -1e-3).all()
    scores = planted.scores_with_top(model, [(0, 3)])
    found = association(scores, effects)
    long = found[found["variant"] == "long"]
    assert (long["p"].isna() | (long["p"] > 0.05)).all()

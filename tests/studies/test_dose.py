"""Effect against strength: each number against a pass by hand, the statistics against a plant."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import planted as plant
from helpers import small_models
from helpers.traces import state, warm
from tl_posheads import DoseResponse, PosheadsError, dose_response, edit_rotary
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.studies.ablation import dose
from tl_posheads.studies.ablation.dose_controls import CONTROLS, EditedSet, layer_matched
from tl_posheads.tasks.base import Prompt

pytestmark = pytest.mark.lens

TOKENS = torch.randint(3, 90, (4, 30), generator=torch.Generator().manual_seed(8))
HEADS = [(1, 2), (0, 1)]
STRENGTHS = [0.0, 0.5, 1.0]
HEADS_ONLY = ["layer_matched_heads"]
OPTIONS = dict(draws=5, seed=3, progress=False)


class Ends:
    """Scores the last three tokens of a text."""

    name = "ends"

    def __repr__(self) -> str:
        return "Ends()"

    def prompts(self, model):
        return [Prompt(row, torch.tensor([27, 28, 29])) for row in TOKENS]


@pytest.fixture(scope="module")
def llama():
    return warm(small_models.rotary_model("Llama"))


@pytest.fixture(scope="module")
def found(llama):
    return dose_response(llama, HEADS, [2], STRENGTHS, Ends(), **OPTIONS)


def test_cells_are_passes_by_hand(llama, found):
    for s, one in enumerate(found.sets):
        for i, row in enumerate(TOKENS):
            for strength in STRENGTHS:
                with edit_rotary(llama, one.heads, scale={tuple(one.rotary_pairs): 1 - strength}):
                    logprob, hit = target_logprobs(llama, row, torch.tensor([27, 28, 29]))
                c = found.cells
                cell = c[(c["set"] == s) & (c["prompt"] == i) & (c["strength"] == strength)]
                assert len(cell) == 1
                assert cell["logprob"].item() == pytest.approx(float(logprob.mean()), abs=1e-4)
                assert cell["exact"].item() == bool(hit.all())
    effects = found.effects()
    assert effects.shape == (1 + 5 + 3 + 3, 4, 3)  # there are three other pairs
    assert (effects[:, :, 0] == 0).all()
    assert (np.abs(effects[:, :, 2]).max(1) > 1e-3).all()


def test_controls_change_heads_or_pairs_and_never_both(found):
    asked = found.sets[0]
    assert asked == EditedSet("", sorted(HEADS), [2])
    assert list(found.controls) == list(CONTROLS)
    for one in found.sets[1:]:
        if one.control == "layer_matched_heads":
            assert one.rotary_pairs == [2]
        else:
            assert one.heads == sorted(HEADS)
    for control in CONTROLS[1:]:
        drawn = [found.sets[i].rotary_pairs for i in found.controls[control]]
        assert sorted(drawn) == [[0], [1], [3]]


def test_nothing_is_run_at_strength_0(llama, monkeypatch):
    monkeypatch.setattr(dose, "run_from_layer", lambda *args: pytest.fail("a pass was run"))
    found = dose_response(llama, HEADS, 1, [0.0], Ends(), controls=HEADS_ONLY, **OPTIONS)
    assert found.norms == []
    assert (found.effects() == 0).all()


def test_shift_is_in_tokens(llama):
    found = dose_response(llama, HEADS, 1, [2.5], Ends(), edit="shift", **OPTIONS)
    with edit_rotary(llama, HEADS, shift={1: 2.5}):
        logprob, _ = target_logprobs(llama, TOKENS[0], torch.tensor([27, 28, 29]))
    cell = found.cells.query("set == 0 and prompt == 0")["logprob"].item()
    assert cell == pytest.approx(float(logprob.mean()), abs=1e-4)


def test_draws_have_as_many_heads_of_each_layer():
    top = [(3, 1), (3, 0), (5, 2)]
    draws = layer_matched(top, 8, 200, seed=1)
    assert all([layer for layer, _ in draw] == [3, 3, 5] for draw in draws)
    assert all(len(set(draw)) == 3 for draw in draws)
    assert draws[:3] == layer_matched(top, 8, 3, seed=1) != layer_matched(top, 8, 3, seed=2)
    # The top heads are drawn like any others.
    share = np.mean([(5, 2) in draw for draw in draws])
    assert 0.05 < share < 0.22


def planted(effect, n_draws=39, n_prompts=12, seed=0):
    """Set 0 loses ``effect`` nats times the strength, the draws nothing; all with noise.

    Other heads, that is; beside them stands one draw of other pairs, which loses as much.
    """
    rng = np.random.default_rng(seed)
    strengths, rows = [0.0, 0.25, 0.5, 1.0], []
    for s in range(n_draws + 2):
        for prompt in range(n_prompts):
            for strength in strengths:
                noise = 0.0 if strength == 0 else rng.normal(0, 0.1)
                lost = effect * strength if s in (0, n_draws + 1) else 0.0
                rows.append([prompt, s, strength, -1 - lost + noise, lost < 0.5, -1.0])
    columns = ["prompt", "set", "strength", "logprob", "exact", "clean"]
    cells = pd.DataFrame(rows, columns=columns)
    facts = {"model": "planted", "edit": "scale", "strengths": strengths}
    sets = [
        EditedSet("layer_matched_heads" if i else "", [(0, i)], [0]) for i in range(n_draws + 1)
    ]
    sets += [EditedSet("random_rotary_pairs", [(0, 0)], [1])]
    return DoseResponse(cells, sets, [3.0, 1.5], facts)


def test_a_planted_effect_is_found():
    found = planted(1.0)
    by_control = dict(list(found.to_pandas().groupby("control")))
    table = by_control["layer_matched_heads"].set_index("strength")
    np.testing.assert_allclose(table["effect"], [0, -0.25, -0.5, -1.0], atol=0.08)
    assert (table["ci_low"].iloc[1:] < table["effect"].iloc[1:]).all()
    assert table.loc[1.0, "ci_low"] <= -1.0 + 0.1
    assert table.loc[1.0, "ci_high"] >= -1.0 - 0.1
    assert table.loc[1.0, "p"] == 1 / 40
    assert table.loc[1.0, "p_adjusted"] == 1 / 40
    assert np.isnan(table.loc[0.0, "p"])
    assert (table["n_draws"] == 39).all()
    assert table.loc[1.0, "exact"] == 0
    assert table.loc[1.0, "control_exact"] == 1
    draws = found.effects()[1:-1, :, -1].mean(1)
    last = table.loc[1.0, ["control_effect", "control_min", "control_max"]].astype(float)
    np.testing.assert_allclose(last, [draws.mean(), draws.min(), draws.max()])
    assert table.loc[1.0, "difference"] == pytest.approx(table.loc[1.0, "effect"] - draws.mean())
    assert table.loc[1.0, "difference_low"] < -0.9
    assert -1.1 < table.loc[1.0, "difference_high"] < -0.9
    pairs = by_control["random_rotary_pairs"].set_index("strength")
    assert pairs.loc[1.0, "p"] >= 0.5  # one draw can't show more
    assert abs(pairs.loc[1.0, "difference"]) < 0.1
    assert (pairs["norm_ratio"] == 0.5).all()
    trend, control = found.trend()
    assert trend.mean < -0.9
    assert trend.ci_high < -0.8
    assert abs(control["layer_matched_heads"]) < 0.3
    assert control["random_rotary_pairs"] < -0.9


def test_every_control_is_told():
    text = repr(planted(1.0)).splitlines()
    assert len(text) == 3
    assert "at strength 1: -1.0" in text[1]
    assert "other heads -0.00 (corrected p 0.025, 39 draws)" in text[2].replace("+0.00", "-0.00")
    assert "other rotary pairs -1.0" in text[2]
    assert "at 0.5 of the norm" in text[2]
    assert text[2].endswith("1 draw)")


def test_a_planted_head_is_found_by_the_pair_it_looks_with():
    retriever = warm(plant.planted_retriever(n_layers=4, n_heads=8, planted=(2, 5)))
    task, options = plant.Retrieval(n=3, length=24), dict(seed=2, progress=False)
    given = (retriever, [(2, 5)], 7, [0.0, 0.5, 0.75, 1.0], task)
    found = dose_response(*given, controls=HEADS_ONLY, **options)
    effects = found.effects()
    holds = np.array([(2, 5) in one.heads for one in found.sets])
    assert (np.diff(effects[holds].mean(1), axis=1) < 0).all()
    assert (effects[holds][:, :, -1] < -1).all()
    assert np.abs(effects[~holds]).max() < 0.01
    assert found.trend()[0].mean == -1
    # Draws that hold the head itself are as bad, and count against it.
    assert found.to_pandas()["p"].iloc[-1] == holds.sum() / 20
    again = dose_response(*given, controls=HEADS_ONLY, **options)
    pd.testing.assert_frame_equal(again.cells, found.cells)
    assert again.provenance == found.provenance


def test_rounding_is_no_trend():
    cells = planted(0.0).cells
    tiny = cells.assign(logprob=cells["clean"] - 1e-6 * cells["strength"])
    found = DoseResponse(tiny, planted(0.0).sets, [], {})
    assert found.trend()[0].mean == 0


def test_no_effect_is_seldom_found():
    p = [
        planted(0.0, n_draws=19, n_prompts=4, seed=s).to_pandas()["p_adjusted"].min()
        for s in range(60)
    ]
    assert np.mean(np.array(p) <= 0.1) < 0.25


def test_goes_on_where_it_stopped(llama, found, tmp_path, monkeypatch):
    real, done = dose._one_prompt, []

    def stops(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    given = (llama, HEADS, [2], STRENGTHS, Ends())
    before = state(llama)
    monkeypatch.setattr(dose, "_one_prompt", stops)
    with pytest.raises(KeyboardInterrupt):
        dose_response(*given, checkpoint=tmp_path / "kept", **OPTIONS)
    assert state(llama)[:2] == before[:2]
    rest = []
    monkeypatch.setattr(dose, "_one_prompt", lambda *args: rest.append(1) or real(*args))
    monkeypatch.setattr(dose, "pair_norms", lambda *args: pytest.fail("they are kept"))
    again = dose_response(*given, checkpoint=tmp_path / "kept", **OPTIONS)
    assert len(rest) == 2
    pd.testing.assert_frame_equal(again.cells, found.cells)


class Anonymous:
    """A task that says nothing of itself, not even where it was made."""

    name = "anonymous"

    def __init__(self, *prompts):
        self._prompts = prompts

    def prompts(self, model):
        return list(self._prompts)


class Judged(Anonymous):
    """A task that says itself what an answer is worth."""

    def evaluate(self, model, prompt):
        return 1.0


def prompt(tokens, target):
    return Prompt(torch.tensor(tokens), torch.tensor([target]))


def test_the_same_task_made_again_goes_on(llama, tmp_path):
    given = (llama, HEADS, 1, [1.0])
    first, second = (
        dose_response(
            *given, Anonymous(prompt([3, 4, 5], 2)), checkpoint=tmp_path / "kept", **OPTIONS
        )
        for _ in range(2)
    )
    pd.testing.assert_frame_equal(first.cells, second.cells)
    assert first.provenance == second.provenance
    said = {"name": "anonymous", "class": "Anonymous"}
    assert said.items() <= first.provenance["task"].items()


def test_round_trip_and_picture(found, tmp_path):
    found.save(tmp_path / "here")
    again = DoseResponse.load(tmp_path / "here")
    pd.testing.assert_frame_equal(again.cells, found.cells)
    assert again.sets == found.sets
    assert again.provenance == found.provenance
    pd.testing.assert_frame_equal(again.to_pandas(), found.to_pandas())
    (tmp_path / "here" / "cells.parquet").write_bytes(b"no table")
    with pytest.raises(PosheadsError, match="damaged"):
        DoseResponse.load(tmp_path / "here")
    figure = found.plot()
    figure.canvas.draw()
    assert figure._repr_png_().startswith(b"\x89PNG")
    # Zero, the draws, what was asked about.
    assert [len(ax.lines) for ax in figure.axes] == [1 + 5 + 1, 1 + 3 + 1, 1 + 3 + 1]
    assert len({ax.get_title(loc="left") for ax in figure.axes}) == 3


def test_all_pairs_can_be_edited_beside_other_heads(llama):
    given = (llama, HEADS, range(4), [1.0], Ends())
    found = dose_response(*given, controls=HEADS_ONLY, **OPTIONS)
    assert list(found.to_pandas()["control"]) == HEADS_ONLY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(heads=[]), "at least one head"),
        (dict(heads=[(7, 0)]), "layer 7"),
        (dict(rotary_pairs=range(2, 6)), "pairs 0 to 3"),
        (dict(rotary_pairs=range(3)), "3 rotary pairs were given, but only 1 others"),
        (dict(rotary_pairs=range(4), controls=CONTROLS[1:2]), "edit fewer pairs"),
        (dict(strengths=[]), "ascending"),
        (dict(strengths=[1.0, 0.5]), "ascending"),
        (dict(strengths=[-1.0]), "0 or more"),
        (dict(strengths=["much"]), "ascending"),
        (dict(edit="freeze"), "'scale' or 'shift'"),
        (dict(draws=0), "1 or more draws"),
        (dict(draws=2.5), "1 or more draws"),
        (dict(controls=19), "expected some of layer_matched_heads"),
        (dict(controls=[]), "each once"),
        (dict(controls=["pairs"]), "random_rotary_pairs"),
        (dict(controls=["random_rotary_pairs"] * 2), "each once"),
        (dict(controls="random_rotary_pairs"), "each once"),
        (dict(seed=-1), "0 or more"),
        (dict(rotary_pairs=None), "pair's number"),
        (dict(strengths=[0.5, float("nan")]), "ascending"),
        (dict(task="passkey"), "one of tl_posheads.tasks"),
        (dict(task=Anonymous()), "no prompts"),
        (dict(task=Judged()), "a metric of its own"),
        (dict(task=Anonymous(prompt([3, 4, 5], 0))), "positions from 1 to 2"),
        (dict(task=Anonymous(prompt([3, 4, 5], 3))), "positions from 1 to 2"),
        (dict(task=Anonymous(prompt([3, 400, 5], 2))), "token id 400"),
        (dict(task=Anonymous(prompt([3] * 300, 2))), "at most 256"),
    ],
)
def test_refusals(llama, change, message, monkeypatch):
    monkeypatch.setattr(dose, "cached_prefix", lambda *args: pytest.fail("a pass was run"))
    monkeypatch.setattr(dose, "pair_norms", lambda *args: pytest.fail("a pass was run"))
    before = state(llama)
    given = {
        "heads": HEADS,
        "rotary_pairs": range(2, 4),
        "strengths": STRENGTHS,
        "task": Ends(),
        **OPTIONS,
        **change,
    }
    with pytest.raises(PosheadsError, match=message) as refusal:
        dose_response(llama, **given)
    assert "\n" not in str(refusal.value)
    assert state(llama)[:2] == before[:2]

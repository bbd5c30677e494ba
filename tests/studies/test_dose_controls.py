"""Controls of edited rotary pairs: draws and norms by hand, and a head that looks with one pair."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import planted as plant
from helpers import small_models
from helpers.traces import warm
from tl_posheads import PosheadsError, dose_response
from tl_posheads.hooks.capture import hook_names, rotary_hook_points
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.studies.ablation.dose_controls import (
    CONTROLS,
    other_pairs,
    pair_draws,
    pair_norms,
)
from tl_posheads.tasks.base import Prompt

pytestmark = pytest.mark.lens

TOKENS = torch.randint(3, 90, (4, 30), generator=torch.Generator().manual_seed(8))
HEADS = [(1, 2), (0, 1)]


def test_norms_are_products_of_mean_lengths():
    llama = small_models.rotary_model("Llama")
    geometry = RotaryGeometry.from_model(llama, layers=[0, 1])
    with rotary_hook_points(llama), torch.no_grad():
        _, cache = llama.run_with_cache(TOKENS, names_filter=hook_names([0, 1]))
    products = []
    for layer, head in HEADS:
        q = cache[f"blocks.{layer}.attn.hook_rot_q"][:, :, head].reshape(-1, 8).numpy()
        kv = geometry[layer].kv_head[head]
        k = cache[f"blocks.{layer}.attn.hook_rot_k"][:, :, kv].reshape(-1, 8).numpy()
        mean = [
            [np.mean([np.sqrt(x[m] ** 2 + x[m + 4] ** 2) for x in side]) for m in range(4)]
            for side in (q, k)
        ]
        products.append(np.prod(mean, axis=0))
    prompts = [Prompt(row, torch.tensor([29])) for row in TOKENS]
    found = pair_norms(llama, prompts, HEADS, geometry)
    np.testing.assert_allclose(found, np.mean(products, axis=0), rtol=1e-5)


def test_draws_of_pairs_are_different_sets_of_others():
    others = [0, 1, 2, 5, 6, 7, 9]
    draws = pair_draws([3, 4, 8], others, 30, seed=1)
    assert len({*map(tuple, draws)}) == 30
    assert all(len({*draw}) == 3 and {*draw} <= {*others} for draw in draws)
    assert pair_draws([3, 4, 8], others, 5, seed=1) == draws[:5]
    assert pair_draws([3, 4, 8], others, 5, seed=2) != draws[:5]
    firsts = [pair_draws([3, 4, 8], others, 1, seed=s)[0] for s in range(300)]
    share = [np.mean([m in draw for draw in firsts]) for m in others]
    np.testing.assert_allclose(share, 3 / 7, atol=0.1)
    # Where there are fewer sets than draws, each comes once.
    assert sorted(pair_draws([0, 1], [2, 3, 4], 19, seed=0)) == [[2, 3], [2, 4], [3, 4]]
    assert pair_draws([0, 1], [2, 3], 19, seed=0) == [[2, 3]]


def test_draws_of_like_norm_are_among_the_four_nearest():
    # By factors: 16 is nearer to 10 than 4.5 is. Behind 10 and 1 stand four of each, and three more.
    norms = np.array([10.0, 1.0, 16.0, 9.0, 11.0, 14.0, 0.5, 0.9, 1.1, 2.0, 1000.0, 4.5, 0.0])
    draws = pair_draws([0, 1], range(2, 13), 16, seed=4, norms=norms)
    by_hand = [[a, b] for a in (2, 3, 4, 5) for b in (6, 7, 8, 9)]
    assert sorted(draws) == by_hand
    assert pair_draws([0, 1], range(2, 13), 3, seed=4, norms=norms) == draws[:3]
    # What one pair got, no other gets; the last one takes what is left.
    assert pair_draws([0, 1], [3, 10], 5, seed=0, norms=norms) == [[3, 10]]
    assert sorted(pair_draws([0], range(2, 13), 19, seed=0, norms=norms)) == [[2], [3], [4], [5]]


def test_others_turn_in_every_layer():
    frequencies = torch.tensor([1.0, 0.5, 0.1, 0.0, 0.01])
    layers = [
        LayerGeometry.from_inv_freq(frequencies),
        LayerGeometry.from_inv_freq(frequencies[:3]),
    ]
    assert other_pairs([1], [(0, 0)], layers) == [0, 2, 4]
    assert other_pairs([1], [(0, 0), (1, 0)], layers) == [0, 2]
    with pytest.raises(PosheadsError, match="2 rotary pairs were given, but only 1 others"):
        other_pairs([1, 2], [(0, 0), (1, 0)], layers)


@pytest.fixture(scope="module")
def retriever():
    """Its head looks with pair 7; pairs 3 to 6 are as long and do nothing, others are 0."""
    return warm(plant.planted_retriever(n_layers=4, n_heads=8, planted=(2, 5), idle=range(3, 7)))


def test_a_planted_pair_is_told_from_others_of_its_head(retriever):
    task, options = plant.Retrieval(n=3, length=24), dict(seed=2, progress=False)
    given = (retriever, [(2, 5)], [0, 7], [0.5, 1.0], task)
    found = dose_response(*given, controls=CONTROLS[1:], **options)
    table = found.to_pandas().query("strength == 1").set_index("control")
    assert (table["effect"] < -1).all()
    assert (table["control_min"].abs() < 0.01).all()
    assert (table["exact"] == 0).all()
    assert (table["control_exact"] == 1).all()
    assert (table["difference_high"] < -1).all()
    assert table.loc["random_rotary_pairs", "n_draws"] == 15  # all sets of two of six
    assert table.loc["random_rotary_pairs", "p"] == 1 / 16
    again = dose_response(*given, controls=CONTROLS[1:], **options)
    assert again.sets == found.sets
    pd.testing.assert_frame_equal(again.cells, found.cells)
    other = dose_response(*given, controls=CONTROLS[1:], **{**options, "seed": 3})
    assert other.sets != found.sets
    # Idle pairs do no harm, and some of their controls hold the one that looks.
    idle = dose_response(retriever, [(2, 5)], [3, 4], [1.0], task, controls=CONTROLS[1:], **options)
    table = idle.to_pandas().set_index("control")
    assert (table["effect"].abs() < 0.01).all()
    assert (table["control_min"] < -1).all()
    assert (table["p"] > 0.5).all()


def test_pairs_of_like_norm_are_the_idle_ones(retriever):
    task, options = plant.Retrieval(n=3, length=24), dict(seed=2, progress=False)
    found = dose_response(retriever, [(2, 5)], 7, [1.0], task, controls=CONTROLS[2:], **options)
    assert found.norms[:3] == [0, 0, 0]
    np.testing.assert_allclose(found.norms[3:7], found.norms[7], rtol=0.05)
    assert sorted(one.rotary_pairs for one in found.sets[1:]) == [[3], [4], [5], [6]]
    row = found.to_pandas().iloc[0]
    assert row["norm_ratio"] == pytest.approx(1, rel=0.05)
    assert row["p"] == 1 / 5
    # A pair that weighs nothing has no part in what its head does.
    light = dose_response(retriever, [(2, 5)], 0, [1.0], task, controls=CONTROLS[2:], **options)
    assert np.abs(light.effects()[0]).max() < 1e-4
    assert np.isnan(light.to_pandas()["norm_ratio"].iloc[0])

"""Dominant dimension from a cache of the user's."""

from __future__ import annotations

import pytest
import torch

import tl_posheads as ph
from helpers import small_models
from tl_posheads import PosheadsError, RotaryGeometry, dimension_contributions, dominant_dimension


@pytest.mark.parametrize("name", ["Llama", "GPT-J", "Gemma 2"])
def test_dominant_from_cache_is_by_hand(name):
    model = small_models.rotary_model(name)
    tokens = torch.stack([torch.arange(3, 15), torch.arange(20, 32)])
    with ph.rotary_hook_points(model):
        _, cache = model.run_with_cache(tokens)
    layer, head = 1, 2
    found = ph.dominant_from_cache(model, cache, layer, head)
    assert found.shape == (2, 12, 12)
    geometry = RotaryGeometry.from_model(model, length=12)[layer]
    q, k = (cache[f"blocks.{layer}.attn.hook_rot_{x}"] for x in "qk")
    by_hand = dominant_dimension(dimension_contributions(q, k, geometry))[:, head]
    at = torch.arange(12)
    apart = at[:, None] - at
    seen = (apart >= 1) & (apart < (geometry.window or 12))
    torch.testing.assert_close(found[:, seen], by_hand[:, seen], atol=1e-6, rtol=0)
    assert found[:, ~seen].isnan().all()


@pytest.mark.parametrize("head", [2, [3, 1], None])
def test_square_maps_of_a_layer(head):
    model = small_models.rotary_model("Gemma 2")
    with ph.rotary_hook_points(model):
        _, cache = model.run_with_cache(torch.arange(3, 27)[None])
    geometry = RotaryGeometry.from_model(model, length=24)
    q, k = (cache[f"blocks.1.attn.hook_rot_{x}"] for x in "qk")
    found = ph.dominant_map(q[0], k[0], geometry, layer=1, head=head)
    parts = dimension_contributions(q, k, geometry, layer=1, head=head)[0]
    at = torch.arange(24)
    apart = at[:, None] - at
    seen = (apart >= 1) & (apart < (geometry[1].window or 24))
    by_hand = dominant_dimension(parts).masked_fill(~seen, float("nan"))
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=0, equal_nan=True)
    assert found.shape == (24, 24) if head == 2 else (len(head or range(4)), 24, 24)


def test_a_square_map_is_of_one_text():
    geometry = ph.LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]))
    q = torch.randn(1, 9, 1, 4)
    with pytest.raises(PosheadsError, match=r"\(1, 9, 1, 4\) .* of one text"):
        ph.dominant_map(q, q, geometry)
    with pytest.raises(PosheadsError, match="head=1 was given"):
        ph.dominant_map(q[0], q[0], geometry, head=1)


def test_a_cache_without_rotated_queries():
    model = small_models.rotary_model("Llama")
    with pytest.raises(PosheadsError, match=r"holds no blocks\.1\.attn\.hook_rot_q"):
        ph.dominant_from_cache(model, {}, 1, 2)
    with pytest.raises(PosheadsError, match="has layers 0 to"):
        ph.dominant_from_cache(model, {}, 7, 2)


def test_a_heads_row(tmp_path):
    model = small_models.rotary_model("Llama")
    scores = ph.score_heads(model, torch.arange(3, 35).reshape(2, 16), progress=False)
    assert scores["L1H2"]["rho"] == float(scores.rho[1, 2])
    assert scores[1, 2].equals(scores["1.2"])
    with pytest.raises(PosheadsError, match="L7H0"):
        scores["L7H0"]


def test_public_names_only():
    assert set(dir(ph)) == set(ph.__all__)
    assert "annotations" not in dir(ph)
    assert "__version__" in dir(ph)

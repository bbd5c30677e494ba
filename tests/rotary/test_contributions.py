"""Contributions and dominant dimension against loops written from the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_posheads import (
    LayerGeometry,
    PosheadsError,
    RotaryGeometry,
    dimension_contributions,
    dominant_dimension,
    unrotated_contribution,
)
from tl_posheads.rotary.contributions import PairVectors, join_pairs, rotate_by, split_pairs
from tl_posheads.scoring.curves import sum_by_distance


def geometry(n_pairs=3, n_heads=4, n_kv_heads=2, rest=2, layout="half"):
    inv_freq = 10.0 ** -torch.arange(n_pairs).double()
    return LayerGeometry.from_inv_freq(
        inv_freq, n_heads, n_kv_heads=n_kv_heads, d_head=2 * n_pairs + rest, layout=layout
    )


def tensors(g, pos=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, pos, g.n_heads, g.d_head, generator=generator, dtype=dtype)
    k = torch.randn(1, pos, g.n_kv_heads, g.d_head, generator=generator, dtype=dtype)
    return q, k


def coordinates(g, m):
    return (m, m + g.n_pairs) if g.layout == "half" else (2 * m, 2 * m + 1)


@pytest.mark.parametrize("layout", ["half", "adjacent"])
def test_contributions_equal_the_definition_written_as_loops(layout):
    g = geometry(layout=layout)
    q, k = tensors(g)
    got = dimension_contributions(q, k, g)
    assert got.shape == (1, 4, 6, 6, 3)
    for h in range(4):
        for i in range(6):
            for j in range(6):
                for m in range(3):
                    expected = sum(q[0, i, h, c] * k[0, j, h // 2, c] for c in coordinates(g, m))
                    assert math.isclose(got[0, h, i, j, m], expected, abs_tol=1e-12)


@given(
    n_pairs=st.integers(1, 9),
    shape=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    rest=st.integers(0, 5),
    layout=st.sampled_from(["half", "adjacent"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_contributions_and_the_rest_sum_to_the_product(n_pairs, shape, rest, layout, seed):
    g = geometry(n_pairs, *shape, rest, layout)
    q, k = tensors(g, seed=seed)
    whole = dimension_contributions(q, k, g).sum(-1) + unrotated_contribution(q, k, g)
    keys = k.repeat_interleave(shape[0] // shape[1], dim=2)
    expected = torch.einsum("bihd,bjhd->bhij", q, keys)
    torch.testing.assert_close(whole, expected)
    scaled = dimension_contributions(q, k, g, scale="attention")
    torch.testing.assert_close(scaled, dimension_contributions(q, k, g) * g.attention_scale)


def three_layers():
    """A model's geometry by hand: its second layer has no RoPE, its third another layout."""
    bare = LayerGeometry.from_inv_freq(torch.zeros(0), 4, n_kv_heads=2, d_head=8)
    return RotaryGeometry("by hand", (geometry(), bare, geometry(layout="adjacent")))


@pytest.mark.parametrize("function", [dimension_contributions, unrotated_contribution])
@pytest.mark.parametrize("head", [2, np.int64(2), [2], [3, 0], slice(None)])
def test_heads_of_a_layer_of_a_model(function, head):
    model = three_layers()
    q, k = tensors(model[2])
    whole = function(q, k, model[2])
    assert whole.shape[:4] == (1, 4, 6, 6)
    asked = None if isinstance(head, slice) else head
    found = function(q, k, model, layer=2, head=asked)
    np.testing.assert_array_equal(found, whole.numpy()[:, head])
    np.testing.assert_array_equal(function(q, k, model[2], head=asked), found)
    if function is dimension_contributions:  # the other layout has other pairs
        assert not np.allclose(found, function(q, k, model, layer=0, head=asked))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"layer=None .* RotaryGeometry\(by hand: 3 layers .* one of \[0, 2\]"),
        ({"layer": 1}, "layer=1 .* has RoPE"),
        ({"layer": -1}, "layer=-1"),
        ({"layer": 2, "head": 4}, "head=4 .* 0 to 3"),
        ({"layer": 2, "head": []}, "head=.. was given"),
        ({"layer": 2, "head": "L2H1"}, "head='L2H1'"),
    ],
)
def test_layers_and_heads_that_are_not_there(options, message):
    model = three_layers()
    q, k = tensors(model[2])
    for function in (dimension_contributions, unrotated_contribution):
        with pytest.raises(PosheadsError, match=message):
            function(q, k, model, **options)
    with pytest.raises(PosheadsError, match="layer=2 .* is one layer's"):
        dimension_contributions(q, k, model[2], layer=2)


@given(shift=st.integers(0, 500), layout=st.sampled_from(["half", "adjacent"]))
@settings(max_examples=20, deadline=None)
def test_contributions_do_not_change_when_all_positions_shift(shift, layout):
    g = geometry(layout=layout)
    q, k = tensors(g)
    steps = torch.full((6,), shift)
    moved = dimension_contributions(rotate_by(q, steps, g), rotate_by(k, steps, g), g)
    torch.testing.assert_close(moved, dimension_contributions(q, k, g))


def test_rotation_follows_the_angle_of_each_pair():
    g = geometry(n_pairs=2, n_heads=1, n_kv_heads=1, rest=1)
    x = torch.tensor([[[1.0, 1.0, 0.0, 0.0, 5.0]]], dtype=torch.float64)
    turned = rotate_by(x, torch.tensor([3]), g)[0, 0]
    expected = [math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3), 5.0]
    np.testing.assert_allclose(turned, expected)


@pytest.mark.parametrize("layout", ["half", "adjacent"])
def test_pairs_split_and_join(layout):
    g = geometry(layout=layout)
    x = torch.arange(8.0)
    first, second = split_pairs(x, g)
    assert [first.tolist(), second.tolist()] == (
        [[0, 1, 2], [3, 4, 5]] if layout == "half" else [[0, 2, 4], [1, 3, 5]]
    )
    assert torch.equal(join_pairs(first, second, x[6:], g), x)


def test_dominant_dimension_by_hand():
    c = torch.tensor([0.0, math.log(3.0), -math.inf])
    assert math.isclose(dominant_dimension(c).item(), 0.75, rel_tol=1e-7)
    assert dominant_dimension(torch.full((5, 4), 900.0)).tolist() == [1.5] * 5


@given(seed=st.integers(0, 99), loud=st.sampled_from([0.1, 1.0, 30.0]))
@settings(max_examples=20, deadline=None)
def test_blockwise_dominant_dimension_equals_the_plain_one(seed, loud):
    g = geometry(n_pairs=5)
    q, k = (x * loud for x in tensors(g, pos=9, seed=seed))
    plain = dominant_dimension(dimension_contributions(q, k, g))[0]
    vectors = PairVectors(q[0], k[0], g)
    rows = torch.tensor([2, 5, 8])
    block = vectors.dominant_rows(rows, slice(1, 7))
    torch.testing.assert_close(block, plain[:, rows, 1:7])
    weights = torch.stack(list(vectors.weight_rows(rows, slice(0, 9))), -1)
    torch.testing.assert_close(
        weights, dimension_contributions(q, k, g).softmax(-1)[0][:, rows], atol=1e-6, rtol=1e-5
    )


def test_saturated_heads_keep_the_order_of_their_last_digits():
    # One pair wins by so much that D differs from it by 1e-11 to 1e-9: far below float32's step.
    g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]))
    q = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    k = torch.stack([torch.tensor([[21.0 + j / 2, 0.0, 0.0, 0.0]]) for j in range(8)])
    d = PairVectors(q, k, g).dominant_rows(torch.tensor([0]), slice(0, 8))[0, 0]
    assert bool((d[1:] < d[:-1]).all())
    np.testing.assert_allclose(d, 1 / (1 + np.exp(21 + np.arange(8) / 2)), rtol=1e-4)


def test_diagonal_sums_equal_loops():
    block = torch.randn(2, 3, 5)
    got = sum_by_distance(block)
    # queries 10, 11, 12 against keys 4..8: distances 2 .. 8
    expected = torch.zeros(2, 7)
    for r in range(3):
        for c in range(5):
            expected[:, (10 + r) - (4 + c) - 2] += block[:, r, c]
    torch.testing.assert_close(got, expected)


def test_tensors_of_another_layer_are_refused():
    g = geometry()
    q, k = tensors(g)
    with pytest.raises(PosheadsError, match="d_head=8"):
        dimension_contributions(q[..., :7], k[..., :7], g)
    with pytest.raises(PosheadsError, match="4 query heads and 2 key heads"):
        dimension_contributions(q, q, g)
    with pytest.raises(PosheadsError, match="expected 'none' or 'attention'"):
        dimension_contributions(q, k, g, scale="model")  # type: ignore[arg-type]

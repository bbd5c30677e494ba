"""Planes of the q-k space against rotary pairs, planted processes and loops from the formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from helpers.matrices import orthonormal, seeded
from tl_posheads import LayerGeometry, PosheadsError, dimension_contributions, dominant_dimension
from tl_posheads.rotary.contributions import rotate_by, split_pairs
from tl_posheads.studies.encodings import (
    PlaneVectors,
    bias_speed,
    distance_products,
    dominant_by_distance,
    half_lives,
    log_shifts,
    ordered_planes,
    plane_contributions,
    planes_by_products,
    rotation_operators,
    transport_operator,
)


def layer(n_pairs, theta=1e4, rest=0, layout="half", n_heads=1):
    inv_freq = theta ** (-torch.arange(n_pairs).double() / n_pairs)
    return LayerGeometry.from_inv_freq(inv_freq, n_heads, d_head=2 * n_pairs + rest, layout=layout)


LAYERS = [
    layer(32, 1e4),
    layer(32, 1e5),
    layer(16, 1e4, rest=8),
    layer(16, 1e5, layout="adjacent"),
    layer(8, 1e4, rest=16, layout="adjacent"),
]


def pair_projector(geometry, m):
    """Onto the two coordinates of rotary pair m, by the package's own reading of the layout."""
    rows = torch.eye(geometry.d_head, dtype=torch.float64)
    first, second = split_pairs(rows, geometry)
    return torch.outer(first[:, m], first[:, m]) + torch.outer(second[:, m], second[:, m])


def plane_projector(basis, m):
    two = basis.vectors[2 * m : 2 * m + 2]
    return two.T @ two


# --- RoPE --------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", LAYERS)
def test_rotations_give_back_the_rotary_pairs_in_their_order(geometry):
    shifts = log_shifts(1 << 16)
    basis = ordered_planes(rotation_operators(geometry, shifts), shifts)
    for m in range(geometry.n_pairs):
        assert torch.allclose(plane_projector(basis, m), pair_projector(geometry, m), atol=1e-8)
    assert basis.moves.tolist() == [m < geometry.n_pairs for m in range(geometry.d_head // 2)]
    expected = math.pi / 3 / geometry.inv_freq
    # The shifts are half an octave apart, and cos is no straight line between them.
    assert torch.allclose(1 / basis.plane_speeds[basis.moves], expected, rtol=0.06)
    assert (basis.explained, basis.diagonal) == (1.0, pytest.approx(1.0))


@pytest.mark.parametrize("geometry", LAYERS)
def test_rotations_are_found_from_random_content_alone(geometry):
    x = torch.randn(3 * geometry.d_head, 1, geometry.d_head, generator=seeded()).double()
    shifts = log_shifts(4096)
    found = []
    for s in shifts:
        moved = rotate_by(x, torch.full((len(x),), s), geometry)
        found.append(transport_operator(x[:, 0], moved[:, 0], ridge=0.0))
    assert torch.allclose(
        found[3].operator, rotation_operators(geometry, [shifts[3]])[0], atol=1e-10
    )
    basis = ordered_planes(found, shifts)
    for m in range(geometry.n_pairs):
        assert torch.allclose(plane_projector(basis, m), pair_projector(geometry, m), atol=1e-6)
    assert basis.source == "transport"
    assert basis.explained_change == pytest.approx(1.0)


def test_slower_than_the_longest_shift_is_extrapolated_in_order():
    geometry, shifts = layer(32, 1e5), log_shifts(64)
    basis = ordered_planes(rotation_operators(geometry, shifts), shifts)
    slow = geometry.inv_freq < 0.5 / 64
    assert int(slow.sum()) > 10
    # Where little is lost, 1 - cos(s theta) = (s theta)^2 / 2, which is 1/2 at s = 1 / theta.
    assert torch.allclose(1 / basis.plane_speeds[slow], 1 / geometry.inv_freq[slow], rtol=0.02)
    assert (basis.speeds.diff() <= 0).all()


@pytest.mark.parametrize("geometry", LAYERS[2:])
def test_rho_with_planes_is_rho_with_rotary_pairs(geometry):
    content = torch.randn(2, 40, 1, geometry.d_head, generator=seeded(3)).double()
    q, k = (rotate_by(x, torch.arange(40), geometry) for x in content)
    shifts = log_shifts(1 << 16)
    basis = ordered_planes(rotation_operators(geometry, shifts), shifts)
    distance, dominant = dominant_by_distance(PlaneVectors(q, k, [basis]))
    truth = dominant_dimension(dimension_contributions(q, k, geometry))[0]
    i, j = np.tril_indices(40, -1)
    expected = stats.spearmanr(i - j, truth[i, j].numpy()).statistic
    assert stats.spearmanr(distance, dominant[0]).statistic == pytest.approx(expected, abs=1e-9)


# --- half-lives --------------------------------------------------------------------------------


def loop_half_life(r, s):
    before = (0.0, 1.0)
    for at, left in zip(s, r):
        if left < 0.5:
            return before[0] + (before[1] - 0.5) / (before[1] - left) * (at - before[0])
        before = (at, left)
    return s[-1] * math.sqrt(0.5 / (1 - r[-1])) if r[-1] < 1 - 1e-12 else math.inf


def test_half_lives_against_a_loop():
    r = torch.rand(7, 200, generator=seeded(), dtype=torch.float64) * 0.9 + 0.3
    r[:, 0] = 1.0
    s = torch.tensor([1.0, 2, 3, 4, 6, 8, 11]).double()
    found = half_lives(r.clamp(max=1.0), s)
    expected = [loop_half_life(row, s.tolist()) for row in r.clamp(max=1.0).T.tolist()]
    assert found.tolist() == pytest.approx(expected)
    assert any(x > 11 for x in expected[1:])


# --- encodings that are added to the content ----------------------------------------------------


def test_sinusoidal_positions_are_found_in_their_order():
    """q = content + position, in a basis that nothing knows of."""
    n_planes, n_pos = 4, 512
    frequency = torch.tensor([1.0, 0.3, 0.08, 0.02]).double()
    hidden = orthonormal(2 * n_planes, seed=5)
    content = 0.4 * torch.randn(16, n_pos, 2 * n_planes, generator=seeded(6), dtype=torch.float64)

    def q(offset):
        angle = (torch.arange(n_pos).double() + offset)[:, None] * frequency
        position = torch.stack([angle.cos(), angle.sin()], -1).flatten(1)
        return ((content + position) @ hidden.T).flatten(0, 1)

    shifts = log_shifts(256)
    basis = ordered_planes([transport_operator(q(0), q(s)) for s in shifts], shifts)
    for m in range(n_planes):
        truth = hidden[:, 2 * m : 2 * m + 2]
        assert (plane_projector(basis, m) * (truth @ truth.T)).sum() / 2 > 0.98
    # Content stays, so that r(s) = (c + p cos(s w)) / (c + p), with p = 1/2 a coordinate.
    c, p = 0.16, 0.5
    expected = torch.acos(torch.tensor((0.5 * (c + p) - c) / p).double()) / frequency
    assert torch.allclose(1 / basis.plane_speeds, expected, rtol=0.15)
    assert 0.5 < basis.explained_change < 1


def test_what_the_vectors_do_not_reach_stands_still():
    x = torch.randn(60, 6, generator=seeded(), dtype=torch.float64)
    x[:, 4:] = 0
    moved = x.clone()
    moved[:, :2] = x[:, :2] @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()
    operator = transport_operator(x, moved).operator
    assert torch.allclose(operator[2:], torch.eye(6).double()[2:], atol=1e-5)


def test_r2_is_what_the_residuals_say():
    x = torch.randn(80, 4, generator=seeded(), dtype=torch.float64)
    moved = x + 0.3 * torch.randn(80, 4, generator=seeded(1), dtype=torch.float64)
    found = transport_operator(x, moved, ridge=0.0)
    expected = torch.linalg.lstsq(x, moved).solution.T
    assert torch.allclose(found.operator, expected, atol=1e-9)
    left = (moved - x @ expected.T).square().sum()
    assert found.r2 == pytest.approx(float(1 - left / moved.square().sum()))
    assert found.r2_change == pytest.approx(float(1 - left / (moved - x).square().sum()))


# --- encodings that move nothing ----------------------------------------------------------------


def test_an_encoding_that_moves_nothing_orders_nothing():
    q = torch.randn(40, 6, generator=seeded())
    shifts = [1, 2, 4]
    basis = ordered_planes([transport_operator(q, q) for _ in shifts], shifts)
    assert basis.speeds.tolist() == [0.0] * 6
    assert not basis.moves.any()
    assert basis.explained_change == 1.0


def autoregressive(n_docs, n_pos, memory, seed):
    """Each plane forgets at its own rate: correlation ``memory ** d`` at distance d."""
    generator, keep = seeded(seed), memory.repeat_interleave(2)
    x = torch.randn(n_docs, len(keep), generator=generator, dtype=torch.float64)
    out = [x]
    for _ in range(n_pos - 1):
        new = torch.randn(n_docs, len(keep), generator=generator, dtype=torch.float64)
        x = keep * x + (1 - keep**2).sqrt() * new
        out.append(x)
    return torch.stack(out, dim=1)


def test_distance_products_against_loops():
    q, k = torch.randn(2, 3, 20, 2, 4, generator=seeded(), dtype=torch.float64)
    found = distance_products(q, k)
    edges = [1, 2, 3, 4, 6, 8, 10]
    for b, (low, high) in enumerate(pairwise(edges)):
        pairs = [(i, i - d) for d in range(low, high) for i in range(d, 20)]
        expected = sum(torch.outer(q[1, i, 1], k[1, j, 1]) for i, j in pairs) / len(pairs)
        assert torch.allclose(found.products[1, b, 1], expected)
        assert found.distance[b] == pytest.approx(np.mean([i - j for i, j in pairs]))
    assert found.products.shape[1] == len(edges) - 1


def test_planes_by_products_follow_planted_memories():
    memory = torch.tensor([0.6, 0.9, 0.98]).double()
    hidden = orthonormal(6, seed=2)
    x = (autoregressive(60, 256, memory, seed=1) @ hidden.T)[:, :, None]
    basis = planes_by_products(distance_products(x, x), 0)
    for m in range(3):
        truth = hidden[:, 2 * m : 2 * m + 2]
        assert (plane_projector(basis, m) * (truth @ truth.T)).sum() / 2 > 0.95
    # From distance 1 on: m(d) / m(1) = memory^(d - 1).
    expected = math.log(0.5) / memory.log()
    assert torch.allclose(1 / basis.plane_speeds, expected, rtol=0.3)
    assert basis.source == "products"
    assert math.isnan(basis.explained_change)


def test_directions_without_a_mean_product_do_not_pass_for_fast():
    planted = autoregressive(24, 128, torch.tensor([0.8]).double(), seed=3)
    noise = torch.randn(2, 24, 128, 6, generator=seeded(4), dtype=torch.float64)
    q, k = (torch.cat([planted, x], dim=-1)[:, :, None] for x in noise)
    basis = planes_by_products(distance_products(q, k), 0)
    truth = torch.eye(8).double()[:2]
    assert (plane_projector(basis, 0) * (truth.T @ truth)).sum() / 2 > 0.95


# --- the bias -----------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.25, 1 / 16, 1 / 64, 1e-4])
def test_alibi_is_as_fast_as_its_slope(slope):
    n = 256
    half = 1 / bias_speed(-slope * torch.arange(n))
    if math.log(2) / slope < n:
        assert half == pytest.approx(math.log(2) / slope, rel=0.02)
    else:  # extrapolated, and far beyond
        assert half > n


def test_a_bias_in_steps_is_as_fast_as_its_first_large_step():
    # T5's buckets: nothing until distance 16, then a jump; a constant on top changes nothing.
    bias = torch.where(torch.arange(64) < 16, 0.0, -3.0)
    assert 15 <= 1 / bias_speed(bias) <= 16
    assert bias_speed(bias + 7.0) == pytest.approx(bias_speed(bias))
    assert bias_speed(-bias) == pytest.approx(bias_speed(bias))
    assert bias_speed(torch.zeros(64)) == 0.0


def products_basis(seed=0, bias=None):
    memory = torch.tensor([0.6, 0.9, 0.98]).double()
    x = autoregressive(60, 256, memory, seed=1)[:, :, None]
    return planes_by_products(distance_products(x, x), 0, bias=bias)


@pytest.mark.parametrize(("half_life", "place"), [(0.7, 0), (3.0, 1), (15.0, 2), (100.0, 3)])
def test_the_bias_has_its_place_among_the_planes(half_life, place):
    # Planes with half-lives of about 1.4, 6.6 and 34 tokens.
    basis = products_basis(bias=-math.log(2) / half_life * torch.arange(256))
    assert basis.bias_at == place
    assert basis.n_dimensions == 4
    assert products_basis().bias_at is None


@pytest.mark.parametrize("place", range(4))
def test_contributions_with_a_bias_sum_to_the_score_and_stand_in_their_places(place):
    q, k = torch.randn(2, 9, 6, generator=seeded(7), dtype=torch.float64)
    speed = [2.0, 0.5, 0.05, 1e-3][place]
    basis = replace(
        products_basis(),
        speeds=torch.tensor([1.0, 1.0, 0.1, 0.1, 0.01, 0.01]).double(),
        bias_speed=speed,
    )
    bias = torch.randn(9, generator=seeded(8), dtype=torch.float64)
    found = plane_contributions(q, k, basis, bias)
    assert basis.bias_at == place
    a, b = q @ basis.vectors.T, k @ basis.vectors.T
    for i in range(9):
        for j in range(i + 1):
            planes = [float(a[i, 2 * m : 2 * m + 2] @ b[j, 2 * m : 2 * m + 2]) for m in range(3)]
            planes.insert(place, float(bias[i - j]))
            assert found[i, j].tolist() == pytest.approx(planes)
            assert float(found[i, j].sum()) == pytest.approx(float(q[i] @ k[j] + bias[i - j]))


@pytest.mark.parametrize("bias_speed", [0.1, 0.0])
def test_heads_with_their_biases_in_different_places_against_loops(bias_speed):
    q, k = torch.randn(2, 12, 3, 6, generator=seeded(9), dtype=torch.float64)
    base = products_basis()
    bases = [replace(base, bias_speed=speed) for speed in (9.0, 0.1, 1e-6)]
    still = base.speeds.clone()
    still[4:] = 0
    # A head whose last plane stands still, and then one whose bias comes behind it.
    bases[1] = replace(bases[1], speeds=still, bias_speed=bias_speed)
    bias = torch.randn(3, 12, generator=seeded(1), dtype=torch.float64)
    for unmoved in ("left_out", "last"):
        vectors = PlaneVectors(q, k, bases, bias, unmoved=unmoved)
        distance, dominant = dominant_by_distance(vectors, window=7)
        pairs = [(i, j) for i in range(12) for j in range(i) if i - j < 7]
        assert distance.tolist() == [i - j for i, j in pairs]
        for head, basis in enumerate(bases):
            for n, (i, j) in enumerate(pairs):
                a, b = basis.vectors @ q[i, head], basis.vectors @ k[j, head]
                c = (a * b).view(3, 2).sum(1).tolist()
                if head == 1 and unmoved == "left_out":
                    c = c[:2]
                c.insert(basis.bias_at, float(bias[head, i - j]))
                w = np.exp(np.array(c) - max(c))
                expected = (w * np.arange(len(c))).sum() / w.sum()
                assert float(dominant[head, n]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_shifts(0), "expected 1 or more"),
        (lambda: transport_operator(torch.zeros(3, 2), torch.zeros(4, 2)), "expected the same"),
        (
            lambda: transport_operator(torch.ones(3, 2), torch.ones(3, 2), ridge=-1),
            "expected 0 or more",
        ),
        (lambda: ordered_planes(torch.eye(2)[None], [2, 1]), "an operator for each shift"),
        (lambda: ordered_planes(torch.eye(3)[None], [1]), "an even number"),
        (
            lambda: distance_products(torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2)),
            "8 positions",
        ),
        (lambda: bias_speed(torch.zeros(1)), "2 or more"),
        (
            lambda: plane_contributions(*torch.zeros(2, 4, 6), products_basis(), torch.zeros(4)),
            "make the bases with the bias",
        ),
        (lambda: plane_contributions(*torch.zeros(2, 4, 5), products_basis()), "a basis for each"),
        (
            lambda: PlaneVectors(*torch.zeros(2, 4, 1, 6), [products_basis()], unmoved="first"),
            "unmoved",
        ),
    ],
)
def test_bad_calls_say_what_was_expected(call, message):
    with pytest.raises(PosheadsError, match=message):
        call()

"""A text measured, against loops in numpy and scipy's ranks; contents moved as RoPE would."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy import stats

from helpers.text_by_hand import (
    CPU,
    GEOMETRIES,
    INV_FREQ,
    NAME,
    all_by_hand,
    as_complex,
    by_hand,
    dominant,
    every_pair,
    measured,
    planted,
    positions,
    rising,
    text,
    weighted_spearman,
)
from tl_posheads import LayerGeometry
from tl_posheads.rotary.contributions import rotate_by
from tl_posheads.rotary.remapping import Region, Remapping
from tl_posheads.scoring import all_pairs, draws
from tl_posheads.scoring.draws import MEASURES, DocumentDraws, Settings


@pytest.mark.parametrize("scale", ["none", "attention"])
@pytest.mark.parametrize("kind", GEOMETRIES)
def test_rho_is_scipys_over_loops(kind, scale):
    geometry = GEOMETRIES[kind]
    q, k = text(geometry, 30)
    found = measured(q, k, geometry, Settings(draws=500, scale=scale))
    factor = 1.0 if scale == "none" else geometry.attention_scale
    for head in range(geometry.n_heads):
        distance, d = all_by_hand(q, k, geometry, head, factor)
        assert found["n_qk_pairs"][head] == len(d)
        assert found["rho"][head] == pytest.approx(stats.spearmanr(distance, d).statistic, abs=1e-9)
        assert found["d_near"][head] == pytest.approx(d[distance <= 2].mean(), abs=1e-9)
        far = distance >= (distance.max() + 1) // 2
        if far.sum() <= 256:
            assert found["d_far"][head] == pytest.approx(d[far].mean(), abs=1e-9)


@pytest.mark.parametrize("kind", ["half", "grouped", "windowed"])
def test_with_distances_weighed_alike_rho_is_weighted(kind):
    geometry = GEOMETRIES[kind]
    q, k = text(geometry, 24, seed=1)
    found = measured(q, k, geometry, Settings(draws=500, weighting="distance"))
    for head in range(geometry.n_heads):
        distance, d = all_by_hand(q, k, geometry, head)
        weights = 1 / np.bincount(distance)[distance]
        expected = weighted_spearman(distance, d, weights)
        assert found["rho"][head] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("weighting", ["pair", "distance"])
@pytest.mark.parametrize("n", [60, 500])
@pytest.mark.parametrize("scale", ["none", "attention"])
@pytest.mark.parametrize("kind", GEOMETRIES)
def test_rotation_and_content_turn_contents_back_and_on(kind, scale, n, weighting):
    geometry = GEOMETRIES[kind]
    q, k = text(geometry, 25, seed=2)
    settings = Settings(draws=n, scale=scale, weighting=weighting)
    found = measured(q, k, geometry, settings)
    draw = DocumentDraws(NAME, 25, settings).within(geometry.window, CPU)
    pairs, places, *_ = positions(draw)
    assert (len(pairs) == 60) == (n == 60)
    weights = np.ones(len(pairs))
    if weighting == "distance" and n == 500:
        per_distance = np.bincount([i - j for i, j in pairs])
        weights = np.array(
            [1 / per_distance[i - j] / per_distance[a - b] for (i, j), (a, b) in zip(pairs, places)]
        )
    factor = 1.0 if scale == "none" else geometry.attention_scale
    for head in range(geometry.n_heads):
        d = np.array(
            [
                by_hand(q, k, geometry, head, pair, place, factor)
                for pair, place in zip(pairs, places)
            ]
        )
        for name, at in (("rotation", places), ("content", pairs)):
            expected = weighted_spearman(np.array([i - j for i, j in at]), d, weights)
            assert found[name][head] == pytest.approx(expected, abs=1e-9), name


@pytest.mark.parametrize("exact", [False, True])
def test_a_layer_that_sees_other_distances(exact):
    """Beyond 8 tokens everything is 8 away and a little quieter; the text's start was cut off."""
    far = Region(
        queries=lambda p: torch.full((*p.shape, 1, 1), 8.0),
        keys=lambda p: torch.zeros(*p.shape, 1, 1),
        scale=lambda p: 1 - p / 100,
    )
    remapping = Remapping((Region(), far), lambda a, b: (a - b > 8).long(), heads=(1,))
    geometry = replace(GEOMETRIES["half"], remapping=remapping).after(4)
    q, k = text(geometry, 26, seed=3)
    settings = Settings(draws=40 if exact else 400, exact=exact)
    found = measured(q, k, geometry, settings)
    theta = geometry.inv_freq.numpy()

    def seen(content, place, head):
        distance, factor = place[0] - place[1], 1.0
        if head == 1 and distance > 8:
            distance, factor = 8, 1 - (place[0] + 4) / 100
        product = as_complex(q[content[0], head], geometry)
        product = product * as_complex(k[content[1], head], geometry).conj()
        turn = np.exp(1j * theta * (distance - (content[0] - content[1])))
        return dominant(factor * (product * turn).real)

    draw = DocumentDraws(NAME, 26, settings).within(None, CPU)
    pairs, places, *_ = positions(draw)
    for head in range(2):
        apart = [i - j for i, j in every_pair(26)]
        d = [seen(pair, pair, head) for pair in every_pair(26)]
        rho = stats.spearmanr(apart, d).statistic
        assert found["rho"][head] == pytest.approx(rho, abs=1e-9)
        d = [seen(pair, place, head) for pair, place in zip(pairs, places)]
        rotation = stats.spearmanr([i - j for i, j in places], d).statistic
        assert found["rotation"][head] == pytest.approx(rotation, abs=1e-9)


def test_where_no_rotation_moves_vectors_there_are_no_parts():
    geometry = replace(GEOMETRIES["half"], is_rotation=False)
    q, k = text(geometry, 20)
    found = measured(q, k, geometry, Settings(draws=500))
    assert np.isfinite(found["rho"]).all()
    assert np.isnan(found["rotation"]).all()
    assert np.isnan(found["content"]).all()


def test_small_chunks_change_nothing(monkeypatch):
    geometry = GEOMETRIES["grouped"]
    q, k = text(geometry, 60)
    whole = measured(q, k, geometry, Settings(draws=300))
    monkeypatch.setattr(draws, "_CHUNK", 7 * geometry.n_heads * geometry.n_pairs)
    parts = measured(q, k, geometry, Settings(draws=300))
    for name in MEASURES:
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-9)


def shapes(n_pos):
    """Seven heads: plain ones, ties by the thousand, saturated ones, and one that is constant."""
    geometry = LayerGeometry.from_inv_freq(torch.tensor([0.5, 0.05, 0.005]), 7)
    q, k = text(geometry, n_pos, seed=5)
    sign = torch.where(torch.arange(n_pos) % 3 == 0, 1.0, -1.0)
    for x, quiet in ((q, sign), (k, torch.ones(n_pos))):
        for head in (2, 3, 6):
            x[:, head] = 0.0
        x[:, 2, 2] = 4 * quiet  # two values of D
        x[:, 3, 2] = 40 * quiet  # the same, but D is 0.5 or a whole number
        # The slowest pair is louder by some 30: D is within 1e-12 of 2, the second of 0.
        x[:, 4, 2] = x[:, 4, 2] * 0.1 + 30.0**0.5
        x[:, 5, 0] = x[:, 5, 0] * 0.1 + 30.0**0.5
    return geometry, q, k


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("weighting", ["pair", "distance"])
@pytest.mark.parametrize("held", [1 << 25, 7000, 900, 60])
def test_ranks_of_all_pairs_are_exact_in_whatever_memory(monkeypatch, held, weighting, window):
    geometry, q, k = shapes(90)
    geometry = replace(geometry, window=window)
    vectors = all_pairs.pair_vectors(q, k, geometry)
    seen = np.array(every_pair(90, window)).T
    d = vectors.dominant_rows(torch.arange(90), slice(0, 90)).numpy()[:, seen[0], seen[1]]
    reference = np.array([by_hand(q, k, geometry, 1, p, p) for p in seen.T])
    np.testing.assert_allclose(d[1], reference, atol=1e-10)
    assert 1e-15 < np.median(np.abs(d[4] - 2)) < 1e-11
    assert 1e-15 < np.median(np.abs(d[5])) < 1e-11
    monkeypatch.setattr(all_pairs, "_HELD", held)
    settings = Settings(draws=100, exact=True, weighting=weighting)
    found = all_pairs.spearman_of_all(q, k, geometry, scale="none", weighting=weighting).numpy()
    distance = seen[0] - seen[1]
    weights = np.ones(len(distance))
    if weighting == "distance":
        weights = 1 / np.bincount(distance)[distance]
    for head in range(6):
        if weighting == "pair":
            expected = stats.spearmanr(distance, d[head]).statistic
        else:
            expected = weighted_spearman(distance, d[head], weights)
        assert found[head] == pytest.approx(expected, abs=1e-9), head
    assert np.isnan(found[6])
    through = measured(q, k, geometry, settings)
    np.testing.assert_array_equal(through["rho"], found)
    assert through["n_qk_pairs"].tolist() == [len(distance)] * 7


@pytest.mark.parametrize("weighting", ["pair", "distance"])
def test_counted_is_drawn_where_all_are_drawn(weighting):
    """Two ways to the same ranks, in float32, saturated heads included."""
    geometry, q, k = shapes(90)
    q, k = q.float(), k.float()
    drawn = measured(q, k, geometry, Settings(draws=5000, weighting=weighting))["rho"]
    counted = all_pairs.spearman_of_all(q, k, geometry, scale="none", weighting=weighting).numpy()
    np.testing.assert_allclose(drawn[:6], counted[:6], atol=1e-4)
    assert np.isnan(drawn[6])


@given(seed=st.integers(0, 99), shift=st.integers(1, 5000), power=st.integers(-3, 3))
@examples(max_examples=15, deadline=None)
def test_where_the_text_stands_and_who_is_loud_do_not_matter(seed, shift, power):
    """The whole text further on; queries doubled and keys halved."""
    geometry = GEOMETRIES["grouped"]
    q, k = text(geometry, 40, seed=seed)
    before = measured(q, k, geometry, Settings(draws=100))
    on = torch.full((40,), shift)
    moved = measured(
        rotate_by(q, on, geometry) * 2.0**power,
        rotate_by(k, on, geometry) * 2.0**-power,
        geometry,
        Settings(draws=100),
    )
    for name in MEASURES:
        np.testing.assert_allclose(moved[name], before[name], atol=1e-7)


@given(seed=st.integers(0, 99), weighting=st.sampled_from(["pair", "distance"]))
@examples(max_examples=15, deadline=None)
def test_pairs_counted_from_the_other_end_turn_every_sign(seed, weighting):
    geometry = GEOMETRIES["half"]
    q, k = text(geometry, 30, seed=seed)
    settings = Settings(draws=200, weighting=weighting)
    before = measured(q, k, geometry, settings)
    turned = replace(geometry, inv_freq=geometry.inv_freq.flip(0))
    order = [4, 3, 2, 1, 0, 9, 8, 7, 6, 5]
    after = measured(q[..., order], k[..., order], turned, settings)
    for name in ("rho", "rotation", "content"):
        np.testing.assert_allclose(after[name], -before[name], atol=1e-7)
    for name in ("d_near", "d_far"):
        np.testing.assert_allclose(after[name], 4 - before[name], atol=1e-7)


def test_heads_share_the_draw():
    geometry = LayerGeometry.from_inv_freq(INV_FREQ, 3)
    q, k = text(geometry, 80)
    q[:, 2], k[:, 2] = q[:, 0], k[:, 0]
    found = measured(q, k, geometry, Settings(draws=150))
    alone = measured(
        q[:, [1]], k[:, [1]], LayerGeometry.from_inv_freq(INV_FREQ, 1), Settings(draws=150)
    )
    for name in MEASURES:
        assert found[name][0] == found[name][2]
        assert found[name][1] == pytest.approx(alone[name][0], abs=1e-12)


def test_contents_that_know_no_position_leave_no_interaction():
    geometry, found = rising(100, heads=4), []
    steady = torch.linspace(0.5, 1.5, 4)[:, None] * torch.tensor([1.0, 1.0, 0, 0, 0, 0])
    for n in range(12):
        q, k = planted(geometry, 100, steady, 0.5, seed=n)
        found.append(measured(q, k, geometry, Settings(draws=2000), f"{n:015x}"))
    rho, rotation, content = (
        np.array([one[name] for one in found]) for name in ("rho", "rotation", "content")
    )
    interaction = (rho - rotation - content).mean(0)
    assert (rho.mean(0)[1:] > 0.3).all()
    assert (np.abs(interaction) < 0.03).all()
    assert (np.abs(content.mean(0)) < 0.05).all()


def test_two_tokens_have_no_order():
    geometry = GEOMETRIES["half"]
    found = measured(*text(geometry, 2), geometry, Settings(draws=3))
    assert np.isnan(found["rho"]).all()
    assert found["n_qk_pairs"].tolist() == [1.0, 1.0]
    np.testing.assert_array_equal(found["d_near"], found["d_far"])

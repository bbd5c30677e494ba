"""Stretch and break point of planted curves: found, with intervals that cover as they claim."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_posheads import PosheadsError, break_point, stretch
from tl_posheads.statistics.log_bins import log_bins

TRAINED, LONGEST = 256, 2048
D = np.arange(1, LONGEST + 1)


def rising(d, h):
    """Saturating curves, each head its own."""
    return 4 + h + (5 + h) * np.log2(d + 1) / (3 + np.log2(d + 1))


def noise(rng, shape, size):
    """Wiggles that neighbouring distances share: slow waves in log distance, and a level."""
    x = np.log2(np.arange(1, shape[-1] + 1))
    wave = sum(
        rng.normal(0, size / (1 + k), (*shape[:-1], 1))
        * np.cos(2 * np.pi * (k * x / 11 + rng.random((*shape[:-1], 1))))
        for k in range(5)
    )
    return wave + rng.normal(0, size, shape)


def planted(scale, rng, *, docs=8, heads=3, size=0.15):
    h = np.arange(heads)[None, :, None]
    shared = noise(rng, (docs, heads, LONGEST), size)
    bare = rising(D[None, None], h) + shared
    extended = rising(D[None, None] / scale, h) + shared + noise(rng, shared.shape, size / 2)
    return extended, bare[..., :TRAINED]


N_LONG = np.broadcast_to(LONGEST + 1 - D, (8, LONGEST))
N_NEAR = np.broadcast_to(TRAINED + 1 - D[:TRAINED], (8, TRAINED))


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.3, 8.0])
def test_planted_stretch_is_found(scale):
    extended, bare = planted(scale, np.random.default_rng(1))
    found = stretch(
        extended, bare, trained=TRAINED, n_extended=N_LONG, n_bare=N_NEAR, factor=8, n_boot=300
    )
    assert found.identifiable
    assert found.scale == pytest.approx(scale, rel=0.15)
    assert found.ci_low <= found.scale <= found.ci_high
    assert found.ci_high / found.ci_low < 1.8
    assert (found.factor, found.unit, found.n_docs, found.n_heads) == (8, "documents", 8, 3)
    assert found.r2 > 0.8
    if scale > 1.5:
        assert found.misfit < found.misfit_unscaled


def test_interval_covers_as_it_claims():
    covered = []
    for seed in range(60):
        extended, bare = planted(3.0, np.random.default_rng(seed))
        found = stretch(extended, bare, trained=TRAINED, factor=4, n_boot=200, seed=seed)
        covered.append(found.ci_low <= 3.0 <= found.ci_high)
    assert 0.85 <= np.mean(covered) <= 1.0


def slow_weight(scale, rng, d=D):
    """Softmax weight of slow pairs: between 0 and 1, with the waves of single pairs in it."""
    waves = sum(np.cos(2 * np.pi * d / scale / period) / 30 for period in (300, 700, 1900))
    means = 0.3 + 0.04 * np.log2(d / scale) + waves
    return means + noise(rng, (8, 3, len(d)), 0.02)


def test_the_weight_of_slow_pairs_is_drawn_out_as_well():
    """Not monotone, so that a weight is met at more than one distance."""
    found, covered = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        extended, bare = slow_weight(4, rng), slow_weight(1, rng, D[:TRAINED])
        fit = stretch(extended, bare, trained=TRAINED, factor=4, n_boot=200, seed=seed)
        found.append(fit.scale)
        covered.append(fit.ci_low <= 4 <= fit.ci_high)
    assert np.median(found) == pytest.approx(4, rel=0.03)
    assert np.mean(covered) >= 0.85


def test_heads_without_values_take_no_part():
    extended, bare = planted(4.0, np.random.default_rng(0))
    alone = stretch(extended[:, 1:], bare[:, 1:], trained=TRAINED, n_boot=50)
    extended[:, 0] = np.nan
    found = stretch(extended, bare, trained=TRAINED, n_boot=50)
    assert (found, found.n_heads) == (alone, 2)
    none = stretch(extended * np.nan, bare, trained=TRAINED, n_boot=50)
    assert (none.n_heads, none.identifiable) == (0, False)


def test_flat_curves_tell_no_scale():
    rng = np.random.default_rng(0)
    flat = 7 + noise(rng, (8, 2, LONGEST), 0.1)
    found = stretch(flat, flat[..., :TRAINED], trained=TRAINED, n_boot=200)
    assert not found.identifiable
    assert np.isnan(found.scale)
    assert "flat" in found.reason or "scales" in found.reason


def test_single_document_draws_heads():
    extended, bare = planted(4.0, np.random.default_rng(3), docs=1, heads=6)
    found = stretch(extended, bare, trained=TRAINED, factor=4, n_boot=200)
    assert found.unit == "heads"
    assert found.scale == pytest.approx(4.0, rel=0.25)
    again = stretch(extended, bare, trained=TRAINED, factor=4, n_boot=200)
    assert found == again


@settings(max_examples=20, deadline=None)
@given(st.floats(1.0, 8.0), st.floats(-50, 50))
def test_without_noise_the_scale_is_exact(scale, level):
    h = np.arange(2)[None, :, None]
    found = stretch(
        level + rising(D[None, None] / scale, h),
        level + rising(D[None, None, :TRAINED], h),
        trained=TRAINED,
        factor=8,
        n_boot=20,
    )
    assert found.scale == pytest.approx(scale, rel=0.01)
    assert found.r2 > 0.999


def test_bare_curves_past_training_take_no_part():
    extended, bare = planted(4.0, np.random.default_rng(2))
    past = np.random.default_rng(5).normal(0, 30, (8, 3, LONGEST - TRAINED))
    found, cut = (
        stretch(extended, curves, trained=TRAINED, factor=4, n_boot=50)
        for curves in (np.concatenate([bare, past], 2), bare)
    )
    assert found == cut


def test_distances_with_few_pairs_take_no_part():
    extended, bare = planted(4.0, np.random.default_rng(2))
    found = stretch(extended, bare, trained=TRAINED, n_extended=N_LONG, n_bare=N_NEAR, n_boot=50)
    extended, bare = extended.copy(), bare.copy()
    extended[..., N_LONG[0] < 0.1 * LONGEST] = 99
    bare[..., N_NEAR[0] < 0.1 * TRAINED] = 99
    assert found == stretch(
        extended, bare, trained=TRAINED, n_extended=N_LONG, n_bare=N_NEAR, n_boot=50
    )


def test_scales_out_of_reach_are_not_told():
    h = np.arange(3)[None, :, None]
    bare = rising(D[None, None, :TRAINED], h)
    found = stretch(np.zeros((1, 3, LONGEST)), bare, trained=TRAINED, n_boot=50)
    assert found.reason.startswith("no scale fits")
    assert np.isnan([found.scale, found.ci_low, found.ci_high, found.misfit, found.r2]).all()
    assert found.misfit_unscaled > 0
    shrunk = stretch(rising(8 * D[None, None], h), bare, trained=TRAINED, n_boot=50)
    assert shrunk.reason == "the best scale lies at an end of those searched"
    # Heads that disagree by as much as can be: half of them drawn out by 1, half by 16.
    mixed = np.stack([rising(D / s, 0) for s in (0.5, 0.5, 16, 16)])[None]
    same = np.broadcast_to(rising(D[:TRAINED], 0), (1, 4, TRAINED))
    found = stretch(mixed, same, trained=TRAINED, factor=16, n_boot=200)
    assert found.reason == "the interval covers half of the scales searched"


def broken(rng, *, at=256, jump=1.5, docs=12, heads=3, size=0.15):
    h = np.arange(heads)[None, :, None]
    trend = 3 + h + (1 + 0.2 * h) * np.log2(D)
    after = (at < D) * (jump + 0.4 * np.log2(np.maximum(D, 1) / at))
    return trend + after + noise(rng, (docs, heads, LONGEST), size)


def test_planted_break_is_found():
    found = break_point(broken(np.random.default_rng(0)), n_boot=300)
    assert found.distance == pytest.approx(256, rel=0.1)
    assert found.ci_low <= 256 * 1.05
    assert found.ci_high >= 256 * 0.95
    assert found.error_ratio < 0.1
    assert found.jump == pytest.approx(1.5, abs=0.4)
    assert found.slope_before == pytest.approx(1.2, abs=0.3)
    assert found.slope_after - found.slope_before == pytest.approx(0.4, abs=0.4)


def test_break_interval_covers():
    covered = []
    for seed in range(40):
        found = break_point(broken(np.random.default_rng(seed), size=0.4), n_boot=150, seed=seed)
        covered.append(found.ci_low <= 256.5 <= found.ci_high)
    assert np.mean(covered) >= 0.85


@pytest.mark.parametrize("width", [None, 1.0, 2.0])
def test_a_break_is_told_from_a_smooth_bend(width):
    bend = 0 if width is None else 8 / (1 + np.exp(-(np.log2(D) - 6) / width)) - 2 * np.log2(D)
    ratios = {1.5: [], 0.0: []}
    for jump, found in ratios.items():
        for seed in range(20):
            at = 256 if jump else 10**9
            curves = broken(np.random.default_rng(seed), jump=jump, at=at) + bend
            found.append(break_point(curves, n_boot=1, seed=seed).error_ratio)
    assert np.median(ratios[0.0]) > 0.9
    assert np.mean(np.array(ratios[0.0]) < 0.5) <= 0.1
    assert max(ratios[1.5]) < 0.25


def test_the_waves_of_a_pair_are_no_break():
    wave = 0.5 * np.cos(2 * np.pi * D / 40) + 0.3 * np.cos(2 * np.pi * D / 150)
    smooth = broken(np.random.default_rng(0), jump=0.0, at=10**9) + wave
    assert break_point(smooth, n_boot=1).error_ratio > 0.85
    found = break_point(broken(np.random.default_rng(0), jump=3.0) + wave, n_boot=100)
    assert found.reason is None
    assert found.distance == pytest.approx(256, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("docs", "heads", "size"), [(1, 4, 0.05), (8, 3, 0.3)])
def test_smooth_power_laws_have_no_break(docs, heads, size):
    d, h = D[:1024], np.arange(heads)[None, :, None]
    ratios = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        curves = 20 + h - (10 + 2 * h) * d ** -(0.2 + 0.1 * h)
        curves = curves + noise(rng, (docs, heads, len(d)), size)
        found = break_point(curves, n_boot=1, seed=seed)
        assert (found.reason is None) == np.isfinite(found.distance) == (found.error_ratio < 0.5)
        ratios.append(found.error_ratio)
    assert np.mean(np.array(ratios) < 0.5) <= 0.05


def test_without_a_break_no_distance_is_given():
    found = break_point(broken(np.random.default_rng(0), jump=0.0, at=10**9), n_boot=10)
    assert np.isnan([found.distance, found.ci_low, found.jump, found.slope_after]).all()
    assert "no break" in repr(found)
    assert f"{found.error_ratio:.2f}" in repr(found)
    assert "nan" not in repr(found)
    there = break_point(broken(np.random.default_rng(0)), n_boot=10)
    assert there.reason is None
    assert f"at {there.distance:,.0f} tokens" in repr(there)


def test_a_kink_is_found_where_it_is():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        curves = broken(rng, jump=0.0) - 1.4 * np.maximum(0, np.log2(D / 256))
        found = break_point(curves, n_boot=100, seed=seed)
        assert found.distance == pytest.approx(256, rel=0.2)
        assert found.ci_low <= 256 <= found.ci_high
        assert found.slope_after - found.slope_before == pytest.approx(-1.0, abs=0.4)
        assert found.jump == pytest.approx(0, abs=0.3)


def test_heads_with_a_window_take_no_part():
    curves = broken(np.random.default_rng(0), heads=4)
    near = curves.copy()
    near[:, 1, 128:] = np.nan
    found = break_point(near, n_boot=50)
    alone = break_point(curves[:, [0, 2, 3]], n_boot=50)
    assert found.n_heads == 3
    assert found.error_ratio == pytest.approx(alone.error_ratio, rel=1e-2)
    # The bins' mean distances shift a little with a head's pairs.
    assert found.distance == pytest.approx(alone.distance, rel=1e-3)
    assert found.jump == pytest.approx(alone.jump, rel=1e-3)
    assert found.distance == pytest.approx(256, rel=0.1)


def test_few_documents_have_no_interval():
    found = break_point(broken(np.random.default_rng(0), docs=3), n_boot=50)
    assert np.isnan(found.ci_low)
    assert found.unit == "documents"
    alone = break_point(broken(np.random.default_rng(0), docs=1, heads=5), n_boot=50)
    assert alone.unit == "heads"
    assert alone.distance == pytest.approx(256, rel=0.15)


def test_far_distances_without_pairs():
    curves = broken(np.random.default_rng(0))
    curves[:4, :, 1500:] = np.nan
    found = break_point(
        curves, n_qk_pairs=np.broadcast_to(LONGEST + 1 - D, (12, LONGEST)), n_boot=100
    )
    assert found.distance == pytest.approx(256, rel=0.1)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 300), st.integers(1, 12), st.integers(0, 9))
def test_log_bins_keep_every_pair(n, per_octave, seed):
    rng = np.random.default_rng(seed)
    values, pairs = rng.normal(size=(2, n)), rng.integers(1, 9, (2, n))
    values[0, rng.integers(n)] = np.nan
    bins = log_bins(np.arange(1, n + 1), pairs, values, per_octave=per_octave)
    held = np.isfinite(values)
    np.testing.assert_allclose(bins.n_qk_pairs.sum(1), (pairs * held).sum(1))
    total = np.nan_to_num(bins.mean * bins.n_qk_pairs).sum(1)
    np.testing.assert_allclose(total, (pairs * np.nan_to_num(values)).sum(1), atol=1e-9)
    assert (np.diff(bins.distance) > 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: break_point(np.ones((3, 2, 99)), n_qk_pairs=np.ones((2, 99))), "numbers of pairs"),
        (lambda: stretch(np.ones((2, 1, 99)), np.ones((1, 1, 9)), trained=9), "same documents"),
        (lambda: stretch(np.ones((1, 1, 99)), np.ones((1, 1, 9)), trained=9, factor=0.5), "factor"),
        (lambda: stretch(np.ones((1, 1, 4)), np.ones((1, 1, 1)), trained=1), "too few|none"),
        (lambda: break_point(np.ones((1, 99))), "doc, head, distance"),
        (lambda: break_point(np.ones((1, 1, 3))), "at least"),
        (lambda: break_point(np.ones((2, 1, 999)), n_boot=0), "n_boot=0"),
        (lambda: log_bins(np.arange(3), np.ones(3), np.ones(3)), "distances from 1"),
        (lambda: log_bins(np.arange(1, 3), np.ones(2), np.full(2, np.nan)), "no curve has a pair"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(PosheadsError, match=message):
        call()

"""Clamped angles against loops, planted pairs that make a change alone, and sums that add up."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from tl_posheads import LayerGeometry, PosheadsError
from tl_posheads.rotary.contributions import dimension_contributions, dominant_dimension, rotate_by
from tl_posheads.rotary.remapping import pair_vectors
from tl_posheads.studies.ood_angles import OODAngles, clamped_dominant, ood_pairs
from tl_posheads.studies.ood_angles.clamped_model import clamped
from tl_posheads.studies.ood_angles.clamping import DistanceBins, clamp_by_bin, one_replaced
from tl_posheads.studies.ood_angles.measure import _stacked

TRAINED = 16
# Wavelengths 7, 15, 45 and 628 tokens: the first two have turned in 16 tokens.
GEOMETRY = LayerGeometry.from_inv_freq(
    2 * math.pi / torch.tensor([7.0, 15.0, 45.0, 628.0]), n_heads=4, n_kv_heads=2
)


def vectors(n_pos=50, geometry=GEOMETRY, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    n_kv = geometry.n_kv_heads
    q, k = (
        2 * torch.randn(n_pos, n, geometry.d_head, generator=generator, dtype=torch.float64)
        for n in (geometry.n_heads, n_kv)
    )
    at = torch.arange(n_pos)
    return tuple(rotate_by(x, at, geometry).to(dtype) for x in (q, k))


def causal(n_pos, window=None):
    i, j = torch.tril_indices(n_pos, n_pos, -1)
    if window is not None:
        i, j = i[i - j < window], j[i - j < window]
    return i, j


def by_loop(rot_q, rot_k, geometry, pairs, i, j, trained=TRAINED):
    """D of one query and key of every head, from the definition: unrotate, clamp, rotate."""
    theta = geometry.inv_freq.numpy()
    out = []
    for head, kv in enumerate(geometry.kv_head):
        q, k = rot_q[i, head].double().numpy(), rot_k[j, kv].double().numpy()
        c = []
        for m in range(geometry.n_pairs):
            a, b = m, m + geometry.n_pairs
            if geometry.layout == "adjacent":
                a, b = 2 * m, 2 * m + 1
            zq = complex(q[a], q[b]) * np.exp(-1j * theta[m] * i)
            zk = complex(k[a], k[b]) * np.exp(-1j * theta[m] * j)
            apart = min(i - j, trained - 1) if m in pairs else i - j
            c.append((zq * np.conj(zk) * np.exp(1j * theta[m] * apart)).real)
        w = np.exp(np.array(c) - max(c))
        out.append((w * np.arange(len(c))).sum() / w.sum())
    return out


@pytest.mark.parametrize("layout", ["half", "adjacent"])
@pytest.mark.parametrize("pairs", [[], [2], [0, 1], [2, 3], [0, 1, 2, 3]])
def test_direct_counterfactual_is_the_loop(layout, pairs):
    geometry = LayerGeometry.from_inv_freq(
        GEOMETRY.inv_freq, n_heads=4, n_kv_heads=2, layout=layout, d_head=11
    )
    q, k = vectors(24, geometry)
    i, j = causal(24)
    found = clamped_dominant(q, k, geometry, pairs, trained=TRAINED, q_pos=i, k_pos=j)
    for n, (row, key) in enumerate(zip(i.tolist(), j.tolist(), strict=True)):
        np.testing.assert_allclose(found[:, n], by_loop(q, k, geometry, pairs, row, key), atol=1e-9)


@pytest.mark.parametrize("window", [None, 20])
def test_sums_by_bin_are_the_loop(window):
    geometry = replace(GEOMETRY, window=window)
    q, k = vectors(50)
    heads, rows = [3, 0], torch.tensor([4, 15, 16, 30, 49])
    bins = DistanceBins.up_to(49, TRAINED, 2)
    found = clamp_by_bin(q, k, geometry, heads, bins, rows)
    want = {
        name: np.zeros((2, *shape, len(bins.start)))
        for name, shape in (("bare", ()), ("paired", ()), ("joint", (3,)), ("single", (4,)))
    }
    count = np.zeros(len(bins.start))

    def value(pairs, i, j):
        return np.array(by_loop(q, k, geometry, pairs, i, j))[heads]

    for i in rows.tolist():
        near = [value([], i, j) for j in range(i) if TRAINED / 2 <= i - j < TRAINED]
        for j in range(i):
            d = i - j
            if window is not None and d >= window:
                continue
            b = next(b for b in range(len(count)) if bins.start[b] <= d < bins.end[b])
            count[b] += 1
            want["bare"][:, b] += value([], i, j)
            if d < TRAINED:
                continue
            want["paired"][:, b] += np.mean(near, 0)
            for s, pairs in enumerate(([2, 3], [0, 1], [0, 1, 2, 3])):
                want["joint"][:, s, b] += value(pairs, i, j)
            for m in range(4):
                want["single"][:, m, b] += value([m], i, j)
    np.testing.assert_array_equal(found.n_qk_pairs, count)
    for name, values in want.items():
        np.testing.assert_allclose(getattr(found, name), values, atol=1e-8, err_msg=name)


def test_the_attention_scale_is_a_factor_on_queries():
    q, k = vectors(50)
    scaled = q * GEOMETRY.attention_scale
    i, j = causal(50)
    found, want, plain = (
        clamped_dominant(x, k, GEOMETRY, [1, 2], trained=TRAINED, q_pos=i, k_pos=j, scale=scale)
        for x, scale in ((q, "attention"), (scaled, "none"), (q, "none"))
    )
    torch.testing.assert_close(found, want)
    assert (found - plain).abs().max() > 0.1
    given = ([3, 0], DistanceBins.up_to(49, TRAINED, 2), torch.tensor([4, 16, 49]))
    sums, want_sums = (
        clamp_by_bin(x, k, GEOMETRY, *given, scale)
        for x, scale in ((q, "attention"), (scaled, "none"))
    )
    for name in ("bare", "paired", "joint", "single"):
        torch.testing.assert_close(getattr(sums, name), getattr(want_sums, name))
    with pytest.raises(PosheadsError, match="expected 'none' or 'attention'"):
        clamped_dominant(q, k, GEOMETRY, [], trained=TRAINED, q_pos=i, k_pos=j, scale="logits")


def test_clamping_beyond_the_text_changes_nothing_bit_for_bit():
    q, k = vectors(40, dtype=torch.float32)
    i, j = causal(40)
    at = dict(q_pos=i, k_pos=j)
    bare = clamped_dominant(q, k, GEOMETRY, [], trained=2, **at)
    for trained in (40, 1000):
        assert torch.equal(clamped_dominant(q, k, GEOMETRY, range(4), trained=trained, **at), bare)
    held = clamped_dominant(q, k, GEOMETRY, range(4), trained=TRAINED, **at)
    near = i - j < TRAINED
    assert torch.equal(held[:, near], bare[:, near])
    assert (held[:, ~near] != bare[:, ~near]).all()
    whole = dominant_dimension(dimension_contributions(q, k, GEOMETRY))[:, i, j]
    torch.testing.assert_close(bare, whole, atol=1e-5, rtol=0)


def test_the_remapped_layer_is_the_direct_clamp():
    q, k = vectors(50)
    i, j = causal(50)
    for pairs in ([2], [0, 3]):
        layer = clamped(GEOMETRY, range(4), pairs, TRAINED)
        live = pair_vectors(q, k, layer).dominant_rows(torch.arange(50), slice(0, 50))
        direct = clamped_dominant(q, k, GEOMETRY, pairs, trained=TRAINED, q_pos=i, k_pos=j)
        torch.testing.assert_close(live[:, i, j], direct, atol=1e-9, rtol=0)


def test_one_replaced_also_where_one_pair_holds_all_the_weight():
    generator = torch.Generator().manual_seed(1)
    for scale in (0.1, 3.0, 400.0):
        plain, other = scale * torch.randn(2, 60, 9, generator=generator, dtype=torch.float64)
        found = one_replaced(plain, other)
        for m in range(9):
            c = plain.clone()
            c[:, m] = other[:, m]
            torch.testing.assert_close(found[:, m], dominant_dimension(c), atol=1e-10, rtol=1e-10)


def test_which_pairs_are_out_of_distribution():
    theta = 2 * math.pi / torch.tensor([3.0, 15.9, 16.1, 900.0, math.inf])
    assert ood_pairs(theta, 16).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("trained", [16, 100, 7])
def test_bins_meet_at_the_training_length(trained):
    bins = DistanceBins.up_to(5 * trained, trained, 4)
    assert trained in bins.start.tolist()
    assert bins.start[1:].tolist() == bins.end[:-1].tolist()
    assert (bins.start[0], bins.end[-1]) == (1, 5 * trained + 1)
    assert bool((bins.start[bins.past] >= trained).all())
    assert int(bins.start[bins.reference].min()) == math.ceil(trained / 2)
    for d in range(1, 5 * trained + 1):
        b = int(bins.of[d])
        assert bins.start[b] <= d < bins.end[b]
        assert int(bins.octave[b]) == math.floor(math.log2(d / trained))


def test_refusals_of_the_plain_functions():
    q, k = vectors(8)
    at = dict(q_pos=torch.tensor([5]), k_pos=torch.tensor([2]))
    with pytest.raises(
        PosheadsError, match="pair 4 was given, but layer 0 has rotary pairs 0 to 3"
    ):
        clamped_dominant(q, k, GEOMETRY, [4], trained=4, **at)
    moved = clamped(GEOMETRY, [0], [1], 4)
    with pytest.raises(PosheadsError, match="sees other distances"):
        clamped_dominant(q, k, moved, [1], trained=4, **at)


# Planted truth: one head, whose contributions are known functions of the distance.

T = 64
WAVES = torch.tensor([16.0, 32.0, 64.0, 512.0])
PLANTED = LayerGeometry.from_inv_freq(2 * math.pi / WAVES)


def planted(size, phase, n_docs=5, noise=0.0):
    """A result of texts whose pair ``m`` contributes ``size * cos(theta * d + phase)``."""
    texts = []
    for doc in range(n_docs):
        n_pos = 4 * T
        q, k = torch.zeros(2, n_pos, 1, 8, dtype=torch.float64)
        q[:, 0, :4] = torch.tensor(size) * torch.tensor(phase).cos()
        q[:, 0, 4:] = torch.tensor(size) * torch.tensor(phase).sin()
        k[:, 0, :4] = 1.0
        generator = torch.Generator().manual_seed(doc)
        q = q + noise * torch.randn(q.shape, generator=generator, dtype=torch.float64)
        at = torch.arange(n_pos)
        bins = DistanceBins.up_to(n_pos - 1, T, 4)
        turned = [rotate_by(x, at, PLANTED) for x in (q, k)]
        texts.append(clamp_by_bin(*turned, PLANTED, [0], bins, torch.arange(1, n_pos)))
    of = lambda name: _stacked([{0: getattr(s, name)} for s in texts], [(0, 0)])
    return OODAngles(
        heads=[(0, 0)],
        trained=T,
        bin_start=bins.start,
        bin_end=bins.end,
        bin_octave=bins.octave,
        inv_freq=PLANTED.inv_freq[None],
        n_qk_pairs=torch.stack([s.n_qk_pairs[None] for s in texts]),
        bare=of("bare"),
        paired=of("paired"),
        joint=of("joint"),
        single=of("single"),
        live=None,
        loss=pd.DataFrame(),
        seed=0,
        provenance={},
    )


def value(found, quantity):
    table = found.summary(n_boot=20).set_index(["quantity", "start", "end"])["value"]
    return table[quantity, T, 4 * T]


def adds_up(found):
    table = found.change()
    parts = table[["change_from_ood", "change_from_in_distribution", "interaction", "other"]].sum(
        axis=1
    )
    np.testing.assert_allclose(table["change"], parts, atol=1e-12)
    np.testing.assert_allclose(table["change"], table["d_bare"] - table["d_reference"], atol=1e-12)
    np.testing.assert_allclose(table["share"], table["change_from_ood"] / table["change"])
    single = found.attribution().query("ood").groupby(["layer", "head", "start"])
    single = single["change_from_pair"].sum().to_numpy()
    np.testing.assert_allclose(table["change_from_ood"], single + table["remainder"], atol=1e-12)


def test_a_slow_pair_that_makes_the_change_gets_all_of_it():
    # The slow pair is past its top only from distance 64 on; inside training it hardly moves.
    found = planted([0.0, 0.0, 0.0, 6.0], [0.0, 0.0, 0.0, -2 * math.pi * T / 512])
    adds_up(found)
    by_pair = found.by_pair(n_boot=20)
    assert by_pair["ood"].tolist() == [0, 0, 0, 1]
    assert value(found, "change") < -0.4
    assert value(found, "head_share") == pytest.approx(1, abs=0.02)
    assert value(found, "share") == pytest.approx(1, abs=0.02)
    assert by_pair["head_share"][3] == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(by_pair["change_from_pair"][:3], 0, atol=1e-12)
    np.testing.assert_allclose(by_pair["head_share"][:3], 0, atol=1e-12)
    assert value(found, "head_share_in_distribution") == pytest.approx(0, abs=1e-12)
    assert value(found, "remainder") == pytest.approx(0, abs=1e-12)


def test_a_fast_pair_that_makes_the_change_gets_it_and_the_slow_ones_nothing():
    # Pair 2 has turned once in 64 tokens. From 32 to 64 its cosine is above 0 and D is 2; beyond,
    # it is also below, and D is the mean of the other pairs' numbers.
    found = planted([0.0, 0.0, 100.0, 0.0], [0.0, 0.0, math.pi / 2, 0.0])
    adds_up(found)
    assert value(found, "change") < -0.2
    for quantity in ("change_from_ood", "head_share", "share", "remainder", "interaction"):
        assert value(found, quantity) == pytest.approx(0, abs=1e-12)
    assert value(found, "share_in_distribution") == pytest.approx(1, abs=0.06)
    assert value(found, "head_share_in_distribution") == pytest.approx(1, abs=0.06)
    by_pair = found.by_pair(n_boot=20)
    assert by_pair["ood"].tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(by_pair["change_from_pair"][[0, 1, 3]], 0, atol=1e-12)
    assert by_pair["head_share"][2] == pytest.approx(1, abs=0.06)


def test_no_change():
    found = planted([0.0, 0.0, 0.0, 0.0], [0.0] * 4)
    adds_up(found)
    table = found.change()
    np.testing.assert_allclose(table["change"], 0, atol=1e-12)
    np.testing.assert_allclose(found.by_pair(n_boot=20)["change_from_pair"], 0, atol=1e-12)


def test_intervals_hold_the_truth_and_come_from_the_seed():
    found = planted([0.0, 0.0, 0.0, 6.0], [0.0, 0.0, 0.0, -0.8], n_docs=6, noise=0.5)
    adds_up(found)
    table = found.summary(n_boot=200)
    pd.testing.assert_frame_equal(table, found.summary(n_boot=200))
    other = replace(found, seed=1).summary(n_boot=200)
    assert not other["ci_low"].equals(table["ci_low"])
    pd.testing.assert_series_equal(other["value"], table["value"])
    assert (table["ci_low"] <= table["value"]).all()
    assert (table["value"] <= table["ci_high"]).all()
    few = planted([0.0, 0.0, 0.0, 6.0], [0.0, 0.0, 0.0, -0.8], n_docs=3)
    assert few.summary(n_boot=20)["ci_low"].isna().all()

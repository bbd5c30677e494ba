"""The rotary atlas on queries and keys whose answers are known, and against loops."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from tl_posheads import LayerGeometry
from tl_posheads.rotary.contributions import rotate_by
from tl_posheads.rotary.remapping import Region, Remapping, every_pair
from tl_posheads.scoring.draws import Settings
from tl_posheads.studies.atlas import VectorMeans, needed_order, separation
from tl_posheads.studies.atlas import measure as measuring
from tl_posheads.studies.atlas.measure import (
    BY_DISTANCE,
    BY_HEAD,
    BY_PAIR,
    AtlasDraws,
    bin_edges,
    measure_layer,
)

INV_FREQ = torch.tensor([1.0, 0.3, 0.05, 0.004])


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def measured(q, k, geometry, *, needed=False, **options):
    """By name what one text's layer shows; all pairs, unless ``draws`` says otherwise."""
    settings = Settings(**{"draws": 10**6, **options})
    n_pos = q.shape[0]
    edges = bin_edges(n_pos - 1)
    draws = AtlasDraws("a text", n_pos, settings, edges)
    found = measure_layer(q, k, geometry, draws, needed=needed)
    names = (BY_PAIR, found.by_pair), (BY_HEAD, found.by_head), (BY_DISTANCE, found.by_distance)
    return {name: value for ns, values in names for name, value in zip(ns, values, strict=True)}


def random_vectors(generator, geometry, n=40):
    shape = (geometry.n_heads, geometry.d_head), (geometry.n_kv_heads, geometry.d_head)
    return [torch.randn(n, *s, generator=generator, dtype=torch.float64) for s in shape]


def complex_pairs(x, geometry):
    """Pairs of ``[pos, head, d_head]`` as complex numbers, by the layout's definition."""
    n = geometry.n_pairs
    x = x.double().numpy()
    if geometry.layout == "half":
        return x[..., :n] + 1j * x[..., n : 2 * n]
    return x[..., 0 : 2 * n : 2] + 1j * x[..., 1 : 2 * n : 2]


def test_one_pair_alone_has_all_the_usage(generator):
    g = LayerGeometry.from_inv_freq(INV_FREQ)
    q, k = torch.zeros(2, 30, 1, 8)
    q[:, :, 2], k[:, :, 6] = 2.0, 3.0  # the two coordinates of pair 2
    found = measured(q, k, g)
    assert found["usage"].tolist() == [[0, 0, 6, 0]]
    assert found["realised"].isnan().tolist() == [[True, True, False, True]]
    # Queries and keys are a quarter turn apart: nothing of their length is realised.
    assert found["realised"][0, 2] == 0
    k[:, :, 6], k[:, :, 2] = 0.0, 3.0
    assert measured(q, k, g)["realised"][0, 2] == 1


@pytest.mark.parametrize(("layout", "d_head"), [("half", 8), ("adjacent", 11)])
def test_vectors_that_point_one_way_before_rotation_are_concentrated(generator, layout, d_head):
    g = LayerGeometry.from_inv_freq(INV_FREQ, 2, d_head=d_head, layout=layout, rotation_scale=1.2)
    one = torch.randn(1, 2, d_head, generator=generator, dtype=torch.float64)
    turned = rotate_by(one.expand(2000, 2, d_head), torch.arange(2000), g)
    turned[..., :8] *= 1.2
    assert torch.allclose(VectorMeans.of(turned, g).concentration, torch.ones(2, 4).double())
    later = VectorMeans.of(turned[700:], g, first=700)
    assert torch.allclose(later.concentration, torch.ones(2, 4).double())
    assert torch.allclose(later.centre, VectorMeans.of(turned, g).centre)
    wrong = VectorMeans.of(turned[3:], g).centre  # as if the text began there
    assert not torch.allclose(wrong, later.centre)
    isotropic = torch.randn(4000, 2, d_head, generator=generator)
    assert VectorMeans.of(isotropic, g).concentration.max() < 0.06


def test_without_a_rotation_to_undo_only_lengths_are_known(generator):
    g = dataclasses.replace(LayerGeometry.from_inv_freq(INV_FREQ), is_rotation=False)
    found = measured(*random_vectors(generator, g), g, needed=True)
    for name in ("usage", "realised", "weight_near", "weight_far"):
        assert found[name].isfinite().all()
    for name in ("concentration_q", "mean_product_real", "needed_rank", "needed_error"):
        assert found[name].isnan().all()
    assert found["slow_norm_q"].isnan().all()
    assert found["separation"].isfinite().all()


CASES = {
    "half": {},
    "adjacent": {"layout": "adjacent"},
    "partial rotary": {"d_head": 13},
    "grouped queries": {"n_heads": 4, "n_kv_heads": 2},
    "a window": {"window": 11},
    "all of it": {"layout": "adjacent", "d_head": 10, "n_heads": 4, "n_kv_heads": 1, "window": 9},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", ["none", "attention"])
def test_every_column_is_what_a_loop_finds(generator, case, scale, monkeypatch):
    monkeypatch.setattr(measuring, "_PER_BIN", 10**6)  # all pairs
    g = LayerGeometry.from_inv_freq(INV_FREQ, **CASES[case])
    q, k = random_vectors(generator, g)
    k += 0.5
    found = measured(q, k, g, scale=scale, needed=True)
    factor = g.attention_scale if scale == "attention" else 1.0
    n = len(q)
    longest = n - 1 if g.window is None else g.window - 1
    theta, positions = g.inv_freq.numpy(), np.arange(n)[:, None]
    for head in range(g.n_heads):
        zq, zk = complex_pairs(q, g)[:, head], complex_pairs(k, g)[:, g.kv_head[head]]
        still_q, still_k = (z * np.exp(-1j * theta * positions) for z in (zq, zk))
        usage = np.abs(zq).mean(0) * np.abs(zk).mean(0) * factor
        product = still_q.mean(0) * still_k.mean(0).conj() * factor
        seen = [(i, j) for i in range(n) for j in range(i) if i - j <= longest]
        c = np.array([(zq[i] * zk[j].conj()).real for i, j in seen]) * factor
        d = np.array([i - j for i, j in seen])
        weight = np.exp(c) / np.exp(c).sum(1, keepdims=True)
        still = np.array([(still_q[i] * still_k[j].conj()).real for i, j in seen]) * factor
        rank, error = greedy_by_hand(c - still)
        expected = {
            "usage": usage,
            "realised": np.abs(c).mean(0) / usage,
            "concentration_q": np.abs(still_q.mean(0)) / np.abs(zq).mean(0),
            "concentration_k": np.abs(still_k.mean(0)) / np.abs(zk).mean(0),
            "weight_near": weight[d <= 2].mean(0),
            "weight_far": weight[d >= (longest + 1) // 2].mean(0),
            "mean_product_real": product.real,
            "mean_product_imag": product.imag,
            "needed_rank": rank,
            "needed_error": error,
        }
        for name, value in expected.items():
            assert found[name][head].tolist() == pytest.approx(list(value), abs=1e-6), name
        curve = (product * np.exp(1j * theta * d[:, None])).real.sum(1)
        edges = bin_edges(n - 1)
        for b, (start, stop) in enumerate(itertools.pairwise(edges)):
            here = (d >= start) & (d < stop)
            got = [float(found[name][head, b]) for name in BY_DISTANCE]
            if not here.any():
                assert np.isnan(got).all()
                continue
            means = [d[here].mean(), curve[here].mean(), c[here].sum(1).mean()]
            assert got == pytest.approx(means, abs=1e-6)
        x, y = (z[:, h].numpy() for z, h in ((q, head), (k, g.kv_head[head])))
        apart = np.linalg.norm(x.mean(0) - y.mean(0))
        spread = math.sqrt(sum(((v - v.mean(0)) ** 2).sum(1).mean() for v in (x, y)))
        assert float(found["separation"][head]) == pytest.approx(apart / spread)


def greedy_by_hand(change):
    """RoPElite from its definition: the scores made anew for every set."""
    n_pairs, kept, ranks, errors = change.shape[1], [], {}, {}
    whole = change.sum(1)
    scale = np.abs(whole).mean()
    while len(kept) < n_pairs:
        tried = {
            m: np.abs(change[:, [*kept, m]].sum(1) - whole).mean()
            for m in range(n_pairs)
            if m not in kept
        }
        best = min(tried, key=tried.get)
        kept.append(best)
        ranks[best], errors[best] = len(kept), tried[best] / scale
    return tuple([x[m] for m in range(n_pairs)] for x in (ranks, errors))


def test_what_does_not_turn_needs_nothing(generator):
    rank, error = needed_order(torch.zeros(9, 2, 4))
    assert rank.isnan().all()
    assert error.isnan().all()
    change = torch.zeros(50, 1, 4)
    change[:, 0, 2] = torch.randn(50, generator=generator)
    rank, error = needed_order(change)
    assert rank[0, 2] == 1
    assert error[0].tolist() == [0, 0, 0, 0]


def test_pairs_meet_where_a_map_of_positions_puts_them(generator, monkeypatch):
    """Halved positions are what halved frequencies at the full ones are."""
    monkeypatch.setattr(measuring, "_PER_BIN", 10**6)
    g = LayerGeometry.from_inv_freq(INV_FREQ, 2)
    half = LayerGeometry.from_inv_freq(INV_FREQ / 2, 2)
    still = random_vectors(generator, g)
    at = torch.arange(len(still[0]))

    def halved(position):
        return position[..., None, None].double() / 2

    there = Remapping((Region(queries=halved, keys=halved),), every_pair)
    mapped = measured(
        *(rotate_by(x, at, g) for x in still), dataclasses.replace(g, remapping=there), needed=True
    )
    plain = measured(*(rotate_by(x, at, half) for x in still), half, needed=True)
    for name in set(mapped) - {"slow_norm_q", "slow_norm_k", "separation"}:
        assert torch.allclose(mapped[name], plain[name], atol=1e-6, equal_nan=True), name


def test_bins_are_half_octaves_and_hold_every_distance():
    for longest in (1, 2, 3, 17, 1000, 8191):
        edges = bin_edges(longest)
        assert edges[0] == 1
        assert edges[-1] == longest + 1
        assert (np.diff(edges) > 0).all()
    wide = bin_edges(8191)[8:-1]
    assert np.allclose(wide[1:] / wide[:-1], math.sqrt(2), rtol=0.05)


def test_draws_are_the_document_s_own(generator):
    g = LayerGeometry.from_inv_freq(INV_FREQ)
    q, k = random_vectors(generator, g, n=200)
    one, again = (measured(q, k, g, draws=50) for _ in range(2))
    other = measured(q, k, g, draws=50, seed=1)
    assert all(torch.equal(one[x].nan_to_num(), again[x].nan_to_num()) for x in one)
    assert torch.equal(one["usage"], other["usage"])
    assert not torch.equal(one["realised"], other["realised"])
    assert not torch.equal(one["score"], other["score"])
    exact = measured(q, k, g)
    assert torch.allclose(exact["realised"], measured(q, k, g, draws=4000)["realised"], atol=0.03)


def test_tight_clouds_are_apart(generator):
    g = LayerGeometry.from_inv_freq(INV_FREQ)
    noise = torch.randn(2, 500, 1, 8, generator=generator, dtype=torch.float64)
    q, k = (VectorMeans.of(x, g) for x in (noise[0] + 2, noise[1] - 2))
    assert float(separation(q, k)) == pytest.approx(4 * math.sqrt(8) / 4, rel=0.05)
    still = VectorMeans.of(torch.ones(5, 1, 8), g)
    assert separation(still, still).isnan().all()

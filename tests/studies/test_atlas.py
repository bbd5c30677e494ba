"""The rotary atlas on queries and keys whose answers are known, and against loops."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import results_by_hand
from tl_posheads import LayerGeometry, PosheadsError
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


def by_hand(**changes):
    return dataclasses.replace(results_by_hand.atlas(), **changes)


def test_spectrum_of_a_head_by_hand():
    found = by_hand()
    usage = found.by_pair[0]
    usage[:, 0, 0] = torch.tensor([1.0, 2.0, 1.0])
    usage[:, 0, 1] = torch.tensor([0.0, 0.0, 5.0])
    table = found.heads().set_index(["layer", "head"])
    assert table.loc[(0, 0), "centroid"] == 1
    entropy = -(0.5 * math.log(0.5) + 0.5 * math.log(0.25)) / math.log(3)
    assert table.loc[(0, 0), "entropy"] == pytest.approx(entropy)
    assert table.loc[(0, 1), ["centroid", "entropy"]].tolist() == [2, 0]
    # Texts of 8 tokens, training of 100, wavelengths 6, 60 and 600.
    assert table.loc[(0, 0), ["slow_text", "slow_trained"]].tolist() == [0.75, 0.25]
    assert table.loc[(0, 1), ["slow_text", "slow_trained"]].tolist() == [1, 1]
    assert (1, 2) not in table.index
    assert len(table) == 5
    unknown = by_hand(trained=None).heads()
    assert unknown["slow_trained"].isna().all()
    assert unknown["slow_text"].notna().all()
    assert table.loc[(0, 2), "rho"] == float(found.scores[0, 0, 2])
    assert "rho" not in by_hand(scores=None).heads()


def test_intervals_are_student_s_t_over_documents():
    found = by_hand()
    values = found.by_document("realised")[:, 0, 1, 2].numpy()
    table = found.to_pandas().set_index(["layer", "head", "pair"]).loc[(0, 1, 2)]
    half = 4.302652730 * values.std(ddof=1) / math.sqrt(3)  # t with 2 degrees of freedom
    assert table["realised"] == pytest.approx(values.mean())
    assert table["realised_ci_low"] == pytest.approx(values.mean() - half)
    assert table["realised_ci_high"] == pytest.approx(values.mean() + half)
    assert table["wavelength"] == 600
    share = found.by_document("usage_share")
    assert torch.allclose(share[:, 0].sum(-1), torch.ones(3, 3).double())


def test_mean_curve_is_the_sum_of_cosines():
    found = by_hand()
    real, imag = (found.by_document(f"mean_product_{x}")[:, 1, 0] for x in ("real", "imag"))
    curve = found.mean_curve((1, 0))
    assert curve["distance"].tolist() == [1, 2, 3, 4, 5]  # the window's
    for row in curve.to_dict("records"):
        each = []
        for doc in range(3):
            terms = [
                math.hypot(real[doc, m], imag[doc, m])
                * math.cos(
                    2 * math.pi / wavelength * row["distance"]
                    + math.atan2(imag[doc, m], real[doc, m])
                )
                for m, wavelength in enumerate((6, 60, 600))
            ]
            each.append(sum(terms))
        assert row["curve"] == pytest.approx(np.mean(each))
        assert row["ci_low"] < row["curve"] < row["ci_high"]
    best = found.heads().set_index(["layer", "head"]).loc[(1, 0), "preferred"]
    assert best == curve.loc[curve["curve"].idxmax(), "distance"]
    assert found.mean_curve((0, 0), [3, 7])["distance"].tolist() == [3, 7]
    other = found.wavelengths.clone()
    other[1] *= 2  # as where frequencies depend on a text's length
    apart = by_hand(wavelengths=other)
    assert apart.mean_curve((1, 0))["curve"].tolist() != curve["curve"].tolist()
    curve = apart.mean_curve((1, 0))
    best = apart.heads().set_index(["layer", "head"]).loc[(1, 0), "preferred"]
    assert best == curve.loc[curve["curve"].idxmax(), "distance"]


def test_correlation_with_the_scores_found():
    found = by_hand()
    curve, score = found.by_distance[1:]
    score[:, 0, 0] = 3 * curve[:, 0, 0] + 1
    score[:, 0, 1] = -curve[:, 0, 1]
    score[:, 1, 0, 2:] = float("nan")  # two bins are too few
    expected = [np.corrcoef(curve[i, 0, 2], score[i, 0, 2])[0, 1] for i in range(3)]
    table = found.heads().set_index(["layer", "head"])["curve_correlation"]
    assert table[(0, 0)] == pytest.approx(1)
    assert table[(0, 1)] == pytest.approx(-1)
    assert table[(0, 2)] == pytest.approx(np.mean(expected))
    assert np.isnan(table[(1, 0)])
    bins = found.mean_scores((0, 0))
    assert bins["distance"].tolist() == [1, 2, 3, 4.5]
    assert bins["score"].to_numpy() == pytest.approx(3 * bins["mean_curve"].to_numpy() + 1)


def test_pairs_needed_for_a_tenth():
    found = by_hand()
    rank, error = (found.by_document(f"needed_{x}") for x in ("rank", "error"))
    rank[:] = torch.tensor([3.0, 1.0, 2.0])
    error[:] = torch.tensor([0.0, 0.4, 0.1], dtype=torch.float64)
    error[2] = torch.tensor([0.0, 0.05, 0.01])
    assert found.heads()["pairs_needed"].iloc[0] == pytest.approx((2 + 2 + 1) / 3)
    for x in (rank, error):
        x[:] = float("nan")
    assert "pairs_needed" not in found.heads()
    assert "needed_rank" not in found.to_pandas()


def test_pictures_say_what_they_show():
    found = by_hand()
    (ax, bar) = found.plot().axes
    share = found.to_pandas().pivot(index=["layer", "head"], columns="pair", values="usage_share")
    assert np.allclose(ax.images[0].get_array(), share.to_numpy())
    assert [label.get_text() for label in ax.get_xticklabels()] == ["6.0", "60", "600"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["layer 0", "layer 1"]
    assert "usage share" in bar.get_ylabel()
    by_rho = found.plot(sort="rho", column="realised").axes[0]
    order = found.heads().sort_values("rho", ascending=False)
    shown = found.to_pandas().set_index(["layer", "head", "pair"])["realised"]
    first = order.iloc[0]
    assert by_rho.images[0].get_array()[0, 1] == shown[(first["layer"], first["head"], 1)]
    assert "rho" in by_rho.get_title(loc="left")
    usage, parts, below = found.plot_head((0, 1)).axes
    heights = [bar.get_height() for bar in usage.patches]
    assert heights == pytest.approx(list(share.loc[(0, 1)]))
    assert "error left" in str([text.get_text() for text in parts.get_legend().get_texts()])
    lines = {line.get_label(): line for line in below.lines}
    assert list(lines["mean curve"].get_ydata()) == list(found.mean_curve((0, 1))["curve"])
    assert list(lines["scores found"].get_ydata()) == list(found.mean_scores((0, 1))["score"])
    assert "trained" not in str([t.get_text() for t in below.texts])
    marked = by_hand(trained=5).plot_head((0, 1)).axes[2]
    assert "trained on 5" in str([t.get_text() for t in marked.texts])


def test_saved_and_read_again(tmp_path):
    found = by_hand()
    found.save(tmp_path)
    again = type(found).load(tmp_path)
    pd.testing.assert_frame_equal(again.to_pandas(), found.to_pandas())
    pd.testing.assert_frame_equal(again.heads(), found.heads())
    assert repr(again) == repr(found)
    assert "L" in repr(found)


def test_what_is_not_there_is_refused():
    found = by_hand()
    for head in ((1, 2), (0, 3), (2, 0)):
        with pytest.raises(PosheadsError, match="not measured"):
            found.mean_curve(head)
    with pytest.raises(PosheadsError, match="expected one of usage, usage_share"):
        found.by_document("nothing")
    with pytest.raises(PosheadsError, match="expected 'layer' or one of rho"):
        found.plot(sort="nothing")
    with pytest.raises(PosheadsError, match="usage_share"):
        found.plot(column="nothing")

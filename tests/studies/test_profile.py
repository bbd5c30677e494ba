"""The profile's measures on tensors, against loops from the formulas; its table and figure."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from tl_posheads.errors import PosheadsError
from tl_posheads.figures.profile import clustered
from tl_posheads.rotary.contributions import rotate_by
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.statistics.ranks import chance_overlap
from tl_posheads.studies.atlas.vectors import VectorMeans
from tl_posheads.studies.profile import (
    HeadProfile,
    before_rotation,
    copied_share,
    copies_of,
    detected_share,
    dimension_utility,
    long_context_share,
    massive_share,
    mean_distance,
    recall,
    sink_mass,
    slow_dimensions,
    slow_share,
)
from tl_posheads.studies.profile.settings import MEASURES, ProfileSettings, measures_of


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def pattern(generator):
    """Three heads' attention over 30 positions."""
    scores = 3 * torch.randn(3, 30, 30, generator=generator)
    hidden = torch.ones(30, 30).triu(1).bool()
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def test_looking_back_against_loops(pattern):
    n = pattern.shape[-1]
    for head in range(3):
        sink = sum(float(pattern[head, i, 0]) for i in range(n)) / n
        assert float(sink_mass(pattern)[head]) == pytest.approx(sink, abs=1e-6)
        for first in (0, 1):
            total = weight = 0.0
            for i in range(n):
                for j in range(first, i + 1):
                    total += float(pattern[head, i, j]) * (i - j)
                    weight += float(pattern[head, i, j])
            found = mean_distance(pattern, first=first)[head]
            assert float(found) == pytest.approx(total / weight, abs=1e-5)


def test_a_pure_sink_has_no_distance_beyond_it():
    pattern = torch.zeros(5, 5)
    pattern[:, 0] = 1.0
    assert float(sink_mass(pattern)) == 1.0
    assert float(mean_distance(pattern)) == 2.0
    assert math.isnan(float(mean_distance(pattern, first=1)))


def test_detected_share_of_each_head_by_itself(pattern):
    detection = torch.eye(30).roll(1, 0).tril()
    expected = [sum(float(p[i, i - 1]) for i in range(1, 30)) / 30 for p in pattern]
    assert detected_share(pattern, detection).tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(PosheadsError, match="same positions"):
        detected_share(pattern, detection[:29, :29])


def _needs(scores, i, window, n_sink, sliding, threshold):
    """By QAdA and by the oracle, from keys one at a time; None where the bulk is too small."""
    seen = [j for j in range(i + 1) if sliding is None or i - j < sliding]
    local = [j for j in seen if j < n_sink or i - j < window]
    bulk = [scores[i, j] for j in seen if j not in local]
    if len(bulk) < window:
        return None
    near = sum(math.exp(scores[i, j]) for j in local)
    mean, variance = np.mean(bulk), np.var(bulk)
    gaussian = len(bulk) * math.exp(mean + variance / 2)
    exact = sum(math.exp(s) for s in bulk)
    return near / (near + gaussian) < threshold, near / (near + exact) < threshold


@pytest.mark.parametrize(("window", "n_sink", "sliding"), [(4, 2, None), (3, 0, None), (4, 3, 20)])
def test_long_context_against_a_loop(generator, window, n_sink, sliding):
    scores = 2.5 * torch.randn(40, 40, generator=generator)
    rows = scores.double().numpy()
    told = [_needs(rows, i, window, n_sink, sliding, 0.6) for i in range(40)]
    told = np.array([pair for pair in told if pair is not None], dtype=float)
    found = long_context_share(
        scores, window=window, n_sink=n_sink, threshold=0.6, sliding_window=sliding
    )
    assert found == pytest.approx(tuple(told.mean(0)))
    assert 0 < found[0] < 1
    shifted = scores + torch.linspace(-30, 30, 40)[:, None]  # softmax doesn't see a row's constant
    assert long_context_share(
        shifted, window=window, n_sink=n_sink, sliding_window=sliding
    ) == pytest.approx(found)


def test_long_context_of_gaussian_keys_is_what_the_keys_moments_say(generator):
    """q . mu and q' Sigma q of the bulk's keys, as the paper has it, give the same answer."""
    q, k = (torch.randn(60, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    scores, answers = q @ k.T, []
    for i in range(60):
        bulk = k[2 : max(2, i - 4)]
        if len(bulk) < 5:
            continue
        mean = q[i] @ bulk.mean(0)
        variance = q[i] @ torch.cov(bulk.T, correction=0) @ q[i]
        far = len(bulk) * torch.exp(mean + variance / 2)
        near = scores[i, [*range(2), *range(i - 4, i + 1)]].exp().sum()
        answers.append(float(near / (near + far)) < 0.6)
    assert long_context_share(scores, window=5, n_sink=2)[0] == pytest.approx(np.mean(answers))


def test_long_context_of_short_texts_is_unknown_and_of_looks_far_back_is_one():
    assert all(math.isnan(x) for x in long_context_share(torch.zeros(8, 8), window=8))
    far = torch.zeros(50, 50)
    far[:, 10] = 30.0
    near = torch.zeros(50, 50)
    near += 30.0 * torch.eye(50)
    options = dict(window=5, n_sink=2)
    assert long_context_share(near, **options) == (0.0, 0.0)
    # 43 queries have 5 keys in their bulk; from 15 on key 10 is among them and takes everything.
    # Of the even rows before that, 11 has 7 of 12 keys near (0.58) and so on down.
    assert long_context_share(far, **options)[1] == pytest.approx(35 / 39)
    with pytest.raises(PosheadsError, match="window of at least 1"):
        long_context_share(far, window=0)


@pytest.mark.parametrize(("layout", "d_head"), [("half", 8), ("adjacent", 8), ("half", 11)])
def test_before_rotation_undoes_rope(generator, layout, d_head):
    g = LayerGeometry.from_inv_freq(
        torch.tensor([1.0, 0.3, 0.1, 0.02]), d_head=d_head, layout=layout, rotation_scale=1.3
    )
    x = torch.randn(12, 2, d_head, generator=generator, dtype=torch.float64)
    turned = rotate_by(x, torch.arange(12), g)
    turned[..., : g.rotary_dim] *= 1.3
    assert torch.allclose(before_rotation(turned, g), x)
    assert torch.allclose(before_rotation(turned[5:], g, first=5), x[5:])
    norms = VectorMeans.of(turned, g).dimension_norms
    assert torch.allclose(norms, x.square().sum(0).sqrt())
    assert not torch.allclose(norms, turned.square().sum(0).sqrt())


def test_massive_dimensions_by_hand():
    x = torch.ones(4, 2, 20)
    x[:, 0, 7] = 30.0  # mean of norms: (19 + 30) / 20 * 2 = 4.9; 60 > 5 * 4.9
    norms = x.square().sum(0).sqrt()
    assert norms[0, 7] == 60.0
    assert massive_share(norms).tolist() == [0.05, 0.0]
    assert massive_share(norms, factor=13.0).tolist() == [0.0, 0.0]
    assert massive_share(torch.zeros(1, 4)).isnan().all()


def test_slow_dimensions_follow_the_layout():
    inv_freq = torch.tensor([1.0, 2 * math.pi / 100, 2 * math.pi / 300])
    half = LayerGeometry.from_inv_freq(inv_freq, d_head=8)
    assert slow_dimensions(half, 200).tolist() == [0, 0, 1, 0, 0, 1, 1, 1]
    adjacent = LayerGeometry.from_inv_freq(inv_freq, layout="adjacent")
    assert slow_dimensions(adjacent, 99).tolist() == [0, 0, 1, 1, 1, 1]
    weight = torch.arange(1.0, 7.0)[None]
    assert slow_share(weight, slow_dimensions(adjacent, 99)).tolist() == [18 / 21]


def test_utility_finds_the_dimensions_that_matter(generator):
    """Two heads that read different dimensions; a third reads all evenly and so has none."""
    n, d = 40, 8
    q = torch.ones(n, 3, d)
    k = 0.01 * torch.randn(n, 3, d, generator=generator)
    k[:, 0, 2] = 4 * torch.randn(n, generator=generator)
    k[:, 1, 5] = 4 * torch.randn(n, generator=generator)
    k[:, 2] = 1.0
    v = torch.randn(n, 3, 4, generator=generator)
    rows = torch.arange(5, n)
    mask, lost = dimension_utility(q[rows], k, v, rows, scale=1.0)
    assert mask[0, 2] > 0.5
    assert mask[1, 5] > 0.5
    mask[0, 2] = mask[1, 5] = 0.0
    assert mask[:2].max() < 0.05
    assert (lost[:2] < 0.05).all()
    assert mask[2].isnan().all()
    assert lost[2].isnan()


def test_utility_with_a_window_and_a_softcap_reads_what_attention_reads(generator):
    """Keys outside the window would matter if they were seen; a hard cap leaves even attention."""
    n = 30
    q, v = torch.ones(n, 1, 2), torch.randn(n, 1, 3, generator=generator)
    k = torch.zeros(n, 1, 2)
    k[:4, 0, 0] = 20.0
    k[:, 0, 1] = 3 * torch.randn(n, generator=generator)
    rows = torch.arange(20, n)
    mask, _ = dimension_utility(q[rows], k, v, rows, scale=1.0, window=10)
    assert mask[0, 0] < 0.05 < 0.5 < mask[0, 1]
    mask, _ = dimension_utility(q[rows], k, v, rows, scale=1.0)
    assert mask[0, 0] > 0.3
    capped, lost = dimension_utility(q[rows], k, v, rows, scale=1.0, softcap=1e-9)
    assert capped.isnan().all()
    assert lost.isnan().all()
    with pytest.raises(PosheadsError, match="expected \\[row, head, d_head\\]"):
        dimension_utility(q[rows], k, v[:5], rows, scale=1.0)


def test_utility_leaves_gradients_and_inputs_alone(generator):
    q, k, v = (torch.randn(9, 2, 4, generator=generator) for _ in range(3))
    before = [x.clone() for x in (q, k, v)]
    with torch.no_grad():
        first, _ = dimension_utility(q, k, v, torch.arange(9), scale=0.5)
        assert not torch.is_grad_enabled()
    second, _ = dimension_utility(q, k, v, torch.arange(9), scale=0.5)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v)))


def test_copied_share_counts_distinct_tokens_of_the_needle():
    #                     0  1  2  3  4  5  6  7
    text = torch.tensor([9, 4, 6, 8, 9, 4, 6, 8])
    needle = copies_of(text, torch.tensor([4, 6, 8]))
    assert needle.tolist() == [[1, 2, 3], [5, 6, 7]]
    written = torch.tensor([4, 6, 8])
    looks = torch.tensor(
        [
            [1, 2, 3],  # all
            [1, 6, 7],  # all, from two places
            [2, 2, 2],  # in the needle, but holds the token once only
            [0, 4, 0],  # elsewhere
            [1, 1, 1],
            [2, 1, 3],  # all of the needle, but two of them while another token is written
        ]
    )
    found = copied_share(looks, written, text, needle)
    assert found.tolist() == pytest.approx([1, 1, 1 / 3, 0, 1 / 3, 1 / 3])
    twice = copied_share(torch.tensor([[1, 5, 1]]), torch.tensor([4, 4, 4]), text, needle)
    assert twice.tolist() == pytest.approx([1 / 3])  # counted once, however often
    with pytest.raises(PosheadsError, match="needle"):
        copied_share(looks, written, text, needle[:0])


def test_copies_and_recall():
    assert copies_of(torch.tensor([1, 1, 1]), torch.tensor([1, 1])).tolist() == [[0, 1], [1, 2]]
    assert copies_of(torch.tensor([1]), torch.tensor([1, 2])).shape == (0, 2)
    assert recall(torch.tensor([1, 2, 3]), torch.tensor([3, 2, 2, 5])) == 0.5


@pytest.fixture
def table():
    rng = np.random.default_rng(3)
    base = rng.normal(size=60)
    layer = np.repeat(np.arange(6), 10)
    return pd.DataFrame(
        {
            "layer": layer,
            "head": np.tile(np.arange(10), 6),
            "positional": base,
            "alike": base + 0.3 * rng.normal(size=60),
            "against": -base + rng.normal(size=60),
            "deep": layer + 0.01 * rng.normal(size=60),
            "deeper": layer + 0.01 * rng.normal(size=60),
            "same": 0.0,
            "unknown": np.nan,
            "gaps": np.where(np.arange(60) % 4 == 0, np.nan, base**3),
            "few": np.where(np.arange(60) < 4, 1.0 + np.arange(60), 0.0),
        }
    )


def test_correlation_is_spearmans(table):
    profile = HeadProfile(table, {})
    rho = profile.correlation()
    for a in ("positional", "alike", "against", "deep", "gaps"):
        for b in ("positional", "alike", "against", "deep", "gaps"):
            both = table[["layer", a, b] if a != b else ["layer", a]].dropna()
            expected = stats.spearmanr(both[a], both[b]).statistic
            assert rho.loc[a, b] == pytest.approx(expected, abs=1e-12)
    assert rho["same"].isna().all()
    assert rho["unknown"].isna().all()
    assert rho.loc["positional", "gaps"] == pytest.approx(1.0)
    within = profile.correlation(within_layers=True)
    assert rho.loc["deep", "deeper"] > 0.95
    assert abs(within.loc["deep", "deeper"]) < 0.4
    assert within.loc["positional", "alike"] > 0.8


def test_overlap_against_sets_and_chance(table):
    profile = HeadProfile(table, {})
    rows = profile.overlap(8).set_index("measure")
    best = set(table["positional"].nlargest(8).index)
    for name in ("alike", "against", "deep"):
        shared = len(best & set(table[name].nlargest(8).index))
        chance, p = chance_overlap(60, 8, 8, shared)
        row = rows.loc[name]
        assert (row["overlap"], row["n_top"]) == (shared, 8)
        assert (row["chance"], row["p"]) == pytest.approx((chance, p))
    assert rows.loc["alike", "overlap"] > 4
    assert rows.loc["few", "n_top"] == 4  # the other heads tie at 0
    assert rows.loc["few", "overlap"] == len(best & {0, 1, 2, 3})
    assert rows.loc["gaps", "n_heads"] == 45
    assert rows.loc[["same", "unknown"], "overlap"].isna().all()
    assert (rows["p_adjusted"].dropna() >= rows["p"].dropna()).all()
    assert profile.overlap(0.1)["n_positional"].tolist()[0] == 6
    for wrong in (0, 1.5, True, "5"):
        with pytest.raises(PosheadsError, match="heads were asked for; expected a count"):
            profile.overlap(wrong)


def test_families_are_the_highest_heads_of_each_measure(table):
    profile = HeadProfile(table.rename(columns={"few": "retrieval", "gaps": "sink"}), {})
    found = profile.families(8)
    assert list(found) == ["positional", "retrieval", "sink"]
    for name, heads in found.items():
        best = profile.table.nlargest(8, name).sort_index()
        expected = [tuple(x) for x in best[["layer", "head"]].to_numpy().tolist()]
        # Four heads retrieve; the other ones tie at 0.
        assert heads == (expected[:4] if name == "retrieval" else expected)
    assert len(profile.families(0.2)["sink"]) == 9  # of the 45 heads that have a value
    assert profile.families(2, ["unknown", "same"]) == {"unknown": [], "same": []}
    with pytest.raises(PosheadsError, match=r"measures=\['kin'\] were asked for; expected some of"):
        profile.families(8, ["sink", "kin"])
    with pytest.raises(PosheadsError, match="expected a count"):
        profile.families(0)


def test_saved_and_read_again(table, tmp_path):
    profile = HeadProfile(table, {"model": "m", "missing": {"unknown": "no"}, "x": [1.5, None]})
    profile.save(tmp_path / "p")
    again = HeadProfile.load(tmp_path / "p")
    pd.testing.assert_frame_equal(again.to_pandas(), table)
    assert again.provenance == profile.provenance
    assert again.columns[0] == "positional"
    assert "60 heads" in repr(again)
    copy = again.to_pandas()
    copy.loc[0, "positional"] = 99.0
    pd.testing.assert_frame_equal(again.to_pandas(), table)
    data = (tmp_path / "p" / "profile.parquet").read_bytes()
    (tmp_path / "p" / "profile.parquet").write_bytes(data[:-1])
    with pytest.raises(PosheadsError, match="damaged"):
        HeadProfile.load(tmp_path / "p")
    with pytest.raises(PosheadsError, match="holds no profiles"):
        HeadProfile.load(tmp_path / "nowhere")


def test_the_map_shows_every_correlation_and_puts_alike_ones_side_by_side(table):
    profile = HeadProfile(table, {"model": "m"})
    fig = profile.plot()
    ax = fig.axes[0]
    shown = [label.get_text() for label in ax.get_yticklabels()]
    assert abs(shown.index("deep") - shown.index("deeper")) == 1
    assert "same" not in shown
    assert "unknown" not in shown
    assert "same, unknown" in ax.get_xlabel()
    rho = profile.correlation()
    texts = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in ax.texts}
    assert len(texts) == len(shown) ** 2
    for i, a in enumerate(shown):
        for j, b in enumerate(shown):
            assert texts[i, j] == f"{rho.loc[a, b]:.2f}"
    assert (ax.images[0].norm.vmin, ax.images[0].norm.vmax) == (-1, 1)
    with pytest.raises(PosheadsError, match="nothing to draw"):
        HeadProfile(table[["layer", "head", "positional", "same"]], {}).plot()


def test_clustered_keeps_every_name_once():
    names = list("abcde")
    rho = pd.DataFrame(np.eye(5), names, names)
    rho.loc["a", "e"] = rho.loc["e", "a"] = 0.9
    rho.loc["b", "d"] = rho.loc["d", "b"] = np.nan
    order = clustered(rho)
    assert sorted(order) == names
    assert abs(order.index("a") - order.index("e")) == 1


def test_names_of_measures():
    assert measures_of(None) == list(MEASURES)
    for wrong in (["sinks"], "sink"):
        with pytest.raises(PosheadsError, match="expected a list of some of"):
            measures_of(wrong)
    assert ProfileSettings().window_for(512) == 64
    assert ProfileSettings().window_for(100_000) == 1024
    assert ProfileSettings(local_window=7).window_for(512) == 7

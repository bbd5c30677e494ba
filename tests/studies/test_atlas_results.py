"""Tables and pictures of a rotary atlas whose values are set by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import results_by_hand
from tl_posheads import PosheadsError


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
    assert list(lines["measured scores"].get_ydata()) == list(found.mean_scores((0, 1))["score"])
    assert "trained" not in str([t.get_text() for t in below.texts])
    marked = by_hand(trained=5).plot_head((0, 1)).axes[2]
    assert "trained on 5" in str([t.get_text() for t in marked.texts])


def test_families_of_a_profile_lie_where_their_usage_does():
    found = by_hand()
    for layer, head, pair in ((0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 0, 1)):
        found.by_pair[0, :, layer, head] = torch.eye(3, dtype=torch.float64)[pair]
    found.by_pair[0, :, 1, 1] = 1.0  # even use
    profile = results_by_hand.profile()
    profile.table["positional"] = [0.1, 0.9, 0.8, 0.0, 0.7, 1.0]
    profile.table["sink"] = [0.5, 0.1, 0.2, 0.3, 0.4, 0.0]
    fig = found.plot_families(profile, 3, ["positional", "sink"])
    positional, sink = fig.axes
    assert positional.get_title(loc="left") == "positional: 2 heads"  # L1H2 was not measured
    everything = {(0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (1.0, 1.0)}
    for ax, expected, median in (
        (positional, {(1.0, 0.0), (2.0, 0.0)}, 1.5),
        (sink, {(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)}, 1.0),
    ):
        grey, dotted, own, line = ax.lines
        assert {tuple(x) for x in np.round(grey.get_xydata(), 9).tolist()} == everything
        assert {tuple(x) for x in np.round(own.get_xydata(), 9).tolist()} == expected
        assert dotted.get_xdata()[0] == pytest.approx(1.0)
        assert line.get_xdata()[0] == pytest.approx(median)
    assert "5 heads" in fig.get_suptitle()


def test_families_of_other_models_are_refused():
    found, profile = by_hand(), results_by_hand.profile()
    profile.table["positional"] = [0.1, 0.2, 0.3, 0.0, 0.4, 1.0]
    with pytest.raises(PosheadsError, match="no head of these families was measured"):
        found.plot_families(profile, 1, ["positional"])
    for layer, head in ((2, 0), (1, 3)):
        other = results_by_hand.profile()
        other.table.loc[len(other.table)] = {"layer": layer, "head": head, "positional": 0.1}
        with pytest.raises(PosheadsError, match=r"7 heads was given.* has 2 layers of 3 heads"):
            found.plot_families(other)
    fewer = dataclasses.replace(profile, table=profile.table.drop(index=5))
    with pytest.raises(PosheadsError, match="profile of 5 heads was given"):
        found.plot_families(fewer)


def test_heads_are_ranked_by_what_is_known_of_them():
    found = by_hand()
    table = found.heads().sort_values("rho", ascending=False)
    ranked = found.ranked()
    assert ranked["rho"].tolist() == table["rho"].tolist()
    assert ranked[["layer", "head"]].to_numpy().tolist() == table[["layer", "head"]].values.tolist()
    assert not [name for name in ranked if name.endswith(("_low", "_high"))]
    plain = by_hand(scores=None).ranked()
    assert plain["slow_text"].is_monotonic_decreasing
    assert "rho" not in plain


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
    pd.testing.assert_frame_equal(found.mean_curve("L0H1"), found.mean_curve((0, 1)))
    for head in ((1, 2), (0, 3), "L2H0"):
        with pytest.raises(PosheadsError, match="not measured"):
            found.mean_curve(head)
    with pytest.raises(PosheadsError, match="expected one of usage, usage_share"):
        found.by_document("nothing")
    with pytest.raises(PosheadsError, match="expected 'layer' or one of rho"):
        found.plot(sort="nothing")
    with pytest.raises(PosheadsError, match="usage_share"):
        found.plot(column="nothing")

"""Tables, tests, comparison, merging, and what is said of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from helpers.scores_by_hand import head_scores, scores_with_gaps
from tl_posheads import HeadScores, LayerGeometry, PosheadsError, RotaryGeometry, ScoreAccumulator
from tl_posheads.scoring.draws import MEASURES

NAN = float("nan")


def test_a_heads_numbers_are_means_over_documents_and_their_t_tests():
    s = scores_with_gaps()
    for name in ("rho", "rotation", "content"):
        values = s.by_document(name)
        np.testing.assert_array_equal(values, s.values[MEASURES.index(name)])
        test = s.test(name)
        known = ~torch.isnan(values[0])
        torch.testing.assert_close(getattr(s, name)[known], values.mean(0)[known])
        expected = stats.ttest_1samp(values[:, known].numpy(), 0.0)
        np.testing.assert_allclose(test.p[known], expected.pvalue)
        np.testing.assert_allclose(
            test.p_adjusted[known], stats.false_discovery_control(expected.pvalue)
        )
        assert bool(torch.isnan(test.p[2]).all())
    np.testing.assert_array_equal(s.p, s.test().p)
    np.testing.assert_array_equal(s.p_adjusted, s.test().p_adjusted)
    np.testing.assert_array_equal(s.ci_low, s.test().ci_low)
    torch.testing.assert_close(s.interaction[0], s.rho[0] - s.rotation[0] - s.content[0])
    torch.testing.assert_close(s.d_far[0], s.by_document("d_far").mean(0)[0])
    assert s.n_documents == 8
    assert s.n_qk_pairs[0].tolist() == [8000] * 5
    assert s.n_qk_pairs[2].tolist() == [0] * 5
    with pytest.raises(PosheadsError, match="expected one of rho, rotation, content"):
        s.test("d_near")


def test_top_takes_counts_and_fractions_best_first():
    s = scores_with_gaps()
    best = s.top(4)
    values = [float(s.rho[place]) for place in best]
    assert values == sorted(s.rho[torch.isfinite(s.rho)].tolist(), reverse=True)[:4]
    assert len(s.top(0.2)) == 3  # of 15 scored heads
    assert s.top(1.0) == s.top(15) == s.top(np.int64(999))
    assert len(s.top(1)) == 1
    for wrong in (0, -1, 0.0, 1.5, "5", True):
        with pytest.raises(PosheadsError, match="expected a"):
            s.top(wrong)
    above = [place for place in s.top(15) if s.ci_low[place] > 0]
    assert s.above(0.0) == above
    assert 0 < len(above) < 15


def test_heads_that_are_equal_stand_in_order_of_their_places():
    s = head_scores([[0.2, 0.5], [0.5, 0.2]], spread=0.0)
    assert s.top(4) == [(0, 1), (1, 0), (0, 0), (1, 1)]


def test_positional_heads_are_above_zero_after_correction():
    s = scores_with_gaps()
    x = s.by_document("rho")[:, [0, 1, 3]].reshape(8, 15).numpy()
    p = stats.false_discovery_control(stats.ttest_1samp(x, 0.0).pvalue)
    places = [(layer, head) for layer in (0, 1, 3) for head in range(5)]
    for alpha in (0.05, 1e-4):
        expected = {place for place, q, m in zip(places, p, x.mean(0)) if q < alpha and m > 0}
        assert set(s.positional(alpha)) == expected
        assert s.positional(alpha) == [place for place in s.top(15) if place in expected]
    assert set(s.positional(1e-4)) < set(s.positional(0.05))
    below = (s.rho < 0) & (s.p_adjusted < 0.05)
    assert bool(below.any())
    one = scores_with_gaps(n_documents=1)
    assert one.positional(0.99) == one.above(-1.0) == []
    assert bool(torch.isnan(one.ci_low).all())
    assert len(one.top(1.0)) == 15


def test_table_has_the_scored_heads():
    s = scores_with_gaps()
    frame = s.to_pandas()
    tests = ["ci_low", "ci_high", "p", "p_adjusted"]
    assert frame.columns.tolist() == [
        "layer",
        "head",
        "rho",
        *tests,
        "rotation",
        *[f"rotation_{x}" for x in tests],
        "content",
        *[f"content_{x}" for x in tests],
        "interaction",
        "d_near",
        "d_far",
        "n_qk_pairs",
        "n_documents",
        "window",
    ]
    assert frame.layer.unique().tolist() == [0, 1, 3]
    assert frame["window"].isna().tolist() == [True] * 5 + [False] * 5 + [True] * 5
    row = frame[(frame.layer == 3) & (frame["head"] == 1)].iloc[0]
    assert row.content_p == float(s.test("content").p[3, 1])
    assert row.rotation_ci_high == float(s.test("rotation").ci_high[3, 1])
    assert row.interaction == pytest.approx(float(s.rho[3, 1]) * 0.1)
    assert (row.n_qk_pairs, row.n_documents) == (8000, 8)


def test_documents_have_a_row_each():
    s = scores_with_gaps(n_documents=3)
    frame = s.documents
    assert len(frame) == 3 * 15
    assert frame.document.tolist() == [name for name in s.document_names for _ in range(15)]
    row = frame[(frame.document == s.document_names[1]) & (frame.layer == 3) & (frame["head"] == 2)]
    for name in MEASURES:
        assert row[name].item() == float(s.by_document(name)[1, 3, 2])
    assert row.interaction.item() == pytest.approx((row.rho - row.rotation - row.content).item())
    means = frame.groupby(["layer", "head"]).rho.mean().to_numpy()
    np.testing.assert_allclose(means, s.to_pandas().rho, atol=1e-12)


def test_comparison_with_itself_another_and_chance():
    a, b = scores_with_gaps(0), scores_with_gaps(1)
    same = a.compare(a, k=5)
    assert (same.rank_correlation, same.overlap, same.n_heads) == (pytest.approx(1.0), 5, 15)
    assert same.chance == pytest.approx(25 / 15)
    other = a.compare(b, k=5)
    known = torch.isfinite(a.rho)
    assert other.rank_correlation == pytest.approx(
        stats.spearmanr(a.rho[known], b.rho[known]).statistic
    )
    assert other.overlap == len(set(a.top(5)) & set(b.top(5)))
    assert 0 < same.p_chance < other.p_chance <= 1
    with pytest.raises(PosheadsError, match="same heads"):
        a.compare(scores_with_gaps(layers=3))
    empty = head_scores(torch.full((4, 5), NAN))
    with pytest.raises(PosheadsError, match="0 heads in common"):
        a.compare(empty)


def test_heads_are_compared_by_paired_t_tests_over_the_documents_in_common():
    a, b = scores_with_gaps(0, n_documents=6), scores_with_gaps(1, n_documents=9)
    frame = a.compare(b).by_head
    assert frame[["layer", "head"]].to_numpy().tolist() == [
        [layer, head] for layer in (0, 1, 3) for head in range(5)
    ]
    mine, theirs = (x.by_document("rho")[:6, [0, 1, 3]].reshape(6, 15).numpy() for x in (a, b))
    test = stats.ttest_rel(theirs, mine)
    interval = test.confidence_interval()
    np.testing.assert_allclose(frame.difference, (theirs - mine).mean(0))
    np.testing.assert_allclose(frame.p, test.pvalue)
    np.testing.assert_allclose(frame.ci_low, interval.low)
    np.testing.assert_allclose(frame.ci_high, interval.high)
    np.testing.assert_allclose(frame.p_adjusted, stats.false_discovery_control(test.pvalue))
    # By name, wherever a document stands.
    order = [4, 1, 0, 5, 3, 2]
    names = tuple(a.document_names[i] for i in order)
    mixed = HeadScores(a.values[:, order], names, a.windows, a.provenance)
    pd.testing.assert_frame_equal(mixed.compare(b).by_head, frame)
    alone = HeadScores(a.values, ("f" * 24,) * 5 + names[:1], a.windows, {})
    none = alone.compare(b).by_head
    assert len(none) == 0
    assert none.columns.tolist() == frame.columns.tolist()


def test_comparison_takes_the_counts_and_shares_that_top_takes():
    a, b = scores_with_gaps(0), scores_with_gaps(1)
    assert a.compare(b, k=np.int64(5)).k == 5
    for wrong in (0, -1, 0.0, 1.5, True):
        with pytest.raises(PosheadsError, match="expected a"):
            a.compare(b, k=wrong)


@pytest.mark.parametrize(
    "options", [{}, dict(qk_pairs="all", weighting="distance"), dict(qk_pairs=50)]
)
def test_merging_equals_one_pass_in_any_order_bit_for_bit(options):
    geometry = RotaryGeometry(
        "toy", (LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]), 3),) * 2
    )
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randn(2, 2, n, 3, 4, generator=generator) for n in (50, 20, 35)]

    def measured(which):
        accumulator = ScoreAccumulator(geometry, **options)
        for n in which:
            for layer in range(2):
                q, k = documents[n][:, [layer]]
                accumulator.update(layer, q, k, [f"{n:015x}"])
        return accumulator

    whole = measured([0, 1, 2]).scores()
    parts = [measured([n]) for n in range(3)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 2, 0]):
        merged = parts[0].like()
        for n in order:
            merged.merge(parts[n])
        found = merged.scores()
        assert found.document_names == whole.document_names
        assert torch.equal(found.values, whole.values)
        assert found.provenance == whole.provenance
    assert torch.equal(parts[1].scores().values[:, 0], whole.values[:, 1])
    assert torch.isfinite(whole.rho).all()
    other = ScoreAccumulator(geometry, skip_first=1, **options)
    for wrong in (other, ScoreAccumulator(geometry, layers=[1], **options)):
        with pytest.raises(PosheadsError, match=r"like\(\)"):
            parts[0].merge(wrong)
    assert len(parts[0].rows) == 1
    with pytest.raises(PosheadsError, match="nothing was measured"):
        other.scores()


def test_summary_counts_heads_and_says_how_large_the_effect_is():
    s = scores_with_gaps()
    said = s.summary()
    below = int(((s.rho < 0) & (s.p_adjusted < 0.05)).sum())
    assert said.startswith(
        f"{len(s.positional())} of 15 heads have a mean rho above zero and {below} below, over 8 "
        "documents (t test, p < 0.05 corrected for 15 heads)."
    )
    assert f"rank correlation {s.split_half():.2f}." in said
    layer, head = s.top(1)[0]
    near, far = float(s.d_near[layer, head]), float(s.d_far[layer, head])
    assert f"L{layer}H{head}, the mean dominant dimension goes from {near:.1f} " in said
    assert f"to {far:.1f} in the farthest octave" in said
    layer, head = s.top(15)[-1]
    assert f"L{layer}H{head} ({float(s.rho[layer, head]):+.3f})" in said
    assert "Give" not in said
    strict = s.summary(alpha=1e-5)
    assert strict.startswith(f"{len(s.positional(1e-5))} of 15")
    assert "p < 1e-05" in strict


def test_summary_of_one_document_of_few_and_of_none():
    one = scores_with_gaps(n_documents=1).summary()
    assert one.startswith("15 heads scored on one document: no intervals and no p-values; give 8")
    assert "above zero" not in one
    assert "half" not in one
    few = scores_with_gaps(n_documents=5).summary()
    assert "over 5 documents" in few
    assert "Give 8 or more documents to tell more heads apart." in few
    assert head_scores([[NAN, NAN]]).summary() == "No head has a score."
    above = head_scores([[0.2, 0.3, 0.4]]).summary()
    assert "Negative" not in above


def test_summary_calls_no_negative_score_more_than_noise_without_a_test():
    noisy = head_scores([[0.3, 0.2, -0.01]], spread=0.2)
    assert float(noisy.p[0, 2]) > 0.5
    assert "no noise" not in noisy.summary()
    assert "no noise" not in head_scores([[0.3, 0.2, -0.1]], n_documents=1).summary()


def test_repr_names_the_best_and_says_what_was_found():
    s = scores_with_gaps()
    best = ", ".join(f"L{layer}H{head}" for layer, head in s.top(3))
    first, *found = repr(s).splitlines()
    assert first == f"HeadScores(toy </script>: 15 heads scored on 8 documents, best {best})"
    assert found == s.summary().splitlines()[:2]


def test_a_head_without_a_score_and_what_is_no_scoring_are_refused():
    s = head_scores([[0.2, 0.5], [0.5, 0.2]])
    with pytest.raises(PosheadsError, match=r"L6H6 .*layers 0 to 1, heads 0 to 1"):
        s["L6H6"]
    with pytest.raises(PosheadsError, match="int was given; expected HeadScores"):
        s.compare(3)

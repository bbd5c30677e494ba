"""Methods compared on one live model: each number against the function that it stands for."""

from __future__ import annotations

from html import escape

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import sem, t, ttest_rel

from helpers import small_models
from helpers.traces import state, warm
from tl_posheads import (
    ExtrapolationComparison,
    PosheadsError,
    RotaryGeometry,
    compare_extrapolations,
    dominant_dimension_curve,
    score_heads,
    sweep_theta,
)
from tl_posheads import extrapolation as ex
from tl_posheads.tasks.base import Prompt
from tl_posheads.views.report import write_report

pytestmark = pytest.mark.lens

TRAINED = 32
TOKENS = torch.randint(3, 90, (4, 96), generator=torch.Generator().manual_seed(5))
HEADS = [(1, 2), (0, 1)]
METHODS = [ex.Linear(3), ex.SelfExtend(4, 12)]
OPTIONS = dict(heads=HEADS, trained=TRAINED, qk_pairs=600, seed=1, progress=False)


class Repeat:
    """Scores the last token of a text."""

    def __init__(self, length: int) -> None:
        self.name, self.length = "repeat", length

    def __repr__(self) -> str:
        return f"Repeat({self.length})"

    def prompts(self, model):
        return [Prompt(row[: self.length], torch.tensor([self.length - 1])) for row in TOKENS[:3]]


@pytest.fixture(scope="module")
def llama():
    return warm(small_models.rotary_model("Llama"))


@pytest.fixture(scope="module")
def found(llama):
    tasks = [Repeat(20), Repeat(80)]
    return compare_extrapolations(llama, METHODS, TOKENS, tasks=tasks, **OPTIONS)


def rows_of(found, table, method):
    return table[table["method"] == method]


def by_method(found):
    return zip(found.methods, [ex.Unchanged(), *METHODS], strict=True)


def test_bare_model_comes_first(found):
    assert found.methods == ("Unchanged()", "Linear(factor=3)", "SelfExtend(group=4, window=12)")
    assert [s["name"] for s in found.settings] == ["Unchanged", "Linear", "SelfExtend"]


def test_curves_are_those_of_the_method(llama, found):
    for m, (_, method) in enumerate(by_method(found)):
        with method(llama, trained=TRAINED):
            whole = dominant_dimension_curve(llama, TOKENS, heads=HEADS, progress=False)
        pooled = (found.whole[m] * found.n_whole[:, None]).sum(0) / found.n_whole.sum(0)
        torch.testing.assert_close(pooled, whole.mean, atol=1e-5, rtol=1e-5)
    cut = dominant_dimension_curve(llama, TOKENS[:, :TRAINED], heads=HEADS, progress=False)
    pooled = (found.within[0] * found.n_within[:, None]).sum(0) / found.n_within.sum(0)
    torch.testing.assert_close(pooled, cut.mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(qk_pairs="all"),
        dict(qk_pairs=20_000, weighting="distance", scale="attention"),
        dict(qk_pairs=500, skip_first=3, seed=7),
    ],
)
def test_scores_are_those_of_score_heads(llama, options):
    found = compare_extrapolations(llama, METHODS, TOKENS, **{**OPTIONS, **options})
    scored = dict(seed=OPTIONS["seed"], progress=False) | options
    for m, (_, method) in enumerate(by_method(found)):
        with method(llama, trained=TRAINED):
            whole = score_heads(llama, TOKENS, **scored)
        mine = found.scores_whole[m]
        assert mine.document_names == found.scores_within[m].document_names == whole.document_names
        torch.testing.assert_close(mine.values, whole.values, atol=1e-4, rtol=0)
        for name in ("weighting", "scale", "skip_first", "seed"):
            assert mine.provenance[name] == whole.provenance[name]
    # Texts of 32 tokens have no more than 496 query-key pairs: all are taken, none is drawn.
    bare = score_heads(llama, TOKENS[:, :TRAINED], **scored)
    torch.testing.assert_close(found.scores_within[0].rho, bare.rho, atol=1e-4, rtol=0)


def test_heads_are_tested_in_pairs_of_the_same_texts(found):
    within, whole = found.scores_within[0], found.scores_whole[2]
    table = found.overlap(2).by_head.set_index(["layer", "head"])
    assert len(table) == 8
    for (layer, head), row in table.iterrows():
        mine, theirs = (s.by_document("rho")[:, layer, head].numpy() for s in (within, whole))
        assert row["difference"] == pytest.approx((theirs - mine).mean())
        assert row["p"] == pytest.approx(ttest_rel(theirs, mine).pvalue)


def test_the_scale_is_that_of_curves_too(llama, found):
    scaled = compare_extrapolations(llama, METHODS, TOKENS, **OPTIONS, scale="attention")
    assert (scaled.provenance["scale"], found.provenance["scale"]) == ("attention", "none")
    options = dict(heads=HEADS, scale="attention", progress=False)
    whole = dominant_dimension_curve(llama, TOKENS, **options)
    pooled = (scaled.whole[0] * scaled.n_whole[:, None]).sum(0) / scaled.n_whole.sum(0)
    torch.testing.assert_close(pooled, whole.mean, atol=1e-5, rtol=1e-5)
    assert (scaled.whole - found.whole).abs().max() > 0.05


def test_slow_pairs_weigh_what_the_allocation_map_says(llama, found):
    """Slow in the bare model, and the same pairs under a method that makes others slower, too."""
    wavelengths = RotaryGeometry.from_model(llama)[0].wavelengths
    slow = [m for m, wave in enumerate(wavelengths.tolist()) if wave > TRAINED]
    assert found.slow == (tuple(slow),) * 2
    assert 0 < len(slow) < len(wavelengths)
    for m, (_, method) in enumerate(by_method(found)):
        with method(llama, trained=TRAINED):
            whole = dominant_dimension_curve(llama, TOKENS, heads=HEADS, progress=False)
        weight = whole.allocation[:, slow].sum(1)
        pooled = (found.slow_whole[m] * found.n_whole[:, None]).sum(0) / found.n_whole.sum(0)
        torch.testing.assert_close(pooled, weight, atol=1e-5, rtol=1e-5)
    cut = dominant_dimension_curve(llama, TOKENS[:, :TRAINED], heads=HEADS, progress=False)
    pooled = (found.slow_within[0] * found.n_within[:, None]).sum(0) / found.n_within.sum(0)
    torch.testing.assert_close(pooled, cut.allocation[:, slow].sum(1), atol=1e-5, rtol=1e-5)


def test_which_pairs_are_slow_can_be_said(llama):
    wavelengths = RotaryGeometry.from_model(llama)[0].wavelengths
    limit = float(wavelengths[-1]) - 1
    one = compare_extrapolations(llama, METHODS[:1], TOKENS, **OPTIONS, slower_than=limit)
    assert one.slow == ((len(wavelengths) - 1,),) * 2
    none = compare_extrapolations(llama, METHODS[:1], TOKENS, **OPTIONS, slower_than=limit + 2)
    assert none.slow == ((), ())
    assert none.slow_whole.isnan().all()
    table = none.to_pandas()
    assert table["allocation_stretch"].isna().all()
    assert table["reason"].str.contains("no head has slow pairs").all()


def test_heads_kept_are_those_of_the_same_whole_texts(llama, found):
    """The bare row too: its best heads on whole texts, beside its best within training."""
    within = score_heads(llama, TOKENS[:, :TRAINED], qk_pairs=600, seed=1, progress=False)
    table = found.to_pandas().set_index("method")
    bare = None
    for m, (name, method) in enumerate(by_method(found)):
        with method(llama, trained=TRAINED):
            scores = score_heads(llama, TOKENS, qk_pairs=600, seed=1, progress=False)
        bare = scores if m == 0 else bare
        found_k = [found.overlap(m, k=3, reference=which).overlap for which in ("within", "whole")]
        best = [{*s.top(3)} for s in (within, bare, scores)]
        assert found_k == [len(best[0] & best[2]), len(best[1] & best[2])]
        assert table.loc[name, "overlap"] == found.overlap(m).overlap
        assert table.loc[name, "overlap_whole"] == found.overlap(m, reference="whole").overlap
    assert found.overlap(0, k=3, reference="whole").overlap == 3
    with pytest.raises(PosheadsError, match="reference='short'"):
        found.overlap(0, reference="short")


def test_verdict_says_what_the_table_says(found):
    said = found.verdict()
    assert list(said) == [*found.methods, "stretch and achievement", "note"]
    table = found.to_pandas().set_index("method")
    for name in found.methods:
        row = table.loc[name]
        for column in ("stretch", "allocation_stretch"):
            fit = getattr(found, column)(name)
            expected = fit.reason or f"{row[column]:.2f} ("
            assert expected in said[name]
            assert (fit.reason is None) or f"{column}: {fit.reason}" in row["reason"]
        assert f"chance {row['chance']:.1f}" in said[name]
        assert f"past training {row['loss_past']:.2f} nats" in said[name]
    loss = found.loss[found.loss["position"] >= TRAINED].groupby(["method", "document"])["loss"]
    means = loss.mean().unstack()
    lost = means.loc[found.methods[1]] - means.loc[found.methods[0]]
    assert f"{lost.mean():+.2f} against the unmodified model" in said[found.methods[1]]
    assert "too few methods to say" in said["stretch and achievement"]
    assert set(found.achievement()["reason"].str.split(" methods").str[0]) == {"fewer than 4"}


def test_enough_methods_are_correlated():
    from tl_posheads.extrapolation.summary import achievement

    stretch = [1.0, 2.0, 4.0, 3.0, 8.0]
    table = pd.DataFrame(
        {
            "stretch": stretch,
            "allocation_stretch": [1.0, 2.0, np.nan, np.nan, 3.0],
            "loss_past": [5.0, 4.0, 3.0, 3.5, 2.0],
        }
    )
    whole, few = achievement(table).to_dict("records")
    assert (whole["n"], whole["reason"]) == (5, "")
    assert whole["rho"] == pytest.approx(-1)
    assert whole["p"] == pytest.approx(2 / 120)
    assert np.isnan(few["rho"])
    assert (few["n"], few["reason"]) == (
        3,
        "fewer than 4 methods with a known allocation_stretch",
    )


def test_a_short_training_length_is_warned_of_and_noted(llama):
    own = llama.cfg.n_ctx
    assert own > TRAINED
    with pytest.warns(UserWarning, match="shorter than the model's own context"):
        found = compare_extrapolations(llama, METHODS[:1], TOKENS, **OPTIONS)
    assert f"own context of {own:,} tokens" in found.provenance["note"]
    assert found.verdict()["note"] == found.provenance["note"] + "."


def test_bands_are_intervals_over_texts(found):
    table = found.mean_curves(per_octave=4)
    row = table[(table["method"] == found.methods[1]) & (table["distance"] == 1)].iloc[0]
    for name, values in (("mean", found.whole), ("slow_weight", found.slow_whole)):
        by_text = values[1, :, :, 0].mean(1).numpy()
        low, high = t.interval(0.95, len(by_text) - 1, by_text.mean(), sem(by_text))
        assert row[name] == pytest.approx(by_text.mean())
        assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx((low, high))
    losses = found.losses([1, TRAINED, 96])
    far = found.loss[found.loss["position"] >= TRAINED]
    by_text = far[far["method"] == found.methods[0]].groupby("document")["loss"].mean()
    low, high = t.interval(0.95, len(by_text) - 1, by_text.mean(), sem(by_text))
    row = losses[(losses["method"] == found.methods[0]) & (losses["start"] == TRAINED)].iloc[0]
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high))


def test_losses_are_the_models(llama, found):
    order = found.loss[found.loss["method"] == "Unchanged()"]
    for name, method in by_method(found):
        with method(llama, trained=TRAINED), torch.no_grad():
            logits = llama(TOKENS).log_softmax(-1)
        expected = -logits[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0]
        mine = found.loss[found.loss["method"] == name]
        got = mine.pivot(index="document", columns="position", values="loss").to_numpy()
        # Texts are taken in the order of their hashes.
        np.testing.assert_allclose(
            np.sort(got.sum(1)), np.sort(expected.double().sum(1).numpy()), rtol=1e-4
        )
        assert len(mine) == len(order) == TOKENS[:, 1:].numel()
    table = found.losses([1, TRAINED, 96])
    far = found.loss[(found.loss["method"] == "Unchanged()") & (found.loss["position"] >= TRAINED)]
    row = table[(table["method"] == "Unchanged()") & (table["start"] == TRAINED)].iloc[0]
    assert row["loss"] == pytest.approx(far["loss"].mean())
    assert row["n"] == len(far)


def test_answers_are_the_models(llama, found):
    for name, method in by_method(found):
        for length in (20, 80):
            with method(llama, trained=TRAINED), torch.no_grad():
                logits = llama(TOKENS[:3, :length]).log_softmax(-1)[:, -2]
            expected = logits.gather(-1, TOKENS[:3, length - 1, None])[:, 0]
            mine = found.tasks[(found.tasks["method"] == name) & (found.tasks["length"] == length)]
            np.testing.assert_allclose(mine["logprob"], expected, atol=1e-4)


def test_table_stands_for_its_parts(found):
    table = found.to_pandas().set_index("method")
    assert list(table.index) == list(found.methods)
    for name in found.methods:
        alike = found.overlap(name)
        assert table.loc[name, "rank_correlation"] == alike.rank_correlation
        drawn = found.stretch(name)
        assert np.array_equal(table.loc[name, "stretch"], drawn.scale, equal_nan=True)
    assert table.loc["Linear(factor=3)", "factor"] == 3
    assert table.loc["SelfExtend(group=4, window=12)", "factor"] == 4
    assert {"repeat_within", "repeat_past", "repeat_logprob_past"} <= set(table.columns)
    assert found.overlap("Unchanged").rank_correlation <= 1


def test_unknown_method_is_named(found):
    with pytest.raises(PosheadsError, match="YaRN"):
        found.stretch("YaRN")


def test_round_trip(found, tmp_path):
    found.save(tmp_path / "here")
    again = ExtrapolationComparison.load(tmp_path / "here")
    assert again.methods == found.methods
    assert again.heads == found.heads
    assert again.settings == found.settings
    assert again.provenance == found.provenance
    assert torch.equal(again.whole.nan_to_num(-1), found.whole.nan_to_num(-1))
    for kind in ("scores_within", "scores_whole"):
        for mine, theirs in zip(getattr(again, kind), getattr(found, kind), strict=True):
            assert torch.equal(mine.values, theirs.values)
            assert mine.document_names == theirs.document_names
            assert (mine.windows, mine.provenance) == (theirs.windows, theirs.provenance)
    pd.testing.assert_frame_equal(again.loss, found.loss)
    pd.testing.assert_frame_equal(again.tasks, found.tasks)
    pd.testing.assert_frame_equal(again.to_pandas(), found.to_pandas())
    (tmp_path / "here" / "tasks.parquet").write_bytes(b"")
    with pytest.raises(PosheadsError, match="damaged"):
        ExtrapolationComparison.load(tmp_path / "here")


def test_comparisons_of_an_earlier_version_are_refused(found, tmp_path):
    label = found.save(tmp_path) / "comparison.json"
    label.write_text(label.read_text().replace('"version": 4', '"version": 3', 1))
    with pytest.raises(PosheadsError, match="measured otherwise: compare again"):
        ExtrapolationComparison.load(tmp_path)


def test_goes_on_where_it_stopped(llama, found, tmp_path, monkeypatch):
    from tl_posheads.extrapolation import observing

    done, real = [], observing.observe

    def stop_at_fifth(*args):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    before = state(llama)
    monkeypatch.setattr(observing, "observe", stop_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        compare_extrapolations(llama, METHODS, TOKENS, checkpoint=tmp_path / "kept", **OPTIONS)
    assert state(llama)[:2] == before[:2]
    rest = []
    monkeypatch.setattr(observing, "observe", lambda *args: rest.append(1) or real(*args))
    again = compare_extrapolations(llama, METHODS, TOKENS, checkpoint=tmp_path / "kept", **OPTIONS)
    assert len(rest) == 3 * 4 - 5
    assert torch.equal(again.whole.nan_to_num(-1), found.whole.nan_to_num(-1))
    assert torch.equal(again.scores_whole[2].values, found.scores_whole[2].values)


def test_texts_of_unequal_length(llama):
    texts = [TOKENS[0], TOKENS[1, :70]]
    found = compare_extrapolations(llama, [ex.Linear(3)], texts, skip_first=2, **OPTIONS)
    assert found.whole.shape == (2, 2, 2, 93)
    assert sorted(found.n_whole.gt(0).sum(1).tolist()) == [67, 93]
    assert torch.isfinite(found.whole).sum(-1).unique().tolist() == [67, 93]


def test_frequencies_are_those_of_each_texts_length(llama):
    """Under dynamic NTK: contents are moved by what rotated them, whatever texts stand beside."""
    methods = [ex.DynamicNTK(4)]
    both = compare_extrapolations(llama, methods, [TOKENS[0], TOKENS[1, :70]], **OPTIONS)
    alone = compare_extrapolations(llama, methods, TOKENS[1:2, :70], **OPTIONS)
    at = both.scores_whole[1].document_names.index(*alone.scores_whole[1].document_names)
    for kind in ("scores_within", "scores_whole"):
        beside, by_itself = (getattr(x, kind)[1].values for x in (both, alone))
        torch.testing.assert_close(beside[:, at], by_itself[:, 0])


def test_picture_shows_every_method(found):
    figure = found.plot()
    figure.canvas.draw()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["unmodified model", "Linear(factor=3)", "SelfExtend(group=4, window=12)"]
    assert figure._repr_png_().startswith(b"\x89PNG")
    for ax in figure.axes:
        assert "(" in ax.get_xlabel()
        assert "(" in ax.get_ylabel()


def test_base_sweep(llama):
    found = sweep_theta(llama, TOKENS, bases=[1e4, 1e5], **OPTIONS)
    table = found.to_pandas()
    assert table["base"].tolist()[1:] == [1e4, 1e5]
    # The model's own base changes nothing.
    torch.testing.assert_close(found.whole[0], found.whole[1], atol=1e-4, rtol=1e-4)
    assert (found.whole[0] - found.whole[2]).abs().max() > 1e-2


def test_refusals(llama):
    before, logits = state(llama), llama(TOKENS[:1])
    cases = [
        (dict(methods=[]), "expected methods"),
        (dict(methods=["yarn"]), "expected methods"),
        (dict(methods=[ex.Linear(2), ex.Linear(2)]), "given twice"),
        (dict(tokens=TOKENS[:, :20]), "trained on 32"),
        (dict(trained=1), "2 or more"),
        (dict(skip_first=31), "skip_first=31 was given for a model trained on 32"),
        (dict(qk_pairs="per_distance"), "expected 'auto', 'all'"),
        (dict(scale="logits"), "scale='logits'"),
        (dict(tokens=TOKENS[[0, 0]]), "the same text"),
        (dict(heads=[(9, 9)]), "layer 9 head 9"),
        (dict(slower_than=-1), "slower_than=-1"),
    ]
    for change, message in cases:
        given = {**OPTIONS, "methods": METHODS, "tokens": TOKENS, **change}
        with pytest.raises(PosheadsError, match=message):
            compare_extrapolations(llama, given.pop("methods"), given.pop("tokens"), **given)
    with ex.Linear(2)(llama), pytest.raises(PosheadsError, match="in force"):
        compare_extrapolations(llama, METHODS, TOKENS, **OPTIONS)
    with pytest.raises(PosheadsError, match="bases"):
        sweep_theta(llama, TOKENS, bases=[])
    with pytest.raises(PosheadsError, match="not RoPE"):
        compare_extrapolations(small_models.other_model("GPT-2"), METHODS, TOKENS)
    assert state(llama)[:2] == before[:2]
    assert torch.equal(llama(TOKENS[:1]), logits)


def test_heads_are_the_best_of_the_bare_model_within_training(llama):
    options = {**OPTIONS, "heads": 3, "qk_pairs": 20_000}
    found = compare_extrapolations(llama, METHODS[:1], TOKENS, **options)
    assert list(found.heads) == found.scores_within[0].top(3)


def test_names_leave_defaults_out():
    assert ex.YaRN(4).name == "YaRN(factor=4)"
    assert (
        ex.Resonance(ex.YaRN(4, beta_fast=8)).name == "Resonance(inner=YaRN(factor=4, beta_fast=8))"
    )
    assert ex.Unchanged().name == "Unchanged()"


def test_the_report_shows_a_comparison(found, tmp_path):
    write_report(found.scores_whole[0], tmp_path / "index.html", extrapolation=found)
    page = (tmp_path / "index.html").read_text()
    assert "Extrapolation beyond the training length" in page
    for method in found.methods:
        assert escape(method) in page
    assert page.count('<img class="figure"') == 2

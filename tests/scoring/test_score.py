"""Scores against scipy on lists of all pairs, and under everything that is fed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import tl_posheads as ph
from helpers import small_models
from tl_posheads.scoring import score as scoring
from tl_posheads.scoring.draws import MEASURES


def tokens_of(n_docs, length, seed=0):
    return torch.randint(3, 90, (n_docs, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama():
    return small_models.rotary_model("Llama")


@pytest.fixture(scope="module")
def gemma():
    return small_models.rotary_model("Gemma 2")


def full_list(model, document, layer, window=None, first=0):
    """Distances and D of every pair of a document, in float64."""
    found = []
    geometry = ph.RotaryGeometry.from_model(model)[layer]

    def consumer(_, q, k):
        d = ph.dominant_dimension(ph.dimension_contributions(q.double(), k.double(), geometry))[0]
        i, j = np.tril_indices(q.shape[1], -1)
        keep = (j >= first) & (i - j < (window or len(document)))
        i, j = i[keep], j[keep]
        found.extend([i - j, d[:, i, j].numpy()])

    ph.capture_rotary(model, document[None], consumer, layers=[layer])
    return found


def rho_by_hand(model, documents, layer, **options):
    """Of every document and head."""
    rows = []
    for document in documents:
        distance, dominant = full_list(model, document, layer, **options)
        rows.append([stats.spearmanr(distance, d).statistic for d in dominant])
    return np.array(rows)


def same(a, b):
    assert a.document_names == b.document_names
    np.testing.assert_array_equal(a.values, b.values)


FAMILIES = ["Llama", "Llama, YaRN", "Mistral, sliding window", "Gemma 2", "GPT-NeoX, Pythia"]
FAMILIES += ["GPT-J", "Falcon", "DeepSeek-V3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_rho_is_the_mean_over_documents_of_scipys(family):
    model = small_models.rotary_model(family)
    documents = tokens_of(3, 40)
    scores = ph.score_heads(model, documents, progress=False)
    windows = {"Mistral, sliding window": (16, 16), "Gemma 2": (16, None)}.get(family, (None, None))
    assert scores.windows == windows
    for layer, window in enumerate(windows):
        expected = rho_by_hand(model, documents, layer, window=window)
        found = scores.by_document("rho")[:, layer].numpy()
        np.testing.assert_allclose(np.sort(found, 0), np.sort(expected, 0), atol=1e-5)
        np.testing.assert_allclose(scores.rho[layer], expected.mean(0), atol=1e-5)
        n = 40 * 39 // 2 if window is None else 15 * 40 - 15 * 16 // 2
        assert scores.n_qk_pairs[layer].tolist() == [3 * n] * 4
        p = stats.ttest_1samp(expected, 0.0).pvalue
        np.testing.assert_allclose(scores.p[layer], p, atol=1e-3)


@pytest.mark.parametrize("weighting", ["pair", "distance"])
def test_all_pairs_however_few_are_drawn(gemma, weighting):
    """`all` is a document's every pair, whatever target_se would draw."""
    documents = tokens_of(3, 70)
    options = dict(weighting=weighting, progress=False)
    drawn = ph.score_heads(gemma, documents, qk_pairs=100, **options)
    counted = ph.score_heads(gemma, documents, qk_pairs="all", target_se=0.2, **options)
    whole = ph.score_heads(gemma, documents, qk_pairs=10_000, **options)
    assert drawn.n_qk_pairs.unique().tolist() == [300]
    assert counted.n_qk_pairs[1].unique().tolist() == [3 * 35 * 69]
    torch.testing.assert_close(counted.rho, whole.rho, atol=1e-5, rtol=0)
    assert (drawn.rho - whole.rho).abs().max() > 1e-3
    # One standard error of a drawn mean is 0.058 or less.
    assert (drawn.rho - whole.rho).abs().max() < 0.25
    assert not torch.equal(counted.rotation, whole.rotation)


def test_auto_draws_what_the_error_asks_for(llama):
    documents = tokens_of(2, 60)
    truth = ph.score_heads(llama, documents, qk_pairs="all", progress=False)
    off = []
    for seed in range(25):
        drawn = ph.score_heads(llama, documents, target_se=0.05, seed=seed, progress=False)
        assert drawn.n_qk_pairs.unique().tolist() == [600]
        off.append(drawn.rho - truth.rho)
    # 25 draws tell a standard error to a seventh of it.
    spread = torch.stack(off).pow(2).mean(0).sqrt()
    assert float(spread.max()) < 0.05 * 1.4
    assert float(spread.median()) < 0.05
    assert float(spread.min()) > 0.01
    plain = ph.score_heads(llama, documents, qk_pairs=300, progress=False)
    again = ph.score_heads(llama, documents, qk_pairs="auto", target_se=0.05, progress=False)
    same(plain, again)
    assert again.provenance["draws"] == 300
    assert (again.provenance["qk_pairs"], plain.provenance["qk_pairs"]) == ("auto", 300)


def test_scale_is_of_the_models_scores(llama):
    documents = tokens_of(2, 40)
    geometry = ph.RotaryGeometry.from_model(llama)[1]
    scores = ph.score_heads(llama, documents, scale="attention", progress=False)
    rows = []
    for document in documents:
        captured = []
        ph.capture_rotary(
            llama, document[None], lambda _, *qk, kept=captured: kept.extend(qk), layers=[1]
        )
        q, k = (x.double() for x in captured)
        c = ph.dimension_contributions(q, k, geometry)[0] * geometry.attention_scale
        i, j = np.tril_indices(40, -1)
        rows.append([stats.spearmanr(i - j, d[i, j]).statistic for d in ph.dominant_dimension(c)])
    np.testing.assert_allclose(scores.rho[1], np.mean(rows, 0), atol=1e-5)
    assert (scores.rho - ph.score_heads(llama, documents, progress=False).rho).abs().max() > 0.01


@pytest.mark.lens
def test_smollm2_scores_are_those_of_every_class_and_version(smollm2):
    """The same numbers, whatever the lens installed."""
    documents = ph.load_corpus("python-docs", smollm2, n_docs=2, length=300)
    scores = ph.score_heads(smollm2, documents, qk_pairs="all", layers=range(20), progress=False)
    kept = {
        (16, 6): 0.285762,
        (18, 4): 0.277026,
        (13, 7): 0.259884,
        (15, 1): 0.258785,
        (19, 1): 0.258659,
    }
    for place, rho in kept.items():
        assert scores.rho[place].item() == pytest.approx(rho, abs=1e-4)
    assert scores.top(1) == [next(iter(kept))]


@pytest.mark.lens
def test_hooks_and_caches_give_what_score_heads_gives():
    model = small_models.rotary_model("GPT-NeoX, Pythia")
    tokens = tokens_of(3, 50)
    direct = ph.score_heads(model, tokens, progress=False)
    acc = ph.ScoreAccumulator(ph.RotaryGeometry.from_model(model))
    cached = acc.like()
    with torch.no_grad(), ph.rotary_hook_points(model):
        model.run_with_hooks(tokens, fwd_hooks=acc.fwd_hooks)
        _, cache = model.run_with_cache(tokens, names_filter=cached.names_filter)
    cached.update_from_cache(cache)
    torch.testing.assert_close(acc.scores().rho, direct.rho, atol=1e-5, rtol=0)
    same(acc.scores(), cached.scores())
    once = acc.scores()
    cached.update_from_cache(cache)  # a document that comes twice counts once
    same(cached.scores(), once)
    for row in tokens:  # one by one, with draws by the text's name: the same numbers
        with torch.no_grad(), ph.rotary_hook_points(model):
            _, cache = model.run_with_cache(row[None], names_filter=cached.names_filter)
        alone = cached.like()
        alone.update_from_cache(cache)
        (name,) = alone.scores().document_names
        i = once.document_names.index(name)
        torch.testing.assert_close(
            alone.scores().values[:, 0], once.values[:, i], atol=1e-4, rtol=0
        )
    with pytest.raises(ph.PosheadsError, match="names_filter"):
        cached.update_from_cache({})


@pytest.mark.lens
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(llama, side):
    texts = [tokens_of(1, n, seed=n)[0] for n in (30, 45, 38)]
    alone = ph.score_heads(llama, texts, progress=False)
    padded, mask = torch.zeros(3, 45).long(), torch.zeros(3, 45).long()
    for row, on, text in zip(padded, mask, texts, strict=True):
        at = slice(45 - len(text), None) if side == "left" else slice(0, len(text))
        row[at], on[at] = text, 1
    same(ph.score_heads(llama, padded, attention_mask=mask, progress=False), alone)
    acc = ph.ScoreAccumulator(ph.RotaryGeometry.from_model(llama))
    with torch.no_grad():
        llama.run_with_hooks(padded, attention_mask=mask, fwd_hooks=acc.hooks_for(mask))
    torch.testing.assert_close(acc.scores().rho, alone.rho, atol=2e-3, rtol=0)
    broken = mask.clone()
    broken[1, 20] = 1 - broken[1, 20]
    with pytest.raises(ph.PosheadsError, match="document 1 is not one run"):
        ph.score_heads(llama, padded, attention_mask=broken, progress=False)


@pytest.mark.parametrize("qk_pairs", ["auto", "all"])
def test_skipped_positions_are_left_out_as_queries_and_keys(llama, qk_pairs):
    documents = tokens_of(2, 40)
    skipped = ph.score_heads(llama, documents, skip_first=7, qk_pairs=qk_pairs, progress=False)
    assert skipped.n_qk_pairs[1, 0] == 2 * 33 * 32 // 2
    expected = rho_by_hand(llama, documents, 1, first=7).mean(0)
    np.testing.assert_allclose(skipped.rho[1], expected, atol=1e-5)


@pytest.mark.lens
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_scored_in_float32_or_better(dtype):
    model = small_models.rotary_model("Llama").to(dtype)
    documents = tokens_of(2, 60)
    scores = ph.score_heads(model, documents, progress=False)
    expected = rho_by_hand(model, documents, 0).mean(0)
    np.testing.assert_allclose(scores.rho[0], expected, atol=1e-5)
    assert scores.provenance["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("hook", "named"),
    [("hook_rot_q", "queries of layer 1 head 2"), ("hook_rot_k", "keys of layer 1 head 2")],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(llama, hook, named, value):
    def spoil(x, hook):
        x = x.clone()
        x[0, 3, 2 if x.shape[2] == 4 else 1, 0] = value
        return x

    with (
        llama.hooks(fwd_hooks=[(f"blocks.1.attn.{hook}", spoil)]),
        pytest.raises(ph.PosheadsError, match=named),
    ):
        ph.score_heads(llama, tokens_of(1, 20), progress=False)


@pytest.mark.parametrize("qk_pairs", ["all", 200])
def test_the_same_seed_gives_the_same_numbers_in_any_order_of_documents(llama, qk_pairs):
    documents, options = tokens_of(4, 50), dict(qk_pairs=qk_pairs, progress=False)
    one = ph.score_heads(llama, documents, **options)
    same(ph.score_heads(llama, documents, **options), one)
    same(ph.score_heads(llama, documents[[2, 0, 3, 1]], **options), one)
    same(ph.score_heads(llama, list(documents), **options), one)
    other = ph.score_heads(llama, documents, seed=1, **options)
    assert torch.equal(other.rho, one.rho) == (qk_pairs == "all")


def test_a_documents_numbers_are_its_own(llama):
    """With pairs fixed, another document more changes nothing of the others."""
    documents = tokens_of(4, 50)
    four = ph.score_heads(llama, documents, qk_pairs=200, progress=False)
    three = ph.score_heads(llama, documents[:3], qk_pairs=200, progress=False)
    at = [four.document_names.index(name) for name in three.document_names]
    np.testing.assert_array_equal(four.values[:, at], three.values)


def test_one_document_has_scores_and_no_tests(llama):
    one = ph.score_heads(llama, tokens_of(1, 50)[0], progress=False)
    assert one.n_documents == 1
    assert bool(torch.isfinite(one.rho).all())
    for name in ("ci_low", "ci_high", "p", "p_adjusted"):
        assert bool(torch.isnan(getattr(one, name)).all())
    assert one.positional() == []


def test_the_same_text_twice_is_refused(llama):
    documents = tokens_of(3, 30)
    with pytest.raises(ph.PosheadsError, match="documents 1 and 3 are the same text"):
        ph.score_heads(llama, torch.cat([documents, documents[[1]]]), progress=False)


def test_chosen_layers_alone_are_scored(llama):
    one = ph.score_heads(llama, tokens_of(2, 30), layers=[1], progress=False)
    both = ph.score_heads(llama, tokens_of(2, 30), progress=False)
    assert bool(torch.isnan(one.rho[0]).all())
    assert torch.equal(one.rho[1], both.rho[1])
    assert one.to_pandas().layer.unique().tolist() == [1]


def test_an_interrupted_run_goes_on_without_doing_anything_twice(llama, tmp_path, monkeypatch):
    documents = tokens_of(3, 80)
    whole = ph.score_heads(llama, documents, progress=False)
    runs = []
    capture = scoring.capture_rotary

    def stop_in_the_second(*args, **kwargs):
        if len(runs) == 1:
            raise KeyboardInterrupt
        runs.append(1)
        return capture(*args, **kwargs)

    monkeypatch.setattr(scoring, "capture_rotary", stop_in_the_second)
    options = dict(progress=False, checkpoint=tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        ph.score_heads(llama, documents, **options)
    monkeypatch.setattr(
        scoring, "capture_rotary", lambda *a, **k: (runs.append(1), capture(*a, **k))[1]
    )
    same(ph.score_heads(llama, documents, **options), whole)
    assert len(runs) == 3
    for other in (
        dict(seed=1),
        dict(qk_pairs="all"),
        dict(weighting="distance"),
        dict(layers=[0]),
        dict(scale="attention"),
        dict(skip_first=1),
    ):
        with pytest.raises(ph.PosheadsError, match="belongs to another run"):
            ph.score_heads(llama, documents, **other, **options)
    with pytest.raises(ph.PosheadsError, match="belongs to another run"):
        ph.score_heads(llama, documents[:2], **options)
    half = next((tmp_path / "kept").glob("*.safetensors"))
    half.write_bytes(half.read_bytes()[:100])
    same(ph.score_heads(llama, documents, **options), whole)
    assert len(runs) == 4


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.ones(2, 1).long(), {}, "at least 2 positions"),
        (torch.ones(2, 9).long() * 500, {}, "token id 500 .* ids 0 to 96"),
        (-torch.ones(2, 9).long(), {}, "token id -1"),
        (torch.ones(2, 9), {}, "expected whole numbers"),
        (torch.ones(1, 2, 9).long(), {}, r"shape \[doc, pos\]"),
        (5, {}, "type int"),
        (torch.ones(2, 300).long(), {}, "at most 256"),
        (torch.ones(2, 9).long(), {}, "documents 0 and 1 are the same text"),
        (torch.ones(2, 9).long(), {"layers": [5]}, "layers 0 to 1"),
        (torch.ones(2, 9).long(), {"layers": []}, "layers 0 to 1"),
        (torch.ones(2, 9).long(), {"qk_pairs": "some"}, "expected 'auto', 'all' or a number"),
        (torch.ones(2, 9).long(), {"qk_pairs": 2}, "at least 3"),
        (torch.ones(2, 9).long(), {"qk_pairs": True}, "qk_pairs=True"),
        (torch.ones(2, 9).long(), {"qk_pairs": 1.5}, "qk_pairs=1.5"),
        (torch.ones(2, 9).long(), {"weighting": "token"}, "expected 'pair'"),
        (torch.ones(2, 9).long(), {"scale": 2}, "expected 'none' or 'attention'"),
        (torch.ones(2, 9).long(), {"target_se": 0}, "target_se=0 "),
        (torch.ones(2, 9).long(), {"target_se": 1}, "target_se=1 "),
        (torch.ones(2, 9).long(), {"target_se": "small"}, "target_se='small'"),
        (torch.ones(2, 9).long(), {"target_se": float("nan")}, "target_se=nan"),
        (torch.ones(2, 9).long(), {"skip_first": 8}, "skip_first=8"),
        (torch.ones(2, 9).long(), {"skip_first": -1}, "whole number"),
        (torch.ones(2, 9).long(), {"attention_mask": torch.ones(9)}, "expected the same"),
        ([torch.ones(9).long()], {"attention_mask": torch.ones(1, 9)}, "a list needs no mask"),
    ],
)
def test_bad_input_is_refused_before_any_forward(llama, monkeypatch, tokens, options, message):
    def never(*args, **kwargs):
        raise AssertionError("a forward pass was run")

    monkeypatch.setattr(llama, "forward", never)
    with pytest.raises(ph.PosheadsError, match=message):
        ph.score_heads(llama, tokens, progress=False, **options)


@pytest.mark.parametrize("seed", [-1, "a", 1.5])
def test_seeds_that_are_none_are_refused(llama, seed):
    with pytest.raises(ph.PosheadsError, match="seed="):
        ph.score_heads(llama, tokens_of(2, 20), seed=seed, progress=False)


def test_provenance_says_what_was_measured(llama):
    documents = [tokens_of(1, n, seed=n)[0] for n in (30, 45)]
    options = dict(weighting="distance", skip_first=2, seed=5, qk_pairs=100)
    scores = ph.score_heads(
        llama, documents, progress=False, provenance={"corpus": "mine"}, **options
    )
    kept = scores.provenance
    assert {name: kept[name] for name in options} == options
    assert (kept["corpus"], kept["n_tokens"], kept["longest"]) == ("mine", 75, 45)
    assert (kept["n_documents"], kept["layers"], kept["exact"]) == (2, [0, 1], False)


def test_layers_without_order_have_no_scores():
    """A layer of one rotary pair, and one without RoPE."""
    layers = (
        ph.LayerGeometry.from_inv_freq(torch.tensor([1.0]), 2, d_head=4),
        ph.LayerGeometry.from_inv_freq(torch.tensor([]), 2, d_head=4),
        ph.LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]), 2),
    )
    acc = ph.ScoreAccumulator(ph.RotaryGeometry("toy", layers))
    assert acc.layers == [2]
    q, k = torch.randn(2, 1, 20, 2, 4, generator=torch.Generator().manual_seed(0))
    acc.update(2, q, k, ["a" * 15])
    scores = acc.scores()
    assert torch.isnan(scores.rho).all(1).tolist() == [True, True, False]
    assert scores.values.shape == (len(MEASURES), 1, 3, 2)
    with pytest.raises(ph.PosheadsError, match="a text of 1 positions"):
        acc.update(2, q[:, :1], k[:, :1], ["b" * 15])

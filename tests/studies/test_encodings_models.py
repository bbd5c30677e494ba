"""score_encoding on live models: against score_heads, transformers' own position ids, and refusals."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import tl_posheads as ph
from helpers import architectures, small_models
from helpers.lens import CLASSES
from helpers.traces import assert_same, state
from tl_posheads import PosheadsError
from tl_posheads.extrapolation import SelfExtend
from tl_posheads.studies.encodings import (
    EncodingScores,
    ordered_planes,
    plane_contributions,
    score_encoding,
    transport_operator,
)
from tl_posheads.studies.encodings.positions import attention_scales, capture_moved, position_table

pytestmark = pytest.mark.lens

TOKENS = torch.randint(3, 90, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", architectures.ROTARY)
def test_under_rope_it_is_the_positional_score(name):
    if name == "Cohere" and "hooked" in CLASSES:
        pytest.skip("transformer-lens 3.9 turns Cohere's coordinates unlike transformers")
    model = small_models.rotary_model(name)
    found = score_encoding(model, TOKENS, progress=False)
    truth = ph.score_heads(model, TOKENS, qk_pairs="all", progress=False)
    assert torch.allclose(found.rho, truth.rho, atol=1e-6, equal_nan=True)
    assert torch.equal(found.n_qk_pairs, truth.n_qk_pairs)
    assert found.windows == truth.windows
    geometry = ph.RotaryGeometry.from_model(model)
    for layer in range(2):
        assert int(found.basis(layer, 0).moves.sum()) == geometry[layer].n_pairs


def test_skipped_positions_and_one_layer():
    model = small_models.rotary_model("Llama")
    found = score_encoding(model, TOKENS, layers=[1], skip_first=4, progress=False)
    truth = ph.score_heads(model, TOKENS, layers=[1], skip_first=4, qk_pairs="all", progress=False)
    assert torch.allclose(found.rho, truth.rho, atol=1e-6, equal_nan=True)
    with pytest.raises(PosheadsError, match="but it was not scored"):
        found.basis(0, 0)


def test_unrotated_coordinates_may_be_the_slowest_dimensions():
    model = small_models.rotary_model("Phi")
    left_out = score_encoding(model, TOKENS, progress=False)
    last = score_encoding(model, TOKENS, unmoved="last", progress=False)
    assert not torch.allclose(left_out.rho, last.rho, atol=1e-3)
    geometry = ph.RotaryGeometry.from_model(model)[0]
    lists = []

    def consumer(layer, q, k):
        c = ph.dimension_contributions(q.double(), k.double(), geometry)[0]
        # The rest, two and two, as slow as each other: their sum is what any order shares.
        lists.append((c, ph.unrotated_contribution(q.double(), k.double(), geometry)[0]))

    ph.capture_rotary(model, TOKENS[:1], consumer, layers=[0])
    (pairs, rest), basis = lists[0], last.basis(0, 0)
    assert basis.moves.tolist() == [True, True, False, False]

    def planes(layer, q, k):
        c = plane_contributions(q[0, :, 0], k[0, :, 0], basis)
        assert torch.allclose(c[..., :2], pairs[0], atol=1e-5)
        assert torch.allclose(c[..., 2:].sum(-1), rest[0], atol=1e-4)

    ph.capture_rotary(model, TOKENS[:1], planes, layers=[0])


# --- learned positions -----------------------------------------------------------------------------


def hooked_gpt2():
    return small_models.small_hooked(
        n_key_value_heads=None,
        d_mlp=48,
        act_fn="gelu",
        positional_embedding_type="standard",
        rotary_dim=None,
        normalization_type="LN",
        initializer_range=-1.0,
    )


LEARNED = {
    "GPT-2": lambda: small_models.other_model("GPT-2"),
    "OPT": lambda: small_models.other_model("OPT"),
} | ({"HookedTransformer": hooked_gpt2} if "hooked" in CLASSES else {})


@pytest.mark.parametrize("name", LEARNED)
def test_learned_positions_are_scored_and_leave_no_trace(name):
    model = LEARNED[name]()
    model.run_with_cache(TOKENS)
    before = state(model)
    with torch.no_grad():
        plain = model(TOKENS)
    found = score_encoding(model, TOKENS, progress=False)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), plain)
    assert_same(before, state(model))
    assert torch.isfinite(found.rho).all()
    assert found.provenance["encoding"] == "learned"
    assert len(found.bases) == 8
    assert found.bases[0].shifts[-1] == 39


def test_positions_are_moved_as_transformers_moves_them():
    """Queries, planes and rho of one head, with transformers' own position_ids."""
    hf_model = small_models.build(*architectures.OTHER["GPT-2"][:2])
    with torch.no_grad():
        # Positions that are a signal, so that the operators have something to say.
        angle = torch.arange(256)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).repeat(4)
        wave = torch.cat([angle.cos(), angle.sin()], dim=1)
        hf_model.transformer.wpe.weight.copy_(0.5 * wave)
        hf_model.transformer.wte.weight.mul_(2)
    model = small_models.bridge(copy.deepcopy(hf_model), "tiny-gpt2")
    layer, head, width = 1, 2, 8

    def vectors(text, offset):
        kept = []
        joint = hf_model.transformer.h[layer].attn.c_attn
        handle = joint.register_forward_hook(lambda m, args, out: kept.append(out.detach()))
        with torch.no_grad():
            hf_model(text[None], position_ids=torch.arange(len(text))[None] + offset)
        handle.remove()
        q, k, _ = kept[0][0].double().split(32, dim=-1)
        at = slice(head * width, (head + 1) * width)
        return q[:, at], k[:, at]

    found = score_encoding(model, TOKENS, progress=False)
    basis = found.basis(layer, head)
    shifts = [int(s) for s in basis.shifts]
    here = torch.cat([torch.cat(vectors(text, 0)) for text in TOKENS])
    operators = [
        transport_operator(here, torch.cat([torch.cat(vectors(text, s)) for text in TOKENS]))
        for s in shifts
    ]
    truth = ordered_planes(operators, shifts)
    assert torch.allclose(basis.speeds, truth.speeds, rtol=1e-3)
    assert basis.explained_change == pytest.approx(truth.explained_change, abs=1e-4)
    assert basis.explained_change > 0.3
    expected = []
    for text in TOKENS:
        d = ph.dominant_dimension(plane_contributions(*vectors(text, 0), truth))
        i, j = torch.tril_indices(len(text), len(text), -1)
        expected.append(stats.spearmanr(i - j, d[i, j]).statistic)
    assert float(found.rho[layer, head]) == pytest.approx(np.mean(expected), abs=1e-3)
    # Documents come in the order of their hashes.
    alone = found.by_document("rho")[:, layer, head].tolist()
    assert sorted(alone) == pytest.approx(sorted(expected), abs=1e-3)


def test_the_table_is_what_the_model_adds():
    model = small_models.other_model("GPT-2")
    weight = model.original_model.transformer.wpe.weight
    assert torch.equal(position_table(model, 100), weight[:100])


def test_long_texts_are_cut_for_moving_and_scored_whole():
    model = small_models.other_model("GPT-2")
    tokens = torch.randint(3, 90, (1, 256), generator=torch.Generator().manual_seed(1))
    found = score_encoding(model, tokens, layers=[0], progress=False)
    assert found.bases[0].shifts[-1] == 128
    assert int(found.n_qk_pairs[0, 0]) == 256 * 255 // 2


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_removed_whatever_is_raised(raised):
    model = small_models.other_model("GPT-2")
    model.run_with_cache(TOKENS)
    before = state(model)

    def consumer(layer, q, k):
        raise raised("in between")

    table = position_table(model, 50)
    with pytest.raises(raised):
        capture_moved(model, TOKENS[0], consumer, layers=[0, 1], at=table[10:50])
    assert_same(before, state(model))


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BLOOM", "tiny-Bloom uses ALiBi biases; .*planes_by_products"),
        ("T5", r"tiny-T5 uses relative position biases \(T5\)"),
        ("Mamba", r"tiny-Mamba has no queries and keys .*Ali et al. 2024"),
    ],
)
def test_other_codes_are_refused_by_name(name, message):
    with pytest.raises(PosheadsError, match=message):
        score_encoding(small_models.other_model(name), TOKENS, progress=False)


def fake(kind, **more):
    cfg = SimpleNamespace(positional_embedding_type=kind, model_name="odd", n_layers=1, **more)
    points = {"blocks.0.attn.hook_q": None}
    return SimpleNamespace(cfg=cfg, run_with_hooks=None, hook_dict=points)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (fake("wavelets"), "odd uses positions of the kind 'wavelets'"),
        (fake("none"), "odd uses no positional encoding"),
        (fake("shortformer"), "odd uses learned absolute positions added to queries and keys"),
        (fake("standard", attention_dir="bidirectional"), "seen from both sides"),
        (torch.nn.Linear(2, 2), "a Linear was given; expected a HookedTransformer"),
    ],
)
def test_unknown_codes_are_refused_by_name(model, message):
    with pytest.raises(PosheadsError, match=message):
        score_encoding(model, TOKENS, progress=False)


def test_moved_distances_are_refused():
    model = small_models.rotary_model("Llama")
    moved = SelfExtend(window=8, group=4)(model)
    with moved, pytest.raises(PosheadsError, match="a method that moves positions"):
        score_encoding(model, TOKENS, progress=False)


def test_a_context_without_room_is_refused():
    model = small_models.other_model("GPT-2")
    with pytest.raises(PosheadsError, match="texts of 4 tokens or more"):
        score_encoding(model, TOKENS[:, :3], progress=False)


# --- results ---------------------------------------------------------------------------------------


def test_scores_are_saved_bit_for_bit(tmp_path):
    for name in ("Llama", "GPT-2"):
        make = small_models.rotary_model if name == "Llama" else small_models.other_model
        scores = score_encoding(make(name), TOKENS, layers=[1], progress=False)
        again = EncodingScores.load(scores.save(tmp_path / name))
        assert torch.equal(scores.values.nan_to_num(9), again.values.nan_to_num(9))
        assert torch.equal(scores.which, again.which)
        assert again.document_names == scores.document_names
        assert (again.windows, again.provenance) == (scores.windows, scores.provenance)
        for one, other in zip(scores.bases, again.bases, strict=True):
            assert torch.equal(one.vectors, other.vectors)
            assert torch.equal(one.survival, other.survival)
            assert (one.source, one.explained, one.bias_speed) == (
                other.source,
                other.explained,
                other.bias_speed,
            )
        table = again.to_pandas()
        assert table["layer"].tolist() == [1] * 4
        assert table["rho"].tolist() == scores.rho[1].tolist()
        assert again.top(1) == [(1, int(scores.rho[1].argmax()))]
        assert again.top(2) == scores.top(2)
    with open(tmp_path / "Llama" / "encodings.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(PosheadsError, match="damaged"):
        EncodingScores.load(tmp_path / "Llama")


def test_one_text_by_itself_is_its_row():
    model = small_models.other_model("GPT-2")
    scores = score_encoding(model, TOKENS[:1], progress=False)
    assert torch.allclose(scores.by_document("rho")[0], scores.rho)
    table = scores.to_pandas()
    assert table[["sd_documents", "ci_low", "ci_high", "p", "p_adjusted"]].isna().all(axis=None)


def test_documents_are_the_replicates_of_intervals_and_tests():
    scores = score_encoding(small_models.rotary_model("Llama"), TOKENS, progress=False)
    as_heads, table = scores, scores.to_pandas()
    for row in table.itertuples():
        alone = scores.by_document("rho")[:, row.layer, row.head].numpy()
        assert row.rho == pytest.approx(alone.mean())
        assert row.sd_documents == pytest.approx(alone.std(ddof=1))
        assert row.p == pytest.approx(stats.ttest_1samp(alone, 0).pvalue)
        assert row.ci_low == pytest.approx(
            stats.t.interval(0.95, 2, alone.mean(), stats.sem(alone))[0]
        )
    assert as_heads.n_documents == 3
    for name in ("rotation", "content", "d_near", "d_far"):
        assert getattr(as_heads, name).isnan().all()
    assert as_heads.compare(as_heads).by_head["difference"].eq(0).all()


@pytest.mark.parametrize("name", ["Gemma 2", "Phi-3, longrope", "Mistral, sliding window"])
def test_the_attention_scale_is_that_of_score_heads(name):
    model = small_models.rotary_model(name)
    options = dict(scale="attention", progress=False)
    found = score_encoding(model, TOKENS, **options)
    truth = ph.score_heads(model, TOKENS, qk_pairs="all", **options)
    assert torch.allclose(found.rho, truth.rho, atol=1e-6, equal_nan=True)
    plain = score_encoding(model, TOKENS, progress=False)
    assert (found.rho - plain.rho).abs().max() > 1e-3
    assert (found.provenance["scale"], plain.provenance["scale"]) == ("attention", "none")


@pytest.mark.parametrize("name", LEARNED)
def test_the_attention_scale_of_learned_positions_is_the_models(name):
    model = LEARNED[name]()
    found = attention_scales(model, TOKENS[0], [0, 1])
    assert found == pytest.approx({0: 8**-0.5, 1: 8**-0.5}, rel=1e-4)
    scores = score_encoding(model, TOKENS, scale="attention", progress=False)
    plain = score_encoding(model, TOKENS, progress=False)
    assert (scores.rho - plain.rho).abs().max() > 1e-3


def test_a_scale_by_layer_is_seen():
    """GPT-2 may divide a layer's scores by its number."""
    family, config = architectures.OTHER["GPT-2"][:2]
    hf_model = small_models.build(family, {**config, "scale_attn_by_inverse_layer_idx": True})
    found = attention_scales(small_models.bridge(hf_model, "tiny-gpt2"), TOKENS[0], [0, 1])
    assert found == pytest.approx({0: 8**-0.5, 1: 8**-0.5 / 2}, rel=1e-4)


def test_another_scale_is_refused():
    with pytest.raises(PosheadsError, match="scale='logits' was given"):
        score_encoding(small_models.rotary_model("Llama"), TOKENS, scale="logits")

"""Clamps on live models against the same by hand, and the study from the model to its files."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import architectures, small_models
from helpers.traces import assert_same, state, warm
from tl_posheads import PosheadsError, RotaryGeometry, capture_rotary, edit_rotary
from tl_posheads import extrapolation as ex
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.io import models
from tl_posheads.rotary.remapping import pair_vectors
from tl_posheads.studies.ood_angles import OODAngles, clamp_rotary, clamped_dominant, ood_angles
from tl_posheads.studies.ood_angles.clamped_model import clamped, hiding

pytestmark = pytest.mark.lens

TRAINED = 24
TOKENS = torch.randint(3, 90, (5, 80), generator=torch.Generator().manual_seed(3))
HEADS = [(0, 1), (1, 0), (1, 3)]
OPTIONS = dict(trained=TRAINED, factor=3, n_queries=200, progress=False)


CLASSES = ["bridge", "hooked"] if models.hooked_available() else ["bridge"]


@pytest.fixture(scope="module", params=CLASSES)
def llama(request, tmp_path_factory):
    if request.param == "bridge":
        return warm(small_models.rotary_model("Llama"))
    folder = tmp_path_factory.mktemp("hooked")
    small_models.build(*architectures.ROTARY["Llama"]).save_pretrained(folder)
    small_models.tiny_tokenizer().save_pretrained(folder)
    return warm(models.load_model(str(folder), cls="hooked", device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def found(llama):
    return ood_angles(llama, TOKENS, heads=HEADS, **OPTIONS)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens, return_type="logits")


def test_all_pairs_of_all_heads_is_rerope(llama):
    every = [(layer, head) for layer in range(2) for head in range(4)]
    # ReRoPE holds far distances at its window; here the last distance of training is trained - 1.
    with clamp_rotary(llama, every, range(4), trained=TRAINED):
        mine = logits(llama)
    with ex.ReRoPE(window=TRAINED - 1)(llama):
        theirs = logits(llama)
    torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=1e-4)
    assert (mine - logits(llama)).abs().max() > 0.1


def test_scores_are_those_of_clamped_contributions_and_others_stay(llama):
    name = "blocks.1.attn.hook_attn_scores"
    only = dict(names_filter=name)
    with torch.no_grad():
        before = llama.run_with_cache(TOKENS[:1], **only)[1][name][0]
        with clamp_rotary(llama, [(1, 2)], [2, 3], trained=TRAINED):
            after = llama.run_with_cache(TOKENS[:1], **only)[1][name][0]
    layer = RotaryGeometry.from_model(llama)[1]
    kept = {}
    capture_rotary(llama, TOKENS[:1], lambda i, q, k: kept.update({i: (q[0], k[0])}), layers=[1])
    q, k = (x.double().numpy() for x in kept[1])
    i, j = np.tril_indices(80, -1)
    theta, n = layer.inv_freq.numpy(), layer.n_pairs
    kv = layer.kv_head[2]
    zq, zk = (x[..., :n] + 1j * x[..., n:] for x in (q[i, 2], k[j, kv]))
    apart = np.minimum(i - j, TRAINED - 1) - (i - j)
    extra = np.where(np.isin(np.arange(n), [2, 3]), apart[:, None] * theta, 0.0)
    want = (zq * zk.conj() * np.exp(1j * extra)).real.sum(-1) * layer.attention_scale
    np.testing.assert_allclose(after[2].numpy()[i, j], want, atol=1e-3)
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    near = i - j < TRAINED
    assert torch.equal(after[2][i[near], j[near]], before[2][i[near], j[near]])


def test_a_text_within_training_stays_bit_for_bit_and_so_does_the_model(llama):
    before, was = state(llama), logits(llama)
    with clamp_rotary(llama, HEADS, range(4), trained=80):
        assert torch.equal(logits(llama), was)
    with pytest.raises(KeyError), clamp_rotary(llama, HEADS, trained=TRAINED):
        raise KeyError
    assert torch.equal(logits(llama), was)
    assert_same(before, state(llama))


def test_hidden_keys_are_hidden_fused_or_not(llama):
    geometry = RotaryGeometry.from_model(llama)
    layers = {i: clamped(geometry[i], [0, 2], [0], TRAINED) for i in range(2)}
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(2)]
    with hiding(llama, layers, TRAINED), torch.no_grad():
        plain, cache = llama.run_with_cache(TOKENS[:1], names_filter=names)
        with fused_attention(llama) as fused:
            assert fused
            torch.testing.assert_close(logits(llama, TOKENS[:1]), plain, atol=2e-3, rtol=1e-4)
    at = torch.arange(80)
    far = at[:, None] - at >= TRAINED
    for name in names:
        assert float(cache[name][0, [0, 2]][:, far].max()) == 0
        assert float(cache[name][0, [1, 3]][:, far].max()) > 0


def rotated(model, text):
    kept = {}
    capture_rotary(model, text[None], lambda i, q, k: kept.update({i: (q[0], k[0])}))
    return kept


def mean_loss(model, first, last):
    """Of the tokens at positions ``first`` to ``last - 1``."""
    logprob = logits(model, TOKENS[:, :72]).log_softmax(-1)[:, first - 1 : last - 1]
    return -float(logprob.gather(-1, TOKENS[:, first:last, None]).mean())


def test_the_study_is_the_loop_over_public_functions(llama, found):
    pairs = found.pairs()
    assert pairs.query("ood")["pair"].unique().tolist() == [1, 2, 3]  # wavelengths 6, 63, 628
    row = pairs.query("layer == 1 and head == 3 and pair == 1").iloc[0]
    assert row["wavelength"] == pytest.approx(2 * math.pi * 10, rel=1e-4)
    assert row["turns_in_training"] == pytest.approx(24 / (2 * math.pi * 10), rel=1e-4)
    assert row["max_angle_in_training"] == pytest.approx(2.3, rel=1e-4)

    geometry = RotaryGeometry.from_model(llama)
    i, j = np.tril_indices(72, -1)
    q_pos, k_pos = torch.as_tensor(i), torch.as_tensor(j)
    sets = {"bare": [], "ood": [1, 2, 3], "in_distribution": [0], "all": [0, 1, 2, 3], 2: [2]}
    dominant = {name: [] for name in sets}
    for text in TOKENS:
        q, k = rotated(llama, text[:72])[1]
        for name, held in sets.items():
            dominant[name].append(
                clamped_dominant(
                    q, k, geometry[1], held, trained=TRAINED, q_pos=q_pos, k_pos=k_pos
                )[3]
            )
    mean = {name: torch.stack(values).mean(0).numpy() for name, values in dominant.items()}
    reference = mean["bare"][(i - j >= 12) & (i - j < 24)].mean()
    table = found.change().query("layer == 1 and head == 3")
    assert table["start"].iloc[0] == TRAINED
    assert table["end"].iloc[-1] == 72
    for _, row in table.iterrows():
        here = (i - j >= row["start"]) & (i - j < row["end"])
        assert row["n_qk_pairs"] == 5 * here.sum()
        bare = mean["bare"][here].mean()
        assert row["d_bare"] == pytest.approx(bare, abs=1e-6)
        assert row["change"] == pytest.approx(bare - reference, abs=1e-6)
        ood, other = bare - mean["ood"][here].mean(), bare - mean["in_distribution"][here].mean()
        assert row["change_from_ood"] == pytest.approx(ood, abs=1e-6)
        assert row["change_from_in_distribution"] == pytest.approx(other, abs=1e-6)
        assert row["other"] == pytest.approx(mean["all"][here].mean() - reference, abs=1e-6)
    single = found.attribution().query("layer == 1 and head == 3 and pair == 2")
    for _, row in single.iterrows():
        here = (i - j >= row["start"]) & (i - j < row["end"])
        want = (mean["bare"] - mean[2])[here].mean()
        assert row["change_from_pair"] == pytest.approx(want, abs=1e-6)


def test_through_the_model_is_the_public_clamp(llama, found):
    table = found.losses().set_index(["condition", "start"])
    names = ["bare", "ood", "in_distribution", "all", "hidden", "pair 1", "pair 2", "pair 3"]
    assert found.losses()["condition"].unique().tolist() == names
    clamps = {"bare": [], "ood": [1, 2, 3], "in_distribution": [0], "all": range(4), "pair 2": [2]}
    for name, held in clamps.items():
        with clamp_rotary(llama, HEADS, held, trained=TRAINED):
            for start, end in ((12, 24), (24, 48), (48, 72)):
                want = mean_loss(llama, start, end)
                assert table["loss"][name, start] == pytest.approx(want, abs=1e-3)
    row, inside = table.loc["ood", 48], table["loss"]["bare", 12]
    bare = table["loss"]["bare", 48]
    assert row["change"] == pytest.approx(row["loss"] - bare)
    assert row["ci_low"] <= row["change"] <= row["ci_high"]
    want = (bare - row["loss"]) / (bare - inside) if bare > inside else math.nan
    assert row["recovered"] == pytest.approx(want, nan_ok=True)

    i, j = np.tril_indices(72, -1)
    far = (i - j >= TRAINED) & (i - j < 29)
    values = []
    with clamp_rotary(llama, HEADS, trained=TRAINED):
        for text in TOKENS:
            q, k = rotated(llama, text[:72])[1]
            inner = RotaryGeometry.from_model(llama)[1]
            assert inner.remapping is not None
            alone = clamped(replace(inner, remapping=None), [3], [1, 2, 3], TRAINED)
            dominant = pair_vectors(q, k, alone).dominant_rows(torch.arange(72), slice(0, 72))
            values.append(dominant[3, i[far], j[far]].mean())
    row = found.change().query("layer == 1 and head == 3 and start == 24").iloc[0]
    assert row["end"] == 29
    assert row["d_live"] == pytest.approx(float(torch.stack(values).mean()), abs=1e-4)
    assert abs(row["d_live"] - (row["d_bare"] - row["change_from_ood"])) > 1e-4


def test_direct_only_and_order_of_texts(llama, found):
    direct = ood_angles(llama, TOKENS.flip(0), heads=HEADS, live="none", **OPTIONS)
    assert torch.equal(direct.single, found.single)
    assert direct.live is None
    assert direct.losses()["condition"].unique().tolist() == ["bare"]
    assert "change_live" not in set(direct.summary(n_boot=5)["quantity"])


def test_the_attention_scale_is_that_of_every_d(llama, found):
    scaled = ood_angles(llama, TOKENS, heads=HEADS, live="joint", scale="attention", **OPTIONS)
    assert (scaled.provenance["scale"], found.provenance["scale"]) == ("attention", "none")
    layer = RotaryGeometry.from_model(llama)[1]
    i, j = np.tril_indices(72, -1)
    at = dict(trained=TRAINED, q_pos=torch.as_tensor(i), k_pos=torch.as_tensor(j))
    total = torch.zeros(2, dtype=torch.float64)
    for text in TOKENS:
        vectors = rotated(llama, text[:72])[1]
        bare, held = (
            clamped_dominant(*vectors, layer, pairs, scale="attention", **at)[3]
            for pairs in ([], range(4))
        )
        total += torch.stack([bare.sum(), held[i - j >= TRAINED].sum()])
    torch.testing.assert_close(scaled.bare[:, 2].sum(), total[0])
    torch.testing.assert_close(scaled.joint[:, 2, 2].sum(), total[1])
    # Later layers differ under the clamp, the first one's queries and keys don't.
    torch.testing.assert_close(
        scaled.live[:, 0],
        scaled.bare[:, 0] + (scaled.joint[:, 0, 0] - scaled.bare[:, 0]) * (scaled.bin_octave >= 0),
        atol=1e-3,
        rtol=1e-5,
    )
    assert (scaled.bare - found.bare).abs().max() > 1


def test_saves_and_loads_bit_for_bit(found, tmp_path):
    found.save(tmp_path / "u")
    again = OODAngles.load(tmp_path / "u")
    for field in fields(found):
        mine, theirs = getattr(again, field.name), getattr(found, field.name)
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    pd.testing.assert_frame_equal(again.loss, found.loss)
    assert (again.heads, again.trained, again.seed) == (found.heads, found.trained, found.seed)
    assert torch.equal(again.live, found.live)
    assert again.provenance == found.provenance
    for key in ("model", "trained", "tokens_sha256", "versions", "n_queries", "factor", "seed"):
        assert key in again.provenance
    pd.testing.assert_frame_equal(again.summary(n_boot=20), found.summary(n_boot=20))
    (tmp_path / "u" / "ood_angles.safetensors").write_bytes(b"nothing")
    with pytest.raises(PosheadsError, match="damaged"):
        OODAngles.load(tmp_path / "u")


def test_figure_says_what_it_shows(found):
    curve, pair, loss = found.plot().axes
    assert [t.get_text() for t in curve.get_legend().get_texts()] == [
        "unmodified model",
        "out-of-distribution pairs clamped",
        "other pairs clamped",
        "out-of-distribution pairs clamped in the pass",
    ]
    assert any("trained on 24" in text.get_text() for text in curve.texts)
    assert len(pair.patches) == 4
    bars = found.by_pair(n_boot=5)["change_from_pair"]
    np.testing.assert_allclose([bar.get_height() for bar in pair.patches], bars)
    bare = found.losses().query("condition == 'bare'").sort_values("start")["loss"]
    np.testing.assert_allclose(loss.lines[0].get_ydata(), bare)


@pytest.mark.parametrize(
    "name", ["Gemma 3", "GPT-NeoX, Pythia", "Cohere", "Phi", "Falcon", "Mistral, sliding window"]
)
def test_other_layouts_and_windows(name):
    if name == "Cohere" and models.hooked_available():
        pytest.skip("3.9's Bridge rotates Cohere's coordinates unlike transformers")
    model = small_models.rotary_model(name)
    if name.startswith("Mistral"):
        with pytest.raises(PosheadsError, match="sliding window"):
            ood_angles(model, TOKENS, live="joint", **OPTIONS)
        return
    found = ood_angles(model, TOKENS[:2], live="joint", **OPTIONS)
    if name == "Gemma 3":
        assert {layer for layer, _ in found.heads} == {1}
        assert found.pairs()["wavelength"].iloc[1] == pytest.approx(198.7, rel=1e-3)
        with pytest.raises(PosheadsError, match="layer 0 head 1"):
            ood_angles(model, TOKENS, heads=[(0, 1)], **OPTIONS)
    layer, head = found.heads[-1]
    geometry = RotaryGeometry.from_model(model)[layer]
    i, j = np.tril_indices(72, -1)
    held = found.pairs().query(f"ood and layer == {layer} and head == {head}")["pair"]
    values = [
        clamped_dominant(
            *rotated(model, text[:72])[layer],
            geometry,
            held,
            trained=TRAINED,
            q_pos=torch.as_tensor(i),
            k_pos=torch.as_tensor(j),
        )[head]
        for text in TOKENS[:2]
    ]
    mean = torch.stack(values).mean(0).numpy()
    table = found.change().query(f"layer == {layer} and head == {head}")
    for _, row in table.iterrows():
        here = (i - j >= row["start"]) & (i - j < row["end"])
        want = row["d_bare"] - mean[here].mean()
        assert row["change_from_ood"] == pytest.approx(want, abs=1e-6)


def test_gptj_is_refused_by_name_unless_only_direct():
    model = small_models.rotary_model("GPT-J")
    with pytest.raises(PosheadsError, match="live='none'"):
        ood_angles(model, TOKENS, **OPTIONS)
    assert len(ood_angles(model, TOKENS[:1], live="none", **OPTIONS).heads) == 8


def test_refusals(llama):
    with pytest.raises(PosheadsError, match="24 tokens was given for a model trained on 24"):
        ood_angles(llama, TOKENS[:, :24], **OPTIONS)
    with pytest.raises(PosheadsError, match="factor=1 was given"):
        ood_angles(llama, TOKENS, **{**OPTIONS, "factor": 1})
    with pytest.raises(PosheadsError, match="live='all' was given"):
        ood_angles(llama, TOKENS, live="all", **OPTIONS)
    with pytest.raises(PosheadsError, match="n_queries=0 was given"):
        ood_angles(llama, TOKENS, **{**OPTIONS, "n_queries": 0})
    with pytest.raises(PosheadsError, match="layer 7 head 0"):
        ood_angles(llama, TOKENS, heads=[(7, 0)], **OPTIONS)
    with ex.Unchanged()(llama), pytest.raises(PosheadsError, match="call it outside"):
        ood_angles(llama, TOKENS, **OPTIONS)
    with pytest.raises(PosheadsError, match="pair 9 was given, but layer 0"):  # noqa: SIM117
        with clamp_rotary(llama, HEADS, [9], trained=TRAINED):
            pass
    with edit_rotary(llama, HEADS, scale={0: 0.5}), pytest.raises(PosheadsError, match="in force"):  # noqa: SIM117
        with clamp_rotary(llama, HEADS, trained=TRAINED):
            pass

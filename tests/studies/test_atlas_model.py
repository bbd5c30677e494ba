"""``rotary_atlas`` on models: loops over ``run_with_cache``, methods in force, stopped runs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import architectures, small_models
from helpers.scores_by_hand import head_scores
from tl_posheads import (
    PosheadsError,
    hook_names,
    profile_heads,
    rotary_atlas,
    rotary_hook_points,
    score_heads,
)
from tl_posheads import extrapolation as ex
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.io import models
from tl_posheads.studies.atlas import RotaryAtlas, run
from tl_posheads.studies.atlas import measure as measuring
from tl_posheads.studies.profile import ProfileSettings

pytestmark = pytest.mark.lens

LENGTH = 40


def tokens_for(n_docs=2, length=LENGTH, seed=0):
    return small_models.random_texts(n_docs, length, seed)


@pytest.fixture(scope="module")
def llama():
    return small_models.rotary_model("Llama")


@pytest.fixture(scope="module")
def atlas(llama):
    return rotary_atlas(llama, tokens_for(), needed=True, progress=False)


@pytest.fixture
def every_pair(monkeypatch):
    monkeypatch.setattr(measuring, "_PER_BIN", 10**6)


def rows_of(atlas, texts):
    """Position in the atlas of each text."""
    units = [unit for unit, _ in run.by_content(list(texts))]
    assert list(atlas.document_names) == units
    return [units.index(run.by_content([text])[0][0]) for text in texts]


def cached(model, tokens, names):
    with rotary_hook_points(model), torch.no_grad():
        return model.run_with_cache(tokens, names_filter=names)[1]


def as_complex(x, g):
    x = x[..., : g.rotary_dim].double().numpy()
    half = g.rotary_dim // 2
    if g.layout == "half":
        return x[..., :half] + 1j * x[..., half:]
    return x[..., 0::2] + 1j * x[..., 1::2]


@pytest.mark.parametrize(
    "name",
    [
        "Llama",
        "Llama, YaRN",
        "Mistral, sliding window",
        "Gemma 2",
        "GPT-NeoX, Pythia",
        "GPT-J",
        "Falcon",
        "DeepSeek-V2",
    ],
)
def test_columns_are_those_of_a_loop_over_the_cache(name, every_pair):
    """Grouped queries, windows, partial rotary, both layouts, MLA's rotary part."""
    model, tokens = small_models.rotary_model(name), tokens_for()
    found = rotary_atlas(model, tokens, progress=False)
    layers = [0, 1]
    cache = cached(model, tokens, hook_names(layers))
    with rotary_hook_points(model):
        geometry = RotaryGeometry.from_model(model, length=LENGTH)
    order = rows_of(found, tokens)
    at = np.arange(LENGTH)[:, None]
    for layer in layers:
        g = geometry[layer]
        q, k = (cache[x] for x in hook_names([layer]))
        theta = g.inv_freq.numpy()
        reach = LENGTH if g.window is None else g.window
        for doc, head in ((0, 0), (1, g.n_heads - 1)):
            zq, zk = (as_complex(x[doc], g) for x in (q, k))
            zq, zk = zq[:, head], zk[:, g.kv_head[head]]
            pairs = [(i, j) for i in range(LENGTH) for j in range(i) if i - j < reach]
            c = np.array([(zq[i] * zk[j].conj()).real for i, j in pairs])
            d = np.array([i - j for i, j in pairs])
            weight = np.exp(c - c.max(1, keepdims=True))
            weight /= weight.sum(1, keepdims=True)
            usage = np.abs(zq).mean(0) * np.abs(zk).mean(0)
            still = [(z * np.exp(-1j * theta * at)) for z in (zq, zk)]
            expected = {
                "usage": usage,
                "usage_share": usage / usage.sum(),
                "realised": np.abs(c).mean(0) / usage,
                "concentration_q": np.abs(still[0].mean(0)) / np.abs(zq).mean(0),
                "concentration_k": np.abs(still[1].mean(0)) / np.abs(zk).mean(0),
                "weight_near": weight[d <= 2].mean(0),
                "weight_far": weight[d >= d.max() // 2 + d.max() % 2].mean(0),
            }
            for column, value in expected.items():
                got = found.by_document(column)[order[doc], layer, head, : g.n_pairs].tolist()
                assert got == pytest.approx(list(value), abs=1e-4, rel=1e-3), column
            mean = found.by_distance[2, order[doc], layer, head, :3].tolist()  # distances 1, 2, 3
            assert mean == pytest.approx([c[d == x].sum(1).mean() for x in (1, 2, 3)], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*architectures.ROTARY, *architectures.MORE])
def test_every_architecture(name):
    model = small_models.rotary_model(name)
    if name.startswith("Cohere") and models.hooked_available():
        # 3.9's Bridge rotates Cohere's coordinates unlike transformers.
        with pytest.raises(PosheadsError, match="does not turn its queries"):
            rotary_atlas(model, tokens_for(), progress=False)
        return
    found = rotary_atlas(model, tokens_for(), progress=False)
    layers = architectures.rotary_layers(name)
    assert sorted({*found.heads()["layer"]}) == list(layers)
    columns = [x for x in found.heads() if not x.startswith(("slow_trained", "layer", "head"))]
    assert found.heads()[columns].notna().all().all()
    assert found.to_pandas().notna().all().all()


@pytest.mark.parametrize(
    "method",
    [
        None,
        ex.Linear(factor=2.0),
        ex.YaRN(factor=2.0),
        ex.DynamicNTK(factor=2.0),
        ex.SelfExtend(window=8, group=4),
        ex.ReRoPE(window=8),
        ex.DualChunk(chunk=16, local=4),
    ],
    ids=lambda x: "bare" if x is None else type(x).__name__,
)
def test_scores_found_are_the_model_s_own(llama, method, every_pair):
    """Under a method, those that attention has under it."""
    method, tokens = method or ex.Unchanged(), tokens_for(length=60)
    names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in (0, 1)]
    with method(llama, trained=32):
        found = rotary_atlas(llama, tokens, scale="attention", progress=False)
        cache = cached(llama, tokens, names)
    order = rows_of(found, tokens)
    at = torch.arange(60)
    distance = at[:, None] - at
    edges = measuring.bin_edges(59)
    for layer in (0, 1):
        for doc in range(2):
            scores = cache[names[layer]][doc]
            for b, (start, stop) in enumerate(pairwise(edges)):
                mean = scores[:, (distance >= start) & (distance < stop)].double().mean(1)
                got = found.by_distance[2, order[doc], layer, :, b]
                assert torch.allclose(got, mean, atol=1e-4)


def test_methods_change_what_they_should(llama):
    tokens = tokens_for(length=60)
    bare = rotary_atlas(llama, tokens, layers=[0], progress=False)
    with ex.Linear(factor=2.0)(llama, trained=32):
        linear = rotary_atlas(llama, tokens, layers=[0], progress=False)
    assert torch.allclose(linear.wavelengths[:, 0], 2 * bare.wavelengths[:, 0])
    with ex.SelfExtend(window=8, group=4)(llama, trained=32):
        mapped = rotary_atlas(llama, tokens, layers=[0], progress=False)
    # Layer 0 reads the same: contents and their use stay, scores don't.
    for column in ("usage", "concentration_q"):
        for other in (linear, mapped):
            change = (other.by_document(column) - bare.by_document(column))[:, 0].abs().max()
            assert change < 1e-4, column
    assert torch.equal(mapped.wavelengths[:, 0], bare.wavelengths[:, 0])
    assert mapped.provenance["inside"] == [ex.SelfExtend(window=8, group=4).name]
    near, far = mapped.by_distance[2, :, 0, :, :3], mapped.by_distance[2, :, 0, :, -1]
    assert torch.allclose(near, bare.by_distance[2, :, 0, :, :3], atol=1e-4)
    assert not torch.allclose(far, bare.by_distance[2, :, 0, :, -1], atol=1e-2)


def test_what_profile_and_score_heads_say_is_the_same(llama, atlas):
    cheap = ProfileSettings(local_window=8, n_sink=2)
    profile = profile_heads(
        llama, tokens_for(), measures=["massive"], needles=0, settings=cheap, progress=False
    ).to_pandas()
    table = atlas.heads()
    for name in ("slow_norm_q", "slow_norm_k"):
        assert table[name].tolist() == pytest.approx(profile[name].tolist(), rel=1e-6)
    scores = score_heads(llama, tokens_for(), qk_pairs=1000, progress=False)
    number = torch.arange(4.0, dtype=torch.float64)
    for end in ("near", "far"):
        weight = atlas.by_document(f"weight_{end}").mean(0)
        assert torch.allclose((weight * number).sum(-1), getattr(scores, f"d_{end}"), atol=1e-5)
    joined = rotary_atlas(llama, tokens_for(), scores=scores, progress=False).heads()
    for name in ("rho", "rotation", "content"):
        assert joined[name].tolist() == getattr(scores, name).flatten().tolist()


def test_needed_is_asked_for(llama, atlas):
    table = atlas.to_pandas()
    assert len(table) == 2 * 4 * 4
    ranks = atlas.by_document("needed_rank").sort(-1).values
    assert torch.equal(ranks, torch.arange(1.0, 5).double().expand(ranks.shape))
    assert atlas.heads()["pairs_needed"].between(1, 4).all()
    plain = rotary_atlas(llama, tokens_for(), progress=False)
    assert not [name for name in plain.to_pandas() if name.startswith("needed")]
    pd.testing.assert_frame_equal(plain.to_pandas(), table[list(plain.to_pandas())])


def test_order_of_texts_and_padding_decide_nothing(llama, atlas):
    tokens = tokens_for()
    options = dict(needed=True, progress=False)
    flipped = rotary_atlas(llama, tokens.flip(0), **options)
    pd.testing.assert_frame_equal(flipped.heads(), atlas.heads())
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
    mask = (torch.arange(LENGTH + 3) >= 3).long().expand(2, -1)
    unpadded = rotary_atlas(llama, padded, attention_mask=mask, **options)
    pd.testing.assert_frame_equal(unpadded.heads(), atlas.heads())
    skipped = rotary_atlas(llama, tokens, skip_first=4, layers=[0], progress=False)
    cache = cached(llama, tokens, hook_names([0]))
    norm = cache[hook_names([0])[0]][:, 4:, 1, [0, 4]].double().norm(dim=-1).mean(1)
    k = cache[hook_names([0])[1]][:, 4:, 0, [0, 4]].double().norm(dim=-1).mean(1)
    order = rows_of(skipped, tokens)
    assert skipped.by_document("usage")[order, 0, 1, 0].tolist() == pytest.approx(
        (norm * k).tolist(), rel=1e-5
    )
    assert skipped.by_pair[:, :, 1].isnan().all()


def test_unequal_lengths(llama):
    long, short = tokens_for(1, 60)[0], tokens_for(1, 30, seed=1)[0]
    found = rotary_atlas(llama, [long, short], progress=False)
    assert sorted(found.lengths) == [30, 60]
    assert found.reach(0) == 59
    far = found.by_distance[0, :, 0, 0, -1]
    assert far.isfinite().tolist() == [n == 60 for n in found.lengths]
    alone = rotary_atlas(llama, [short], progress=False)
    i = found.lengths.index(30)
    assert torch.equal(found.by_pair[:, i].nan_to_num(), alone.by_pair[:, 0].nan_to_num())


def test_a_stopped_run_goes_on(llama, atlas, tmp_path, monkeypatch):
    options = dict(needed=True, progress=False, checkpoint=tmp_path / "c")
    true, passes = run.capture_rotary, []

    def once(*args, **kwargs):
        if passes:
            raise KeyboardInterrupt
        passes.append(1)
        true(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run, "capture_rotary", once)
        with pytest.raises(KeyboardInterrupt):
            rotary_atlas(llama, tokens_for(), **options)
    passes.clear()
    monkeypatch.setattr(run, "capture_rotary", once)  # one document is left
    again = rotary_atlas(llama, tokens_for(), **options)
    assert passes == [1]
    pd.testing.assert_frame_equal(again.to_pandas(), atlas.to_pandas())
    with pytest.raises(PosheadsError, match="belongs to another run"):
        rotary_atlas(llama, tokens_for(), progress=False, checkpoint=tmp_path / "c")
    loaded = RotaryAtlas.load(again.save(tmp_path / "a"))
    pd.testing.assert_frame_equal(loaded.heads(), atlas.heads())


def test_the_model_is_left_as_it_was(llama, monkeypatch):
    hooks = [len(p.fwd_hooks) for p in llama.hook_dict.values()]
    extra = set(llama.__dict__)

    def fail(*args, **kwargs):
        raise RuntimeError("stop")

    monkeypatch.setattr(run, "measure_layer", fail)
    with pytest.raises(RuntimeError, match="stop"):
        rotary_atlas(llama, tokens_for(), progress=False)
    assert [len(p.fwd_hooks) for p in llama.hook_dict.values()] == hooks
    assert set(llama.__dict__) == extra


def test_mrope_is_refused_by_name_before_a_pass():
    model = small_models.refused_model("Qwen2.5-VL")
    if model is None:
        pytest.skip("this lens doesn't load Qwen2.5-VL")

    def never(*args, **kwargs):
        raise AssertionError("a forward pass was run before the refusal")

    model.forward = never
    with pytest.raises(PosheadsError, match=r"tiny-Qwen2_5_VL uses MRoPE .*, not RoPE"):
        rotary_atlas(model, tokens_for(), progress=False)


def test_what_can_t_be_is_refused(llama):
    tokens = tokens_for()
    with pytest.raises(PosheadsError, match="GPT2|no RoPE|rotary"):
        rotary_atlas(small_models.other_model("GPT-2"), tokens)
    with pytest.raises(PosheadsError, match="qk_pairs='auto'"):
        rotary_atlas(llama, tokens, qk_pairs="auto")
    with pytest.raises(PosheadsError, match="qk_pairs=2"):
        rotary_atlas(llama, tokens, qk_pairs=2)
    with pytest.raises(PosheadsError, match="scale='other'"):
        rotary_atlas(llama, tokens, scale="other")
    with pytest.raises(PosheadsError, match="trained=1"):
        rotary_atlas(llama, tokens, trained=1)
    scores = head_scores([[0.1, 0.2, 0.3, 0.4]])
    with pytest.raises(PosheadsError, match="give this model's scores"):
        rotary_atlas(llama, tokens, scores=scores)
    with pytest.raises(PosheadsError, match="same text"):
        rotary_atlas(llama, tokens[[0, 0]])
    with pytest.raises(PosheadsError, match="at most"):
        rotary_atlas(llama, tokens_for(1, 400))

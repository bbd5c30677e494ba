"""Every text at the frequencies of its own length: nothing depends on what was read before."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import PhimoeConfig
from transformers.models.llama import modeling_llama
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

import tl_posheads as ph
from helpers import architectures, small_models
from helpers.text_by_hand import reference_rho
from helpers.traces import state, warm
from tl_posheads import extrapolation as ex
from tl_posheads.hooks.lengths import own_frequencies
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.io import models
from tl_posheads.tasks import generate_answers
from tl_posheads.tasks.base import Prompt

pytestmark = pytest.mark.lens

N = 64  # where the frequencies begin to depend on the length
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
LONGROPE = dict(architectures.LONGROPE, long_factor=[4.0, 8.0, 16.0, 32.0])
HALF = dict(short_factor=[1.0, 1.2], long_factor=[4.0, 16.0])
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Olmo2": {},
    "Phi3": {},
    "Phi": {"partial_rotary_factor": 0.5},
    "StableLm": {"partial_rotary_factor": 0.5},
    "Falcon": {
        "multi_query": True,
        "alibi": False,
        "parallel_attn": True,
        "bias": False,
        "new_decoder_architecture": False,
    },
    "GPTNeoX": {"rotary_pct": 0.5, "num_key_value_heads": None},
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "DeepseekV3": architectures.MLA,
}
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in FAMILIES
    if name not in ("Llama", "GPTNeoX", "Phi3")
]
NAMES = ["Llama", "GPTNeoX", "Phi3", *SLOW]


def tokens_of(length, seed):
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed))


def built(family, kind):
    """A transformers model whose frequencies depend on the length from 64 tokens on."""
    options = {**architectures.BASE, **FAMILIES[family]}
    if kind == "dynamic":
        if family == "Phi3":
            pytest.skip("Phi-3 has LongRoPE alone")
        options |= {"max_position_embeddings": N, "rope_parameters": dict(DYNAMIC)}
    else:
        half = "rotary_pct" in options or "partial_rotary_factor" in options
        options["rope_parameters"] = {**LONGROPE, **(HALF if half else {})}
        if family == "Phi3":
            options["original_max_position_embeddings"] = N
    return small_models.build(family, options)


def bridged(family, kind):
    model = small_models.bridge(built(family, kind), f"tiny-{family}")
    if family == "DeepseekV3" and models.hooked_available():
        pytest.skip("the Bridge of 3.9 gives DeepSeek no causal mask")
    return model


def rotary_state(model):
    """Buffers with their contents and numbers of every rotary embedding."""
    found = {}
    for name, module in model.original_model.named_modules():
        if "max_seq_len_cached" in vars(module):
            found[name] = (
                {k: (id(v), v.clone()) for k, v in module._buffers.items()},
                {
                    k: v
                    for k, v in vars(module).items()
                    if isinstance(v, int | float | torch.Tensor)
                },
            )
    assert found
    return found


def same_state(before, after):
    for name, (buffers, numbers) in before.items():
        assert buffers.keys() == after[name][0].keys()
        for key, (where, value) in buffers.items():
            assert after[name][0][key][0] == where
            assert torch.equal(after[name][0][key][1], value)
        assert numbers.keys() == after[name][1].keys()
        for key, value in numbers.items():
            assert torch.equal(torch.as_tensor(after[name][1][key]), torch.as_tensor(value)), key


def dynamic_frequencies(length, d=8, base=1e4, factor=4.0):
    """emozilla's formula, in numpy."""
    if length > N:
        base *= (factor * length / N - (factor - 1)) ** (d / (d - 2))
    return base ** (-np.arange(0, d, 2) / d)


def rho(model, texts):
    with ex.Unchanged()(model):
        return ph.score_heads(model, texts, progress=False, qk_pairs="all")


def test_dynamic_geometry_is_that_of_the_length_asked_for():
    model = bridged("Llama", "dynamic")
    with torch.no_grad():
        model(tokens_of(256, 0)[None])
    before = rotary_state(model)
    for length in (128, 64, 40, 200):
        geometry = ph.RotaryGeometry.from_model(model, length=length)
        assert geometry.length == length
        for layer in (0, 1):
            np.testing.assert_allclose(
                geometry[layer].inv_freq, dynamic_frequencies(length), rtol=1e-5
            )
    same_state(before, rotary_state(model))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("family", NAMES)
def test_scores_depend_neither_on_texts_before_nor_on_those_beside(family, kind):
    texts = [tokens_of(n, n) for n in (40, 128, 256)]
    alone = []
    for text in texts:  # each by a model that has never read another
        alone.append(rho(bridged(family, kind), [text]))
    model = warm(bridged(family, kind))
    with torch.no_grad():
        model(tokens_of(256, 7)[None])
    before, hooks = rotary_state(model), state(model)
    together = rho(model, texts)
    same_state(before, rotary_state(model))
    assert state(model)[:2] == hooks[:2]
    for one in alone:
        i = together.document_names.index(one.document_names[0])
        torch.testing.assert_close(
            together.by_document("rho")[i],
            one.by_document("rho")[0],
            atol=1e-6,
            rtol=0,
            equal_nan=True,
        )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_scores_are_numpys_on_fresh_transformers_models(kind, monkeypatch):
    texts, wanted = [tokens_of(n, n) for n in (40, 90)], []
    rotate = modeling_llama.apply_rotary_pos_emb
    for text in texts:
        seen = []

        def spy(*args, seen=seen, **kwargs):
            seen.append(rotate(*args, **kwargs))
            return seen[-1]

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(modeling_llama, "apply_rotary_pos_emb", spy)
            built("Llama", kind)(text[None], use_cache=False)
        q, k = (x[0].double().numpy() for x in seen[1])
        wanted.append([reference_rho(q[h], k[h // 2], "half", 8, None) for h in range(4)])
    model = bridged("Llama", kind)
    with torch.no_grad():
        model(tokens_of(256, 7)[None])
    np.testing.assert_allclose(rho(model, texts).rho[1], np.mean(wanted, 0), atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("family", NAMES)
@torch.no_grad()
def test_logprobs_are_those_of_a_fresh_transformers_model(family, kind):
    model = bridged(family, kind)
    model(tokens_of(256, 7)[None])
    before = rotary_state(model)
    for length in (128, 64, 40):
        text = tokens_of(length, length)
        fresh = built(family, kind)(text[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        wanted = fresh.gather(-1, text[1:, None])[:, 0]
        found, _ = target_logprobs(model, text, torch.arange(1, length))
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
        same_state(before, rotary_state(model))
        with ex.Unchanged()(model):
            torch.testing.assert_close(
                model(text[None])[0, :-1].log_softmax(-1), fresh, atol=2e-4, rtol=1e-4
            )
    with ex.Unchanged()(model), pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    same_state(before, rotary_state(model))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_curves_and_profiles_take_every_texts_own_frequencies(kind):
    model = bridged("Llama", kind)
    texts, heads = [tokens_of(40, 1), tokens_of(200, 2)], [(0, 1), (1, 3)]
    with ex.Unchanged()(model):
        each = [ph.dominant_dimension_curve(model, [t], heads=heads, progress=False) for t in texts]
        both = ph.dominant_dimension_curve(model, texts, heads=heads, progress=False)
        short = ph.profile_heads(model, texts[:1], measures=["massive"], progress=False)
        long = ph.profile_heads(model, texts[1:], measures=["massive"], progress=False)
        mean = ph.profile_heads(model, texts, measures=["massive"], progress=False)
    total = each[1].mean * each[1].n_qk_pairs
    total[:, :39] += each[0].mean * each[0].n_qk_pairs
    torch.testing.assert_close(both.mean * both.n_qk_pairs, total, atol=1e-5, rtol=1e-6)
    column = "slow_norm_k"
    torch.testing.assert_close(
        torch.tensor(mean.table[column]),
        (torch.tensor(short.table[column]) + torch.tensor(long.table[column])) / 2,
        atol=1e-6,
        rtol=1e-6,
        equal_nan=True,
    )


def test_what_holds_for_one_length_refuses_others():
    model = bridged("Llama", "dynamic")
    with (
        ex.Unchanged()(model),
        pytest.raises(ph.PosheadsError, match="frequencies .* not the same"),
    ):
        ph.encodings.score_encoding(model, [tokens_of(40, 1), tokens_of(100, 2)], progress=False)
    accumulator = ph.ScoreAccumulator(
        ph.RotaryGeometry.from_model(model, length=100), qk_pairs="all"
    )
    text = tokens_of(100, 2)
    with ex.Unchanged()(model), torch.no_grad():
        model(tokens_of(200, 3)[None])
        model.run_with_hooks(text[None], fwd_hooks=accumulator.fwd_hooks)
        found = accumulator.scores().rho
        torch.testing.assert_close(found, rho_inside(model, text), atol=1e-6, rtol=0)
        with pytest.raises(ph.PosheadsError, match="geometry is that of 100"):
            model.run_with_hooks(text[None, :90], fwd_hooks=accumulator.fwd_hooks)


def rho_inside(model, text):
    return ph.score_heads(model, [text], qk_pairs="all", progress=False).rho


def answers(model, start, n):
    prompt = Prompt(
        tokens=torch.cat([start, torch.full((n,), 5)]),
        targets=torch.arange(len(start), len(start) + n),
    )
    return generate_answers(model, [prompt])["generated"][0]


def uncached(hf_model, start, n):
    for _ in range(n):
        following = hf_model(start[None], use_cache=False).logits[0, -1].argmax()
        if int(following) == 2:
            break
        start = torch.cat([start, following[None]])
    return start


@pytest.mark.parametrize("length", [53, 60, 64, 65])
@torch.no_grad()
def test_generation_across_longropes_border_is_transformers(length):
    """64 tokens: Phi-3 computes its cache anew there."""
    hf_model, model = built("Phi3", "longrope"), bridged("Phi3", "longrope")
    bare = small_models.build("Phi3", {**architectures.BASE, "max_position_embeddings": N})
    bare.load_state_dict(hf_model.state_dict())
    extended = small_models.bridge(bare, "tiny-Phi3")
    method = ex.LongRoPE.from_config(hf_model.config)
    tokenizer = small_models.tiny_tokenizer()
    for seed in range(4):
        start = tokens_of(length, seed)
        theirs = hf_model.generate(
            start[None],
            attention_mask=torch.ones(1, length).long(),
            max_new_tokens=12,
            do_sample=False,
        )[0]
        slow = uncached(hf_model, start, 12)
        assert torch.equal(theirs[: len(slow)], slow)
        wanted = tokenizer.decode(slow[length:], skip_special_tokens=True).strip()
        assert answers(model, start, 12) == wanted
        with method(extended):
            assert answers(extended, start, 12) == wanted


@pytest.mark.parametrize("mapping", [False, True])
@torch.no_grad()
def test_longrope_from_config_on_the_bare_model_is_transformers(mapping):
    model = small_models.bridge(small_models.build("Llama", architectures.BASE))
    for change in (
        {},
        {"attention_factor": 1.4},
        {"factor": 2.0},
        {"factor": 8.0},
        {"original_max_position_embeddings": 48},
    ):
        rope = {**LONGROPE, **change}
        config = {**architectures.BASE, "rope_parameters": rope}
        theirs = small_models.build("Llama", config)  # of the same weights
        given = theirs.config.to_dict() if mapping else theirs.config
        method = ex.LongRoPE.from_config(given)
        assert method.original_length == rope["original_max_position_embeddings"]
        native = small_models.bridge(small_models.build("Llama", config))
        for length in (40, 56, 64, 65, 128):
            text = tokens_of(length, length)[None]
            with method(model):
                torch.testing.assert_close(
                    model(text), theirs(text, use_cache=False).logits, atol=1e-3, rtol=1e-4
                )
                inside = ph.RotaryGeometry.from_model(model, length=length)
            own = ph.RotaryGeometry.from_model(native, length=length)
            np.testing.assert_allclose(inside[1].inv_freq, own[1].inv_freq, rtol=1e-4)
            assert inside[1].rotation_scale == pytest.approx(own[1].rotation_scale, rel=1e-4)


def test_longrope_keeps_phimoes_factors():
    config = PhimoeConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=256,
        rope_parameters={**LONGROPE, "short_mscale": 1.05, "long_mscale": 1.25},
    )
    method, theirs = ex.LongRoPE.from_config(config), PhimoeRotaryEmbedding(config)
    own = torch.ones(4, dtype=torch.float64)
    for length in (48, 64, 65, 128):
        cos, sin = theirs(torch.zeros(1, length, 32), torch.arange(length)[None])
        amplitude = (cos.double() ** 2 + sin.double() ** 2).sqrt().mean().item()
        assert method.frequencies(own, 256, length).scale == pytest.approx(amplitude, abs=1e-6)


def test_longrope_needs_the_length_and_the_factor():
    rope = {"long_factor": [1.0, 2.0], "original_max_position_embeddings": N}
    with pytest.raises(ph.PosheadsError, match="give the whole config"):
        ex.LongRoPE.from_config(rope)
    assert ex.LongRoPE.from_config({**rope, "factor": 4.0}).original_length == N
    with pytest.raises(ph.PosheadsError, match="give the whole config"):
        ex.LongRoPE.from_config({"long_factor": [1.0, 2.0], "factor": 4.0})


@pytest.mark.skipif(not models.hooked_available(), reason="no HookedTransformer")
@torch.no_grad()
def test_qwens_own_scaling_in_a_hookedtransformer_leaves_nothing():
    model = small_models.small_hooked(
        n_key_value_heads=None,
        d_mlp=48,
        normalization_type="LN",
        initializer_range=-1.0,
        final_rms=True,
        rotary_adjacent_pairs=False,
        use_dynamic_ntk_rope=True,
        train_seq_length=N,
    )
    attn = model.blocks[0].attn
    model(tokens_of(100, 0)[None])
    before, alpha = attn.rotary_cos, attn._ntk_alpha_cached
    for context in (nullcontext(), ex.Unchanged()(model)):
        with context:
            for length in (200, 40, 100):
                geometry = ph.RotaryGeometry.from_model(model, length=length)
                factor = max(2 ** np.ceil(np.log2(length / N) + 1) - 1, 1) if length > N else 1
                base = 1e4 * factor ** (8 / 6)
                np.testing.assert_allclose(
                    geometry[0].inv_freq, base ** (-np.arange(0, 8, 2) / 8), rtol=1e-4
                )
    assert attn.rotary_cos is before
    assert attn._ntk_alpha_cached == alpha


def test_frequencies_that_are_always_the_same_cost_nothing():
    model = small_models.rotary_model("Llama")
    hooks = state(model)
    with own_frequencies(model):
        assert state(model)[:2] == hooks[:2]

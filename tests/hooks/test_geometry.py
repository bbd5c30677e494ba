"""Geometry measured on small models of every architecture, against their own attention scores."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers.models.llama import modeling_llama

from helpers import architectures, small_models
from helpers.text_by_hand import reference_rho
from tl_posheads import (
    LayerGeometry,
    PosheadsError,
    RotaryGeometry,
    capture_rotary,
    dimension_contributions,
    dominant_dimension,
    dominant_dimension_curve,
    extrapolation,
    head_maps,
    rotary_hook_points,
    score_heads,
    unrotated_contribution,
)
from tl_posheads.scoring.all_pairs import n_visible

pytestmark = pytest.mark.lens


def theta(base, dim):
    return [base ** (-2 * m / dim) for m in range(dim // 2)]


def yarn(factor, original, dim=8, base=10000.0, fast=32, slow=1):
    """Equations 13-16 of YaRN (arXiv 2309.00071), bounds as transformers rounds them."""

    def bound(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(bound(fast)), 0), min(math.ceil(bound(slow)), dim - 1)
    out = []
    for m, f in enumerate(theta(base, dim)):
        ramp = min(max((m - low) / (high - low), 0), 1)
        out.append(f / factor * ramp + f * (1 - ramp))
    return out


LLAMA = ("half", 8, theta(10000.0, 8), 1.0, 8**-0.5, None, [None, None])
EXPECTED = dict.fromkeys(("Llama", "Qwen2", "Qwen3", "OLMo 2", "Falcon"), LLAMA) | {
    "Llama, YaRN": ("half", 8, yarn(4.0, 64), 0.1 * math.log(4) + 1, 8**-0.5, None, [None, None]),
    "Mistral, sliding window": (*LLAMA[:6], [16, 16]),
    "Mixtral": ("half", 8, theta(1e6, 8), 1.0, 8**-0.5, None, [None, None]),
    "Gemma 2": (*LLAMA[:5], 50.0, [16, None]),
    "Phi": ("half", 4, theta(10000.0, 4), 1.0, 8**-0.5, None, [None, None]),
    "StableLM": ("half", 4, theta(10000.0, 4), 1.0, 8**-0.5, None, [None, None]),
    "GPT-NeoX, Pythia": ("half", 4, theta(10000.0, 4), 1.0, 8**-0.5, None, [None, None]),
    "GPT-J": ("adjacent", 4, theta(10000.0, 4), 1.0, 8**-0.5, None, [None, None]),
    "Cohere": ("adjacent", 8, theta(500000.0, 8), 1.0, 8**-0.5, None, [None, None]),
    "DeepSeek-V3": ("half", 8, theta(10000.0, 8), 1.0, 16**-0.5, None, [None, None]),
    "DeepSeek-V2": ("adjacent", 8, theta(10000.0, 8), 1.0, 16**-0.5, None, [None, None]),
    "Phi-3, longrope": (
        "half",
        8,
        [f / s for f, s in zip(theta(10000.0, 8), (1.0, 1.1, 1.2, 1.3))],
        math.sqrt(1 + math.log(4) / math.log(64)),
        8**-0.5,
        None,
        [None, None],
    ),
}


@pytest.fixture(
    scope="module",
    params=[
        *architectures.ROTARY,
        "gpt-oss",  # sinks
        "LFM2",  # convolutions, and layers without attention
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in architectures.MORE
            if name not in ("gpt-oss", "LFM2")
        ),
    ],
)
def case(request):
    """Name, model, and whether the installed lens computes what transformers does."""
    name = request.param
    tokens = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = small_models.rotary_hf(name)(tokens).logits
        model = small_models.rotary_model(name)
        is_right = torch.allclose(model(tokens), theirs, atol=1e-3)
    return name, model, is_right


def observe(model, tokens, names):
    seen = {}

    def keep(value, hook):
        seen[hook.name] = value.detach().clone()

    with rotary_hook_points(model):
        model.run_with_hooks(
            tokens,
            fwd_hooks=[
                (point, keep)
                for i in (0, 1)
                for n in names
                if (point := f"blocks.{i}.attn.{n}") in model.hook_dict
            ],
        )
    return lambda layer, name: next(
        value for key, value in seen.items() if key.endswith(f"{layer}.attn.{name}")
    )


def their_rotations(model, layer):
    """Frequencies and scale that transformers computed for this kind of layer."""
    kinds = getattr(model.original_model.config.get_text_config(), "layer_types", None)
    for module in model.original_model.modules():
        for prefix in ("", f"{kinds[layer]}_" if kinds else ""):
            if (inv_freq := getattr(module, f"{prefix}inv_freq", None)) is not None:
                yield inv_freq, getattr(module, f"{prefix}attention_scaling", 1.0)


def test_geometry_and_scores_of_every_architecture(case):
    name, model, lens_is_right = case
    if not lens_is_right:
        # The Bridge of 3.9 turns other coordinates than Cohere does, and gives DeepSeek no causal
        # mask: its logits are not the models' own.
        reason = {
            "Cohere": "does not turn its queries",
            "Cohere 2": "does not turn its queries",
            "DeepSeek-V2": "see later tokens",
            "DeepSeek-V3": "see later tokens",
        }[name]
        with pytest.raises(PosheadsError, match=reason):
            RotaryGeometry.from_model(model)
        return
    geometry = RotaryGeometry.from_model(model)
    if name in EXPECTED:
        layout, rotary_dim, inv_freq, scale, attention_scale, softcap, windows = EXPECTED[name]
        for layer in (0, 1):
            g = geometry[layer]
            assert (g.layout, g.rotary_dim, g.softcap, g.window) == (
                layout,
                rotary_dim,
                softcap,
                windows[layer],
            )
            np.testing.assert_allclose(g.inv_freq, inv_freq, rtol=1e-4, atol=1e-8)
            assert g.rotation_scale == pytest.approx(scale, rel=1e-5)
            assert g.attention_scale == pytest.approx(attention_scale, rel=1e-6)
    rotary = [layer for layer in (0, 1) if geometry[layer].n_pairs]
    assert rotary == list(architectures.rotary_layers(name))
    if name in architectures.MORE:
        for layer in rotary:
            g = geometry[layer]
            assert any(
                len(g.inv_freq) == len(inv_freq)
                and torch.allclose(g.inv_freq.float(), inv_freq, rtol=1e-4, atol=1e-8)
                and g.rotation_scale == pytest.approx(scale, rel=1e-5)
                for inv_freq, scale in their_rotations(model, layer)
            )
    tokens = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    names = ["hook_rot_q", "hook_rot_k", "hook_attn_scores"]
    is_latent = "MLA" in type(model.blocks[1].attn).__name__
    get = observe(model, tokens, names + (["hook_q", "hook_k"] if is_latent else []))
    for layer in rotary:
        g, scores = geometry[layer], get(layer, "hook_attn_scores")
        q, k = get(layer, "hook_rot_q"), get(layer, "hook_rot_k")
        ours = dimension_contributions(q, k, g, scale="attention").sum(-1)
        if is_latent:  # the unrotated rest is no part of the rotated vectors
            rest = [get(layer, n)[..., : -g.rotary_dim] for n in ("hook_q", "hook_k")]
            ours = ours + rest[0] @ rest[1].transpose(-1, -2) * g.attention_scale
        else:
            ours = ours + unrotated_contribution(q, k, g) * g.attention_scale
        causal = torch.ones(40, 40, dtype=torch.bool).tril()
        if g.window is not None:
            causal &= ~torch.ones(40, 40, dtype=torch.bool).tril(-g.window)
        if name == "GPT-J":  # the lens shows the pattern under this name
            ours = ours.masked_fill(~causal, -torch.inf).softmax(-1)
        elif g.softcap is not None:
            ours = g.softcap * torch.tanh(ours / g.softcap)
        torch.testing.assert_close(ours[..., causal], scores[..., causal], atol=1e-4, rtol=1e-4)
        hidden = scores[..., ~causal]
        assert bool((hidden == 0).all() if name == "GPT-J" else (hidden < -1e4).all())


def test_rho_of_every_architecture_equals_numpy_and_scipy(case):
    name, model, lens_is_right = case
    if not lens_is_right:
        return  # refused, as the test above has seen
    tokens = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(2))
    scores = score_heads(model, tokens, progress=False)
    geometry = RotaryGeometry.from_model(model)
    get = observe(model, tokens, ["hook_rot_q", "hook_rot_k"])
    captured = {}
    capture_rotary(model, tokens, lambda layer, *both: captured.update({layer: both}))
    for layer in range(2):
        if layer not in architectures.rotary_layers(name):
            assert scores.rho[layer].isnan().all()
            continue
        # Fused attention rounds otherwise than the lens's, and ranks see every last digit.
        for x, hook in zip(captured[layer], ("hook_rot_q", "hook_rot_k"), strict=True):
            torch.testing.assert_close(x[0], get(layer, hook)[0], atol=1e-5, rtol=1e-4)
        q, k = (x[0].double().numpy() for x in captured[layer])
        g = geometry[layer]
        for head in range(4):
            expected = reference_rho(
                q[:, head], k[:, g.kv_head[head]], g.layout, g.rotary_dim, g.window
            )
            # Two neighbouring ranks that rounding swaps are worth some 1e-6.
            assert scores.rho[layer, head].item() == pytest.approx(expected, abs=2e-5)
        assert scores.windows[layer] == g.window


def test_maps_and_curves_take_the_attention_scale():
    model = small_models.rotary_model("Gemma 2")
    tokens = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(2))
    geometry, captured = RotaryGeometry.from_model(model), {}
    capture_rotary(model, tokens, lambda layer, *both: captured.update({layer: both}))
    for scale in ("none", "attention"):
        options = dict(heads=[(0, 1), (1, 3)], scale=scale)
        curve = dominant_dimension_curve(model, tokens, progress=False, **options)
        maps = head_maps(model, tokens, **options)
        assert curve.scale == maps.scale == scale
        for i, (layer, head) in enumerate(options["heads"]):
            q, k = captured[layer]
            c = dimension_contributions(q.double(), k.double(), geometry[layer], scale=scale)
            expected = dominant_dimension(c)[0, head]
            seen = torch.isfinite(maps.dominant[i])
            torch.testing.assert_close(maps.dominant[i][seen], expected[seen], atol=1e-4, rtol=1e-4)
            assert int(seen.sum()) == n_visible(24, geometry[layer].window)
            for d in (1, 9):
                mean = expected.diagonal(-d).mean().item()
                assert curve.mean[i, d - 1].item() == pytest.approx(mean, abs=1e-4)


def test_llama3_scaling_equals_its_formula():
    geometry = RotaryGeometry.from_model(small_models.rotary_model("Llama, llama3 scaling"))
    expected = []
    for f in theta(500000.0, 8):
        wavelength = 2 * math.pi / f
        if wavelength > 64 / 1.0:
            f /= 8.0
        elif wavelength > 64 / 4.0:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            f = (1 - smooth) * f / 8.0 + smooth * f
        expected.append(f)
    np.testing.assert_allclose(geometry[0].inv_freq, expected, rtol=1e-4)


def test_gemma3_has_two_thetas():
    geometry = RotaryGeometry.from_model(small_models.rotary_model("Gemma 3"))
    np.testing.assert_allclose(geometry[0].inv_freq, theta(1e4, 8), rtol=1e-4)
    np.testing.assert_allclose(geometry[1].inv_freq, theta(1e6, 8), rtol=1e-4)
    assert [g.window for g in geometry.layers] == [16, None]


def test_longrope_frequencies_are_those_of_the_texts_length():
    model = small_models.rotary_model("Phi-3, longrope")
    long = RotaryGeometry.from_model(model, length=100)[0].inv_freq
    expected = [f / s for f, s in zip(theta(10000.0, 8), (1.0, 2.0, 3.0, 4.0))]
    np.testing.assert_allclose(long, expected, rtol=1e-4)


def test_smollm2_has_the_theta_that_its_configuration_denies(smollm2):
    geometry = RotaryGeometry.from_model(smollm2)
    assert (geometry.n_layers, geometry.n_heads) == (30, 9)
    np.testing.assert_allclose(geometry[7].inv_freq, theta(100000.0, 64), rtol=2e-4, atol=1e-8)
    assert geometry[7].kv_head == (0, 0, 0, 1, 1, 1, 2, 2, 2)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in architectures.REFUSED]
)
def test_what_the_lens_or_the_method_lacks_is_refused_for_that_reason(name):
    model = small_models.refused_model(name)
    if model is None:
        pytest.skip(f"this lens doesn't load {name}")
    tokens = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    for action in (RotaryGeometry.from_model, lambda m: score_heads(m, tokens, progress=False)):
        with pytest.raises(PosheadsError, match=re.escape(architectures.REFUSED[name][2])):
            action(model)


def test_mrope_that_the_lens_shows_is_rope_on_text():
    """Qwen3.5's checkpoints have sections; all three positions of a text's token are the same."""
    family, config, layers = architectures.MORE["Qwen3.5"]
    sections = {**config["rope_parameters"], "mrope_section": [1, 1, 0], "mrope_interleaved": True}
    hf_model = small_models.build(family, {**config, "rope_parameters": sections})
    geometry = RotaryGeometry.from_model(small_models.bridge(hf_model))
    np.testing.assert_allclose(geometry[layers[0]].inv_freq, theta(10000.0, 4), rtol=1e-4)


def test_the_documented_table_is_the_tested_one():
    page = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"
    assert architectures.table() in page.read_text()


@pytest.mark.parametrize("name", list(architectures.OTHER))
def test_other_positions_are_refused_by_name(name):
    family, _, positions = architectures.OTHER[name]
    model = small_models.other_model(name)

    def never(*args, **kwargs):
        raise AssertionError("a forward pass was run before the refusal")

    model.forward = never
    for action in (RotaryGeometry.from_model, lambda m: score_heads(m, torch.ones(1, 9).long())):
        with pytest.raises(PosheadsError, match=f"tiny-{family} uses .*{positions}.* not RoPE"):
            action(model)


def test_layers_that_are_not_there_are_refused():
    model = small_models.rotary_model("Llama")
    tokens = torch.arange(3, 12)[None]
    for layers in ([], [2], [-1]):
        refused = pytest.raises(PosheadsError, match=r"layers=\[.*layers 0 to 1")
        with refused:
            RotaryGeometry.from_model(model, layers=layers)
        with refused:
            capture_rotary(model, tokens, lambda *_: None, layers=layers)
        with refused:
            score_heads(model, tokens, layers=layers, progress=False)


def test_a_model_that_runs_its_layers_twice_is_refused():
    model = small_models.rotary_model("Llama")
    block = model.blocks[0]
    once = block.forward

    def twice(x, **kwargs):
        return once(once(x, **{**kwargs, "past_key_values": None}), **kwargs)

    block.__dict__["forward"] = twice
    with pytest.raises(PosheadsError, match="layer 0 of tiny-Llama runs more than once"):
        RotaryGeometry.from_model(model)


def test_a_mask_with_gaps_is_no_window(monkeypatch):
    """Every query sees its own key and every other one of those before; the last, half of them."""

    def every_other(inputs_embeds, **kwargs):
        at = torch.arange(inputs_embeds.shape[1])
        apart = at[:, None] - at
        mask = torch.zeros(apart.shape).masked_fill((apart < 0) | (apart % 2 == 1), -torch.inf)
        return mask[None, None]

    monkeypatch.setattr(modeling_llama, "create_causal_mask", every_other)
    with pytest.raises(PosheadsError, match="layer 0 of tiny-Llama sees exactly the last 32 keys"):
        RotaryGeometry.from_model(small_models.rotary_model("Llama"))


@pytest.mark.parametrize("head", [0, 3])
def test_scores_far_below_what_fp16_holds_are_no_mask(head):
    """A constant on all of a head's scores, -1.3e5 as in Pythia, changes nothing."""
    tokens = torch.randint(3, 90, (2, 64), generator=torch.Generator().manual_seed(1))
    method, found = extrapolation.SelfExtend(4, 16), []
    for constant in (0.0, 600.0):
        hf_model = small_models.build(*architectures.ROTARY["GPT-NeoX, Pythia"]).double()
        joint = hf_model.gpt_neox.layers[1].attention.query_key_value
        q, k = 24 * head + 4, 24 * head + 12  # of eight coordinates, the first that doesn't turn
        with torch.no_grad():
            joint.weight[[q, k]] = 0
            joint.bias[[q, k]] = torch.tensor([constant, -constant]).double()
        model = TransformerBridge.boot_transformers(
            "tiny-GPTNeoX",
            hf_model=hf_model,
            tokenizer=small_models.tiny_tokenizer(),
            device="cpu",
            dtype=torch.float64,
        )
        g = RotaryGeometry.from_model(model)[1]
        assert (g.window, g.attention_scale) == (None, pytest.approx(8**-0.5, rel=1e-6))
        with torch.no_grad():
            plain = model(tokens)
            with method(model):
                found.append((score_heads(model, tokens, progress=False).rho, model(tokens)))
        assert (found[-1][1] - plain).abs().max() > 0.1
    # transformers takes the softmax in float32, where -1.3e5 has two digits after the point.
    torch.testing.assert_close(found[1][1], found[0][1], atol=5e-3, rtol=0)
    torch.testing.assert_close(found[1][0], found[0][0], atol=5e-3, rtol=0)


def test_what_is_no_lens_model_is_refused():
    with pytest.raises(PosheadsError, match="expected a HookedTransformer or a TransformerBridge"):
        RotaryGeometry.from_model(torch.nn.Linear(2, 2))


def test_geometry_by_hand_is_checked():
    with pytest.raises(PosheadsError, match="n_kv_heads dividing"):
        LayerGeometry.from_inv_freq(torch.ones(2), n_heads=4, n_kv_heads=3)
    g = LayerGeometry.from_inv_freq(torch.tensor([math.pi, math.pi / 50]), 2)
    assert g.wavelengths.tolist() == pytest.approx([2.0, 100.0])
    assert dominant_dimension(torch.zeros(3, g.n_pairs)).tolist() == [0.5] * 3

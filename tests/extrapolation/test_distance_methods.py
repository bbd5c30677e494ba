"""Methods that change distances, against the papers' formulas written out pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from helpers import architectures, small_models
from helpers.distances_by_hand import METHODS, TOKENS, TRAINED, N, numbers, off
from helpers.traces import assert_same, state, warm
from tl_posheads import PosheadsError, capture_rotary, rotary_hook_points, score_heads
from tl_posheads.extrapolation.methods.dpe import DPE
from tl_posheads.extrapolation.methods.dual_chunk import DualChunk
from tl_posheads.extrapolation.methods.rerope import ReRoPE
from tl_posheads.extrapolation.methods.self_extend import SelfExtend
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.logprobs import reads_cache
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.io import models
from tl_posheads.scoring.curves import dominant_dimension_curve

pytestmark = pytest.mark.lens

FAMILIES = [
    "Llama",
    "StableLM",
    "Phi",
    "GPT-NeoX, Pythia",
    "Cohere",
    "Mistral, sliding window",
    "Gemma 2",
]
FUSED = {"Llama", "StableLM", "Phi", "Mistral, sliding window", "hooked"}


@pytest.fixture(params=[*FAMILIES, "hooked"], scope="module")
def family(request):
    name = request.param
    if name == "Cohere" and models.hooked_available():
        pytest.skip("transformer-lens 3.9 turns Cohere's coordinates unlike transformers")
    model = warm(
        small_models.small_hooked() if name == "hooked" else small_models.rotary_model(name)
    )
    model.family, model.geometry = name, RotaryGeometry.from_model(model)
    return model


def reference(model, tokens, distance, log_n=False):
    """Logits of a pass in which every score is computed from the distance that the paper gives."""
    seen, geometry = {}, model.geometry
    whole = [g.layer for g in geometry.layers if g.window is None]

    def scores(old, hook):
        g = geometry[int(hook.name.split(".")[1])]
        (q, rest_q), (k, rest_k) = numbers(seen["q"], g), numbers(seen["k"], g)
        k, rest_k, out = k[:, :, g.kv_head], rest_k[:, :, g.kv_head], old.clone()
        n = old.shape[-1]
        for i in range(n):
            for j in range(max(0, i + 1 - (g.window or n)), i + 1):
                turn = np.exp(1j * g.inv_freq.numpy() * distance(i, j, g.n_pairs))
                score = (q[:, i] * k[:, j].conj() * turn).real.sum(-1)
                score = (score + (rest_q[:, i] * rest_k[:, j]).sum(-1)) * g.attention_scale
                if log_n:
                    score = score * max(1.0, np.log(i + 1) / np.log(TRAINED))
                if g.softcap:
                    score = g.softcap * np.tanh(score / g.softcap)
                out[:, :, i, j] = torch.as_tensor(score).to(out)
        return out

    hooks = []
    for layer in whole or range(len(geometry)):
        name = f"blocks.{layer}.attn.hook_"
        hooks += [(f"{name}rot_{x}", lambda v, hook, x=x: seen.update({x: v})) for x in "qk"]
        hooks.append((f"{name}attn_scores", scores))
    with torch.no_grad(), rotary_hook_points(model):
        return model.run_with_hooks(tokens, fwd_hooks=hooks)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_logits_are_those_of_the_papers_formulas(family, name):
    make, distance = METHODS[name]
    expected = reference(family, TOKENS, distance, log_n=name == "log n")
    with make(family.geometry[1].n_pairs)(family, trained=TRAINED):
        got = family(TOKENS)
    assert off(got, expected) < 1e-4
    assert off(got, family(TOKENS)) > 1e-2


@torch.no_grad()
def test_smollm2_in_both_classes(smollm2):
    smollm2.geometry = RotaryGeometry.from_model(smollm2)
    tokens = smollm2.to_tokens("The quick brown fox jumps over the lazy dog. " * 4)[:, :28]
    for name in ("SelfExtend", "DualChunk"):
        make, distance = METHODS[name]
        with make(32)(smollm2):
            got = smollm2(tokens)
        assert off(got, reference(smollm2, tokens, distance)) < 1e-4
        assert off(got, smollm2(tokens)) > 1e-2


WIDE = [SelfExtend(4, N), ReRoPE(N), ReRoPE(N, leak=3.0), DualChunk(N + 4, 4), DPE((2, 2), N)]


@torch.no_grad()
@pytest.mark.parametrize("method", WIDE, ids=repr)
def test_what_no_distance_reaches_is_the_bare_model(family, method):
    if isinstance(method, DPE):
        method = DPE((2,) * family.geometry[1].n_pairs, N)
    bare, before, longer = family(TOKENS), state(family), TOKENS.repeat(1, 2)
    with method(family):
        assert torch.equal(family(TOKENS), bare)
        inside = family(longer)
    assert_same(before, state(family))
    # Mistral's window hides what is far; chunks cut across it.
    changes = family.family != "Mistral, sliding window" or isinstance(method, DualChunk)
    assert torch.equal(inside, family(longer)) != changes
    assert torch.equal(family(TOKENS), bare)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_an_exception_leaves_nothing(family, name):
    before, bare = state(family), family(TOKENS)

    def bad(scores, hook):
        raise RuntimeError("mine")

    method = METHODS[name][0](family.geometry[1].n_pairs)
    with pytest.raises(RuntimeError, match="mine"), method(family):
        family.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_attn_scores", bad)])
    family.reset_hooks()
    assert_same(before, state(family))
    with pytest.raises(KeyboardInterrupt), method(family):
        raise KeyboardInterrupt
    assert_same(before, state(family))
    assert torch.equal(family(TOKENS), bare)


def unembedded(model, run):
    """What ``run`` returns, and the logits of its passes, before Cohere and Gemma scale them."""
    seen = []
    handle = model.unembed.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    try:
        return run(), seen
    finally:
        handle.remove()


def generated_off(model, prompt, n):
    """How far logits of generation with a cache are off; tokens have to be the same without."""
    options = dict(
        max_new_tokens=n, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
    )
    tokens, steps = unembedded(model, lambda: model.generate(prompt, **options))
    _, (whole,) = unembedded(model, lambda: model(tokens))
    uncached = model.generate(prompt, use_past_kv_cache=False, **options)
    assert torch.equal(tokens, uncached)
    if reads_cache(model):  # from one step on it is the cache that the keys come from
        assert [step.shape[1] for step in steps[1:n]] == [1] * (n - 1)
    at = slice(prompt.shape[1] - 1, -1)
    return off(torch.stack([step[:, -1] for step in steps[:n]], 1), whole[:, at])


def padded_off(model, tokens, n):
    """How far a row padded on the left by ``n`` is off, and the whole one beside it."""
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    padded[1, :n] = mask[1, :n] = 0
    got = model(padded, attention_mask=mask)
    # The sum: max() would drop a NaN.
    return off(got[:1], model(tokens[:1])) + off(got[1:, n:], model(tokens[1:, n:]))


def fused_off(model, tokens):
    with fused_attention(model) as on:
        fused = model(tokens)
    return on, off(fused, model(tokens))


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_caches_padding_and_fused_passes_change_nothing(family, name):
    watch = [("blocks.1.attn.hook_pattern", lambda pattern, hook: None)]
    with METHODS[name][0](family.geometry[1].n_pairs)(family, trained=TRAINED):
        # From within the window to far beyond it.
        assert generated_off(family, TOKENS[:, :6], 30) < 1e-4
        assert padded_off(family, TOKENS, 5) < 1e-4
        on, far = fused_off(family, TOKENS)
        assert on == (family.family in FUSED)
        assert far < 1e-4
        with family.hooks(fwd_hooks=watch):
            assert fused_off(family, TOKENS) == (False, 0.0)


@torch.no_grad()
@pytest.mark.parametrize("method", [SelfExtend(4, 16), DualChunk(32, 8)], ids=repr)
def test_smollm2_with_caches_padding_and_fused_passes(smollm2, method):
    text = smollm2.to_tokens("One two three four five six seven eight nine ten. " * 12)[0]
    with method(smollm2):
        assert generated_off(smollm2, text[None, :116], 3) < 1e-4
        assert padded_off(smollm2, torch.stack([text[:90], text[20:110]]), 7) < 1e-4
        on, far = fused_off(smollm2, text[None, :120])
        assert on
        assert far < 1e-4


def dominant(model, document, distance, layer, skip):
    """Distance and each head's dominant dimension, of every pair that attention sees."""
    kept, g = {}, model.geometry[layer]
    capture_rotary(model, document[None], lambda at, q, k: kept.update(q=q, k=k), layers=[layer])
    q, k = numbers(kept["q"], g)[0][0], numbers(kept["k"], g)[0][0][:, g.kv_head]
    apart, values = [], []
    for i in range(skip, N):
        for j in range(max(skip, i + 1 - (g.window or N)), i):
            turn = np.exp(1j * g.inv_freq.numpy() * distance(i, j, g.n_pairs))
            weight = np.exp((q[i] * k[j].conj() * turn).real)
            apart.append(i - j)
            values.append(weight @ np.arange(g.n_pairs) / weight.sum(-1))
    return np.array(apart), np.stack(values, 1)


@pytest.mark.parametrize("skip", [0, 5])
@pytest.mark.parametrize("name", ["SelfExtend", "leaky", "DualChunk", "DPE by head"])
@pytest.mark.parametrize("which", ["Llama", "Mistral, sliding window"])
def test_scores_and_curves_are_those_of_the_changed_distances(which, name, skip):
    model = small_models.rotary_model(which)
    model.geometry = RotaryGeometry.from_model(model)
    make, distance = METHODS[name]
    options = dict(skip_first=skip, progress=False)
    heads = [(layer, head) for layer in (0, 1) for head in (3, 0, 1)]
    with make(4)(model, trained=TRAINED):
        exact = score_heads(model, TOKENS, qk_pairs="all", **options)
        curve = dominant_dimension_curve(model, TOKENS, heads=heads, **options)
        found = [[dominant(model, d, distance, layer, skip) for d in TOKENS] for layer in (0, 1)]
    bare = score_heads(model, TOKENS, qk_pairs="all", **options)
    assert (exact.rho - bare.rho).abs().max() > 0.01
    for layer in (0, 1):
        rho = [
            [spearmanr(apart, row).statistic for row in values] for apart, values in found[layer]
        ]
        # Neighbouring ranks that rounding swaps are worth 1e-5 in a text so short.
        np.testing.assert_allclose(exact.rho[layer], np.mean(rho, 0), atol=1e-4)
        apart = np.concatenate([d for d, _ in found[layer]])
        values = np.concatenate([v for _, v in found[layer]], 1)
        for place, (at, head) in enumerate(heads):
            if at == layer:
                # Nothing is that far apart in Mistral: no mean.
                with np.errstate(invalid="ignore"):
                    total = np.bincount(apart, values[head], N)[curve.distance]
                    mean = total / np.bincount(apart, minlength=N)[curve.distance]
                np.testing.assert_allclose(curve.mean[place], mean, atol=1e-5)


@pytest.mark.parametrize("name", ["GPT-J", "DeepSeek-V3", "DeepSeek-V2"])
def test_models_without_scores_are_refused_by_name(name):
    model = warm(small_models.rotary_model(name))
    before = state(model)
    for method in (SelfExtend(4, 8), ReRoPE(8), DualChunk(), DPE((2, 2), 8)):
        named = f"{type(method).__name__}.*tiny-{architectures.ROTARY[name][0]}.*like YaRN"
        with pytest.raises(PosheadsError, match=named), method(model):
            pass
    assert_same(before, state(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfExtend(0, 8), r"SelfExtend\(group=0\)"),
        (lambda: SelfExtend(4, 0), r"SelfExtend\(window=0\)"),
        (lambda: ReRoPE(0), r"ReRoPE\(window=0\)"),
        (lambda: ReRoPE(8.0), r"whole number of 1 or more"),
        (lambda: ReRoPE(8, leak=0.5), r"ReRoPE\(leak=0.5\)"),
        (lambda: ReRoPE(8, log_n=3), r"True or False"),
        (lambda: DualChunk(1), r"DualChunk\(chunk=1\)"),
        (lambda: DualChunk(16, 16), "local below chunk"),
        (lambda: DualChunk(local=0), r"DualChunk\(local=0\)"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(PosheadsError, match=message):
        make()


def test_chunks_that_do_not_fit_the_training_length_are_refused(llama):
    before = state(llama)
    refused = pytest.raises(PosheadsError, match="makes chunk=192 and local=400; expected local")
    with refused, DualChunk(local=400)(llama):
        pass
    assert_same(before, state(llama))
    assert DualChunk().sizes(256) == (192, 16)

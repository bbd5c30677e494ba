"""Hook points on rotated queries and keys: read, edited, removed without a trace."""

from __future__ import annotations

import pytest
import torch

from helpers import small_models
from helpers.traces import assert_same, state, warm
from tl_posheads import PosheadsError, capture_rotary, hook_names, rotary_hook_points, score_heads
from tl_posheads.hooks.logprobs import reads_cache

pytestmark = pytest.mark.lens

OWN = ["GPT-NeoX, Pythia", "GPT-J", "Phi-3, longrope", "Falcon"]
NAMES = [*OWN, "Llama", "DeepSeek-V3"]
TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=NAMES)
def model(request):
    return warm(small_models.rotary_model(request.param))


def test_run_with_cache_reads_and_run_with_hooks_edits(model):
    with torch.no_grad():
        plain = model(TOKENS)
        before = state(model)
        with rotary_hook_points(model):
            logits, cache = model.run_with_cache(TOKENS, names_filter=hook_names([0, 1]))
            assert torch.equal(logits, plain)
            assert set(hook_names([0, 1])) <= set(cache.keys())
            q = cache["blocks.1.attn.hook_rot_q"]
            assert q.shape[:3] == (2, 12, 4)
            seen = []

            def zero(value, hook):
                return torch.zeros_like(value)

            def look(value, hook):
                seen.append(value)

            edited = model.run_with_hooks(
                TOKENS,
                fwd_hooks=[
                    ("blocks.0.attn.hook_rot_k", zero),
                    ("blocks.0.attn.hook_attn_scores", look),
                ],
            )
            assert not torch.allclose(edited, plain, atol=1e-4)
        assert_same(before, state(model))
        assert torch.equal(model(TOKENS), plain)


@pytest.mark.parametrize("name", OWN)
def test_edited_keys_are_edited_in_the_kv_cache_too(name):
    """Token by token with a cache gives what one pass gives, under an edit of every key."""
    model = small_models.rotary_model(name)
    hf_model = model.original_model
    if not reads_cache(model):
        pytest.skip("the lens doesn't read the cache of this transformers")

    def louder(value, hook):
        return value * 1.7

    def by_steps():
        past, steps = None, []
        for t in range(TOKENS.shape[1]):
            out = hf_model(TOKENS[:, t : t + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
        return torch.cat(steps, 1)

    with torch.no_grad():
        torch.testing.assert_close(by_steps(), model(TOKENS), atol=1e-4, rtol=1e-4)
        with rotary_hook_points(model):
            for layer in (0, 1):
                model.blocks[layer].attn.hook_rot_k.add_hook(louder)
            whole, stepwise = model(TOKENS), by_steps()
            model.reset_hooks()
        torch.testing.assert_close(stepwise, whole, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(whole, model(TOKENS), atol=1e-3)


def test_two_models_at_once_keep_their_hooks_apart():
    one, two = (warm(small_models.rotary_model("GPT-J")) for _ in range(2))
    seen = []

    def look(value, hook):
        seen.append(hook.name)

    with torch.no_grad():
        plain = one(TOKENS)
        with rotary_hook_points(one):
            with rotary_hook_points(two):
                two.blocks[0].attn.hook_rot_q.add_hook(look)
                one(TOKENS)
                assert seen == []
                two(TOKENS)
                assert len(seen) == 1
            two(TOKENS)
            assert len(seen) == 1
            _, cache = one.run_with_cache(TOKENS, names_filter=hook_names([0]))
            assert set(hook_names([0])) <= set(cache.keys())
        assert torch.equal(one(TOKENS), plain)


def test_capture_hands_over_what_the_cache_holds_and_stops_early(model):
    with torch.no_grad(), rotary_hook_points(model):
        _, cache = model.run_with_cache(TOKENS, names_filter=hook_names([0, 1]))
    before, got, later = state(model), [], []
    model.hook_dict["blocks.1.attn.hook_attn_scores"].add_perma_hook(
        lambda v, hook: later.append(1)
    )
    capture_rotary(model, TOKENS, lambda layer, q, k: got.append((layer, q.clone(), k.clone())))
    assert later == []  # the pass ended before the last layer's attention
    model.reset_hooks(including_permanent=True)
    assert [layer for layer, _, _ in got] == [0, 1]
    for layer, q, k in got:
        assert torch.equal(q, cache[f"blocks.{layer}.attn.hook_rot_q"])
        assert torch.equal(k, cache[f"blocks.{layer}.attn.hook_rot_k"])
        assert not q.requires_grad
    assert_same(before, state(model))


def test_a_hybrids_layers_without_attention_are_left_out():
    model, got = small_models.rotary_model("LFM2"), []
    capture_rotary(model, TOKENS, lambda layer, q, k: got.append(layer))
    assert got == [1]
    with pytest.raises(PosheadsError, match="layer 0 of tiny-Lfm2 has no rotary attention"):
        capture_rotary(model, TOKENS, lambda *_: None, layers=[0, 1])
    with pytest.raises(PosheadsError, match=r"no attention in layers \[0\] of tiny-Lfm2"):
        score_heads(model, TOKENS, layers=[0], progress=False)


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was_whatever_is_raised(model, raised):
    before = state(model)

    def consumer(layer, q, k):
        raise raised("stop")

    with pytest.raises(raised, match="stop"):
        capture_rotary(model, TOKENS, consumer)
    assert_same(before, state(model))
    with pytest.raises(raised), rotary_hook_points(model), rotary_hook_points(model):
        raise raised
    assert_same(before, state(model))


def test_nesting_keeps_the_hook_points_until_the_outer_one_leaves():
    model = small_models.rotary_model("GPT-NeoX, Pythia")
    names = hook_names([0])
    with torch.no_grad(), rotary_hook_points(model):
        with rotary_hook_points(model):
            _, once = model.run_with_cache(TOKENS, names_filter=names)
        _, still = model.run_with_cache(TOKENS, names_filter=names)
        assert torch.equal(once[names[0]], still[names[0]])
    with torch.no_grad():
        _, gone = model.run_with_cache(TOKENS, names_filter=names)
    assert names[0] not in gone


def test_forgotten_hooks_are_refused_and_meant_ones_stay_in_force():
    model = small_models.rotary_model("Llama")
    plain = score_heads(model, TOKENS, progress=False)

    def louder(value, hook):
        return 3 * value

    name = "blocks.0.attn.hook_rot_q"
    model.add_hook(name, louder)
    with pytest.raises(PosheadsError, match=r"blocks\.0\.attn\.hook_rot_q.*reset_hooks"):
        score_heads(model, TOKENS, progress=False)
    model.reset_hooks()
    with model.hooks(fwd_hooks=[(name, louder)]):
        meant = score_heads(model, TOKENS, progress=False)
        assert len(model.blocks[0].attn.hook_rot_q.fwd_hooks) == 1
    assert not torch.allclose(meant.rho[0], plain.rho[0], atol=1e-3)
    assert torch.equal(score_heads(model, TOKENS, progress=False).rho, plain.rho)

"""Passes that compute less: the same numbers, the same model afterwards, fewer layers run."""

from __future__ import annotations

import pytest
import torch

from helpers import architectures, small_models
from helpers.traces import state, warm
from tl_posheads import ablation_hooks
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.logprobs import cached_prefix, run_from_layer, target_logprobs
from tl_posheads.studies.ablation.attribution import attributed_effects

pytestmark = pytest.mark.lens

TOKENS = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(3))
TARGETS = torch.tensor([5, 17, 18, 39])
FUSED = {
    "Llama",
    "Llama, llama3 scaling",
    "Llama, YaRN",
    "Mistral, sliding window",
    "Mixtral",
    "Qwen2",
    "Qwen3",
    "Gemma 3",
    "Phi",
    "StableLM",
    "OLMo 2",
}


def by_hand(model, tokens, targets, hooks=()):
    with torch.no_grad():
        logits = model.run_with_hooks(tokens[None], fwd_hooks=list(hooks), return_type="logits")[0]
    table = logits.float().log_softmax(-1)
    logprob = torch.stack([table[t - 1, tokens[t]] for t in targets.tolist()])
    hit = torch.stack([table[t - 1].argmax() == tokens[t] for t in targets.tolist()])
    return logprob, hit


@pytest.fixture(params=architectures.ROTARY, scope="module")
def family(request):
    model = warm(small_models.rotary_model(request.param))
    model.family = request.param
    return model


def test_numbers_are_those_of_whole_passes(family):
    hooks = ablation_hooks(family, [(1, 0), (1, 3)])
    expected, ablated = (by_hand(family, TOKENS, TARGETS, h) for h in ((), hooks))
    before = state(family)
    got = target_logprobs(family, TOKENS, TARGETS)
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(got[1], expected[1])
    with fused_attention(family) as fused:
        assert fused == (family.family in FUSED)
        prefix = cached_prefix(family, TOKENS, TARGETS, [0, 1])
        shared = run_from_layer(family, TOKENS, TARGETS, prefix, 1, hooks)
        whole = run_from_layer(family, TOKENS, TARGETS, prefix, 0, hooks)
    torch.testing.assert_close(prefix.logprob, expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shared[0], ablated[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole[0], ablated[0], atol=1e-4, rtol=1e-4)
    assert (ablated[0] - expected[0]).abs().max() > 1e-3
    assert state(family)[:2] == before[:2]


def test_on_smollm2(smollm2):
    tokens = smollm2.to_tokens("The quick brown fox jumps over the lazy dog. " * 6)[0]
    targets = torch.arange(30, len(tokens))
    hooks = ablation_hooks(smollm2, [(20, 4), (25, 1)])
    expected = by_hand(smollm2, tokens, targets, hooks)
    ran = []
    with fused_attention(smollm2) as fused:
        prefix = cached_prefix(smollm2, tokens, targets, [20])
        handles = [
            block.register_forward_hook(lambda m, a, o, i=i: ran.append(i))
            for i, block in enumerate(smollm2.blocks)
        ]
        counters = [("blocks.19.attn.hook_z", lambda z, hook: ran.append("below"))]
        got = run_from_layer(smollm2, tokens, targets, prefix, 20, [*hooks, *counters])
        for handle in handles:
            handle.remove()
    assert fused
    assert "below" not in ran  # attention below the first ablated layer was not computed
    assert ran[-10:] == list(range(20, 30))
    torch.testing.assert_close(got[0], expected[0], atol=1e-3, rtol=1e-3)
    assert torch.equal(got[1], expected[1])


def test_who_watches_the_pattern_sees_it(smollm2):
    """A listener between q and z keeps attention as the lens computes it."""
    tokens = smollm2.to_tokens("one two three")[0]
    seen = []
    look = ("blocks.3.attn.hook_pattern", lambda pattern, hook: seen.append(pattern.shape))
    with smollm2.hooks(fwd_hooks=[look]), fused_attention(smollm2) as fused:
        target_logprobs(smollm2, tokens, torch.tensor([2]))
    assert not fused
    assert seen == [(1, 9, len(tokens), len(tokens))]


def test_everything_is_undone_after_an_exception(smollm2):
    before = state(smollm2)
    with pytest.raises(KeyboardInterrupt), fused_attention(smollm2):
        raise KeyboardInterrupt

    def bad(z, hook):
        raise RuntimeError("mine")

    tokens = smollm2.to_tokens("one two three")[0]
    with fused_attention(smollm2):
        prefix = cached_prefix(smollm2, tokens, torch.tensor([2]), [5])
    with pytest.raises(RuntimeError, match="mine"), fused_attention(smollm2):
        run_from_layer(
            smollm2, tokens, torch.tensor([2]), prefix, 5, [("blocks.7.attn.hook_z", bad)]
        )
    after = state(smollm2)
    assert before[:2] == after[:2]


@pytest.mark.parametrize("name", ["Llama", "GPT-J", "Gemma 2", "DeepSeek-V3"])
def test_attribution_is_the_derivative(name):
    """Shrinking a head's output a little changes the log-probability in proportion."""
    model = small_models.rotary_model(name)
    found = attributed_effects(model, TOKENS, TARGETS)
    clean = by_hand(model, TOKENS, TARGETS)[0].double().mean()
    assert found.logprob == pytest.approx(float(clean), abs=1e-5)
    for layer, head in [(0, 1), (0, 3), (1, 0), (1, 2)]:

        def shrink(z, hook, head=head, by=0.0):
            z = z.clone()
            z[:, :, head] *= 1 - by
            return z

        def at(by, layer=layer):
            hook = lambda z, hook: shrink(z, hook, by=by)
            return by_hand(model, TOKENS, TARGETS, [(f"blocks.{layer}.attn.hook_z", hook)])[0]

        slope = (at(0.002).double().mean() - at(-0.002).double().mean()) / 0.004
        assert float(found.effects[layer, head]) == pytest.approx(float(slope), abs=3e-3)
    assert all(weight.requires_grad for weight in model.parameters())


def test_attribution_of_a_mean():
    model = small_models.rotary_model("Llama")
    torch.manual_seed(0)
    values = {0: torch.randn(4, 8), 1: torch.randn(40, 4, 8)}
    zero, moved = (
        attributed_effects(model, TOKENS, TARGETS),
        attributed_effects(model, TOKENS, TARGETS, values),
    )
    # Linear in the replacement: that of z itself would be no change at all.
    _, cache = model.run_with_cache(TOKENS[None])
    z = cache["blocks.1.attn.hook_z"][0]
    same = attributed_effects(model, TOKENS, TARGETS, {1: z})
    assert same.effects[1].abs().max() < 1e-6
    assert torch.equal(same.effects[0], zero.effects[0])
    assert not torch.allclose(moved.effects, zero.effects)


def test_attribution_agrees_with_the_lens():
    """The lens's own gradient cache, where the installed line has it."""
    tool = pytest.importorskip(
        "transformer_lens.tools.analysis.attribution_patching",
        reason="transformer-lens before 4 has no attribution patching",
    )
    model = small_models.rotary_model("Llama")

    def metric(logits):
        table = logits[0].log_softmax(-1)
        return table[TARGETS - 1].gather(-1, TOKENS[TARGETS][:, None]).mean()

    cache = tool.cache_activation_and_gradient(model, TOKENS[None], metric)
    ours = attributed_effects(model, TOKENS, TARGETS).effects
    for layer in (0, 1):
        name = f"blocks.{layer}.attn.hook_z"
        theirs = -(cache.activations[name] * cache.gradients[name]).sum((0, 1, 3))
        torch.testing.assert_close(ours[layer], theirs, atol=1e-5, rtol=1e-4)

"""Ablation of heads: what replaces their output, where, and that nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens import patching

from helpers import architectures, small_models
from helpers.traces import state, warm
from tl_posheads import PosheadsError, ablate, ablation_hooks
from tl_posheads.hooks.heads import by_layer, heads_of
from tl_posheads.hooks.logprobs import reads_cache

pytestmark = pytest.mark.lens

TOKENS = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(1))
REFERENCE = torch.randint(3, 90, (3, 24), generator=torch.Generator().manual_seed(2))
HEADS = [(1, 2), (0, 1), (1, 0)]
FAMILIES = [name for name in architectures.ROTARY if not name.startswith("Llama,")]


@pytest.fixture(scope="module")
def llama():
    return warm(small_models.rotary_model("Llama"))


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return warm(small_models.rotary_model(request.param))


def z_of(model, tokens, layer):
    """What attention gives its output projection, read off the projection itself."""
    return model.run_with_cache(tokens, names_filter=[f"blocks.{layer}.attn.hook_z"])[1][
        f"blocks.{layer}.attn.hook_z"
    ]


@torch.no_grad()
def test_zero_takes_exactly_these_heads(family):
    clean, (logits, cache) = family(TOKENS), (None, None)
    before = state(family)
    with ablate(family, HEADS):
        logits, cache = family.run_with_cache(TOKENS)
    for layer in (0, 1):
        z = cache[f"blocks.{layer}.attn.hook_z"]
        zero = (z == 0).all(-1).all(1).all(0)
        assert torch.nonzero(zero).flatten().tolist() == by_layer(HEADS)[layer]
    assert (logits - clean).abs().max() > 1e-3
    assert torch.equal(family(TOKENS), clean)
    after = state(family)
    assert before[:2] == after[:2]
    assert all(torch.equal(after[2][name], weight) for name, weight in before[2].items())


@torch.no_grad()
def test_all_heads_of_a_layer_are_its_attention_less_the_bias(family):
    everything = [(1, head) for head in range(4)]
    attn_out = {}

    def only_bias(value, hook):
        bias = getattr(family.blocks[1].attn, "b_O", None)
        attn_out["at"] = hook.name
        return torch.zeros_like(value) if bias is None else torch.zeros_like(value) + bias

    reference = family.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_out", only_bias)])
    with ablate(family, everything):
        torch.testing.assert_close(family(TOKENS), reference, atol=1e-5, rtol=1e-4)
    assert attn_out


@torch.no_grad()
def test_nothing_ablated_changes_nothing(llama):
    assert ablation_hooks(llama, []) == []
    clean = llama(TOKENS)
    with ablate(llama, [], "mean", reference=REFERENCE):
        assert torch.equal(llama(TOKENS), clean)


@torch.no_grad()
def test_mean_is_the_mean_over_texts_and_positions(llama):
    z = z_of(llama, REFERENCE, 1).double()
    with ablate(llama, [(1, 2)], "mean", reference=REFERENCE):
        got = z_of(llama, TOKENS, 1)[:, :, 2]
    torch.testing.assert_close(
        got, z[:, :, 2].mean((0, 1)).float().expand_as(got), atol=1e-6, rtol=1e-5
    )
    with ablate(llama, [(1, 2)], "mean", reference=REFERENCE, per_position=True):
        got = z_of(llama, TOKENS, 1)[:, :, 2]
    torch.testing.assert_close(
        got, z[:, :20, 2].mean(0).float().expand_as(got), atol=1e-6, rtol=1e-5
    )


@torch.no_grad()
def test_mean_of_texts_of_unequal_length_weighs_tokens(llama):
    texts = [REFERENCE[0], REFERENCE[1, :7]]
    z = [z_of(llama, text[None], 0)[0, :, 3].double() for text in texts]
    with ablate(llama, [(0, 3)], "mean", reference=texts):
        got = z_of(llama, TOKENS, 0)[0, 0, 3]
    torch.testing.assert_close(got, torch.cat(z).mean(0).float(), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_resample_is_what_the_head_wrote_in_another_text(llama):
    z = z_of(llama, REFERENCE, 1)[:, :20, 0]
    found = set()
    for seed in range(8):
        with ablate(llama, [(1, 0)], "resample", reference=REFERENCE, seed=seed):
            got = z_of(llama, TOKENS, 1)[:, :, 0]
        texts = [next(i for i in range(3) if torch.allclose(row, z[i], atol=1e-6)) for row in got]
        assert len(set(texts)) == 2  # two rows, two texts
        found.add(tuple(texts))
        again = ablation_hooks(llama, [(1, 0)], "resample", reference=REFERENCE, seed=seed)
        with llama.hooks(fwd_hooks=again):
            assert torch.equal(z_of(llama, TOKENS, 1)[:, :, 0], got)
    assert len(found) > 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 18), st.integers(1, 19), st.integers(1, 4), st.booleans())
def test_positions_are_those_asked_for(llama, start, width, step, as_list):
    wanted = [p for p in range(20) if start <= p < start + width and (p - start) % step == 0]
    positions = wanted if as_list else slice(start, start + width, step)
    with torch.no_grad(), ablate(llama, [(0, 1)], positions=positions):
        z = z_of(llama, TOKENS, 0)[:, :, 1]
    assert torch.nonzero((z == 0).all(-1).all(0)).flatten().tolist() == wanted


@torch.no_grad()
def test_masked_pattern_is_zero_z(family):
    if type(family.blocks[0].attn).__name__ == "AttentionBridge":
        with pytest.raises(PosheadsError, match="pattern only after use"):
            ablation_hooks(family, HEADS, on="pattern")
        return
    with ablate(family, HEADS):
        expected = family(TOKENS)
    with ablate(family, HEADS, on="pattern"):
        assert torch.equal(family(TOKENS), expected)
    with ablate(family, HEADS, on="pattern", positions=slice(3, 9)):
        masked = family(TOKENS)
    with ablate(family, HEADS, positions=slice(3, 9)):
        torch.testing.assert_close(family(TOKENS), masked, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"positions": slice(6, 12)},
        {"mode": "resample"},
        {"mode": "mean", "per_position": True},
    ],
)
def test_generation_with_a_cache_is_that_without(smollm2, how):
    """Token by token, positions counted from the text's start."""
    prompt = smollm2.to_tokens("The cat sat on the mat and the")
    if "mode" in how:
        how = {**how, "reference": smollm2.to_tokens("one two three four five " * 8)}
    outputs = []
    with ablate(smollm2, [(7, 8), (6, 6), (0, 3), (0, 4), (0, 5)], **how):
        for cached in (True, False):
            outputs.append(
                smollm2.generate(
                    prompt,
                    max_new_tokens=6,
                    do_sample=False,
                    use_past_kv_cache=cached,
                    stop_at_eos=False,
                    verbose=False,
                    return_type="tokens",
                )
            )
    assert torch.equal(*outputs)


@torch.no_grad()
def test_positions_count_on_through_the_cache(family):
    """A step of generation shows one position; which one, the cache's length says."""
    if type(family.blocks[0].attn).__name__ == "AttentionBridge":
        return  # refused, see below
    prompt, steps = TOKENS[:1], []
    with (
        ablate(family, [(0, 1)], positions=slice(18, 22)),
        family.hooks(
            fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: steps.append(z[0, :, 1]))]
        ),
    ):
        family.generate(
            prompt,
            max_new_tokens=5,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            return_type="tokens",
        )
    if not reads_cache(family):
        assert [len(step) for step in steps] == [20, 21, 22, 23, 24]
        steps = steps[-1:]
    else:
        assert [len(step) for step in steps] == [20, 1, 1, 1, 1]
    zero = (torch.cat(steps) == 0).all(-1)
    assert torch.nonzero(zero).flatten().tolist() == [18, 19, 20, 21]


@torch.no_grad()
def test_composes_with_the_lens(smollm2):
    head = (5, 3)
    tokens = smollm2.to_tokens("one two three one two three one two")
    mine = []
    with ablate(smollm2, [head]):
        logits, cache = smollm2.run_with_cache(tokens)
        # direct logit attribution: the head adds nothing, its neighbour something
        per_head = cache.stack_head_results(layer=6)
        assert per_head[5 * 9 + 3].abs().max() == 0
        assert per_head[5 * 9 + 2].abs().max() > 0
        # hooks of one's own, together with ours
        with smollm2.hooks(
            fwd_hooks=[("blocks.5.attn.hook_z", lambda z, hook: mine.append(z.clone()))]
        ):
            assert torch.equal(smollm2(tokens), logits)
        assert mine[0][:, :, 3].abs().max() == 0


@torch.no_grad()
def test_composes_with_the_lens_patching(family):
    """It resets hooks after every pass; the ablation stays, and a patch has the last word."""
    corrupted = TOKENS.flip(0)
    metric = lambda logits: logits[0, -1, 50]
    with ablate(family, [(0, 1), (1, 2)]):
        logits, cache = family.run_with_cache(TOKENS)
        table = patching.get_act_patch_attn_head_out_all_pos(family, corrupted, cache, metric)
        family.reset_hooks()
        assert torch.equal(family(TOKENS), logits)
        plain = metric(family(corrupted))
    for layer, head in [(0, 0), (0, 1), (1, 2), (1, 3)]:
        clean = cache[f"blocks.{layer}.attn.hook_z"]

        def put(z, hook, head=head, clean=clean):
            z = z.clone()
            z[:, :, head] = clean[:, :, head]
            return z

        hooks = [*ablation_hooks(family, [(0, 1), (1, 2)]), (f"blocks.{layer}.attn.hook_z", put)]
        expected = metric(family.run_with_hooks(corrupted, fwd_hooks=hooks))
        torch.testing.assert_close(table[layer, head], expected, atol=1e-4, rtol=1e-4)
        if (layer, head) in [(0, 1), (1, 2)]:  # zero is put in the place of zero
            assert clean[:, :, head].abs().max() == 0
            torch.testing.assert_close(expected, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:A hook on attn.hook_pattern")  # GPT-J shows it afterwards
@torch.no_grad()
def test_of_hooks_at_a_hook_point_the_last_added_stands(family):
    """A patch over an ablated head restores it, an ablation over a patched head takes it away."""
    (clean, cache), name = family.run_with_cache(TOKENS), "blocks.0.attn.hook_z"

    def restore(z, hook):
        z = z.clone()
        z[:, :, 1] = cache[name][:, :, 1]
        return z

    with ablate(family, [(0, 1)]):
        ablated = family(TOKENS)
        restored = family.run_with_hooks(TOKENS, fwd_hooks=[(name, restore)])
        flat = lambda pattern, hook: pattern.index_fill(1, torch.tensor([1]), 0.05)
        before = [("blocks.0.attn.hook_pattern", flat)]
        torch.testing.assert_close(family.run_with_hooks(TOKENS, fwd_hooks=before), ablated)
    assert (ablated - clean).abs().max() > 1e-3
    torch.testing.assert_close(restored, clean)
    with family.hooks(fwd_hooks=[(name, restore)]), ablate(family, [(0, 1)]):
        torch.testing.assert_close(family(TOKENS), ablated)
    with ablate(family, [(0, 1)], "mean", reference=REFERENCE):
        assert (family(TOKENS) - ablated).abs().max() > 1e-4
        with ablate(family, [(0, 1)]):
            torch.testing.assert_close(family(TOKENS), ablated)


def test_composes_with_head_detector(smollm2):
    detector = pytest.importorskip("transformer_lens.head_detector")
    text = "one two three one two three"

    def scores():
        return detector.detect_head(
            smollm2,
            text,
            "previous_token_head",
            heads=[(0, 1), (5, 3), (6, 0)],
            error_measure="mul",
        )

    clean = scores()
    with ablate(smollm2, [(5, 3)]):
        inside = scores()
    # A head's own pattern does not depend on its output; later layers see its loss.
    assert torch.equal(inside[:6], clean[:6])
    assert inside[6, 0] != clean[6, 0]
    assert torch.equal(scores(), clean)


def test_an_exception_leaves_nothing(llama):
    before = state(llama)
    with pytest.raises(KeyboardInterrupt), ablate(llama, HEADS, "mean", reference=REFERENCE):
        raise KeyboardInterrupt

    def bad(z, hook):
        raise RuntimeError("mine")

    with (
        pytest.raises(RuntimeError, match="mine"),
        llama.hooks(fwd_hooks=[("blocks.1.attn.hook_z", bad)]),
        ablate(llama, HEADS, "mean", reference=REFERENCE),
    ):
        pass
    after = state(llama)
    assert before[:2] == after[:2]
    assert all(torch.equal(after[2][name], weight) for name, weight in before[2].items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(heads=[(2, 0)]), "layers 0 to 1 with heads 0 to 3"),
        (dict(heads=[(0, 4)]), "layers 0 to 1 with heads 0 to 3"),
        (dict(heads=[(0, -1)]), "layers 0 to 1"),
        (dict(heads=[(0, 1), (0, 1)]), "given twice"),
        (dict(heads=[3]), "pairs like"),
        (dict(mode="gaussian"), "zero, mean, resample"),
        (dict(mode="mean"), "without a reference"),
        (dict(reference=REFERENCE), "leave it out"),
        (dict(mode="resample", reference=REFERENCE, per_position=True), "belongs to 'mean'"),
        (dict(on="pattern", mode="mean", reference=REFERENCE), "set to zero"),
        (dict(on="scores"), "'z' or 'pattern'"),
        (dict(positions=slice(5, 5)), "isn't empty"),
        (dict(positions=[-1]), "from 0"),
        (dict(mode="mean", reference=torch.tensor([[3, 400]])), "ids 0 to 96"),
    ],
)
def test_bad_input_is_refused_before_any_pass(llama, call, message):
    ran = []
    with (
        llama.hooks(fwd_hooks=[("hook_embed", lambda value, hook: ran.append(1))]),
        pytest.raises(PosheadsError, match=message),
    ):
        ablation_hooks(llama, **{"heads": HEADS, **call})
    assert not ran


@torch.no_grad()
@pytest.mark.parametrize("how", [dict(mode="resample"), dict(mode="mean", per_position=True)])
def test_a_text_longer_than_the_reference_is_refused_in_the_first_layer(llama, how):
    ran = []
    with ablate(llama, HEADS, reference=REFERENCE[:, :19], **how):
        with (
            llama.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda v, hook: ran.append(1))]),
            pytest.raises(PosheadsError, match="text of 20 tokens .* 19 positions"),
        ):
            llama(TOKENS)
        assert not ran
        llama(TOKENS[:, :19])


def test_positions_with_native_attention_are_refused():
    model = small_models.rotary_model("GPT-J")
    with pytest.raises(PosheadsError, match="exposes its pattern only after use"):
        ablation_hooks(model, [(0, 1)], positions=slice(0, 3))


def test_what_is_no_lens_model_is_refused():
    with pytest.raises(PosheadsError, match="a Linear was given; expected a HookedTransformer"):
        ablation_hooks(torch.nn.Linear(2, 2), HEADS)


def test_heads_keep_their_order(llama):
    assert heads_of(llama, torch.tensor(HEADS)) == HEADS

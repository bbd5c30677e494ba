"""Padded rows: each is what it would be alone, wherever in its row the text stands."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tl_posheads as ph
from helpers import architectures, small_models
from helpers.distances_by_hand import off
from helpers.traces import warm
from tl_posheads import PosheadsError, ablate, ablation_hooks, score_heads
from tl_posheads.extrapolation.methods.dpe import DPE
from tl_posheads.extrapolation.methods.dual_chunk import DualChunk
from tl_posheads.extrapolation.methods.longrope import LongRoPE
from tl_posheads.extrapolation.methods.ntk import DynamicNTK
from tl_posheads.extrapolation.methods.rerope import ReRoPE
from tl_posheads.extrapolation.methods.self_extend import SelfExtend
from tl_posheads.hooks.inputs import require_unpadded
from tl_posheads.hooks.logprobs import reads_cache
from tl_posheads.hooks.positions import text_keys

pytestmark = pytest.mark.lens

WIDTH, LENGTHS = 34, (30, 22, 26)
TEXTS = [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
REFERENCE = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(2))
# Padding on the left of each row; the rest of it is on the right.
LAYOUTS = {"left": (4, 12, 8), "right": (0, 0, 0), "mixed": (4, 0, 8), "both": (2, 5, 0)}
HEADS = [(0, 1), (1, 2)]
FAMILIES = [name for name in architectures.ROTARY if not name.startswith(("Llama,", "GPT-J"))]
SCORED = ["Llama", "StableLM", "Phi", "GPT-NeoX, Pythia", "Mistral, sliding window", "Gemma 2"]


def padded(layout):
    tokens, mask = torch.zeros(2, len(TEXTS), WIDTH).long()
    for row, on, text, left in zip(tokens, mask, TEXTS, LAYOUTS[layout]):
        row[left : left + len(text)], on[left : left + len(text)] = text, 1
    return tokens, mask


def build(name):
    return warm(
        small_models.small_hooked() if name == "hooked" else small_models.rotary_model(name)
    )


@pytest.fixture(params=[*FAMILIES, "hooked"], scope="module")
def family(request):
    return build(request.param)


@pytest.fixture(params=[*SCORED, "hooked"], scope="module")
def scored(request):
    return build(request.param)


@pytest.fixture(scope="module")
def llama():
    return warm(small_models.rotary_model("Llama"))


def texts_off(model, layout, alone):
    """How far the texts of a padded batch are from each by itself."""
    tokens, mask = padded(layout)
    got = model(tokens, attention_mask=mask)
    return max(off(row[on.bool()], text) for row, on, text in zip(got, mask, alone))


def z_of(model, layer, head):
    """``[doc, pos, d_head]`` of the reference."""
    name = f"blocks.{layer}.attn.hook_z"
    return model.run_with_cache(REFERENCE, names_filter=[name])[1][name][:, :, head]


def put(model, what, where):
    """Each text alone, with heads replaced at positions by hooks that know nothing of padding."""

    def hook(z, hook):
        layer, z = int(hook.name.split(".")[1]), z.clone()
        for head in (head for at, head in HEADS if at == layer):
            at = list(range(z.shape[1]))[where]
            z[:, at, head] = 0 if what is None else what[layer, head][at].to(z)
        return z

    hooks = [(f"blocks.{layer}.attn.hook_z", hook) for layer, _ in HEADS]
    return [model.run_with_hooks(text[None], fwd_hooks=hooks)[0] for text in TEXTS]


@pytest.mark.slow
@torch.no_grad()
def test_ablation_by_position_counts_from_the_texts_first_token(family):
    z = {place: z_of(family, *place) for place in HEADS}
    mean = {place: value.double().mean(0) for place, value in z.items()}
    one = {place: value[0] for place, value in z.items()}
    few, everywhere, some = slice(0, 3), slice(None), slice(2, 25, 5)
    cases = [
        (dict(positions=few), put(family, None, few)),
        (dict(positions=[2, 7, 12, 17, 22]), put(family, None, some)),
        (dict(positions=few, on="pattern"), put(family, None, few)),
        (dict(mode="mean", reference=REFERENCE, per_position=True), put(family, mean, everywhere)),
        (dict(mode="resample", reference=REFERENCE[:1]), put(family, one, everywhere)),
        (dict(mode="resample", reference=REFERENCE[:1], positions=few), put(family, one, few)),
    ]
    bare = [family(text[None])[0] for text in TEXTS]
    for layout in LAYOUTS:
        assert texts_off(family, layout, bare) < 1e-4
        for how, alone in cases:
            with ablate(family, HEADS, **how):
                assert texts_off(family, layout, alone) < 1e-4, (layout, how)
            assert texts_off(family, layout, alone) > 1e-3, (layout, how)


def steps(model, tokens, mask, n_first):
    """Logits of a pass over the first columns and of a step for each other, with a KV cache."""
    hf_model, position = getattr(model, "original_model", None), (mask.cumsum(1) - 1).clamp_min(0)
    ends, past, out = range(n_first, tokens.shape[1] + 1), None, []
    if hf_model is None:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        past = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens))
    for end in ends:
        new = slice(0 if end == n_first else end - 1, end)
        if hf_model is None:
            out.append(model(tokens[:, new], attention_mask=mask[:, new], past_kv_cache=past))
            continue
        step = hf_model(
            tokens[:, new],
            attention_mask=mask[:, :end],
            position_ids=position[:, new],
            past_key_values=past,
            use_cache=True,
        )
        past = step.past_key_values
        out.append(step.logits)
    return torch.cat(out, 1)


def steps_off(model, layout, n_new, n_first):
    """The same of the steps after padded prompts, beside their texts in one pass."""
    tokens, mask = padded(layout)
    new = REFERENCE[:1, :n_new].expand(len(TEXTS), -1)
    alone = [model(torch.cat([text, new[0]])[None])[0] for text in TEXTS]
    tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    got = steps(model, tokens, mask, n_first)
    return max(off(row[on.bool()], text) for row, on, text in zip(got, mask, alone))


def gapped(model):
    """Layouts, those apart whose padding a window of transformers would count between texts."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return ["left"] if getattr(config, "sliding_window", None) else list(LAYOUTS)


@pytest.mark.slow
@torch.no_grad()
def test_positions_of_padded_rows_count_on_through_the_cache(family):
    if not reads_cache(family):
        pytest.skip("the Bridge reads no cache with this transformers")
    for how in (
        dict(positions=slice(18, 26)),
        dict(positions=slice(18, 26), on="pattern"),
        dict(mode="mean", reference=REFERENCE, per_position=True),
    ):
        with ablate(family, HEADS, **how):
            # From within the texts; and padding between a prompt and what is written.
            assert steps_off(family, "left", 2, 24) < 1e-4, how
            for layout in gapped(family):
                assert steps_off(family, layout, 4, WIDTH) < 1e-4, (layout, how)


@torch.no_grad()
@pytest.mark.parametrize("how", [dict(mode="resample"), dict(mode="mean", per_position=True)])
def test_padding_is_no_text_that_a_reference_lacks(llama, how):
    tokens, mask = padded("both")
    with ablate(llama, HEADS, reference=REFERENCE[:, :30], **how):
        llama(tokens, attention_mask=mask)
    with ablate(llama, HEADS, reference=REFERENCE[:, :29], **how):
        with pytest.raises(PosheadsError, match="text of 30 tokens .* 29 positions"):
            llama(tokens, attention_mask=mask)
        llama(tokens[1:], attention_mask=mask[1:])


def methods(n):
    chosen = ((0,), (1,), (), (0,))
    return [
        SelfExtend(4, 8),
        ReRoPE(8, log_n=True),
        ReRoPE(8, leak=3.0),
        DualChunk(16, 4),
        DPE((2, 3, 1, 2)[:n], 8),
        DPE((2, 3, 1, 2)[:n], 8, [chosen, chosen]),
    ]


@pytest.mark.slow
@torch.no_grad()
def test_distances_of_padded_rows_are_those_of_their_texts(scored):
    n_pairs = ph.RotaryGeometry.from_model(scored)[1].n_pairs
    bare = [scored(text[None])[0] for text in TEXTS]
    for method in methods(n_pairs):
        with method(scored, trained=20):
            alone = [scored(text[None])[0] for text in TEXTS]
            for layout in LAYOUTS:
                assert texts_off(scored, layout, alone) < 1e-4, (layout, method)
        assert texts_off(scored, "left", alone) > 1e-3, method
        assert max(map(off, alone, bare)) > 1e-3


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("method", [SelfExtend(4, 8), DualChunk(16, 4)], ids=repr)
def test_steps_after_padding_meet_at_the_texts_distances(scored, method):
    if not reads_cache(scored):
        pytest.skip("the Bridge reads no cache with this transformers")
    with method(scored, trained=20):
        for layout in gapped(scored):
            assert steps_off(scored, layout, 4, WIDTH) < 1e-4, layout


@torch.no_grad()
def test_frequencies_are_those_of_each_rows_own_length(llama):
    for method in (DynamicNTK(2.0), LongRoPE((1.0, 2.0, 3.0, 4.0), (1.0, 1.1, 1.2, 1.3))):
        with method(llama, trained=24):
            alone = [llama(text[None])[0] for text in TEXTS]
            for layout in LAYOUTS:
                assert texts_off(llama, layout, alone) < 1e-4, (layout, method)
        bare = [llama(text[None])[0] for text in TEXTS]
        assert max(map(off, alone, bare)) > 1e-3, method


@pytest.mark.parametrize(
    ("dtype", "masked"),
    [
        (torch.float32, float("-inf")),
        (torch.float32, torch.finfo(torch.float32).min),
        (torch.bfloat16, torch.finfo(torch.bfloat16).min),
        (torch.float16, -65504.0),
    ],
)
def test_keys_that_nobody_sees_are_padding(dtype, masked):
    mask = padded("both")[1].bool()
    causal = torch.ones(WIDTH, WIDTH).tril().bool()
    scores = torch.full((3, 2, WIDTH, WIDTH), -3e4 if dtype == torch.float16 else -2e5)
    scores = scores.masked_fill(~(causal & mask[:, None, None]), masked).to(dtype)
    assert torch.equal(text_keys(scores), mask)


# Ends of two rows; which of them are padding where the token (0) only pads, and where it is EOS.
ENDS = [
    ([[5, 6, 7, 8], [9, 8, 7, 6]], False, False),
    ([[5, 6, 7, 8], [9, 8, 7, 0]], True, True),
    ([[5, 6, 7, 8], [0, 8, 7, 6]], True, True),
    ([[5, 6, 0, 8], [9, 0, 0, 6]], False, False),
    ([[0, 6, 7, 8], [0, 8, 7, 6]], True, False),
    ([[0, 6, 7, 0], [0, 8, 7, 0]], True, False),
    ([[0, 6, 7, 8], [0, 0, 7, 6]], True, True),
    ([[5, 6, 0, 0], [9, 8, 0, 0]], True, True),
    ([[0, 6, 7, 0]], True, False),
    ([[0, 6, 0, 0]], True, True),
]


@pytest.mark.parametrize(("rows", "only_pads", "is_eos"), ENDS)
def test_what_is_taken_for_padding(rows, only_pads, is_eos):
    for eos, expected in ((2, only_pads), (0, is_eos)):
        tokenizer = SimpleNamespace(pad_token_id=0, bos_token_id=None, eos_token_id=eos)
        for tokens in (torch.tensor(rows), torch.tensor(rows).flip(1)):
            if expected:
                with pytest.raises(PosheadsError, match=r"pad token 0.*attention_mask=.*list"):
                    require_unpadded(SimpleNamespace(tokenizer=tokenizer), tokens)
            else:
                require_unpadded(SimpleNamespace(tokenizer=tokenizer), tokens)
    for without in (None, SimpleNamespace(pad_token_id=None)):
        require_unpadded(SimpleNamespace(tokenizer=without), torch.tensor(rows))


def test_padding_without_a_mask_is_refused_before_any_pass(llama):
    tokens, mask = padded("left")
    ran, options = [], dict(progress=False)
    calls = [
        lambda x: score_heads(llama, x, **options),
        lambda x: ph.dominant_dimension_curve(llama, x, heads=HEADS, **options),
        lambda x: ablation_hooks(llama, HEADS, "mean", reference=x),
        lambda x: ph.head_maps(llama, x[1:2], HEADS),
        lambda x: ph.patch_heads(llama, x, x.flip(0), lambda logits: 0.0, **options),
    ]
    with llama.hooks(fwd_hooks=[("hook_embed", lambda value, hook: ran.append(1))]):
        for call in calls:
            with pytest.raises(PosheadsError, match="pad token 0"):
                call(tokens)
    assert not ran
    masked = score_heads(llama, tokens, attention_mask=mask, **options)
    assert torch.equal(masked.rho, score_heads(llama, TEXTS, **options).rho)
    # What nobody calls padding is text: the way out where the pad token is meant.
    meant = score_heads(llama, list(tokens), **options)
    whole = score_heads(llama, tokens, attention_mask=torch.ones_like(mask), **options)
    assert torch.equal(meant.rho, whole.rho)
    assert not torch.equal(meant.rho, masked.rho)


@torch.no_grad()
@pytest.mark.parametrize("how", [dict(), dict(per_position=True)], ids=["mean", "per position"])
def test_a_reference_of_unequal_texts_is_a_list(llama, how):
    name = "blocks.0.attn.hook_z"
    z = [llama.run_with_cache(text[None])[1][name][0, :, 1].double() for text in TEXTS]
    mean = torch.stack([x[:22] for x in z]).mean(0) if how else torch.cat(z).mean(0)
    with ablate(llama, [(0, 1)], "mean", reference=TEXTS, **how):
        got = llama.run_with_cache(TEXTS[1][None])[1][name][0, :, 1]
    torch.testing.assert_close(got, mean.float().expand_as(got), atol=1e-6, rtol=1e-5)

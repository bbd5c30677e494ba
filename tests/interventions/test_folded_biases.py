"""What zero means where the lens has folded value biases into the output bias."""

from __future__ import annotations

import pytest
import torch

import tl_posheads as ph
from helpers import architectures, small_models
from helpers.traces import warm
from tl_posheads import ablate, ablation_hooks, ablation_study
from tl_posheads.io.models import hooked_available
from tl_posheads.studies.ablation.attribution import attributed_effects

pytestmark = pytest.mark.lens

TOKENS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))
REFERENCE = torch.randint(3, 90, (3, 24), generator=torch.Generator().manual_seed(2))
HEADS = [(0, 1), (1, 2)]
FAMILIES = [name for name in architectures.ROTARY if not name.startswith("Llama,")]


def with_biases(name):
    """A model with every bias at random, fresh ones are zero; and whether its values have any.

    That is by a bias of their own, or by their LayerNorm's.
    """
    family, config = architectures.ROTARY[name]
    if name == "Phi":  # with shared keys and biases the lens can't fold
        config = {**config, "num_key_value_heads": None}
    hf = small_models.build(family, config)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, weight in hf.named_parameters():
            if key.endswith("bias"):
                weight.copy_(0.3 * torch.randn(weight.shape, generator=random))
    keys = ("v_proj.bias", "query_key_value.bias", "input_layernorm.bias", "ln_1.bias")
    biased = any(key.endswith(keys) for key, _ in hf.named_parameters())
    return small_models.bridge(hf, f"tiny-{family}"), biased


@torch.no_grad()
def under(model, heads=HEADS, mode="zero", **options):
    reference = None if mode == "zero" else REFERENCE
    with ablate(model, heads, mode, reference=reference, **options):
        return model(TOKENS).log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_ablation_is_the_same_after_compatibility_mode_or_refused(name):
    model, biased = with_biases(name)
    warm(model)
    options = [dict(mode="zero"), dict(mode="mean")]
    if name != "GPT-J":
        options += [dict(mode="mean", per_position=True), dict(on="pattern")]
    before = [under(model, **some) for some in options]
    with torch.no_grad():
        plain = model(TOKENS).log_softmax(-1)
    model.enable_compatibility_mode()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).log_softmax(-1), plain, atol=1e-4, rtol=0)
    for some, right in zip(options, before):
        if biased and some.get("mode", "zero") == "zero":
            with pytest.raises(ph.PosheadsError, match="folded into the output bias.*mode 'mean'"):
                under(model, **some)
        else:
            torch.testing.assert_close(under(model, **some), right, atol=1e-4, rtol=0)


def test_without_folding_of_value_biases_zero_is_zero():
    model, _ = with_biases("StableLM")
    right = under(warm(model))
    model.enable_compatibility_mode(fold_value_biases=False)
    torch.testing.assert_close(under(model), right, atol=1e-4, rtol=0)


def test_all_that_sets_heads_to_zero_refuses_before_a_pass():
    model, _ = with_biases("GPT-NeoX, Pythia")
    scores = ph.score_heads(model, TOKENS, progress=False)
    model.enable_compatibility_mode()
    passes = []
    refused = pytest.raises(ph.PosheadsError, match="layer 0 the value biases are folded")
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: passes.append(hook.name))]):
        with refused:
            ablation_hooks(model, [(0, 0)], on="pattern", positions=[3])
        with refused:
            attributed_effects(model, TOKENS[0], torch.tensor([4]))
        task = ph.tasks.Passkey(length=200, n=2)
        for mode in (dict(), dict(mode="mean", reference=REFERENCE)):
            with refused:
                ablation_study(model, scores, tasks=[task], **mode, progress=False)
    assert not passes


def test_models_whose_biases_are_zero_by_themselves_are_not_refused():
    family, config = architectures.ROTARY["Phi"]  # fresh, all its biases are zero
    model = warm(small_models.bridge(small_models.build(family, config)))
    assert not model.blocks[0].attn.b_V.any()
    assert under(model).isfinite().all()


@pytest.mark.skipif(not hooked_available(), reason="this line has no HookedTransformer")
@pytest.mark.parametrize("n_kv_heads", [None, 2])
def test_a_processed_hooked_transformer_is_refused_too(n_kv_heads):
    model = small_models.small_hooked(
        n_key_value_heads=n_kv_heads,
        n_ctx=64,
        act_fn="gelu",
        normalization_type="LN",
        initializer_range=-1.0,
    )
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "b_" in key:
                weight.normal_(std=0.3)
    right = {mode: under(model, mode=mode) for mode in ("zero", "mean")}
    model.load_and_process_state_dict(model.state_dict(), fold_value_biases=False)
    torch.testing.assert_close(under(model), right["zero"], atol=1e-4, rtol=0)
    model.load_and_process_state_dict(
        model.state_dict(), fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    with pytest.raises(ph.PosheadsError, match="folded into the output bias"):
        under(model)
    torch.testing.assert_close(under(model, mode="mean"), right["mean"], atol=1e-4, rtol=0)

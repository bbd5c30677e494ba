"""Methods that change frequencies, against transformers' own models of the same kind."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from helpers import architectures, small_models
from tl_posheads import extrapolation as ex
from tl_posheads.io import models

pytestmark = pytest.mark.lens

TRAINED, LENGTH = 64, 200
TOKENS = torch.randint(3, 90, (1, LENGTH), generator=torch.Generator().manual_seed(4))


def like_transformers(kind: str, n_pairs: int, theta: float):
    """A method, and the rope_parameters of a model that has it built in."""
    long = tuple(1.0 + 2.0 * m / n_pairs for m in range(n_pairs))
    short = tuple(1.0 + 0.1 * m for m in range(n_pairs))
    rope = {"rope_theta": theta, "original_max_position_embeddings": TRAINED, "factor": 4.0}
    return {
        "linear": (ex.Linear(4), {**rope, "rope_type": "linear"}),
        "dynamic": (ex.DynamicNTK(4), {**rope, "rope_type": "dynamic"}),
        "yarn": (ex.YaRN(4), {**rope, "rope_type": "yarn"}),
        "yarn, whole ramp": (
            ex.YaRN(4, beta_fast=8, truncate=False, attention_factor=1.3),
            {
                **rope,
                "rope_type": "yarn",
                "beta_fast": 8.0,
                "beta_slow": 1.0,
                "truncate": False,
                "attention_factor": 1.3,
            },
        ),
        "yarn, DeepSeek's scale": (
            ex.YaRN(4, mscale=0.7, mscale_all_dim=1.1),
            {**rope, "rope_type": "yarn", "mscale": 0.7, "mscale_all_dim": 1.1},
        ),
        "llama3": (
            ex.Llama3(4, low_freq_factor=1.0, high_freq_factor=3.0),
            {**rope, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 3.0},
        ),
        "longrope": (
            ex.LongRoPE(long, short, factor=4),
            {
                **rope,
                "rope_type": "longrope",
                "long_factor": list(long),
                "short_factor": list(short),
            },
        ),
    }[kind]


KINDS = [
    "linear",
    "dynamic",
    "yarn",
    "yarn, whole ramp",
    "yarn, DeepSeek's scale",
    "llama3",
    "longrope",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_pairs", [4, 16, 64])
def test_formula_is_transformers(kind, n_pairs):
    theta = 10000.0 if n_pairs < 64 else 500000.0
    method, rope = like_transformers(kind, n_pairs, theta)
    config = LlamaConfig(
        hidden_size=2 * n_pairs,
        num_attention_heads=1,
        rope_parameters=rope,
        # transformers takes the original length of three types from here.
        max_position_embeddings=4 * TRAINED if kind == "longrope" else TRAINED,
    )
    own = theta ** (-torch.arange(n_pairs, dtype=torch.float64) / n_pairs)
    for length in (10, TRAINED, TRAINED + 1, 200):
        inv_freq, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=length)
        mine = method.frequencies(own, TRAINED, length)
        torch.testing.assert_close(mine.inv_freq.float(), inv_freq, rtol=1e-6, atol=0)
        assert mine.scale == pytest.approx(scale, rel=1e-6)


LAYOUTS = {
    "half": ("Llama", {}, 4),
    "partial": ("StableLm", {"partial_rotary_factor": 0.5}, 2),
    "joint projection": ("GPTNeoX", {"rotary_pct": 0.5, "num_key_value_heads": None}, 2),
    "adjacent": ("Cohere", {}, 4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_are_transformers(layout, kind):
    family, special, n_pairs = LAYOUTS[layout]
    if family == "Cohere" and models.hooked_available():
        pytest.skip("the Bridge of transformer-lens 3.9 rotates Cohere otherwise than transformers")
    if family == "GPTNeoX" and kind.startswith(("longrope", "dynamic")):
        kind = "yarn"
    method, rope = like_transformers(kind, n_pairs, 10000.0)
    if "partial_rotary_factor" in special or "rotary_pct" in special:
        rope["partial_rotary_factor"] = 0.5
    longest = 4 * TRAINED if kind == "longrope" else TRAINED
    base = {**architectures.BASE, **special}
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    if "partial_rotary_factor" in rope:
        plain["partial_rotary_factor"] = 0.5
    bare = small_models.build(
        family, {**base, "max_position_embeddings": TRAINED, "rope_parameters": plain}
    )
    theirs = small_models.build(
        family, {**base, "max_position_embeddings": longest, "rope_parameters": rope}
    )
    theirs.load_state_dict(bare.state_dict())
    expected, unextended = theirs(TOKENS).logits, bare(TOKENS).logits
    model = small_models.bridge(bare)
    with method(model):
        got = model(TOKENS)
    assert (got - expected).abs().max() < 1e-3
    assert (unextended - expected).abs().max() > 2e-3  # the method does something


@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
@torch.no_grad()
def test_generation_is_transformers(kind):
    method, rope = like_transformers(kind, 4, 10000.0)
    base = {**architectures.BASE, "max_position_embeddings": TRAINED}
    bare = small_models.build("Llama", base)
    theirs = small_models.build("Llama", {**base, "rope_parameters": rope})
    theirs.load_state_dict(bare.state_dict())
    prompt = TOKENS[:, :90]
    expected = theirs.generate(
        prompt,
        max_new_tokens=12,
        do_sample=False,
        attention_mask=torch.ones_like(prompt),
        eos_token_id=None,
    )
    model = small_models.bridge(bare)
    with method(model):
        got = model.generate(
            prompt,
            max_new_tokens=12,
            do_sample=False,
            use_past_kv_cache=True,
            verbose=False,
            stop_at_eos=False,
            return_type="tokens",
        )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_smollm2_is_transformers(smollm2, smollm2_folder, kind):
    method, rope = like_transformers(kind, 32, 100000.0)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    theirs.config.rope_parameters = rope
    theirs.config.max_position_embeddings = 4 * TRAINED if kind == "longrope" else TRAINED
    rotary = type(theirs.model.rotary_emb)(theirs.config)
    theirs.model.rotary_emb = rotary
    tokens = torch.randint(3, 40000, (1, 90), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits.log_softmax(-1)
    with method(smollm2, trained=TRAINED):
        got = smollm2(tokens).log_softmax(-1)
    assert (got - expected).abs().max() < 1e-3

"""Small randomly initialised models of every architecture that the README's table claims.

Each is built from a transformers config and booted as a TransformerBridge, offline. Weights are
scaled up so that scores differ by more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformer_lens.model_bridge import TransformerBridge

N_VOCAB = 97
BASE = dict(
    vocab_size=N_VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GPT = dict(vocab_size=N_VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256,
           bos_token_id=1, eos_token_id=2)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0,
            original_max_position_embeddings=64)  # fmt: skip
LONGROPE = dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=64,
                short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.0, 3.0, 4.0])  # fmt: skip
MLA = dict(num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
           qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4,
           num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
           first_k_dense_replace=1, n_shared_experts=1)  # fmt: skip
WINDOWED = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
THETAS = dict(
    full_attention=dict(rope_type="default", rope_theta=1000000.0),
    sliding_attention=dict(rope_type="default", rope_theta=10000.0),
)

# name in the README's table -> (family in transformers, config)
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", BASE),
    "Llama, llama3 scaling": ("Llama", {**BASE, "rope_parameters": LLAMA3}),
    "Llama, YaRN": ("Llama", {**BASE, "rope_parameters": YARN}),
    "Mistral, sliding window": ("Mistral", {**BASE, "sliding_window": 16}),
    "Mixtral": ("Mixtral", {**BASE, "num_local_experts": 2}),
    "Qwen2": ("Qwen2", BASE),
    "Qwen3": ("Qwen3", {**BASE, "head_dim": 8}),
    "Gemma 2": ("Gemma2", {**BASE, "head_dim": 8, "query_pre_attn_scalar": 8, **WINDOWED}),
    "Gemma 3": (
        "Gemma3",
        {**BASE, "head_dim": 8, "query_pre_attn_scalar": 8, **WINDOWED, "rope_parameters": THETAS},
    ),
    "Cohere": ("Cohere", BASE),
    "Phi": ("Phi", {**BASE, "partial_rotary_factor": 0.5}),
    "Phi-3, longrope": (
        "Phi3",
        {**BASE, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
    ),
    "StableLM": ("StableLm", {**BASE, "partial_rotary_factor": 0.5}),
    "OLMo 2": ("Olmo2", BASE),
    "GPT-NeoX, Pythia": (
        "GPTNeoX",
        {**BASE, "rotary_pct": 0.5, "num_key_value_heads": None},
    ),
    "GPT-J": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "Falcon": ("Falcon", {**BASE, "multi_query": True, "alibi": False, "parallel_attn": True,
                          "new_decoder_architecture": False, "bias": False}),
    "DeepSeek-V3": ("DeepseekV3", {**BASE, **MLA}),
    "DeepSeek-V2": ("DeepseekV2", {**BASE, **MLA, "topk_method": "greedy"}),
}  # fmt: skip

# name -> (family, config, what its positions are)
OTHER: dict[str, tuple[str, dict[str, Any], str]] = {
    "GPT-2": ("GPT2", GPT, "learned"),
    "BLOOM": ("Bloom", dict(vocab_size=N_VOCAB, hidden_size=32, n_layer=2, n_head=4), "ALiBi"),
    "OPT": (
        "OPT",
        {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": None},
        "learned",
    ),
    "T5": (
        "T5",
        dict(vocab_size=N_VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        "relative",
    ),
    "Mamba": ("Mamba", dict(vocab_size=N_VOCAB, hidden_size=32, num_hidden_layers=2), "recurrent"),
}


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word ``w3`` .. ``w96``; 0 pads, 1 begins, 2 ends."""
    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, N_VOCAB))]
    inner = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="</s>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        # What the lens asks for before it makes a tokenizer of its own, from the hub.
        name_or_path="tiny", add_bos_token=True,
    )  # fmt: skip


def build(family: str, config: dict[str, Any], *, seed: int = 0, boost: float = 6.0) -> Any:
    """The transformers model, random weights times ``boost`` in the projections."""
    torch.manual_seed(seed)
    options = {key: value for key, value in config.items() if value is not None}
    cls = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    head = {"T5": "ForConditionalGeneration", "GPT2": "LMHeadModel"}.get(family, "ForCausalLM")
    hf_model = getattr(transformers, f"{family}{head}")(getattr(transformers, cls)(**options))
    with torch.no_grad():
        for name, weight in hf_model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(boost)
            elif weight.ndim == 1 and "norm" in name.lower():
                weight.add_(0.1 * torch.randn_like(weight))
    hf_model.config.architectures = [type(hf_model).__name__]
    if family not in ("Mamba", "T5"):
        # The Bridge of 3.9 doesn't ask for it, and transformers' default shows no scores.
        hf_model.set_attn_implementation("eager")
    return hf_model.eval()


def bridge(hf_model: Any, name: str = "tiny") -> TransformerBridge:
    return TransformerBridge.boot_transformers(
        name, hf_model=hf_model, tokenizer=tiny_tokenizer(), device="cpu"
    )


def rotary_model(name: str) -> TransformerBridge:
    family, config = ROTARY[name]
    return bridge(build(family, config), f"tiny-{family}")


def other_model(name: str) -> TransformerBridge:
    family, config, _ = OTHER[name]
    return bridge(build(family, config), f"tiny-{family}")


BUILDERS: dict[str, Callable[[], TransformerBridge]] = {
    name: partial(rotary_model, name) for name in ROTARY
}

"""GGUF files of small models, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from helpers import architectures, small_models

MERGES = ["Ġ Ġ", "Ġ 5", "1 2", "5 Ġ", "Ġ d", "o n", "Ġd on", "Ċ Ċ"]
TOKENS = [
    "<s>",
    "</s>",
    "<pad>",
    *bytes_to_unicode().values(),
    *(merge.replace(" ", "") for merge in MERGES),
    "qqq",  # which no merge makes
]

# llama.cpp's name -> (family in transformers, config, what the norms are written with)
BASE = {
    **architectures.BASE,
    "vocab_size": len(TOKENS),
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
HEAD8 = {**BASE, "head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any], float]] = {
    "llama": ("Llama", BASE, 0.0),
    "qwen2": ("Qwen2", BASE, 0.0),
    "qwen3": ("Qwen3", HEAD8, 0.0),
    "phi3": ("Phi3", BASE, 0.0),
    "gemma2": ("Gemma2", {**HEAD8, "query_pre_attn_scalar": 8, "sliding_window": 16}, 1.0),
    "gemma3": (
        "Gemma3",
        {
            **HEAD8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
            "num_hidden_layers": 6,
            "rope_parameters": architectures.THETAS,
        },
        1.0,
    ),
    "stablelm": ("StableLm", {**BASE, "partial_rotary_factor": 0.5}, 0.0),
    "starcoder2": ("Starcoder2", {**BASE, "tie_word_embeddings": True, "rope_theta": 1e5}, 0.0),
    "nemotron": ("Nemotron", {**HEAD8, "partial_rotary_factor": 0.5}, 1.0),
}
KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "norm_epsilon": "attention.layer_norm_epsilon",
    "norm_eps": "attention.layer_norm_epsilon",
    "vocab_size": "vocab_size",
}


def permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Half layout to adjacent, as llama.cpp keeps queries and keys of Llama."""
    rows = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    architecture: str = "llama",
    *,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    renamed: dict[str, str] | None = None,
    tokenizer: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    name: str | None = None,
) -> Any:
    """Write the family's model; returns the transformers model that it was made from.

    Args:
        keys: metadata beside the usual; None takes a key away.
        tensors: further ones. renamed: tensors under another name.
        tokenizer: ``tokenizer.ggml.*`` other than the usual.
        config: of the model, other than FAMILIES says.
    """
    family, own, norm = FAMILIES[architecture]
    model = small_models.build(family, {**own, **(config or {})})
    cfg = model.config
    head_dim = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
    rope = cfg.rope_parameters
    rope = rope.get("full_attention", rope)
    metadata = {
        **{theirs: getattr(cfg, ours) for ours, theirs in KEYS.items() if hasattr(cfg, ours)},
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.key_length": head_dim,
        "attention.sliding_window": getattr(cfg, "sliding_window", None),
        **(keys or {}),
    }
    writer = gguf.GGUFWriter(str(path), architecture)
    _add(writer, "general.name", name)
    for key, value in metadata.items():
        _add(writer, f"{architecture}.{key}", value)
    for key, value in {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "merges": MERGES,
        "token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "padding_token_id": 2,
        **(tokenizer or {}),
    }.items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    arch = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, cfg.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and cfg.tie_word_embeddings:
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        value = weight.float().numpy()
        if architecture == "llama" and ".attn_q." in theirs:
            value = permuted(value, cfg.num_attention_heads)
        elif architecture == "llama" and ".attn_k." in theirs:
            value = permuted(value, cfg.num_key_value_heads)
        elif "norm.weight" in theirs:
            value = value + norm
        writer.add_tensor((renamed or {}).get(theirs, theirs), np.ascontiguousarray(value))
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)

"""Text length: how long a text a model takes, and rotary frequencies that depend on the length.

Under dynamic NTK and LongRoPE the frequencies depend on the text's length, and transformers'
module keeps those of the longest text so far. Here every pass gets those of its own length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # corpora use this module, and commands check them before importing torch
    from torch import nn

# `cfg.n_ctx` while a model takes texts of any length.
ANY_LENGTH = 1 << 24
# HookedTransformer's converters write these instead of many checkpoints' own lengths.
_CAPS = (2048, 8192)
_TABLES = ("rotary_cos", "rotary_sin", "embed_positions")


def context_length(model: Any) -> int | None:
    """The model's context length in tokens; None without limit."""
    n_ctx = getattr(getattr(model, "cfg", None), "n_ctx", None)
    return int(n_ctx) if n_ctx else None


def checkpoint_length(model: Any) -> int | None:
    """Context length in the checkpoint's configuration, in tokens; None without limit.

    For many families, TransformerLens caps ``cfg.n_ctx`` of a HookedTransformer that it loads. The
    original configuration is then read offline from transformers' cache.
    """
    n_ctx = context_length(model)
    if type(model).__name__ == "HookedTransformer" and n_ctx in _CAPS:
        cfg = model.cfg
        shape = (cfg.original_architecture, cfg.d_model, cfg.n_layers, cfg.n_heads)
        if cfg.positional_embedding_type == "rotary" and cfg.tokenizer_name:
            return _published(cfg.tokenizer_name, shape) or n_ctx
    return n_ctx


@cache
def _published(name: str, shape: tuple[Any, ...]) -> int | None:
    """The length in a checkpoint's configuration, if that describes a model of this shape."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return None
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    architecture = (getattr(config, "architectures", None) or [None])[0]
    found = (architecture, *(getattr(config, size, None) for size in sizes))
    return declared_length(config) if found == shape else None


def declared_length(config: Any) -> int | None:
    """The context length in a transformers configuration; None if it has none."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def own_length_matters(model: Any) -> bool:
    """Whether the unmodified model's frequencies depend on the text's length."""
    kinds = {str(p.get("rope_type", p.get("type"))) for p in rope_parameters(model)}
    return bool(kinds & {"dynamic", "longrope"}) or bool(
        getattr(model.cfg, "use_dynamic_ntk_rope", False)
    )


def rope_parameters(model: Any) -> list[dict[str, Any]]:
    """RoPE parameters of a Bridge, for all kinds of layers."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [p for p in (rope, *rope.values()) if isinstance(p, dict)]


def own_border(model: Any) -> int | None:
    """Length beyond which transformers recomputes the KV cache because all frequencies change.

    Phi-3's LongRoPE has one. Elsewhere, and under dynamic NTK, cached keys keep their rotation.
    """
    config = getattr(getattr(model, "original_model", None), "config", None)
    if all(p.get("rope_type", p.get("type")) != "longrope" for p in rope_parameters(model)):
        return None
    return getattr(config, "original_max_position_embeddings", None)


@contextmanager
def own_frequencies(model: Any) -> Iterator[None]:
    """Inside, every pass has the frequencies of its own length, regardless of earlier texts.

    On exit, the model's rotary state is restored bit for bit. Models whose frequencies don't depend
    on the length are left alone.
    """
    if not own_length_matters(model):
        yield
        return
    with rotary_state_kept(model) as modules, ExitStack() as stack:
        for module in modules:
            if "original_max_seq_len" in vars(module):
                stack.callback(module.register_forward_pre_hook(_forget).remove)
        yield


def _forget(module: Any, args: Any) -> None:
    """Reset a transformers rotary embedding to the state before its first text."""
    for name in [name for name in vars(module) if name.endswith("_max_seq_len_cached")]:
        delattr(module, name)  # of one kind of layer; without it the module's own is used
    module.max_seq_len_cached = module.original_max_seq_len
    for name in [*vars(module), *module._buffers]:
        if name.endswith("original_inv_freq"):
            # A copy: transformers writes LongRoPE's frequencies into it.
            own = getattr(module, name).detach()
            place = name.replace("original_", "")
            module._buffers[place] = own.to(module._buffers[place].device, copy=True)


@contextmanager
def rotary_state_kept(model: Any) -> Iterator[list[nn.Module]]:
    """Inside, passes may change rotary tables and frequencies; they are restored on exit.

    Yields:
        The modules that have such state.
    """
    found = {
        id(module): module
        for owner in (model, getattr(model, "original_model", model))
        for module in owner.modules()
        if "max_seq_len_cached" in vars(module) or not module._buffers.keys().isdisjoint(_TABLES)
    }
    modules = list(found.values())
    before = [(dict(module._buffers), _numbers(module)) for module in modules]
    # Tables are replaced; frequencies may also change in place.
    values = {
        id(buffer): (buffer, buffer.clone())
        for buffers, _ in before
        for name, buffer in buffers.items()
        if buffer is not None and name.endswith("inv_freq")
    }
    try:
        yield modules
    finally:
        for buffer, value in values.values():
            buffer.copy_(value)
        for module, (buffers, numbers) in zip(modules, before, strict=True):
            module._buffers.clear()
            module._buffers.update(buffers)
            for name in _numbers(module).keys() - numbers.keys():
                delattr(module, name)
            vars(module).update(numbers)


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Lengths, factors and frequencies that a module keeps outside its buffers."""
    from torch import Tensor

    return {
        name: value
        for name, value in vars(module).items()
        if name != "training" and isinstance(value, Tensor | int | float)
    }

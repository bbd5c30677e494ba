"""What a text's length means to a model: how long it may be, and which frequencies it brings.

Under dynamic NTK and LongRoPE a pass's frequencies depend on its length, and transformers' module
keeps those of the longest text so far. Here a pass gets those of its own length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # corpora, which a command asks before it waits for torch, need lengths
    from torch import nn

# `cfg.n_ctx` while a model may read texts of any length.
ANY_LENGTH = 1 << 24
# HookedTransformer's converters write these in the place of many checkpoints' own lengths.
_CAPS = (2048, 8192)
_TABLES = ("rotary_cos", "rotary_sin", "embed_positions")


def context_length(model: Any) -> int | None:
    """Tokens that the model was set up for; None without limit."""
    n_ctx = getattr(getattr(model, "cfg", None), "n_ctx", None)
    return int(n_ctx) if n_ctx else None


def checkpoint_length(model: Any) -> int | None:
    """Tokens that the checkpoint's configuration was made for; None without limit.

    For checkpoints of many families ``cfg.n_ctx`` of a HookedTransformer that TransformerLens
    loaded itself is a cap. Their configuration is looked up where transformers keeps it, offline.
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
    """The length in a checkpoint's configuration, where it is that of a model of this shape."""
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
    """What a configuration of transformers says of the length; None where it doesn't."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def own_length_matters(model: Any) -> bool:
    """Whether the model's own frequencies depend on a text's length, whatever is in force on it."""
    kinds = {str(p.get("rope_type", p.get("type"))) for p in rope_parameters(model)}
    return bool(kinds & {"dynamic", "longrope"}) or bool(
        getattr(model.cfg, "use_dynamic_ntk_rope", False)
    )


def rope_parameters(model: Any) -> list[dict[str, Any]]:
    """A Bridge's, of all kinds of layers."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [p for p in (rope, *rope.values()) if isinstance(p, dict)]


def own_border(model: Any) -> int | None:
    """Tokens past which transformers computes a KV cache anew, as all frequencies are others.

    So it is with Phi-3's LongRoPE. Elsewhere, and under dynamic NTK, cached keys keep theirs.
    """
    config = getattr(getattr(model, "original_model", None), "config", None)
    if all(p.get("rope_type", p.get("type")) != "longrope" for p in rope_parameters(model)):
        return None
    return getattr(config, "original_max_position_embeddings", None)


@contextmanager
def own_frequencies(model: Any) -> Iterator[None]:
    """Inside, every pass has the frequencies of its own length, whatever was read before.

    On leaving, the model's rotary state is bit for bit what it was. Models whose frequencies don't
    depend on the length are left alone.
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
    """Put a rotary embedding of transformers as if it had never seen a text."""
    for name in [name for name in vars(module) if name.endswith("_max_seq_len_cached")]:
        delattr(module, name)  # of a kind of layer; without it the module's own counts
    module.max_seq_len_cached = module.original_max_seq_len
    for name in [*vars(module), *module._buffers]:
        if name.endswith("original_inv_freq"):
            # A copy: transformers writes LongRoPE's frequencies into it.
            own = getattr(module, name).detach()
            place = name.replace("original_", "")
            module._buffers[place] = own.to(module._buffers[place].device, copy=True)


@contextmanager
def rotary_state_kept(model: Any) -> Iterator[list[nn.Module]]:
    """Inside, passes may change rotary tables and frequencies; on leaving they are as before.

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
    # Tables are replaced; frequencies may also be written into.
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
    """Lengths, factors and frequencies that a module keeps beside its buffers."""
    from torch import Tensor

    return {
        name: value
        for name, value in vars(module).items()
        if name != "training" and isinstance(value, Tensor | int | float)
    }

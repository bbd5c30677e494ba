"""Forward passes that score chosen tokens and compute nothing that the score does not need.

Three savings, none of which changes a number beyond rounding: logits are computed at the scored
positions alone; attention runs through ``scaled_dot_product_attention`` while nobody watches
scores or pattern; and passes that differ from some layer on share what lies before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tl_posheads.capture import attention, instance_method, own_hooks

Hooks = Sequence[tuple[str, Callable[..., Any]]]


@contextmanager
def unembed_only(model: Any, positions: Tensor) -> Iterator[None]:
    """Inside, logits are computed at ``positions`` alone: the vocabulary is the widest layer."""

    def choose(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, positions.to(args[0].device)], *args[1:])

    handle = model.unembed.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def target_logits(
    model: Any, tokens: Int[Tensor, "pos"], targets: Int[Tensor, "target"]
) -> Float[Tensor, "target d_vocab"]:
    """Logits that predict the tokens at ``targets``, in float32; gradient as the caller has it."""
    device = next(model.parameters()).device
    with unembed_only(model, targets - 1):
        return model(tokens[None].to(device), return_type="logits")[0].float()


def _scored(
    logits: Tensor, tokens: Tensor, targets: Tensor
) -> tuple[Float[Tensor, "target"], Bool[Tensor, "target"]]:
    wanted = tokens[targets].to(logits.device)
    logprob = logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
    return logprob.cpu(), (logits.argmax(-1) == wanted).cpu()


def target_logprobs(
    model: Any, tokens: Int[Tensor, "pos"], targets: Int[Tensor, "target"]
) -> tuple[Float[Tensor, "target"], Bool[Tensor, "target"]]:
    """Log-probability of the tokens at ``targets``, and whether each was the likeliest.

    One forward pass without gradient; hooks on the model are in force. The logits of other
    positions are never computed.

    Returns:
        Natural logarithms in float32 and booleans, on the CPU.
    """
    with torch.no_grad():
        return _scored(target_logits(model, tokens, targets), tokens, targets)


@dataclass(frozen=True, eq=False)
class Trunk:
    """An unablated pass over a text, and what left some of its blocks.

    Attributes:
        logprob, hit: of the targets, as :func:`target_logprobs` gives them.
        outputs: for layer ``l``, what block ``l - 1`` returned, in the block's own form.
    """

    logprob: Float[Tensor, "target"]
    hit: Bool[Tensor, "target"]
    outputs: dict[int, Any]


def run_trunk(
    model: Any,
    tokens: Int[Tensor, "pos"],
    targets: Int[Tensor, "target"],
    layers: Sequence[int],
) -> Trunk:
    """Run a text once, keeping what enters each of ``layers``.

    Memory: ``len(layers) * pos * d_model`` numbers on the model's device.
    """
    outputs: dict[int, Any] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            outputs[layer] = output

        return hook

    with ExitStack() as stack:
        for layer in {layer for layer in layers if layer > 0}:
            block = model.blocks[layer - 1]
            stack.callback(block.register_forward_hook(keep(layer)).remove)
        logprob, hit = target_logprobs(model, tokens, targets)
    return Trunk(logprob, hit, outputs)


def run_branch(
    model: Any,
    tokens: Int[Tensor, "pos"],
    targets: Int[Tensor, "target"],
    trunk: Trunk,
    layer: int,
    hooks: Hooks,
) -> tuple[Float[Tensor, "target"], Bool[Tensor, "target"]]:
    """The same text under ``hooks``, none of which lies below ``layer``; blocks below don't run.

    Returns:
        As :func:`target_logprobs`.
    """
    points = model.hook_dict
    with ExitStack() as stack:
        if layer > 0:
            output = trunk.outputs[layer]
            for below in range(layer):
                # Each hands on what the last of them returned; their input decides nothing.
                stack.enter_context(
                    instance_method(model.blocks[below], "forward", lambda *a, **k: output)
                )
        stack.enter_context(own_hooks([(points[name], hook) for name, hook in hooks]))
        return target_logprobs(model, tokens, targets)


@contextmanager
def fused_attention(model: Any) -> Iterator[bool]:
    """Inside, attention runs through torch's fused kernels, which never form the pattern.

    Only where the result is the same: nobody watches what lies between q and z, and the lens's
    attention is one that can be handed over (Llama's kind on the Bridge, rotary HookedTransformer;
    no softcap, sinks or local window on the latter). Elsewhere nothing changes. Only for whole
    texts in one pass, without padding and without a KV cache.

    Yields:
        Whether it is in force.
    """
    layers = [a for i in range(model.cfg.n_layers) if (a := attention(model, i)) is not None]
    kinds = [_kind(model, attn) for attn in layers]
    if not layers or any(kind is None for kind in kinds) or _watched(layers):
        yield False
        return
    with ExitStack() as stack:
        if kinds[0] == "bridge":
            stack.enter_context(_attention_implementation(model.original_model, "sdpa"))
        for attn, kind in zip(layers, kinds, strict=True):
            stack.enter_context(_handed_over(attn) if kind == "bridge" else _fused_hooked(attn))
        yield True


_ALWAYS_FIRE = ("hook_q", "hook_k", "hook_v", "hook_z")


def _watched(layers: Sequence[Any]) -> bool:
    """Whether anyone listens to a hook point that the fused way passes by."""
    for attn in layers:
        for name, module in attn.named_modules():
            hooks = getattr(module, "fwd_hooks", None)
            if hooks is None or not (hooks or module.bwd_hooks):
                continue
            # On the Bridge hook_q, hook_k, hook_v and hook_z are points of q, k, v and o.
            if name not in _ALWAYS_FIRE and name.split(".")[0] not in ("q", "k", "v", "o"):
                return True
    return False


def _kind(model: Any, attn: Any) -> str | None:
    name = type(attn).__name__
    if name == "PositionEmbeddingsAttentionBridge":
        inner = attn.original_component
        config = getattr(inner, "config", None)
        same = (
            getattr(inner, "attn_logit_softcapping", None) is None
            and getattr(inner, "sinks", None) is None
            # 3.9 rotates Cohere's coordinates unlike transformers; handed over, it would change.
            and not type(inner).__name__.startswith("Cohere")
            and not getattr(attn.config, "use_split_qkv_input", False)
            and not getattr(attn.config, "use_attn_in", False)
            and not getattr(attn.config, "use_attn_result", False)
            and getattr(config, "_attn_implementation", None) is not None
            and all(_submodule(attn, inner, x) for x in "qkvo")
        )
        return "bridge" if same else None
    if name in ("Attention", "GroupedQueryAttention"):
        cfg = attn.cfg
        same = (
            cfg.positional_embedding_type == "rotary"
            and cfg.attention_dir == "causal"
            and getattr(attn, "attn_type", "global") == "global"
            and not (getattr(cfg, "attn_scores_soft_cap", None) or 0) > 0
            and not getattr(cfg, "use_attention_sinks", False)
            and not getattr(cfg, "ungroup_grouped_query_attention", False)
            and not getattr(cfg, "load_in_4bit", False)
        )
        return "hooked" if same else None
    return None


def _submodule(attn: Any, inner: Any, name: str) -> bool:
    """Whether transformers' attention calls the lens's component, and so its hook points."""
    bridge = getattr(attn, name, None)
    return bridge is not None and any(child is bridge for child in inner.children())


@contextmanager
def _attention_implementation(hf_model: Any, name: str) -> Iterator[None]:
    """The masks are made by the model, so that the setting is the model's, not a layer's."""
    configs = {id(m.config): m.config for m in hf_model.modules() if hasattr(m, "config")}
    configs = {k: c for k, c in configs.items() if hasattr(c, "_attn_implementation_internal")}
    before = {k: c._attn_implementation_internal for k, c in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = name
        yield
    finally:
        for k, config in configs.items():
            config._attn_implementation_internal = before[k]


@contextmanager
def _handed_over(attn: Any) -> Iterator[None]:
    """transformers' own attention, which calls the lens's q, k, v and o."""
    inner = attn.original_component
    with instance_method(attn, "forward", lambda *args, **kwargs: inner(*args, **kwargs)):
        yield


@contextmanager
def _fused_hooked(attn: Any) -> Iterator[None]:
    """HookedTransformer's steps from scores to z, the first two of which become nothing."""
    waiting: list[tuple[Tensor, Tensor]] = []

    def scores(q: Tensor, k: Tensor) -> Tensor:
        waiting.append((q, k))
        return q.new_zeros((1, 1, 1, 1))

    def z(v: Float[Tensor, "batch pos kv_head d_head"], pattern: Tensor) -> Tensor:
        q, k, v = (rearrange(x, "b pos head d -> b head pos d") for x in (*waiting.pop(), v))
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=1 / float(attn.attn_scale),
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        out_z: Tensor = attn.hook_z(rearrange(out, "b head pos d -> b pos head d"))
        return out_z

    with (
        instance_method(attn, "calculate_attention_scores", scores),
        instance_method(attn, "apply_causal_mask", lambda scores, *args: scores),
        instance_method(attn, "calculate_z_scores", z),
    ):
        yield

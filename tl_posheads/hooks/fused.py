"""Attention of a live model through torch's fused kernels, with the rotated hook points firing."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tl_posheads.hooks.changes import changes_of
from tl_posheads.hooks.model import LensModel, attention_of, instance_method, model_name, own_hooks
from tl_posheads.rotary.precision import MOST_ROUNDED, rounding_of
from tl_posheads.rotary.remapping import only_heads, remapped_attention


@contextmanager
def fused_attention(model: LensModel) -> Iterator[bool]:
    """Inside, attention uses torch's fused kernels, which never form the attention pattern.

    This happens only where the result is the same: there are no hooks on scores or pattern, and the
    attention is of a supported kind (Llama's on the Bridge, rotary HookedTransformer; no softcap,
    sinks or local window on the latter). Elsewhere nothing changes, except for a warning where
    scores are too large for the half precision they are stored in. ``hook_rot_q`` and
    ``hook_rot_k`` fire as usual. Only for whole texts in one pass, without padding or a KV cache.

    Yields:
        Whether fused kernels are used.
    """
    found = {i: a for i in range(model.cfg.n_layers) if (a := attention_of(model, i)) is not None}
    layers = list(found.values())
    kinds = [_kind(model, attn) for attn in layers]
    changes = changes_of(model)
    ours = {id(handle) for change in changes for handle in change.handles}
    remapped: dict[int, Any] = {}
    for change in changes:
        # Only the hooks know how to chain two changes of the same scores.
        if remapped.keys() & change.remapped.keys():
            kinds = [None]
        remapped |= change.remapped
    if not layers or any(kind is None for kind in kinds) or _watched(layers, ours):
        with _rounding_watched(model, found):
            yield False
        return
    with ExitStack() as stack:
        if kinds[0] == "bridge":
            _register()
            stack.enter_context(_attention_implementation(cast(Any, model).original_model, _NAME))
        for (layer, attn), kind in zip(found.items(), kinds, strict=True):
            over = _handed_over if kind == "bridge" else _fused_hooked
            stack.enter_context(over(attn, remapped.get(layer)))
        yield True


@contextmanager
def _rounding_watched(model: LensModel, layers: Mapping[int, Any]) -> Iterator[None]:
    """Inside, warn once if eager attention in half precision rounds large scores.

    The fused kernels never do, so a pass without them would not match a pass with them.
    """
    if next(model.parameters()).dtype.itemsize > 2:
        yield
        return
    told = False

    def look(layer: int, scores: Tensor, hook: Any) -> None:
        nonlocal told
        rounded = 0.0 if told else rounding_of(scores, scores.dtype)
        if rounded >= MOST_ROUNDED:
            told = True
            warnings.warn(
                f"attention of {model_name(model)} can't use fused kernels here, and "
                f"keeps scores of layer {layer} in {scores.dtype}, which rounds them by up to "
                f"{rounded:.2g} nats; load the model in float32, or remove the hooks on its scores "
                "and patterns",
                stacklevel=2,
            )

    points = {i: getattr(attn, "hook_attn_scores", None) for i, attn in layers.items()}
    with own_hooks([(p, partial(look, i)) for i, p in points.items() if p is not None]):
        yield


_NAME = "tl_posheads"
_ALWAYS_FIRE = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q", "hook_rot_k")


def _watched(layers: Sequence[Any], ours: set[int]) -> bool:
    """Whether hooks other than ``ours`` are on a hook point that fused attention skips."""
    for attn in layers:
        for name, module in attn.named_modules():
            hooks = getattr(module, "fwd_hooks", None)
            if hooks is None:
                continue
            if not module.bwd_hooks and all(id(handle) in ours for handle in hooks):
                continue
            # On the Bridge, hook_q, hook_k, hook_v and hook_z belong to q, k, v and o.
            if name not in _ALWAYS_FIRE and name.split(".")[0] not in ("q", "k", "v", "o"):
                return True
    return False


def _kind(model: LensModel, attn: Any) -> str | None:
    name = type(attn).__name__
    if name == "PositionEmbeddingsAttentionBridge":
        inner = attn.original_component
        config = getattr(inner, "config", None)
        same = (
            getattr(inner, "attn_logit_softcapping", None) is None
            and getattr(inner, "sinks", None) is None
            # 3.9 rotates Cohere's coordinates, and normalises HunYuan's queries, unlike
            # transformers; handed over, they would change.
            and not type(inner).__name__.startswith(("Cohere", "HunYuan"))
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
    """Whether transformers' attention calls TransformerLens's component and so its hooks."""
    bridge = getattr(attn, name, None)
    return bridge is not None and any(child is bridge for child in inner.children())


@contextmanager
def _attention_implementation(hf_model: Any, name: str) -> Iterator[None]:
    """Set on the model, not on a layer, because the model makes the masks."""
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


def _register() -> None:
    """Register this attention with transformers, next to ``sdpa`` and with its masks."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)


def _attend(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The attention that transformers calls for a layer inside :func:`_handed_over`."""
    return module.__dict__[_NAME](module, *args, **kwargs)


@contextmanager
def attention_replaced(inner: Any, attend: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Inside, one of transformers' attention modules calls ``attend(query, key, value, mask)``.

    Yields the function that it called before.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    _register()
    eager = sys.modules[type(inner).__module__].eager_attention_forward
    before = ALL_ATTENTION_FUNCTIONS.get_interface(inner.config._attn_implementation, eager)
    config = copy.copy(inner.config)  # the model makes its masks from the shared one
    config._attn_implementation_internal = _NAME
    with (
        instance_method(inner, "config", config),
        instance_method(inner, _NAME, lambda module, *args, **kwargs: attend(*args, **kwargs)),
    ):
        yield partial(before, inner)


@contextmanager
def _handed_over(attn: Any, remapped: Any) -> Iterator[None]:
    """Use transformers' own attention, which calls TransformerLens's q, k, v and o."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    inner = attn.original_component

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> Any:
        query, key = attn.hook_rot_q(query), attn.hook_rot_k(key)
        z: Tensor | None = None
        if remapped is None or remapped.remapping.heads is not None:
            z = sdpa_attention_forward(module, query, key, value, *args, **kw)[0]
        if remapped is not None:
            q, k, v = (rearrange(x, "b head pos d -> b pos head d") for x in (query, key, value))
            z = _remapped(q, k, v, z, remapped)
        return z, None

    with (
        instance_method(attn, "forward", lambda *args, **kwargs: inner(*args, **kwargs)),
        instance_method(inner, _NAME, attend),
    ):
        yield


def _remapped(q: Tensor, k: Tensor, v: Tensor, z: Tensor | None, geometry: Any) -> Tensor:
    """``z``, ``[batch, pos, head, d_head]``, with remapped heads replaced."""
    at = torch.arange(q.shape[1], device=q.device).expand(q.shape[0], -1)
    heads = geometry.remapping.heads
    if z is None or heads is None:
        return remapped_attention(q, k, v, at, geometry)
    members = list(heads)
    alone, keys = only_heads(geometry, k, members)
    mine = remapped_attention(
        q[:, :, members], keys, only_heads(geometry, v, members)[1], at, alone
    )
    return z.index_copy(2, torch.tensor(members, device=z.device), mine)


@contextmanager
def _fused_hooked(attn: Any, remapped: Any) -> Iterator[None]:
    """Replace HookedTransformer's steps from scores to z; the first two do nothing."""
    waiting: list[tuple[Tensor, Tensor]] = []

    def scores(q: Tensor, k: Tensor) -> Tensor:
        waiting.append((q, k))
        return q.new_zeros((1, 1, 1, 1))

    def z(v: Float[Tensor, "batch pos kv_head d_head"], pattern: Tensor) -> Tensor:
        q, k = waiting.pop()
        out: Tensor | None = None
        if remapped is None or remapped.remapping.heads is not None:
            query, key, value = (rearrange(x, "b pos head d -> b head pos d") for x in (q, k, v))
            out = scaled_dot_product_attention(
                query,
                key,
                value,
                is_causal=True,
                scale=1 / float(attn.attn_scale),
                enable_gqa=q.shape[2] != k.shape[2],
            )
            out = rearrange(out, "b head pos d -> b pos head d")
        if remapped is not None:
            out = _remapped(q, k, v, out, remapped)
        out_z: Tensor = attn.hook_z(out)
        return out_z

    with (
        instance_method(attn, "calculate_attention_scores", scores),
        instance_method(attn, "apply_causal_mask", lambda scores, *args: scores),
        instance_method(attn, "calculate_z_scores", z),
        # There are no scores to pass to hooks; changes of the scores are applied by the kernel.
        instance_method(attn.hook_attn_scores, "_call_impl", lambda scores: scores),
    ):
        yield

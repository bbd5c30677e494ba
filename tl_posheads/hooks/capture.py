"""Rotated queries and keys of a live model: missing hook points, and capture in one pass.

HookedTransformer and TransformerBridge share the hook names ``blocks.{layer}.attn.hook_rot_q``
and ``hook_rot_k``. Where the Bridge never fires them (joint projections: GPT-NeoX, Phi-3, Falcon;
and GPT-J), :func:`rotary_hook_points` makes them fire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.fused import attention_replaced, fused_attention
from tl_posheads.hooks.inputs import layers_of
from tl_posheads.hooks.lengths import own_frequencies
from tl_posheads.hooks.model import (
    LensModel,
    PassDone,
    attention_of,
    instance_method,
    model_name,
    own_hooks,
    require_rotary,
    run_forward,
)


def hook_names(layers: Sequence[int]) -> list[str]:
    """Hook names of rotated queries and keys, for ``names_filter``.

    Example:
        >>> hook_names([0])
        ['blocks.0.attn.hook_rot_q', 'blocks.0.attn.hook_rot_k']
    """
    return [f"blocks.{layer}.attn.hook_rot_{x}" for layer in layers for x in "qk"]


class _HookedCache:
    """A KV cache whose keys go through ``hook_rot_k`` before they are cached, as elsewhere."""

    def __init__(self, cache: Any, rotated_key: Callable[[Tensor], Tensor]) -> None:
        self._cache, self._rotated_key = cache, rotated_key

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(self._rotated_key(key), *args, **kwargs)


@contextmanager
def _joint_projection(attn: Any) -> Iterator[None]:
    rotate = attn._apply_rotary_pos_emb

    def rotate_and_hook(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k = rotate(q, k, *args, **kwargs)
        return attn.hook_rot_q(q), attn.hook_rot_k(k)

    with instance_method(attn, "_apply_rotary_pos_emb", rotate_and_hook):
        yield


@contextmanager
def _gptj(attn: Any) -> Iterator[None]:
    """GPT-J keeps transformers' own attention: hook where it passes rotated q and k on."""
    inner, cached = attn.original_component, False

    def use_hooked_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal cached
        given = [name for name in ("cache", "layer_past") if kwargs.get(name) is not None]
        cached = bool(given)
        hooked = {name: _HookedCache(kwargs[name], attn.hook_rot_k) for name in given}
        return args, {**kwargs, **hooked}

    def attend_and_hook(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        key = key if cached else attn.hook_rot_k(key)
        return attend(attn.hook_rot_q(query), key, *args, **kwargs)

    with ExitStack() as stack:
        handle = inner.register_forward_pre_hook(use_hooked_cache, with_kwargs=True)
        stack.callback(handle.remove)
        if hasattr(inner, "_attn"):
            attend = inner._attn
            stack.enter_context(instance_method(inner, "_attn", attend_and_hook))
        else:  # from transformers 5.24 on
            attend = stack.enter_context(attention_replaced(inner, attend_and_hook))
        yield


def _seam(attn: Any) -> Any:
    """Context manager that makes a component fire its hooks; None if TransformerLens does."""
    names = {cls.__name__ for cls in type(attn).__mro__}
    if "JointQKVPositionEmbeddingsAttentionBridge" in names:
        return _joint_projection(attn)
    inner = type(getattr(attn, "original_component", None)).__name__
    if inner == "GPTJAttention":
        return _gptj(attn)
    if inner.startswith("HunYuan"):
        raise PosheadsError(
            "HunYuan normalises its queries and keys after their rotation, so attention does not "
            "use the vectors that RoPE rotated; choose another model"
        )
    if "CodeGenAttentionBridge" in names:
        raise PosheadsError(
            "CodeGen's attention in TransformerLens does not expose its rotated queries, so they "
            "can't be hooked; choose another model (GPT-J is the closest)"
        )
    return None


_OPEN_ATTRIBUTE = "_tl_posheads_open"


@contextmanager
def rotary_hook_points(model: LensModel) -> Iterator[Any]:
    """Inside, ``blocks.{l}.attn.hook_rot_q`` and ``hook_rot_k`` exist and fire in every layer.

    ``model.run_with_cache`` reads them and ``model.run_with_hooks`` edits them: attention uses what
    a hook returns, also with a KV cache. Shapes: ``[batch, pos, head, d_head]`` and
    ``[batch, pos, kv_head, d_head]``. The model is restored on exit, even after an exception.
    Can be nested. :func:`tl_posheads.score_heads` enters it by itself.

    Raises:
        PosheadsError: the model has no RoPE, or its attention can't be hooked.

    Example:
        >>> with rotary_hook_points(model):                     # doctest: +SKIP
        ...     _, cache = model.run_with_cache(tokens, names_filter=hook_names(range(4)))
    """
    require_rotary(model)
    if _OPEN_ATTRIBUTE in model.__dict__:
        yield model
        return
    with ExitStack() as stack:
        for layer in range(model.cfg.n_layers):
            attn = attention_of(model, layer)
            seam = None if attn is None else _seam(attn)
            if seam is not None:
                stack.enter_context(seam)
        model.__dict__[_OPEN_ATTRIBUTE] = True
        stack.callback(model.__dict__.pop, _OPEN_ATTRIBUTE)
        yield model


def capture_rotary(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"],
    consumer: Callable[
        [int, Float[Tensor, "batch pos head d_head"], Float[Tensor, "batch pos kv_head d_head"]],
        None,
    ],
    *,
    layers: Sequence[int] | None = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> None:
    """Run one forward pass that calls ``consumer(layer, rot_q, rot_k)`` for each layer.

    Nothing is kept: a layer's tensors are released when the consumer returns. The pass ends at the
    last requested layer, before its attention is computed. Attention uses fused kernels where the
    result is the same (:func:`tl_posheads.hooks.fused.fused_attention`). Elsewhere, and with an
    attention mask, peak memory beyond the consumer's is that of TransformerLens's eager attention:
    a few ``[batch, head, pos, pos]`` tensors of one layer.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE.
        tokens: on any device.
        consumer: gets the model's own tensors, without gradient; it must not modify them.
        layers: by default all that have attention. The consumer is called in ascending order.
        attention_mask: 1 for tokens, 0 for padding.

    Raises:
        PosheadsError: no RoPE; layers that the model doesn't have; a layer without attention, or
            whose rotated queries were never seen.

    Example:
        >>> def norms(layer, rot_q, rot_k):
        ...     print(layer, rot_q.norm(dim=-1).mean().item())
        >>> capture_rotary(model, tokens, norms, layers=[0, 6])      # doctest: +SKIP
    """
    require_rotary(model)
    wanted = layers_of(model, layers)
    if layers is None:
        wanted = [layer for layer in wanted if attention_of(model, layer) is not None]

    def until_last(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
        consumer(layer, rot_q, rot_k)
        if layer == wanted[-1]:
            raise PassDone

    whole = nullcontext() if attention_mask is not None else fused_attention(model)
    own = own_frequencies(model)
    with own, rotary_consumer(model, until_last, wanted), whole, suppress(PassDone):
        run_forward(model, tokens, attention_mask)


@contextmanager
def rotary_consumer(
    model: LensModel, consumer: Callable[[int, Tensor, Tensor], None], layers: Sequence[int]
) -> Iterator[None]:
    """Inside, a pass without a KV cache calls ``consumer(layer, rot_q, rot_k)`` for each layer.

    Raises:
        PosheadsError: no RoPE; on exit, a layer whose rotated queries were never seen.
    """
    with rotary_hook_points(model):
        points = {}
        for layer in layers:
            attn: Any = attention_of(model, layer)
            if attn is None or not hasattr(attn, "hook_rot_q"):
                raise PosheadsError(
                    f"layer {layer} of {model_name(model)} has no rotary attention; leave it out "
                    "of `layers`"
                )
            points[layer] = (attn.hook_rot_q, attn.hook_rot_k)
        waiting: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
        seen: set[int] = set()

        def keeper(layer: int, which: str) -> Callable[..., None]:
            def keep(value: Tensor, hook: Any) -> None:
                # GPT-J with a cache shows its keys first; all others show queries first.
                waiting[layer][which] = value.detach()
                if len(waiting[layer]) < 2:
                    return
                both, waiting[layer] = waiting[layer], {}
                seen.add(layer)
                consumer(layer, both["q"], both["k"])

            return keep

        hooks = [
            (points[layer][which], keeper(layer, "qk"[which]))
            for layer in layers
            for which in (0, 1)
        ]
        with own_hooks(hooks):
            yield
    missing = sorted(set(layers) - seen)
    if missing:
        kind = type(attention_of(model, missing[0])).__name__
        raise PosheadsError(
            f"the rotated queries of layer {missing[0]} of {model_name(model)} were never seen: "
            f"TransformerLens does not offer them for {kind}"
        )

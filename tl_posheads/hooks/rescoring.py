"""Recomputed attention scores of a live model, for layers with remapped distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import rotary_hook_points
from tl_posheads.hooks.changes import Change, changed, trained_length
from tl_posheads.hooks.masks import lowest_score
from tl_posheads.hooks.model import (
    LensModel,
    attention_of,
    instance_method,
    is_native,
    model_name,
    own_hooks,
)
from tl_posheads.hooks.positions import Positions, key_positions, text_keys, watched_positions
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.rotary.precision import MOST_ROUNDED, rounding_of
from tl_posheads.rotary.remapping import only_heads, remapped_scores


def require_scores(model: LensModel, what: str) -> None:
    """Refuse models whose scores can't be recomputed from rotated queries and keys.

    Raises:
        PosheadsError: GPT-J and multi-head latent attention, by name.
    """
    for layer in range(model.cfg.n_layers):
        attn = attention_of(model, layer)
        why = None
        if is_native(attn):
            why = "whose attention in TransformerLens shows its scores only afterwards"
        elif "MLA" in type(attn).__name__:
            why = "whose rotated vectors are only a part of its queries and keys"
        if why is not None:
            raise PosheadsError(
                f"{what} was requested for {model_name(model)}, {why}; use a method that changes "
                "only frequencies, like YaRN, or an edit by scale= or shift="
            )


@contextmanager
def rescored(
    model: LensModel, layers: Mapping[int, LayerGeometry], positions: Positions
) -> Iterator[list[Any]]:
    """Inside, the scores of ``layers`` follow their geometry's remapping.

    Use it inside ``rotary_hook_points`` and ``watched_positions``. The scores are computed from
    queries and keys after all hooks on ``hook_rot_q`` and ``hook_rot_k``, in float32 at least.

    Yields:
        Handles of the hooks on the scores.

    Raises:
        PosheadsError: from the hooks, if attention stores its scores in half precision and they
            are so large that this rounds them by half a nat or more.
    """
    with ExitStack() as stack:
        # One for all layers: they run one after the other, so no tensors are held longer.
        seen: dict[str, Tensor] = {}
        for layer in layers:
            attn: Any = attention_of(model, layer)
            for which in "qk":
                point = getattr(attn, f"hook_rot_{which}")
                keeper = _keep(point, which, seen, positions)
                stack.enter_context(instance_method(point, "_call_impl", keeper))
            if hasattr(attn, "_update_kv_cache"):  # the Bridge caches rotated keys
                spy = _with_cached(attn._update_kv_cache, seen)
                stack.enter_context(instance_method(attn, "_update_kv_cache", spy))
        points = model.hook_dict
        scores = [
            (points[f"blocks.{layer}.attn.hook_attn_scores"], _rescore(seen, geometry))
            for layer, geometry in layers.items()
        ]
        yield stack.enter_context(own_hooks(scores))


@contextmanager
def remapped(model: LensModel, layers: Mapping[int, LayerGeometry], name: str) -> Iterator[None]:
    """Inside, ``layers`` use the distances of their remapping: the edit ``name`` is active."""
    with ExitStack() as stack:
        stack.enter_context(rotary_hook_points(model))
        positions = stack.enter_context(watched_positions(model))
        handles = stack.enter_context(rescored(model, layers, positions))

        def inside(layer: LayerGeometry, length: int) -> LayerGeometry:
            if layer.layer not in layers:
                return layer
            return replace(layer, remapping=layers[layer.layer].remapping)

        change = Change(
            name=name,
            kind="edit",
            trained=trained_length(model),
            geometry=inside,
            remapped=dict(layers),
            handles=handles,
        )
        stack.enter_context(changed(model, change))
        yield


def _with_cached(update: Callable[..., Any], seen: dict[str, Tensor]) -> Callable[..., Any]:
    def update_and_keep(k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        k, v = update(k, v, **kwargs)
        seen["k"] = k.transpose(1, 2)
        return k, v

    return update_and_keep


def _keep(
    point: Any, which: str, seen: dict[str, Tensor], positions: Positions
) -> Callable[..., Any]:
    """Keep the hook point's result: a hook couldn't be sure to be the last one on it."""
    call, turned = point._call_impl, getattr(point, "hook_conversion", None) is not None

    def call_and_keep(*args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        x = out.transpose(1, 2) if turned else out  # [batch, pos, head, d_head]
        seen[which] = x
        if which == "q":
            seen["at"] = positions.of(x)
        return out

    return call_and_keep


def _rescore(seen: dict[str, Tensor], geometry: LayerGeometry) -> Callable[..., Tensor]:
    assert geometry.remapping is not None
    heads = list(geometry.remapping.heads or range(geometry.n_heads))

    def hook(scores: Float[Tensor, "batch head q_pos k_pos"], hook: Any) -> Tensor:
        q, k, q_pos = seen.pop("q"), seen.pop("k"), seen.pop("at")
        k_pos = key_positions(q_pos, text_keys(scores))
        alone, keys = only_heads(geometry, k, heads)
        lowest = lowest_score(
            q[:, :, heads].detach().transpose(1, 2),
            keys.detach().transpose(1, 2),
            geometry.attention_scale,
            scores.dtype,
        )
        out = scores.clone()  # autograd and others may hold the old ones
        # Other heads' scores stay identical bit for bit.
        for rows, new, unchanged in remapped_scores(q[:, :, heads], keys, q_pos, k_pos, alone):
            old = scores[:, heads, rows, : new.shape[-1]]
            stay = unchanged[:, None] | (old < lowest[:, :, rows])
            new = torch.where(stay, old.to(new.dtype), new)
            rounded = rounding_of(new, old.dtype)
            if rounded >= MOST_ROUNDED:
                raise PosheadsError(
                    f"scores of layer {geometry.layer} are so large that {old.dtype}, in which its "
                    f"attention stores them, rounds them by up to {rounded:.2g} nats; load the "
                    "model in float32 (bfloat16 suffices where attention uses fused kernels, "
                    "with no hook on scores or pattern)"
                )
            out[:, heads, rows, : new.shape[-1]] = new.to(old.dtype)
        return out

    return hook

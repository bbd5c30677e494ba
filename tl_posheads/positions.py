"""Positions of the tokens in a running pass, as the model itself counts them.

Padding and KV caches decide where a pass begins; nobody knows better than the place where the
model turns positions into angles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.lens import attention, instance_method, model_name


class Positions:
    """Positions of what was rotated last: read them in a hook on ``hook_rot_q`` or ``hook_rot_k``.

    In a Bridge those of the new tokens; in a HookedTransformer, at ``hook_rot_k``, those of all
    keys, since it rotates the cached ones afresh.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None

    def put(self, position: Tensor) -> None:
        self._last = position

    def of(self, x: Tensor) -> Int[Tensor, "batch pos"]:
        """For ``x`` of shape ``[batch, pos, head, d_head]``."""
        last = self._last
        if last is None or last.shape[-1] != x.shape[1]:
            # DeepSeek's fallback, and a layer run by itself: both count from 0.
            last = torch.arange(x.shape[1])
        return last.to(x.device).reshape(-1, x.shape[1]).expand(x.shape[0], -1)


def key_positions(q_pos: Int[Tensor, "batch q_pos"], n_k: int) -> Int[Tensor, "batch k_pos"]:
    """Positions of all keys, cached ones before, the last key being the last query's.

    Padding on the left gets negative ones, on the right larger ones than it has; both are masked.
    """
    n_q = q_pos.shape[1]
    # transformers gives all padding position 1: count from the end where no padding is.
    from_end = n_q == 1 or bool((q_pos[:, -1] - q_pos[:, -2] == 1).all())
    anchor = q_pos[:, -1:] - (n_k - 1) if from_end else q_pos[:, :1] - (n_k - n_q)
    return anchor + torch.arange(n_k, device=q_pos.device)


@contextmanager
def watched_positions(model: Any) -> Iterator[Positions]:
    """Inside, the positions of the running pass can be read from what this yields."""
    positions = Positions()
    with ExitStack() as stack:
        for layer in range(model.cfg.n_layers):
            attn: Any = attention(model, layer)
            if hasattr(attn, "apply_rotary"):  # HookedTransformer
                wrapper = _hooked(attn.apply_rotary, positions)
                stack.enter_context(instance_method(attn, "apply_rotary", wrapper))
            inner: Any = getattr(attn, "original_component", None)
            if hasattr(inner, "embed_positions"):  # GPT-J
                handle = inner.register_forward_pre_hook(_gptj(positions), with_kwargs=True)
                stack.callback(handle.remove)
        whole = getattr(model, "original_model", None)
        for name, module in [] if whole is None else whole.named_modules():
            if name.split(".")[-1] == "rotary_emb":
                hook = _rotary_embedding(model, positions)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield positions


def _hooked(rotate: Callable[..., Tensor], positions: Positions) -> Callable[..., Tensor]:
    def apply_rotary(x: Tensor, past_kv_pos_offset: int = 0, attention_mask: Any = None) -> Tensor:
        if attention_mask is None:
            at = torch.arange(past_kv_pos_offset, past_kv_pos_offset + x.shape[1])
        else:
            from transformer_lens.utilities import get_offset_position_ids

            at = get_offset_position_ids(past_kv_pos_offset, attention_mask)
        positions.put(at)
        return rotate(x, past_kv_pos_offset, attention_mask)

    return apply_rotary


def _gptj(positions: Positions) -> Callable[..., None]:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("position_ids") is not None:
            positions.put(kwargs["position_ids"])

    return hook


def _rotary_embedding(model: Any, positions: Positions) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if not isinstance(at, Tensor):
            return
        if at.ndim > 2:
            raise PosheadsError(
                f"{model_name(model)} gives a token {at.shape[0]} positions (as models of pictures "
                "do); only models with one position a token can be extended or edited"
            )
        positions.put(at)

    return hook

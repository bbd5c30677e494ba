"""Positions of a running pass's tokens: in their texts, and as the model itself counts them.

Both depend on padding and KV caches. Where a row's text is follows from the masked scores
(:func:`text_keys`), which every padded pass has, whoever made its mask. How far a token was
rotated is best read where the model turns positions into angles (:func:`watched_positions`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.model import LensModel, attention_of, instance_method, model_name


class Positions:
    """Positions of the vectors rotated last, for hooks on ``hook_rot_q`` or ``hook_rot_k``.

    In a Bridge, those of the new tokens; in a HookedTransformer at ``hook_rot_k``, those of all
    keys, because it rotates the cached ones again.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._mask: Tensor | None = None

    def put(self, position: Tensor) -> None:
        self._last = position

    def put_mask(self, attention_mask: Tensor | None) -> None:
        self._mask = attention_mask

    def of(self, x: Tensor) -> Int[Tensor, "batch pos"]:
        """For ``x`` of shape ``[batch, pos, head, d_head]``."""
        last = self._last
        if last is None or last.shape[-1] != x.shape[1]:
            # DeepSeek's fallback, and a layer run on its own: both count from 0.
            last = torch.arange(x.shape[1])
        return last.to(x.device).reshape(-1, x.shape[1]).expand(x.shape[0], -1)

    def lengths(self, x: Tensor) -> list[int]:
        """Tokens of each row's text so far, those in a KV cache included; at least 1."""
        at, mask = self.of(x), self._mask
        if mask is not None and mask.ndim == 2 and mask.shape[1] >= x.shape[1]:
            # A Bridge keeps counting over padding on the right; a HookedTransformer stops there.
            at = at.masked_fill(mask[:, -x.shape[1] :].to(x.device) == 0, 0)
        return [int(last) + 1 for last in at.amax(1)]


def text_keys(scores: Float[Tensor, "batch head q_pos k_pos"]) -> Bool[Tensor, "batch k_pos"]:
    """Which keys are text: those that some query attends to. None attends to padding.

    Args:
        scores: masked scores. TransformerLens masks with -inf or about the dtype's lowest number.
    """
    # NaN is no mask. One head may have scores so low, but not all heads for all queries of a key.
    return ~(scores.detach().amax((1, 2)) < torch.finfo(scores.dtype).min / 2)


class TextPositions:
    """Positions of the queries of one layer's running pass: hook :meth:`read` on its scores.

    Attributes:
        q: ``[batch, q_pos]``. 0 is the first token of the row's text, wherever it is in the row
            or the KV cache; -1 is padding on either side.
    """

    def __init__(self, windowed: bool) -> None:
        self.q: Int[Tensor, "batch q_pos"] = torch.empty(0, 0, dtype=torch.long)
        self._windowed = windowed
        self._text: Tensor | None = None

    def read(self, scores: Float[Tensor, "batch head q_pos k_pos"], hook: Any) -> None:
        n_q, n_k = scores.shape[-2:]
        text = text_keys(scores)
        if self._windowed and n_k > n_q:
            # The cache of a windowed layer drops keys, and its window masks others that it keeps.
            past, known = torch.ones_like(text[:, n_q:]), self._text
            if known is not None and len(known) == len(text) and known.shape[1] >= n_k - n_q:
                past = known
            text = torch.cat([past, text[:, -n_q:]], 1)
        self._text = text
        self.q = torch.where(text, text.cumsum(1) - 1, -1)[:, -n_q:]


def key_positions(
    q_pos: Int[Tensor, "batch q_pos"], text: Bool[Tensor, "batch k_pos"]
) -> Int[Tensor, "batch k_pos"]:
    """The model's positions of all keys, cached ones first; the last key is the last query's.

    Args:
        q_pos: the model's positions of the queries, which may be anything at padding.
        text: as from :func:`text_keys`; models keep counting over padding between texts.
    """
    before = text.cumsum(1)
    # Counted back from the row's last query that is text.
    n_q, n_k = q_pos.shape[1], text.shape[1]
    order = torch.arange(n_q, device=text.device)
    last = torch.where(text[:, n_k - n_q :], order, -1).amax(1, keepdim=True).clamp_min(0)
    return q_pos.gather(1, last) - before.gather(1, last + n_k - n_q) + before


@contextmanager
def watched_positions(model: LensModel) -> Iterator[Positions]:
    """Yields an object that holds the positions of the running pass."""
    positions = Positions()
    with ExitStack() as stack:
        for layer in range(model.cfg.n_layers):
            attn: Any = attention_of(model, layer)
            if hasattr(attn, "apply_rotary"):  # HookedTransformer
                wrapper = _hooked(attn.apply_rotary, positions)
                stack.enter_context(instance_method(attn, "apply_rotary", wrapper))
            inner: Any = getattr(attn, "original_component", None)
            if hasattr(inner, "embed_positions"):  # GPT-J
                handle = inner.register_forward_pre_hook(_gptj(positions), with_kwargs=True)
                stack.callback(handle.remove)
        whole = getattr(model, "original_model", None)
        if whole is not None:
            mask = whole.register_forward_pre_hook(_mask(positions), with_kwargs=True)
            stack.callback(mask.remove)
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
            from transformer_lens.utilities import get_offset_position_ids  # type: ignore[attr-defined]

            at = get_offset_position_ids(past_kv_pos_offset, attention_mask)
        positions.put(at)
        return rotate(x, past_kv_pos_offset, attention_mask)

    return apply_rotary


def _mask(positions: Positions) -> Callable[..., None]:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        positions.put_mask(mask if isinstance(mask, Tensor) else None)

    return hook


def _gptj(positions: Positions) -> Callable[..., None]:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("position_ids") is not None:
            positions.put(kwargs["position_ids"])

    return hook


def _rotary_embedding(model: LensModel, positions: Positions) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if not isinstance(at, Tensor):
            return
        if at.ndim > 2:
            raise PosheadsError(
                f"{model_name(model)} gives a token {at.shape[0]} positions (as multimodal models "
                "do); only models with one position per token can be extended or edited"
            )
        positions.put(at)

    return hook

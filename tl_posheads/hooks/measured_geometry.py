"""Measures a model's rotary geometry from one pass in which all positions hold the same vector."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import rotary_hook_points
from tl_posheads.hooks.inputs import layers_of, require_finite
from tl_posheads.hooks.lengths import context_length, own_frequencies, own_length_matters
from tl_posheads.hooks.masks import visible_keys, window_of
from tl_posheads.hooks.model import (
    LensModel,
    PassDone,
    attention_of,
    model_name,
    one_thread,
    others_hooks_suspended,
    own_hooks,
    run_forward,
)
from tl_posheads.rotary.contributions import rotate_by
from tl_posheads.rotary.geometry import LayerGeometry, share_keys

_POINTS = (
    "hook_rot_q",
    "hook_rot_k",
    "hook_q",
    "hook_k",
    "hook_attn_scores",
    "hook_cos",
    "hook_sin",
)
# A window up to this length shows in the mask; the measured pass is long enough.
_LONGEST_SEEN_WINDOW = 512


def measured_layers(
    model: LensModel, *, length: int, layers: Sequence[int] | None
) -> tuple[str, tuple[LayerGeometry, ...]]:
    """Name and layers for ``RotaryGeometry.from_model``."""
    asked, n_layers, name = layers_of(model, layers), int(model.cfg.n_layers), model_name(model)
    wanted = [layer for layer in asked if attention_of(model, layer) is not None]
    if not wanted:
        raise PosheadsError(
            f"TransformerLens shows no attention in layers {asked} of {name}; choose other layers "
            "or another model"
        )
    for layer in wanted:
        _require_every_key(model, layer)
    # Thousands of small operations: next to another busy process, distributing each over threads
    # takes a hundred times as long as the operation itself.
    with one_thread(), own_frequencies(model), rotary_hook_points(model):
        windows = [_declared_window(model, layer) for layer in range(n_layers)]
        short = [w for w in windows if w is not None and w <= _LONGEST_SEEN_WINDOW]
        if not own_length_matters(model):  # else another length has other frequencies
            n_ctx = context_length(model) or length
            length = min(max([length, *(w + 2 for w in short)]), n_ctx)
        length = max(2, length)
        tokens = torch.full((1, length), _plain_token(model), dtype=torch.long)
        seen = _observe(model, tokens, wanted)
        found = {
            layer: _layer_geometry(model, layer, seen[layer], windows[layer]) for layer in wanted
        }
    any_layer = next(iter(found.values()))
    return name, tuple(
        found.get(layer, _placeholder(layer, any_layer)) for layer in range(n_layers)
    )


def _placeholder(layer: int, like: LayerGeometry) -> LayerGeometry:
    return LayerGeometry(
        layer=layer,
        layout="half",
        d_head=like.d_head,
        rotary_dim=0,
        inv_freq=torch.zeros(0, dtype=torch.float64),
        rotation_scale=1.0,
        attention_scale=like.attention_scale,
        softcap=None,
        window=None,
        kv_head=like.kv_head,
    )


def _plain_token(model: LensModel) -> int:
    """A token other than padding, which some models treat differently."""
    tokenizer = getattr(model, "tokenizer", None)
    special = set(getattr(tokenizer, "all_special_ids", None) or ())
    vocabulary = int(getattr(model.cfg, "d_vocab", None) or 8)
    return next(t for t in range(vocabulary // 2, 2 * vocabulary) if t % vocabulary not in special)


def _declared_window(model: LensModel, layer: int) -> int | None:
    """The window that the layer declares; short windows are also checked against the mask."""
    attn: Any = attention_of(model, layer)
    if hasattr(attn, "attn_type"):  # HookedTransformer
        return int(model.cfg.window_size) if attn.attn_type == "local" else None
    inner = getattr(attn, "original_component", None)
    config = getattr(inner, "config", None)
    window = getattr(inner, "sliding_window", None)
    if window is None and getattr(config, "use_sliding_window", True):
        window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds and kinds[layer] != "sliding_attention"):
        return None
    return int(window)


def _require_every_key(model: LensModel, layer: int) -> None:
    """Refuse attention whose gaps only show in texts longer than the measured pass."""
    inner: Any = getattr(attention_of(model, layer), "original_component", None)
    config: Any = getattr(inner, "config", None)
    kinds = getattr(config, "layer_types", None)
    why = None
    if getattr(config, "index_topk", None):
        why = f"attends to {config.index_topk} keys chosen by content (sparse attention)"
    elif kinds and kinds[layer] == "chunked_attention":
        why = "attends only to keys of its own chunk of the text"
    if why is not None:
        raise PosheadsError(
            f"a query in layer {layer} of {model_name(model)} {why}; only attention to all earlier "
            "keys, or to the last ones in a sliding window, can be scored"
        )


class _Layer(dict[str, Tensor]):
    """One layer's values at its hook points, by name; the rotation's as cos and sin."""


@contextmanager
def _rotations_passed_by(model: LensModel, seen: dict[int, _Layer]) -> Iterator[None]:
    """DeepSeek-V2 rotates complex numbers and GPT-J isn't wrapped: both bypass hook_cos."""
    handles = []

    def keep(module: Any, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_complex():
            for layer in seen.values():
                layer.setdefault("hook_cos", output.real)
                layer.setdefault("hook_sin", output.imag)
        elif type(module).__name__ == "GPTJRotaryEmbedding":  # sine first
            for layer in seen.values():
                layer.setdefault("hook_sin", output[0])
                layer.setdefault("hook_cos", output[1])

    inner: Any = getattr(model, "original_model", model)
    for module_name, module in inner.named_modules():
        if module_name.split(".")[-1] == "rotary_emb":
            handles.append(module.register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _ended_before(module: Any) -> Iterator[None]:
    """Inside, a pass ends before ``module``: the logits aren't needed."""

    def end(*_: Any) -> None:
        raise PassDone

    handle = module.register_forward_pre_hook(end) if isinstance(module, nn.Module) else None
    try:
        with suppress(PassDone):
            yield
    finally:
        if handle is not None:
            handle.remove()


def _observe(model: LensModel, tokens: Tensor, layers: Sequence[int]) -> dict[int, _Layer]:
    seen = {layer: _Layer() for layer in layers}
    again: set[int] = set()

    def keeper(layer: int, name: str) -> Any:
        def keep(value: Tensor, hook: Any) -> None:
            if name == "hook_rot_q" and name in seen[layer]:
                again.add(layer)
            seen[layer][name] = value.detach()

        return keep

    def same_everywhere(value: Tensor, hook: Any) -> Tensor:
        return value[:, :1].expand_as(value).contiguous()

    # Sinks, convolutions and recurrent layers treat positions of the same token differently.
    hooks = [
        (
            getattr(attention_of(model, i), "hook_in", None) or model.blocks[i].hook_resid_pre,
            same_everywhere,
        )
        for i in layers
    ]
    hooks += [
        (getattr(attention_of(model, layer), name), keeper(layer, name))
        for layer in layers
        for name in _POINTS
        if hasattr(attention_of(model, layer), name)
    ]
    # Hooks of others edit the model; the measurement is of its own rotation.
    quiet = (others_hooks_suspended(model), _ended_before(getattr(model, "unembed", None)))
    with quiet[0], own_hooks(hooks), _rotations_passed_by(model, seen), quiet[1]:
        run_forward(model, tokens)
    if again:
        raise PosheadsError(
            f"layer {min(again)} of {model_name(model)} runs more than once in a pass (a looped "
            "model), so that its heads have several scores; choose another model"
        )
    n = tokens.shape[1]
    for layer in layers:
        attn: Any = attention_of(model, layer)
        inner: Any = getattr(attn, "original_component", None)
        if hasattr(attn, "rotary_cos"):  # HookedTransformer
            seen[layer]["hook_cos"] = attn.rotary_cos[:n]
            seen[layer]["hook_sin"] = attn.rotary_sin[:n]
        elif hasattr(inner, "embed_positions") and "hook_cos" not in seen[layer]:  # GPT-J
            half = inner.embed_positions.shape[-1] // 2
            seen[layer]["hook_sin"] = inner.embed_positions[:n, :half]
            seen[layer]["hook_cos"] = inner.embed_positions[:n, half:]
    return seen


def _layer_geometry(
    model: LensModel, layer: int, seen: _Layer, declared: int | None
) -> LayerGeometry:
    where = f"layer {layer} of {model_name(model)}"
    if not {"hook_rot_q", "hook_rot_k"} <= seen.keys():
        raise PosheadsError(
            f"the rotated queries and keys of {where} were never seen: TransformerLens does not "
            f"offer them for {type(attention_of(model, layer)).__name__}"
        )
    rot_q, rot_k = seen["hook_rot_q"][0], seen["hook_rot_k"][0]
    kv_head = share_keys(rot_q.shape[1], rot_k.shape[1])
    require_finite(layer, rot_q, rot_k, kv_head)
    layout, inv_freq, scale = _rotation(rot_q, seen, where)
    scores = seen.get("hook_attn_scores")
    own_scale, softcap = declared_scale(model, layer, rot_q.shape[-1])
    q, k = _whole_vectors(seen, rot_q, rot_k)
    visible = visible_keys(q, k, scores, own_scale, where)
    attention_scale = measured_scale(q, k, scores, softcap, own_scale, where)
    return LayerGeometry(
        layer=layer,
        layout=layout,
        d_head=rot_q.shape[-1],
        rotary_dim=2 * len(inv_freq),
        inv_freq=inv_freq,
        rotation_scale=scale,
        attention_scale=attention_scale,
        softcap=softcap,
        window=declared if visible is None else window_of(visible, declared, where),
        kv_head=kv_head,
    )


def _tolerance(x: Tensor) -> float:
    return {torch.float64: 1e-4, torch.float32: 1e-3}.get(x.dtype, 0.1)


def _frequencies(cos: Tensor, sin: Tensor) -> Tensor:
    """Radians per token of each column: unwrapped by doubling, then fitted through zero."""
    angle = torch.atan2(sin.double(), cos.double())
    angle = angle - angle[:1]
    n, turn = len(angle), 2 * math.pi
    theta = angle[1] - turn * (angle[1] / turn).round()
    step = 2
    while step < n:
        # The error of the current estimate, times `step`, stays far below half a turn.
        expected = theta * step
        theta = (expected + _wrap(angle[step] - expected)) / step
        step *= 2
    position = torch.arange(n, dtype=torch.float64, device=angle.device)[:, None]
    rest = _wrap(angle - position * theta)
    return theta + (position * rest).sum(0) / (position * position).sum()


def _wrap(angle: Tensor) -> Tensor:
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def _rotation(
    rot_q: Tensor, seen: _Layer, where: str
) -> tuple[Literal["half", "adjacent"], Tensor, float]:
    """Layout, frequencies and scale: the reading of cos and sin that matches the queries."""
    nothing = torch.zeros(0, dtype=torch.float64)
    still = _misfit(rot_q, rot_q[:1].expand_as(rot_q))
    if "hook_cos" not in seen:
        if still < _tolerance(rot_q):
            return "half", nothing, 1.0
        raise PosheadsError(
            f"{where} rotates its queries, but doesn't expose the cosines and sines; "
            f"this kind of attention is not supported"
        )
    cos, sin = (seen[name].reshape(-1, seen[name].shape[-1]) for name in ("hook_cos", "hook_sin"))
    cos, sin = cos[: len(rot_q)].cpu(), sin[: len(rot_q)].cpu()
    width, rot_q = cos.shape[-1], rot_q.cpu()
    columns = [slice(0, width // 2), slice(0, width, 2), slice(0, width)]
    best: tuple[float, Any] = (math.inf, None)
    for column in columns:
        inv_freq = _frequencies(cos[:, column], sin[:, column])
        if not 0 < 2 * len(inv_freq) <= rot_q.shape[-1]:
            continue
        for layout in ("half", "adjacent"):
            geometry = LayerGeometry.from_inv_freq(
                inv_freq, rot_q.shape[1], d_head=rot_q.shape[-1], layout=layout
            )
            first = rot_q[:1].double().expand(rot_q.shape)
            predicted = rotate_by(first, torch.arange(len(rot_q)), geometry)
            misfit = _misfit(rot_q, predicted)
            if misfit < 0.5 * best[0]:  # prefer the first among equals: Llama's, the most common
                best = (misfit, (layout, inv_freq))
        if best[0] < 0.1 * _tolerance(rot_q):
            break
    if still < _tolerance(rot_q) and still <= best[0]:
        return "half", nothing, 1.0
    if best[0] > _tolerance(rot_q):
        raise PosheadsError(
            f"{where} does not turn its queries as its cosines and sines say (off by "
            f"{best[0]:.1%}); this kind of attention is not supported"
        )
    layout, inv_freq = best[1]
    return layout, inv_freq, float((cos.double() ** 2 + sin.double() ** 2).sqrt().mean())


def _misfit(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return float((x - y).abs().max() / x.abs().max().clamp_min(1e-30))


def _whole_vectors(seen: _Layer, rot_q: Tensor, rot_k: Tensor) -> tuple[Tensor, Tensor]:
    """The full query and key vectors: with MLA only a part of them is rotated."""
    q, k = seen.get("hook_q"), seen.get("hook_k")
    is_latent = q is not None and k is not None and q.ndim == 4 and q.shape[1] == rot_q.shape[1]
    if is_latent and q.shape[-1] > rot_q.shape[-1] and q.shape[2] == rot_q.shape[0]:  # type: ignore[union-attr]
        return q[0], k[0]  # type: ignore[index]
    share = torch.as_tensor(share_keys(rot_q.shape[1], rot_k.shape[1]), device=rot_k.device)
    return rot_q.transpose(0, 1), rot_k.index_select(1, share).transpose(0, 1)


def declared_scale(model: LensModel, layer: int, d_head: int) -> tuple[float, float | None]:
    attn: Any = attention_of(model, layer)
    if hasattr(attn, "attn_scale"):  # HookedTransformer divides
        cap = float(getattr(model.cfg, "attn_scores_soft_cap", -1) or -1)
        return 1 / float(attn.attn_scale), cap if cap > 0 else None
    inner: Any = getattr(attn, "original_component", None)
    softcap = getattr(inner, "attn_logit_softcapping", None)
    scale = getattr(inner, "scaling", None) or getattr(inner, "softmax_scale", None)
    if hasattr(inner, "scale_attn"):  # GPT-J divides
        scale = 1 / float(inner.scale_attn)
    return float(scale or d_head**-0.5), float(softcap) if softcap else None


def measured_scale(
    q: Tensor, k: Tensor, scores: Tensor | None, softcap: float | None, declared: float, where: str
) -> float:
    """Least-squares factor of scores on products; the declared number if both agree."""
    visible = visible_keys(q, k, scores, declared, where)
    if scores is None or visible is None:
        return declared
    product = q.double() @ k.double().transpose(-1, -2)
    x, y = product[visible], scores[0].double()[visible]
    if softcap is not None:
        inside = y.abs() < 0.9 * softcap
        x, y = x[inside], softcap * torch.atanh(y[inside] / softcap)
    if len(x) == 0 or float(x.abs().max()) == 0:
        return declared
    measured = float((x * y).sum() / (x * x).sum())
    if _misfit(y, measured * x) > 10 * _tolerance(scores):
        raise PosheadsError(
            f"the attention scores of {where} are not a multiple of q . k at its hooks (something "
            "is added to them, or queries are changed after their rotation); this kind of "
            "attention is not supported"
        )
    return declared if abs(measured / declared - 1) < 0.02 else measured

"""Pairs of a live model clamped to angles that training saw: later layers then change too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import rotary_hook_points
from tl_posheads.hooks.changes import (
    Change,
    changed,
    changes_of,
    require_fixed_frequencies,
    trained_length,
    trained_of,
)
from tl_posheads.hooks.heads import Head, by_layer, heads_of
from tl_posheads.hooks.model import LensModel, model_name, own_hooks, require_rotary
from tl_posheads.hooks.rescoring import remapped, require_scores
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.rotary.remapping import Region, Remapping, every_pair
from tl_posheads.studies.ood_angles.clamping import check_pairs, ood_pairs


def clamped(
    layer: LayerGeometry, heads: Sequence[int], pairs: Iterable[int], trained: int
) -> LayerGeometry:
    """The layer with pairs of some heads at relative distances ``min(d, trained - 1)``.

    Two regions: distances below ``trained``, which stay, and the others, where a clamped pair's
    query stands at ``trained - 1`` and its key at 0.

    Raises:
        PosheadsError: pairs that the layer doesn't have.
    """
    held = torch.zeros(layer.n_pairs, dtype=torch.bool)
    held[check_pairs(pairs, layer)] = True

    def at(place: int) -> Callable[[Tensor], Tensor]:
        def move(position: Tensor) -> Tensor:
            return torch.where(held.to(position.device), place, position[..., None, None].double())

        return move

    def region(q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (q_pos - k_pos >= trained).long()

    regions = (Region(), Region(at(trained - 1), at(0)))
    return replace(layer, remapping=Remapping(regions, region, heads=tuple(heads)))


@contextmanager
def clamp_rotary(
    model: LensModel,
    heads: Sequence[Head],
    pairs: Iterable[int] | None = None,
    *,
    trained: int | None = None,
) -> Iterator[Any]:
    """Inside, rotary pairs of ``heads`` see no larger distance than training had.

    A pair's relative angle is ``theta * min(d, trained - 1)``; content, other pairs and other
    heads stay, and scores at distances below ``trained`` stay bit for bit. With all pairs of all
    heads it is ReRoPE (Su 2023) with its window at the training length.
    ``edit_rotary`` can't do this: ``freeze=`` holds a pair at one distance also where training saw
    others, and ``remap=`` slows it at all of them.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE; enter ``Unchanged()`` first for
            texts longer than ``cfg.n_ctx``.
        heads: ``(layer, head)`` pairs.
        pairs: rotary pairs, 0 the fastest; by default those of each layer that training did not
            see a full turn of.
        trained: tokens of a training text; the checkpoint's own length by default.

    Yields:
        The model.

    Memory: as ``edit_rotary(freeze=...)``.

    Raises:
        PosheadsError: no RoPE; heads or pairs that don't exist; a layer without RoPE; another
            change of scores or edit in force; frequencies that depend on the text's length; GPT-J
            and DeepSeek.

    Example:
        >>> with Unchanged()(model, trained=256), clamp_rotary(model, heads):   # doctest: +SKIP
        ...     loss = model(tokens, return_type="loss")
    """
    require_rotary(model)
    members = by_layer(heads_of(model, heads))
    known = trained_of(model, trained)
    wanted = None if pairs is None else list(pairs)
    require_room(model)
    with rotary_hook_points(model):
        geometry = RotaryGeometry.from_model(model, layers=list(members) or None)
        layers = {}
        for layer, chosen in members.items():
            here = geometry[layer]
            if not here.n_pairs:
                raise PosheadsError(
                    f"layer {layer} of {model_name(model)} has no RoPE; leave its heads out"
                )
            held = wanted
            if held is None:
                held = torch.nonzero(ood_pairs(here.inv_freq, known)).flatten().tolist()
            layers[layer] = clamped(here, chosen, held, known)
        with remapped(model, layers, name=f"clamp_rotary(pairs={wanted}, trained={known})"):
            yield model


def require_room(model: LensModel) -> None:
    """Refuse models whose scores can't be recomputed, and changes that would conflict.

    Raises:
        PosheadsError: as :func:`clamp_rotary`.
    """
    for change in changes_of(model):
        if change.kind == "edit" or change.remapped:
            raise PosheadsError(
                f"pairs of {model_name(model)} were to be clamped while {change.name} is in force; "
                "leave that first"
            )
    require_fixed_frequencies(
        model, "clamping pairs", "load it with rope_parameters of type 'default'"
    )
    require_scores(model, "clamping pairs")


@contextmanager
def hiding(model: LensModel, layers: Mapping[int, LayerGeometry], trained: int) -> Iterator[None]:
    """Inside, the heads of each remapping can't attend to keys ``trained`` or more tokens away.

    For whole texts in one pass, without padding and without a KV cache.
    """
    near = {
        layer: replace(
            geometry,
            window=min(trained, geometry.window or trained),
            remapping=Remapping((Region(),), every_pair, heads=geometry.remapping.heads),
        )
        for layer, geometry in layers.items()
        if geometry.remapping is not None
    }

    def hook_of(layer: LayerGeometry) -> Callable[..., Tensor]:
        assert layer.remapping is not None
        heads = list(layer.remapping.heads or range(layer.n_heads))

        def hook(scores: Float[Tensor, "batch head pos pos"], hook: Any) -> Tensor:
            at = torch.arange(scores.shape[-1], device=scores.device)
            far = at[:, None] - at >= trained
            out = scores.clone()
            out[:, heads] = scores[:, heads].masked_fill(far, torch.finfo(scores.dtype).min)
            return out

        return hook

    points = model.hook_dict
    hooks = [
        (points[f"blocks.{i}.attn.hook_attn_scores"], hook_of(here)) for i, here in near.items()
    ]
    with rotary_hook_points(model), own_hooks(hooks) as handles:
        # Fused attention does the hooks' work by the geometry's window.
        change = Change(
            name=f"keys from {trained} tokens on hidden",
            kind="edit",
            trained=trained_length(model),
            geometry=lambda layer, length: layer,
            remapped=near,
            handles=handles,
        )
        with changed(model, change):
            yield

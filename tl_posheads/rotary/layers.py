"""A layer out of a model's geometry, and some of its heads, as functions are asked for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from tl_posheads.errors import PosheadsError

if TYPE_CHECKING:
    from tl_posheads.rotary.geometry import LayerGeometry


@runtime_checkable
class ModelGeometry(Protocol):
    """The part of ``RotaryGeometry`` that the mathematics needs."""

    @property
    def layers(self) -> Sequence[LayerGeometry]: ...


def layer_of(geometry: LayerGeometry | ModelGeometry, layer: int | None) -> LayerGeometry:
    """The geometry of a model's layer; without ``layer`` the one that was given.

    Raises:
        PosheadsError: ``layer`` is missing beside a model's geometry, or isn't a layer of it with
            RoPE; or it was given beside one layer's.
    """
    if not isinstance(geometry, ModelGeometry):
        if layer is not None:
            raise PosheadsError(
                f"layer={layer!r} was given with {geometry!r}, which is one layer's; leave it out, "
                "or give RotaryGeometry.from_model(model)"
            )
        return geometry
    known = [place for place, one in enumerate(geometry.layers) if one.n_pairs]
    if layer not in known:
        raise PosheadsError(
            f"layer={layer!r} was given with {geometry!r}; expected a layer that was measured and "
            f"has RoPE, one of {known}"
        )
    return geometry.layers[layer]


def heads_in(geometry: LayerGeometry, head: int | Sequence[int] | None) -> list[int]:
    """Query heads of a layer as a list; None is all.

    Raises:
        PosheadsError: one that the layer doesn't have.
    """
    known = range(len(geometry.kv_head))
    heads = list(known) if head is None else np.atleast_1d(head).tolist()
    if not heads or not set(heads) <= set(known):
        raise PosheadsError(
            f"head={head!r} was given; expected one of the layer's 0 to {known[-1]}, or a list"
        )
    return heads


def is_one(head: int | Sequence[int] | None) -> bool:
    """Whether one head is asked for by its number, so that a result has no axis of heads."""
    return head is not None and np.ndim(head) == 0

"""Resolve the ``layer`` and ``head`` arguments of functions that take a geometry."""

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
    """The geometry of a model's layer; without ``layer``, the geometry that was given.

    Raises:
        PosheadsError: ``layer`` is missing with a model's geometry, or isn't one of its layers with
            RoPE; or it was given with a single layer's geometry.
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
    """Query heads of a layer as a list; None means all.

    Raises:
        PosheadsError: a head that the layer doesn't have.
    """
    known = range(len(geometry.kv_head))
    heads = list(known) if head is None else np.atleast_1d(head).tolist()
    if not heads or not set(heads) <= set(known):
        raise PosheadsError(
            f"head={head!r} was given; expected one of the layer's 0 to {known[-1]}, or a list"
        )
    return heads


def is_one(head: int | Sequence[int] | None) -> bool:
    """Whether ``head`` is an int, so that a result has no axis ``head``."""
    return head is not None and np.ndim(head) == 0

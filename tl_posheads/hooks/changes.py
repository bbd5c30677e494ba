"""Changes that this package's contexts have made to a live model, and the text lengths it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.lengths import (
    ANY_LENGTH,
    checkpoint_length,
    own_length_matters,
    rotary_state_kept,
)
from tl_posheads.hooks.model import LensModel, model_name
from tl_posheads.rotary.geometry import LayerGeometry


@dataclass(frozen=True, eq=False)
class Change:
    """A change that a context of this package makes to the rotary dimensions of a live model.

    Attributes:
        name: the method or edit with all its settings, for provenance.
        kind: ``"extrapolation"`` or ``"edit"``.
        trained: training length in positions.
        geometry: maps a layer's geometry and a text's length to the changed geometry.
        length_matters: whether ``geometry`` depends on the length.
        border: length beyond which all keys are rotated differently, so that a KV cache becomes
            invalid; None where there is no such length.
        remapped: for a change of attention scores, the layers' changed geometry.
        handles: its hooks on attention scores, which fused attention replaces.
    """

    name: str
    kind: str
    trained: int
    geometry: Callable[[LayerGeometry, int], LayerGeometry]
    length_matters: bool = False
    border: int | None = None
    remapped: dict[int, LayerGeometry] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)


_CHANGES_ATTRIBUTE = "_tl_posheads_changes"


def changes_of(model: LensModel) -> tuple[Change, ...]:
    """Active changes, the outermost first."""
    return tuple(model.__dict__.get(_CHANGES_ATTRIBUTE, ()))


@contextmanager
def changed(model: LensModel, change: Change) -> Iterator[None]:
    """Inside, everything that reads the model's geometry sees ``change``."""
    before = changes_of(model)
    model.__dict__[_CHANGES_ATTRIBUTE] = (*before, change)
    try:
        yield
    finally:
        if before:
            model.__dict__[_CHANGES_ATTRIBUTE] = before
        else:
            del model.__dict__[_CHANGES_ATTRIBUTE]


def trained_length(model: LensModel) -> int:
    """The model's training length in positions, also inside a context that extends it.

    Raises:
        PosheadsError: it is unknown.
    """
    changes = changes_of(model)
    known = changes[0].trained if changes else checkpoint_length(model)
    if known is None:
        raise PosheadsError(
            f"{model_name(model)} doesn't say how long its training texts were; give trained="
        )
    return known


def trained_of(model: LensModel, trained: int | None) -> int:
    """``trained``, or by default the model's own training length.

    Raises:
        PosheadsError: not a whole number of 2 or more.
    """
    if trained is None:
        return trained_length(model)
    if isinstance(trained, bool) or not isinstance(trained, int) or trained < 2:
        raise PosheadsError(
            f"trained={trained!r} was given; expected the number of positions that the model was "
            "trained on, 2 or more"
        )
    return trained


def length_matters(model: LensModel) -> bool:
    """Whether the rotary frequencies depend on the text's length (dynamic NTK, LongRoPE)."""
    return own_length_matters(model) or any(c.length_matters for c in changes_of(model))


def require_fixed_frequencies(model: LensModel, what: str, instead: str) -> None:
    """Refuse models whose frequencies depend on the text's length.

    Args:
        what: the requested operation, for the message.
        instead: what to do instead.

    Raises:
        PosheadsError: they do.
    """
    if length_matters(model):
        raise PosheadsError(
            f"{what} was requested for {model_name(model)}, whose frequencies depend on the text's "
            f"length (dynamic NTK or LongRoPE); {instead}"
        )


def require_bare(model: LensModel) -> None:
    """Refuse a model on which a method or an edit is active.

    Raises:
        PosheadsError: there is one.
    """
    for change in changes_of(model):
        raise PosheadsError(
            f"{change.name} is in force on {model_name(model)}; this function needs the "
            "unmodified model, so call it outside that context"
        )


@contextmanager
def any_length(model: LensModel) -> Iterator[None]:
    """Inside, the model takes texts of any length; tables that grew for them shrink on exit.

    No method refuses texts longer than its target length: what happens there is what users want
    to find out.
    """
    n_ctx = model.cfg.n_ctx
    with rotary_state_kept(model):
        model.cfg.n_ctx = max(int(n_ctx), ANY_LENGTH)
        try:
            yield
        finally:
            model.cfg.n_ctx = n_ctx

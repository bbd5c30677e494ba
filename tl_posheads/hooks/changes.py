"""What contexts of this package have changed in a live model, and what that means for its texts."""

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
    """What a context of ours has changed in the rotary dimensions of a live model.

    Attributes:
        name: for provenance: the method or edit, with all its settings.
        kind: ``"extrapolation"`` or ``"edit"``.
        trained: positions that the model was trained on.
        geometry: a layer's geometry and a text's length to its geometry under the change.
        length_matters: whether ``geometry`` depends on the length.
        border: tokens past which all keys turn otherwise, so that those in a KV cache are of no
            use; None where there is no such length.
        remapped: for a change of scores, the layers' changed geometry.
        handles: its hooks on scores, which attention without scores does the work of.
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
    """Changes in force, the outermost first."""
    return tuple(model.__dict__.get(_CHANGES_ATTRIBUTE, ()))


@contextmanager
def changed(model: LensModel, change: Change) -> Iterator[None]:
    """Inside, ``change`` is known to everyone who reads the model's geometry."""
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
    """Positions that the model was trained on, also inside a context that lets it read more.

    Raises:
        PosheadsError: nobody knows.
    """
    changes = changes_of(model)
    known = changes[0].trained if changes else checkpoint_length(model)
    if known is None:
        raise PosheadsError(
            f"{model_name(model)} doesn't say how long its training texts were; give trained="
        )
    return known


def trained_of(model: LensModel, trained: int | None) -> int:
    """The training length asked for, or the model's own.

    Raises:
        PosheadsError: no whole number of 2 or more.
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
    """Whether the frequencies depend on the text's length (dynamic NTK, LongRoPE)."""
    return own_length_matters(model) or any(c.length_matters for c in changes_of(model))


def require_fixed_frequencies(model: LensModel, what: str, instead: str) -> None:
    """Refuse models whose frequencies depend on the text's length.

    Args:
        what: was asked of the model.
        instead: what to do.

    Raises:
        PosheadsError: they do.
    """
    if length_matters(model):
        raise PosheadsError(
            f"{what} was asked of {model_name(model)}, whose frequencies depend on the text's "
            f"length (dynamic NTK or LongRoPE); {instead}"
        )


def require_bare(model: LensModel) -> None:
    """Refuse a model on which a method or an edit is in force.

    Raises:
        PosheadsError: there is one.
    """
    for change in changes_of(model):
        raise PosheadsError(
            f"{change.name} is in force on {model_name(model)}; what is asked for begins with the "
            "bare model, call it outside"
        )


@contextmanager
def any_length(model: LensModel) -> Iterator[None]:
    """Inside, texts of any length can be read; tables that grew for them go on leaving.

    No method forbids a text that is longer than it was meant for: what happens there is the
    question.
    """
    n_ctx = model.cfg.n_ctx
    with rotary_state_kept(model):
        model.cfg.n_ctx = max(int(n_ctx), ANY_LENGTH)
        try:
            yield
        finally:
            model.cfg.n_ctx = n_ctx

"""What an extrapolation method is, and how it is put on a live model and taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import hook_names, rotary_hook_points
from tl_posheads.hooks.changes import (
    Change,
    any_length,
    changed,
    changes_of,
    require_fixed_frequencies,
    trained_of,
)
from tl_posheads.hooks.lengths import own_frequencies
from tl_posheads.hooks.model import LensModel, model_name, own_hooks, require_rotary
from tl_posheads.hooks.positions import Positions, watched_positions
from tl_posheads.hooks.rescoring import require_scores, rescored
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.rotary.contributions import turn
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.rotary.remapping import Remapping


class Frequencies(NamedTuple):
    """Frequencies under a method.

    Attributes:
        inv_freq: radians per token of each pair, float64.
        scale: factor on queries and keys both (YaRN's square root of its inverse temperature).
    """

    inv_freq: Float[Tensor, " pair"]
    scale: float = 1.0


@dataclass(frozen=True)
class Method:
    """A reversible way, without training, to let a model read longer texts than in training.

    Call it with a model to get a context manager: inside, forward passes, ``generate`` with a KV
    cache, ``run_with_cache`` and everything of this package see the extended model, and texts may
    be longer than ``cfg.n_ctx``. Hooks set inside see the changed queries, keys and scores. When
    the block ends, even by an exception, the model is as it was; its weights are never touched. If
    a model's own frequencies depend on the text's length, each pass inside uses those of its own
    length, whatever was read before.

    In models that mix layers with and without a sliding window, those with one are left alone: they
    never see a new distance.

    Raises:
        PosheadsError: an invalid setting; on entering: no RoPE, another method in force, a
            model whose own frequencies depend on the length.
    """

    length_matters: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The method with its non-default settings, for tables and legends."""
        given = [(f, getattr(self, f.name)) for f in fields(self) if f.repr]
        shown = [
            f"{f.name}={value.name if isinstance(value, Method) else repr(value)}"
            for f, value in given
            if isinstance(value, Tensor) or value != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __call__(
        self, model: LensModel, *, trained: int | None = None
    ) -> AbstractContextManager[Any]:
        """The context manager.

        Args:
            model: HookedTransformer or TransformerBridge with RoPE.
            trained: positions that it was trained on; by default what its checkpoint's
                configuration says.

        Returns:
            A context manager that yields the model.
        """
        return _extended(model, self, trained)

    def layer_geometry(self, layer: LayerGeometry, trained: int, length: int) -> LayerGeometry:
        """A layer's geometry under the method, for texts of ``length`` tokens."""
        return layer

    def border(self, trained: int) -> int | None:
        """Length past which the frequencies switch to another set, if there is one."""
        return None


@dataclass(frozen=True)
class FrequencyMethod(Method):
    """A method that changes frequencies: a further rotation of the rotated queries and keys."""

    def frequencies(
        self, inv_freq: Float[Tensor, " pair"], trained: int, length: int
    ) -> Frequencies:
        """The method's formula.

        Args:
            inv_freq: the model's own, float64, fastest pair first.
            trained: positions that it was trained on.
            length: tokens of the text so far, those in the KV cache included.
        """
        raise NotImplementedError

    def turns(
        self, layer: LayerGeometry, position: Int[Tensor, "*batch pos"], trained: int, length: int
    ) -> tuple[Float[Tensor, "*batch pos head pair"], Float[Tensor, "*batch pos head pair"]]:
        """Cosine and sine, times the scale, of the further rotation at each position.

        The head axis may have length 1.
        """
        new = self.frequencies(layer.inv_freq, trained, length)
        by = (new.inv_freq - layer.inv_freq).to(position.device)
        angle = position[..., None, None].double() * by
        return angle.cos() * new.scale, angle.sin() * new.scale

    def layer_geometry(self, layer: LayerGeometry, trained: int, length: int) -> LayerGeometry:
        new = self.frequencies(layer.inv_freq, trained, length)
        return replace(
            layer, inv_freq=new.inv_freq, rotation_scale=layer.rotation_scale * new.scale
        )


@dataclass(frozen=True)
class DistanceMethod(Method):
    """A method that treats query-key pairs by their token distance: it recomputes the scores."""

    def remapping(self, layer: LayerGeometry, trained: int) -> Remapping:
        """Regions of query-key pairs, and the positions of queries and keys in each."""
        raise NotImplementedError

    def layer_geometry(self, layer: LayerGeometry, trained: int, length: int) -> LayerGeometry:
        return replace(layer, remapping=self.remapping(layer, trained))


def require_factor(method: str, factor: Any, name: str = "factor") -> None:
    """Refuse a factor that isn't a number of at least 1.

    Raises:
        PosheadsError: it isn't.
    """
    known = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not known or not 1 <= factor < float("inf"):
        raise PosheadsError(
            f"{method}({name}={factor!r}) was given; expected a number of 1 or more: how many "
            "times longer the texts are than in training"
        )


def require_whole(method: str, **least: tuple[Any, int]) -> None:
    """Refuse settings, given as value and least value, that aren't whole numbers.

    Raises:
        PosheadsError: the first that isn't.
    """
    for name, (value, smallest) in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise PosheadsError(
                f"{method}({name}={value!r}) was given; expected a whole number of {smallest} or "
                "more"
            )


def require_positive(method: str, **values: Any) -> None:
    """Refuse settings that aren't finite numbers above 0; None counts as not set.

    Raises:
        PosheadsError: the first that isn't.
    """
    for name, value in values.items():
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and (not known or not 0 < value < float("inf")):
            raise PosheadsError(
                f"{method}({name}={value!r}) was given; expected a finite number above 0"
            )


def _require_alone(model: LensModel, method: Method) -> None:
    for change in changes_of(model):
        if change.kind == "extrapolation":
            raise PosheadsError(
                f"{method} was asked of a {model_name(model)} on which {change.name} is in force; "
                "leave that first, methods can't be nested"
            )
        raise PosheadsError(
            f"{method} was asked of a {model_name(model)} on which {change.name} is in force; "
            "enter the method first and the edit inside it"
        )
    if isinstance(method, FrequencyMethod | DistanceMethod):
        require_fixed_frequencies(
            model,
            str(method),
            "load it with rope_parameters of type 'default' and extend that "
            "(LongRoPE.from_config(config) has the factors)",
        )


def require_longer(documents: Sequence[Tensor], trained: int) -> None:
    """Refuse texts that don't reach beyond the training length.

    Raises:
        PosheadsError: one doesn't.
    """
    shortest = min(len(document) for document in documents)
    if shortest <= trained:
        raise PosheadsError(
            f"a text of {shortest} tokens was given for a model trained on {trained}; give "
            "longer texts, or set trained="
        )


@contextmanager
def _extended(model: LensModel, method: Method, trained: int | None) -> Iterator[Any]:
    require_rotary(model)
    _require_alone(model, method)
    known = trained_of(model, trained)
    if isinstance(method, DistanceMethod):
        require_scores(model, repr(method))
    with ExitStack() as stack:
        stack.enter_context(rotary_hook_points(model))
        layers = extended_layers(RotaryGeometry.from_model(model))
        # Refuses, before anything is touched, a layer that the method can't change.
        inside = {i: method.layer_geometry(layer, known, known) for i, layer in layers.items()}
        stack.enter_context(any_length(model))
        stack.enter_context(own_frequencies(model))
        positions = stack.enter_context(watched_positions(model))
        remapped: dict[int, LayerGeometry] = {}
        handles: list[Any] = []
        if isinstance(method, FrequencyMethod):
            stack.enter_context(own_hooks(_rotations(model, method, layers, positions, known)))
        elif isinstance(method, DistanceMethod):
            remapped = inside
            handles = stack.enter_context(rescored(model, remapped, positions))

        def geometry(layer: LayerGeometry, length: int) -> LayerGeometry:
            if layer.layer not in layers:
                return layer
            return method.layer_geometry(layer, known, length)

        change = Change(
            name=repr(method),
            kind="extrapolation",
            trained=known,
            geometry=geometry,
            length_matters=method.length_matters,
            border=method.border(known),
            remapped=remapped,
            handles=handles,
        )
        stack.enter_context(changed(model, change))
        yield model


def extended_layers(geometry: RotaryGeometry) -> dict[int, LayerGeometry]:
    """The layers that methods change: those without a window, or all if every one has a window."""
    rotary = [layer for layer in geometry.layers if layer.n_pairs]
    whole = [layer for layer in rotary if layer.window is None]
    return {layer.layer: layer for layer in whole or rotary}


def _rotations(
    model: LensModel,
    method: FrequencyMethod,
    layers: Mapping[int, LayerGeometry],
    positions: Positions,
    trained: int,
) -> list[tuple[Any, Callable[..., Tensor]]]:
    def rotation(layer: LayerGeometry) -> Callable[..., Tensor]:
        def hook(x: Float[Tensor, "batch pos head d_head"], hook: Any) -> Tensor:
            at, lengths = positions.of(x), positions.lengths(x)
            if method.length_matters and len(set(lengths)) > 1:
                # Each row as if it were alone.
                rows = zip(at, lengths, strict=True)
                each = [method.turns(layer, row[None], trained, length) for row, length in rows]
                cos, sin = (torch.cat(parts) for parts in zip(*each, strict=True))
            else:
                cos, sin = method.turns(layer, at, trained, max(lengths))
            return turn(x, cos.to(x.device), sin.to(x.device), layer)

        return hook

    return hooks_on_rotated(model, {i: rotation(layer) for i, layer in layers.items()})


def hooks_on_rotated(
    model: LensModel, hooks: Mapping[int, Callable[..., Tensor]]
) -> list[tuple[Any, Callable[..., Tensor]]]:
    """For ``own_hooks``: each layer's hook on its rotated queries and on its rotated keys."""
    points = model.hook_dict
    return [(points[name], hook) for i, hook in hooks.items() for name in hook_names([i])]

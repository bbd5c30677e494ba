"""Rotary geometry of every layer of a live model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tl_posheads.hooks.changes import changes_of
from tl_posheads.hooks.lengths import own_length_matters
from tl_posheads.hooks.measured_geometry import measured_layers
from tl_posheads.hooks.model import LensModel, require_rotary
from tl_posheads.rotary.geometry import LayerGeometry

_SHORT = 64  # tokens that suffice for frequencies that don't depend on the length


@dataclass(frozen=True, eq=False, repr=False)
class RotaryGeometry:
    """Rotary geometry of every layer of a model, read from the live model.

    Attributes:
        model_name: the model's name.
        layers: one :class:`LayerGeometry` per layer, by index.
        length: text length in tokens that it is valid for; None if the length doesn't matter.
    """

    model_name: str
    layers: tuple[LayerGeometry, ...]
    length: int | None = None

    @classmethod
    def from_model(
        cls, model: LensModel, *, length: int = 64, layers: Sequence[int] | None = None
    ) -> RotaryGeometry:
        """Measure the geometry in one forward pass in which all positions hold the same vector.

        Every attention layer gets the first position's vector at all positions, so
        ``hook_rot_q`` shows only the rotation. Frequencies come from the cosines and sines that
        the pass used, layout and width from their effect on the queries, and the attention scale
        from the scores. The configuration isn't used: in TransformerLens its theta may differ
        from the model's.

        Args:
            model: HookedTransformer or TransformerBridge with RoPE.
            length: text length in tokens, for frequencies that depend on it (dynamic NTK,
                LongRoPE).
            layers: layers to measure (default: all). The others, and layers of a hybrid model
                without attention, get a placeholder without pairs.

        Raises:
            PosheadsError: no RoPE (by name, before any forward pass); layers that the model
                doesn't have; an unsupported rotation; attention to keys other than all earlier
                ones or the last ones in a window.
        """
        require_rotary(model)
        # An active method gets the length; only the model's own rotation has to be measured at it.
        own = own_length_matters(model)
        seen = length if own else _SHORT
        name, measured = measured_layers(model, length=seen, layers=layers)
        for change in changes_of(model):
            measured = tuple(
                change.geometry(layer, length) if layer.n_pairs else layer for layer in measured
            )
        matters = own or any(change.length_matters for change in changes_of(model))
        return cls(name, measured, length if matters else None)

    def __repr__(self) -> str:
        pairs = max(layer.n_pairs for layer in self.layers)
        of = f"{self.n_layers} layers of {self.n_heads} heads, {pairs} rotary pairs"
        at = "" if self.length is None else f", at {self.length} tokens"
        return f"RotaryGeometry({self.model_name}: {of}{at})"

    def __getitem__(self, layer: int) -> LayerGeometry:
        return self.layers[layer]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_heads(self) -> int:
        return self.layers[0].n_heads

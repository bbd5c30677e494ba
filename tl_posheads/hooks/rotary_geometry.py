"""What RoPE does in every layer of a live model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tl_posheads.hooks.changes import changes_of
from tl_posheads.hooks.lengths import own_length_matters
from tl_posheads.hooks.measured_geometry import measured_layers
from tl_posheads.hooks.model import LensModel, require_rotary
from tl_posheads.rotary.geometry import LayerGeometry

_SHORT = 64  # tokens that tell frequencies which don't depend on the length


@dataclass(frozen=True, eq=False, repr=False)
class RotaryGeometry:
    """Rotary geometry of every layer of a model, read from the live model.

    Attributes:
        model_name: as the lens calls it.
        layers: one :class:`LayerGeometry` per layer, by index.
        length: tokens of the texts that it holds for; None where their length doesn't matter.
    """

    model_name: str
    layers: tuple[LayerGeometry, ...]
    length: int | None = None

    @classmethod
    def from_model(
        cls, model: LensModel, *, length: int = 64, layers: Sequence[int] | None = None
    ) -> RotaryGeometry:
        """Measure the geometry with one forward pass that gives all positions the same vector.

        Every attention layer is handed the first position's vector at all of them, so what
        ``hook_rot_q`` shows is the rotation alone. Frequencies come from the cosines and
        sines that the pass really used, layout and width from what they did to the queries, the
        attention scale from the scores. The configuration is not believed: in TransformerLens
        it may hold another theta than the model.

        Args:
            model: HookedTransformer or TransformerBridge with RoPE.
            length: tokens of a text. Frequencies that depend on it (dynamic NTK, LongRoPE) are
                those of this length.
            layers: those to measure (all); the others, and those of a hybrid model that have no
                attention, hold a placeholder without pairs.

        Raises:
            PosheadsError: no RoPE (by name, before any forward); layers that the model doesn't
                have; a rotation that is not understood, or attention that sees other keys than
                all before or the last ones in a window.
        """
        require_rotary(model)
        # A method in force is told the length; only the model's own rotation has to be seen at it.
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

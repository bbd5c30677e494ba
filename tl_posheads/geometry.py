"""What RoPE does in each layer of a live model: which coordinates turn together, how fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.lengths import own_length_matters
from tl_posheads.lens import changes_of, require_rotary
from tl_posheads.remapping import Remapping

_PROBE = 64  # tokens that tell frequencies which don't depend on the length


@dataclass(frozen=True, eq=False)
class LayerGeometry:
    """Rotary geometry of one attention layer.

    Attributes:
        layer: its index.
        layout: ``"half"`` turns coordinates ``m`` and ``m + rotary_dim/2`` together (Llama,
            GPT-NeoX), ``"adjacent"`` ``2m`` and ``2m+1`` (GPT-J, Cohere).
        d_head: width of the tensors at ``hook_rot_q`` and ``hook_rot_k``.
        rotary_dim: how many of the first coordinates are turned; 0 in a layer without RoPE.
        inv_freq: radians per token of each pair, float64, ``[rotary_dim / 2]``.
        rotation_scale: length that the rotation multiplies by; not 1 under YaRN and LongRoPE.
        attention_scale: scores before softcap and mask are ``attention_scale * q . k``.
        softcap: scores pass ``softcap * tanh(scores / softcap)``; None without.
        window: query ``i`` sees keys ``i - window < j <= i``; None sees all before it.
        kv_head: the key head of each query head.
        remapping: other distances that the layer sees than the text has, as under SelfExtend;
            None for its own.
        is_rotation: whether a further rotation moves vectors to other positions; not so under a
            Fourier series (FoPE with ``sigma`` above 0).

    Example:
        >>> import torch
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]), n_heads=4, n_kv_heads=2)
        >>> g.kv_head, g.rotary_dim, g.wavelengths.round().tolist()
        ((0, 0, 1, 1), 4, [6.0, 63.0])
    """

    layer: int
    layout: Literal["half", "adjacent"]
    d_head: int
    rotary_dim: int
    inv_freq: Float[Tensor, "pair"]
    rotation_scale: float
    attention_scale: float
    softcap: float | None
    window: int | None
    kv_head: tuple[int, ...]
    remapping: Remapping | None = None
    is_rotation: bool = True

    @classmethod
    def from_inv_freq(
        cls,
        inv_freq: Float[Tensor, "pair"],
        n_heads: int = 1,
        *,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        layout: Literal["half", "adjacent"] = "half",
        layer: int = 0,
        window: int | None = None,
        softcap: float | None = None,
        rotation_scale: float = 1.0,
        attention_scale: float | None = None,
    ) -> LayerGeometry:
        """Geometry by hand, for tensors that come from no model.

        ``d_head`` is twice the number of pairs by default, ``attention_scale`` ``d_head**-0.5``.
        """
        rotary_dim = 2 * len(inv_freq)
        width, n_kv = d_head or rotary_dim, n_kv_heads or n_heads
        if layout not in ("half", "adjacent") or width < rotary_dim or n_heads % n_kv:
            raise PosheadsError(
                f"layout={layout!r}, {len(inv_freq)} frequencies, d_head={width}, "
                f"n_heads={n_heads} and n_kv_heads={n_kv} were given; expected layout 'half' or "
                "'adjacent', d_head of at least twice the frequencies and n_kv_heads dividing "
                "n_heads"
            )
        return cls(
            layer=layer,
            layout=layout,
            d_head=width,
            rotary_dim=rotary_dim,
            inv_freq=inv_freq.double(),
            rotation_scale=rotation_scale,
            attention_scale=width**-0.5 if attention_scale is None else attention_scale,
            softcap=softcap,
            window=window,
            kv_head=share_keys(n_heads, n_kv),
        )

    def after(self, first: int) -> LayerGeometry:
        """The geometry of texts whose first positions were cut off."""
        if self.remapping is None or not first:
            return self
        return replace(self, remapping=self.remapping.after(first))

    @property
    def n_pairs(self) -> int:
        return self.rotary_dim // 2

    @property
    def n_heads(self) -> int:
        return len(self.kv_head)

    @property
    def n_kv_heads(self) -> int:
        return max(self.kv_head) + 1

    @property
    def wavelengths(self) -> Float[Tensor, "pair"]:
        """Tokens per full turn of each pair."""
        return 2 * math.pi / self.inv_freq


def share_keys(n_heads: int, n_kv_heads: int) -> tuple[int, ...]:
    """Grouped-query attention: neighbours share a key head."""
    return tuple(head * n_kv_heads // n_heads for head in range(n_heads))


@dataclass(frozen=True, eq=False)
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
        cls, model: Any, *, length: int = 64, layers: Sequence[int] | None = None
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
        from tl_posheads.probe import measure

        require_rotary(model)
        # A method in force is told the length; only the model's own rotation has to be seen at it.
        own = own_length_matters(model)
        seen = length if own else _PROBE
        name, measured = measure(model, length=seen, layers=layers)
        for change in changes_of(model):
            measured = tuple(
                change.geometry(layer, length) if layer.n_pairs else layer for layer in measured
            )
        matters = own or any(change.length_matters for change in changes_of(model))
        return cls(name, measured, length if matters else None)

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

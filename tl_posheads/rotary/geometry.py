"""What RoPE does in one layer: which coordinates it rotates together, and how fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.rotary.remapping import Remapping


@dataclass(frozen=True, eq=False, repr=False)
class LayerGeometry:
    """Rotary geometry of one attention layer.

    Attributes:
        layer: its index.
        layout: ``"half"`` rotates coordinates ``m`` and ``m + rotary_dim/2`` together (Llama,
            GPT-NeoX), ``"adjacent"`` ``2m`` and ``2m+1`` (GPT-J, Cohere).
        d_head: width of the tensors at ``hook_rot_q`` and ``hook_rot_k``.
        rotary_dim: how many of the first coordinates are rotated; 0 in a layer without RoPE.
        inv_freq: radians per token of each pair, float64, ``[rotary_dim / 2]``.
        rotation_scale: factor of the rotation on a vector's length; not 1 under YaRN and LongRoPE.
        attention_scale: scores before softcap and mask are ``attention_scale * q . k``.
        softcap: scores become ``softcap * tanh(scores / softcap)``; None without.
        window: query ``i`` attends to keys ``i - window < j <= i``; None means to all up to ``i``.
        kv_head: the key head of each query head.
        remapping: the distances at which queries and keys meet where they differ from the text's,
            as under SelfExtend; None if they don't.
        is_rotation: whether a further rotation moves vectors to other positions; False under a
            Fourier series (FoPE with ``sigma`` above 0).

    Example:
        >>> import torch
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]), n_heads=4, n_kv_heads=2)
        >>> g
        LayerGeometry(layer=0, n_heads=4, n_kv_heads=2, d_head=4, n_pairs=2, layout='half',
        window=None)
        >>> g.kv_head, g.rotary_dim, g.wavelengths.round().tolist()
        ((0, 0, 1, 1), 4, [6.0, 63.0])
    """

    layer: int
    layout: Literal["half", "adjacent"]
    d_head: int
    rotary_dim: int
    inv_freq: Float[Tensor, " pair"]
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
        inv_freq: Float[Tensor, " pair"],
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
        """Geometry built by hand, for tensors that don't come from a model.

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

    def __repr__(self) -> str:
        shown = ("layer", "n_heads", "n_kv_heads", "d_head", "n_pairs", "layout", "window")
        return f"LayerGeometry({', '.join(f'{x}={getattr(self, x)!r}' for x in shown)})"

    def after(self, first: int) -> LayerGeometry:
        """The geometry for texts whose first positions were cut off."""
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
    def wavelengths(self) -> Float[Tensor, " pair"]:
        """Tokens per full turn of each pair."""
        return 2 * math.pi / self.inv_freq


def share_keys(n_heads: int, n_kv_heads: int) -> tuple[int, ...]:
    """Grouped-query attention: neighbours share a key head."""
    return tuple(head * n_kv_heads // n_heads for head in range(n_heads))

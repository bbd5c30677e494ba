"""DPE: SelfExtend with a scale for every rotary pair, in the pairs that matter to a head."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import DistanceMethod, require_whole
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.rotary.remapping import Region, Remapping, every_pair

KeyPairs = tuple[tuple[tuple[int, ...], ...], ...]
"""By layer and query head, the rotary pairs whose positions are changed."""


@dataclass(frozen=True, repr=False)
class DPE(DistanceMethod):
    """Keep positions within ``window``; each pair divides those of farther keys by its own scale.

    In pair ``m`` with scale ``s`` a far query at position ``i`` stands at
    ``i // s + window - window // s``, its key at ``j // s``; pairs that are not among the head's
    key pairs stay where they are. Lu et al., "Effective length extrapolation via dimension-wise
    positional embeddings manipulation", 2025, arXiv 2504.18857; as in their code,
    github.com/LuLuLuyi/DPE, but for ``window / s``, which their code leaves unrounded in whole
    passes and rounds down in generation; here it is rounded down in both.

    :func:`fit_dpe` finds the settings.

    Attributes:
        scales: of each pair, fastest first, whole numbers of 1 or more; the paper's are equal in
            each of eight groups of neighbours.
        window: distances below it stay, 1 or more; 1,024 in the paper.
        key_pairs: ``key_pairs[layer][head]`` are the pairs whose positions change, counted from 0;
            None changes all.

    Example:
        >>> DPE(scales=(1, 1, 4, 8), window=64)
        DPE(scales=(1, 1, 4, 8), window=64, key_pairs=None)
        >>> DPE((2, 4), 64, key_pairs=[[[0, 1], [1]]])
        DPE(scales=(2, 4), window=64, key_pairs=<1 layers, 3 pairs in all, sha256 ...>)
    """

    scales: tuple[int, ...]
    window: int
    key_pairs: KeyPairs | None = None

    def __post_init__(self) -> None:
        require_whole("DPE", window=(self.window, 1))
        scales = _whole(self.scales)
        if not scales or min(scales) < 1:
            raise PosheadsError(
                f"DPE(scales={self.scales!r}) was given; expected a whole number of 1 or more for "
                "every rotary pair"
            )
        object.__setattr__(self, "scales", scales)
        if self.key_pairs is not None:
            object.__setattr__(self, "key_pairs", _frozen(self.key_pairs, len(scales)))

    def __repr__(self) -> str:
        chosen = "None"
        if self.key_pairs is not None:
            # Thousands of numbers; a digest identifies them.
            digest = hashlib.sha256(repr(self.key_pairs).encode()).hexdigest()[:16]
            n = sum(len(pairs) for heads in self.key_pairs for pairs in heads)
            chosen = f"<{len(self.key_pairs)} layers, {n} pairs in all, sha256 {digest}>"
        return f"DPE(scales={self.scales}, window={self.window}, key_pairs={chosen})"

    def remapping(self, layer: LayerGeometry, trained: int) -> Remapping:
        scale, heads = self._scale(layer)
        if not heads:
            return Remapping((Region(),), every_pair)
        shift = self.window - self.window // scale

        def queries(position: Tensor) -> Tensor:
            return _floor(position, scale) + shift.to(position.device)

        def keys(position: Tensor) -> Tensor:
            return _floor(position, scale)

        def region(q_pos: Tensor, k_pos: Tensor) -> Tensor:
            return (q_pos - k_pos >= self.window).long()

        some = heads if len(heads) < layer.n_heads else None
        return Remapping((Region(), Region(queries, keys)), region, heads=some)

    def _scale(self, layer: LayerGeometry) -> tuple[Tensor, tuple[int, ...]]:
        """Scales of shape ``[head or 1, pair]``, and the heads that they change."""
        scale = torch.tensor(self.scales)[None]
        if scale.shape[-1] != layer.n_pairs:
            raise PosheadsError(
                f"{self} was given, with {scale.shape[-1]} scales, but layer {layer.layer} has "
                f"{layer.n_pairs} rotary pairs; give a scale for each"
            )
        if self.key_pairs is not None:
            by_head = self.key_pairs[layer.layer] if layer.layer < len(self.key_pairs) else ()
            if len(by_head) != layer.n_heads:
                raise PosheadsError(
                    f"{self} was given, which chooses pairs of {len(by_head)} heads in layer "
                    f"{layer.layer}, but that has {layer.n_heads}; give pairs for every layer and "
                    "query head, an empty list where none is to change"
                )
            mine = torch.zeros(layer.n_heads, layer.n_pairs, dtype=torch.bool)
            for head, pairs in enumerate(by_head):
                mine[head, list(pairs)] = True
            scale = torch.where(mine, scale, 1)
        changed = (scale > 1).any(-1).expand(layer.n_heads)
        return scale, tuple(torch.nonzero(changed).flatten().tolist())


def _floor(position: Tensor, scale: Tensor) -> Tensor:
    return torch.div(position[..., None, None], scale.to(position.device), rounding_mode="floor")


def _whole(given: Any) -> tuple[int, ...] | None:
    """Whole numbers as a tuple; None where they aren't."""
    numbers = given.tolist() if isinstance(given, Tensor) else given
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        return None
    numbers = tuple(numbers)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    return numbers if whole else None


def _frozen(key_pairs: Any, n_pairs: int) -> KeyPairs:
    try:
        layers = [list(heads) for heads in key_pairs]
    except TypeError:
        raise PosheadsError(
            f"DPE(key_pairs={key_pairs!r}) was given; expected key_pairs[layer][head] to be the "
            "pairs of that head, as key_pairs(model, tokens) returns"
        ) from None
    out = []
    for layer, heads in enumerate(layers):
        mine = []
        for head, given in enumerate(heads):
            pairs, all_pairs = _whole(given), set(range(n_pairs))
            if pairs is None or len(set(pairs)) < len(pairs) or not set(pairs) <= all_pairs:
                raise PosheadsError(
                    f"DPE was given {given!r} as the key pairs of layer {layer} head {head}; "
                    f"expected different whole numbers from 0 to {n_pairs - 1}: there are "
                    f"{n_pairs} scales"
                )
            mine.append(tuple(sorted(pairs)))
        out.append(tuple(mine))
    return tuple(out)

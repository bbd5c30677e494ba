"""SelfExtend: grouped positions for far tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tl_posheads.extrapolation.base import DistanceMethod, require_whole
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.rotary.remapping import Region, Remapping


@dataclass(frozen=True)
class SelfExtend(DistanceMethod):
    """Keep positions within ``window``; divide those of farther keys by ``group`` and round down.

    A far query at position ``i`` stands at ``i // group + window - window // group``, its key at
    ``j // group``. Texts of up to ``(trained - window) * group + window`` tokens then hold no
    distance that is new to the model. Jin et al., "LLM maybe LongLM: self-extend LLM context
    window without tuning", ICML 2024, arXiv 2401.01325, algorithm 1.

    Attributes:
        group: tokens that share a position where they are far, 1 or more.
        window: distances below it stay, 1 or more.

    Example:
        >>> SelfExtend(group=8, window=1024)
        SelfExtend(group=8, window=1024)
    """

    group: int
    window: int

    def __post_init__(self) -> None:
        require_whole("SelfExtend", group=(self.group, 1), window=(self.window, 1))

    def remapping(self, layer: LayerGeometry, trained: int) -> Remapping:
        shift = self.window - self.window // self.group

        def queries(position: Tensor) -> Tensor:
            return (_floor(position, self.group) + shift)[..., None, None]

        def keys(position: Tensor) -> Tensor:
            return _floor(position, self.group)[..., None, None]

        def region(q_pos: Tensor, k_pos: Tensor) -> Tensor:
            return (q_pos - k_pos >= self.window).long()

        return Remapping((Region(), Region(queries, keys)), region)


def _floor(position: Tensor, group: int) -> Tensor:
    return torch.div(position, group, rounding_mode="floor")

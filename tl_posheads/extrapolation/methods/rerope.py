"""ReRoPE: one distance for all far tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import DistanceMethod, require_factor, require_whole
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.rotary.remapping import Region, Remapping


@dataclass(frozen=True)
class ReRoPE(DistanceMethod):
    """Keep distances below ``window``; cap larger ones at it, or let them grow more slowly.

    Plain (``leak`` None): a far query stands at ``window`` and its key at 0. Leaky: the far
    distance ``d`` is ``window + (d - window) / leak``. Su, "Rectified rotary position embeddings",
    2023, kexue.fm/archives/9708; code at github.com/bojone/rerope.

    Attributes:
        window: distances below it stay, 1 or more.
        leak: tokens that count as one beyond the window, 1 or more (16 in the code); None for the
            plain form.
        log_n: multiply the scores of the query at position ``i`` by ``log(i + 1) / log(trained)``
            where that is above 1, as the code does for either form; not part of the formula.

    Example:
        >>> ReRoPE(window=512)
        ReRoPE(window=512, leak=None, log_n=False)
        >>> ReRoPE(window=512, leak=16).window
        512
    """

    window: int
    leak: float | None = None
    log_n: bool = False

    def __post_init__(self) -> None:
        require_whole("ReRoPE", window=(self.window, 1))
        if self.leak is not None:
            require_factor("ReRoPE", self.leak, "leak")
        if not isinstance(self.log_n, bool):
            raise PosheadsError(f"ReRoPE(log_n={self.log_n!r}) was given; expected True or False")

    def remapping(self, layer: LayerGeometry, trained: int) -> Remapping:
        leak = self.leak
        shift = 0.0 if leak is None else self.window - self.window / leak

        def queries(position: Tensor) -> Tensor:
            far = position.double()[..., None, None]
            return torch.full_like(far, self.window) if leak is None else far / leak + shift

        def keys(position: Tensor) -> Tensor:
            far = position.double()[..., None, None]
            return torch.zeros_like(far) if leak is None else far / leak

        def region(q_pos: Tensor, k_pos: Tensor) -> Tensor:
            return (q_pos - k_pos >= self.window).long()

        scale = _log_n(trained) if self.log_n else None
        return Remapping((Region(scale=scale), Region(queries, keys, scale)), region)


def _log_n(trained: int) -> Callable[[Tensor], Tensor]:
    def scale(position: Tensor) -> Tensor:
        # Padding may stand at negative positions; 2 keeps the logarithm finite there.
        return (position.clamp(min=1).double() + 1).log().div(math.log(trained)).clamp(min=1.0)

    return scale

"""Dual Chunk Attention: positions that start again in every chunk of the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import DistanceMethod, require_whole
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.rotary.remapping import Region, Remapping


@dataclass(frozen=True)
class DualChunk(DistanceMethod):
    """Keep distances within a chunk of the text; cap those to keys of earlier chunks.

    The text is cut into chunks of ``size = chunk - local`` tokens, and a key ``j`` stands at
    ``j % size``. A query ``i`` sees its own chunk from ``i % size``, so that distances stay; the
    chunk before from ``min(i % size + size, chunk)``, so that distances of up to ``local`` stay
    across the border; and all earlier ones from ``chunk``. No distance exceeds ``chunk``. An et
    al., "Training-free long-context scaling of large language models", ICML 2024, arXiv
    2402.17463; defaults and borders are those of github.com/HKUNLP/ChunkLlama (the paper's largest
    distance is one less).

    Scores are not scaled, as in the paper and ChunkLlama's Llama 2 code; vLLM's version multiplies
    them by ``0.1 * log(length / trained) + 1`` on texts beyond the training length.

    Attributes:
        chunk: largest distance, in tokens; None takes three quarters of the training length.
        local: tokens by which ``chunk`` exceeds a chunk's size; None takes a sixteenth of the
            training length. Below ``chunk``.

    Example:
        >>> DualChunk().sizes(trained=4096)
        (3072, 256)
        >>> DualChunk(chunk=1024, local=128)
        DualChunk(chunk=1024, local=128)
    """

    chunk: int | None = None
    local: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None:
            require_whole("DualChunk", chunk=(self.chunk, 2))
        if self.local is not None:
            require_whole("DualChunk", local=(self.local, 1))
        if self.chunk is not None and self.local is not None:
            _check(self, self.chunk, self.local)

    def sizes(self, trained: int) -> tuple[int, int]:
        """``chunk`` and ``local`` for a model trained on so many positions."""
        chunk = trained * 3 // 4 if self.chunk is None else self.chunk
        local = max(1, trained // 16) if self.local is None else self.local
        _check(self, chunk, local)
        return chunk, local

    def remapping(self, layer: LayerGeometry, trained: int) -> Remapping:
        chunk, local = self.sizes(trained)
        size = chunk - local

        def keys(position: Tensor) -> Tensor:
            return (position % size)[..., None, None]

        def successive(position: Tensor) -> Tensor:
            return (position % size + size).clamp(max=chunk)[..., None, None]

        def inter(position: Tensor) -> Tensor:
            # With a local window longer than a chunk the code stays below it.
            return torch.full_like(position, min(2 * size - 1, chunk))[..., None, None]

        def region(q_pos: Tensor, k_pos: Tensor) -> Tensor:
            number = torch.div(q_pos, size, rounding_mode="floor")
            return (number - torch.div(k_pos, size, rounding_mode="floor")).clamp(0, 2)

        # Queries and keys of one chunk move together, which changes nothing: no region moves less.
        return Remapping((Region(), Region(successive, keys), Region(inter, keys)), region)


def _check(method: DualChunk, chunk: int, local: int) -> None:
    if local >= chunk:
        raise PosheadsError(
            f"{method} was given, which makes chunk={chunk} and local={local}; expected local "
            "below chunk: their difference is the size of the text's chunks"
        )

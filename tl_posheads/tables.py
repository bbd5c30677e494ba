"""Counts of one layer's query-key pairs that add up: over documents, batches and machines."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.statistics import DominantGrid

Weighting = Literal["all", "per_distance"] | int

N_BLOCKS = 16  # stretches of positions that few documents are cut into, together
FEW_DOCUMENTS = 8
N_BUCKETS = 64  # blocks of the bootstrap at most: more documents share them
_N_SAMPLES = 64  # documents that keep a sample
_N_TENSORS = 7  # fields of LayerTable that are one tensor


@dataclass(frozen=True)
class Settings:
    """What is counted, the same for every layer and document.

    Attributes:
        pairs: weighting, as in ``score_heads``.
        exact: keep every D and distance, for exact ranks.
        seed: of permutation, shifts and draws.
        n_blocks: stretches that a document is cut into for the bootstrap.
    """

    pairs: Weighting = "all"
    exact: bool = False
    seed: int = 0
    n_blocks: int = N_BLOCKS


@dataclass
class LayerTable:
    """What is kept of one layer; ``merge`` adds another's.

    Attributes:
        counts: pairs in cells of D bin and distance bin, ``[head, d_bin, x_bin]``; with
            ``pairs="per_distance"`` their weights, float64.
        geometry_counts: the same after the content was permuted, on up to 256 queries a text.
        blocks: document -> small tables of its blocks of queries and keys, ``[block, head, d, x]``.
        null_observed: the shift statistic as it is, ``[head]``.
        null_draws: the same of every surrogate, ``[head, draw]``.
        samples: document -> some values of D, ``[head, n]``; of the first ones in the order of
            their names, so that it doesn't matter in which order they were counted.
        longest: the longest distance counted.
        n_documents: texts counted.
        n_pairs: pairs counted, of every head.
        lists: every distance and D where exact ranks are wanted, ``[1 or head, n]``, ``[head, n]``.
    """

    counts: Int[Tensor, "head d_bin x_bin"] | Float[Tensor, "head d_bin x_bin"]
    geometry_counts: Int[Tensor, "head d_bin x_bin"]
    null_observed: Float[Tensor, "head"]
    null_draws: Float[Tensor, "head draw"]
    longest: Int[Tensor, ""]
    n_documents: Int[Tensor, ""]
    n_pairs: Int[Tensor, ""]
    samples: dict[str, Float[Tensor, "head n"]] = field(default_factory=dict)
    blocks: dict[str, Int[Tensor, "block head d x"]] = field(default_factory=dict)
    lists: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def merge(self, other: LayerTable) -> None:
        """Add another table of the same layer and grid, whatever its texts' lengths."""
        self.counts = _add(self.counts, other.counts)
        self.geometry_counts = _add(self.geometry_counts, other.geometry_counts)
        self.null_observed = self.null_observed + other.null_observed
        self.null_draws = self.null_draws + other.null_draws
        samples = self.samples | other.samples
        self.samples = {key: samples[key] for key in sorted(samples)[:_N_SAMPLES]}
        self.longest = torch.maximum(self.longest, other.longest)
        self.n_documents = self.n_documents + other.n_documents
        self.n_pairs = self.n_pairs + other.n_pairs
        self._add_blocks(other.blocks)
        self.lists += other.lists

    def _add_blocks(self, others: dict[str, Tensor]) -> None:
        merged = dict(self.blocks)
        for key, block in others.items():
            merged[key] = _add(merged[key], block) if key in merged else block
        if self.n_documents >= FEW_DOCUMENTS:  # documents are the blocks from here on
            merged = {key: block.sum(0, keepdim=True) for key, block in merged.items()}
        if self.n_documents > N_BUCKETS:  # and from here on, handfuls of documents
            folded: dict[str, Tensor] = {}
            for key, block in merged.items():
                name = key if key.startswith("~") else f"~{int(key[:15], 16) % N_BUCKETS}"
                folded[name] = _add(folded[name], block) if name in folded else block
            merged = folded
        self.blocks = merged

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything under flat names, for one safetensors file."""
        out = {f.name: getattr(self, f.name) for f in fields(self)[:_N_TENSORS]}
        out |= {f"samples.{key}": sample for key, sample in self.samples.items()}
        out |= {f"blocks.{key}": block for key, block in self.blocks.items()}
        for i, (distance, dominant) in enumerate(self.lists):
            out |= {f"lists.{i}.distance": distance, f"lists.{i}.dominant": dominant}
        return {name: tensor.cpu().contiguous() for name, tensor in out.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> LayerTable:
        plain = {f.name: tensors[f.name] for f in fields(cls)[:_N_TENSORS]}
        samples = {n[8:]: t for n, t in tensors.items() if n.startswith("samples.")}
        blocks = {n[7:]: t for n, t in tensors.items() if n.startswith("blocks.")}
        n_lists = sum(n.startswith("lists.") for n in tensors) // 2
        lists = [
            (tensors[f"lists.{i}.distance"], tensors[f"lists.{i}.dominant"]) for i in range(n_lists)
        ]
        return cls(**plain, samples=samples, blocks=blocks, lists=lists)

    @property
    def sample(self) -> Float[Tensor, "head n"]:
        """The values of D kept for another grid."""
        return torch.cat([self.samples[key] for key in sorted(self.samples)], dim=1)


def _add(a: Tensor, b: Tensor) -> Tensor:
    """Sum of tables whose last axis (distance) may be of different length, and blocks' first."""
    if a.shape == b.shape:
        return a + b
    shape = [max(m, n) for m, n in zip(a.shape, b.shape, strict=True)]
    out = a.new_zeros(shape)
    for part in (a, b):
        out[tuple(slice(0, n) for n in part.shape)] += part
    return out


@dataclass(frozen=True)
class Grids:
    """The D bins of one layer: of its heads as they are, and with permuted content."""

    dominant: DominantGrid
    geometry: DominantGrid

"""Scores of a model's heads: a table, its best, its comparison with another, its files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from scipy import stats
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.files import damage_named, read_labelled, table_bytes, write_labelled
from tl_posheads.statistics import chance_overlap

FORMAT = "tl_posheads.HeadScores"
_TENSORS, _TABLE, _LABEL = "scores.safetensors", "table.parquet", "scores.json"


@dataclass(frozen=True)
class Comparison:
    """How alike two scorings of the same heads are.

    Attributes:
        rank_correlation: Spearman's rho between the two lists of scores.
        n_heads: heads that both scored.
        k: how many of the best were compared.
        overlap: how many of them are the same.
        chance: overlap that two random choices would have on average.
        p_chance: probability that two random choices overlap at least so much.
    """

    rank_correlation: float
    n_heads: int
    k: int
    overlap: int
    chance: float
    p_chance: float


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Positional scores of every head that was scored; NaN elsewhere.

    Attributes:
        rho: Spearman's rho between token distance and dominant dimension, ``[layer, head]``.
        ci_low, ci_high: 95 % interval of rho, by bootstrap over documents or query blocks
            (``provenance["interval"]`` says which).
        rho_geometry: rho after the head's content was permuted over the positions.
        p_null: one-sided p-value against circularly shifted rows, corrected for the number of
            heads (Benjamini-Hochberg).
        se: standard error of rho where pairs were drawn, NaN elsewhere.
        n_pairs: query-key pairs counted.
        windows: sliding window of each layer, None without.
        provenance: how the scores came about.
    """

    rho: Float[Tensor, "layer head"]
    ci_low: Float[Tensor, "layer head"]
    ci_high: Float[Tensor, "layer head"]
    rho_geometry: Float[Tensor, "layer head"]
    p_null: Float[Tensor, "layer head"]
    se: Float[Tensor, "layer head"]
    n_pairs: Int[Tensor, "layer head"]
    windows: tuple[int | None, ...]
    provenance: dict[str, Any]

    def __repr__(self) -> str:
        best = ", ".join(f"L{layer}H{head}" for layer, head in self._ranked()[:3])
        return (
            f"HeadScores({self.provenance.get('model')}: {len(self._ranked())} heads scored, "
            f"best {best})"
        )

    def _ranked(self) -> list[tuple[int, int]]:
        known = torch.nonzero(torch.isfinite(self.rho)).tolist()
        return sorted(
            ((layer, head) for layer, head in known),
            key=lambda place: (-float(self.rho[place]), place),
        )

    def top(self, k: int | float) -> list[tuple[int, int]]:
        """The best heads as ``(layer, head)``, best first.

        Args:
            k: an integer is a count, a float between 0 and 1 a fraction of the scored heads
                (rounded, at least one).

        Raises:
            PosheadsError: another kind of number.
        """
        ranked = self._ranked()
        if isinstance(k, bool) or not isinstance(k, int | float | np.integer | np.floating):
            raise PosheadsError(
                f"top({k!r}) was asked; expected a count like 20 or a share like 0.05"
            )
        if isinstance(k, int | np.integer):
            if k < 1:
                raise PosheadsError(f"top({k}) was asked; expected a count of at least 1")
            return ranked[: int(k)]
        if not 0 < k <= 1:
            raise PosheadsError(f"top({k}) was asked; expected a share above 0 and at most 1")
        return ranked[: max(1, round(float(k) * len(ranked)))]

    def above(self, threshold: float) -> list[tuple[int, int]]:
        """Heads whose whole confidence interval lies above ``threshold``, best first."""
        return [place for place in self._ranked() if float(self.ci_low[place]) > threshold]

    def plot(self) -> Any:
        """Histogram of the scores beside the nulls, as a matplotlib figure.

        Raises:
            PosheadsError: no head has a score.
        """
        from tl_posheads.score_figure import score_figure

        if not self._ranked():
            raise PosheadsError("no head has a score; there is nothing to draw")
        return score_figure(self)

    def to_pandas(self) -> pd.DataFrame:
        """One row per head of the scored layers, in order of layer and head."""
        layers = torch.nonzero(self.n_pairs.sum(1) > 0).flatten().tolist()
        rows = [
            {
                "layer": layer,
                "head": head,
                **{
                    name: float(getattr(self, name)[layer, head])
                    for name in ("rho", "ci_low", "ci_high", "rho_geometry", "p_null")
                },
                "n_pairs": int(self.n_pairs[layer, head]),
                "window": self.windows[layer],
            }
            for layer in layers
            for head in range(self.rho.shape[1])
        ]
        columns = ["layer", "head", "rho", "ci_low", "ci_high", "rho_geometry", "p_null",
                   "n_pairs", "window"]  # fmt: skip
        frame = pd.DataFrame(rows, columns=columns)
        return frame.astype({"window": "Int64"})

    def compare(self, other: HeadScores, *, k: int | float = 0.05) -> Comparison:
        """Rank correlation with another scoring of the same heads, and overlap of the best ``k``.

        Raises:
            PosheadsError: other layers and heads than these, or fewer than three in common.
        """
        if self.rho.shape != other.rho.shape:
            raise PosheadsError(
                f"scores of {tuple(self.rho.shape)} and {tuple(other.rho.shape)} layers and heads "
                "were given; only scorings of the same heads can be compared"
            )
        both = torch.isfinite(self.rho) & torch.isfinite(other.rho)
        n = int(both.sum())
        if n < 3:
            raise PosheadsError(f"the two scorings have {n} heads in common; expected at least 3")
        mine, theirs = (
            [place for place in scores._ranked() if bool(both[place])] for scores in (self, other)
        )
        count = min(n, int(k) if isinstance(k, int) else max(1, round(k * n)))
        overlap = len(set(mine[:count]) & set(theirs[:count]))
        chance, p = chance_overlap(n, count, count, overlap)
        rho = stats.spearmanr(self.rho[both].numpy(), other.rho[both].numpy()).statistic
        return Comparison(float(rho), n, count, overlap, chance, p)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the attributes, by name."""
        return {name: getattr(self, name) for name in _tensor_names()}

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        windows: Sequence[int | None],
        provenance: dict[str, Any],
    ) -> HeadScores:
        """The inverse of :meth:`tensors`; a name that is missing is a ``KeyError``."""
        named = {name: tensors[name] for name in _tensor_names()}
        return cls(**named, windows=tuple(windows), provenance=provenance)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``scores.safetensors``, ``table.parquet`` and ``scores.json`` into a folder.

        Each file is written whole or not at all, and the last one carries the others' checksums:
        a folder that a crash left between two of them is refused by :meth:`load`.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        facts = {
            "format": FORMAT,
            "version": 1,
            "windows": list(self.windows),
            "provenance": self.provenance,
        }
        parts = {_TENSORS: save_tensors(tensors), _TABLE: table_bytes(self.to_pandas())}
        return write_labelled(folder, _LABEL, parts, facts)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> HeadScores:
        """Read what :meth:`save` wrote, bit for bit.

        Raises:
            PosheadsError: no such folder, another program's files, or damaged ones.
        """
        label, parts = read_labelled(
            folder, _LABEL, made_by="HeadScores", what="scores", again="score again"
        )
        with damage_named(f"the scores in {folder} are", "score again"):
            tensors = load_tensors(parts[_TENSORS])
            return cls.from_tensors(tensors, label["windows"], label["provenance"])


def _tensor_names() -> list[str]:
    return [f.name for f in fields(HeadScores)[:7]]

"""Scores of a model's heads under its own position code: a table, its best, its files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tl_posheads.codes.basis import QKBasis
from tl_posheads.errors import PosheadsError
from tl_posheads.files import damage_named, read_labelled, table_bytes, write_labelled
from tl_posheads.results import HeadScores

_LABEL, _FILE, _TABLE = "codes.json", "codes.safetensors", "table.parquet"
_OWN = ("values", "which")
_OF_BASIS = ("vectors", "speeds", "survival", "shifts")
_FACTS = ("explained", "explained_change", "diagonal", "source", "bias_speed")


@dataclass(frozen=True, eq=False, repr=False)
class CodeScores(HeadScores):
    """Positional scores under any code, and the planes that they rest on; NaN elsewhere.

    Everything that :class:`HeadScores` has, but of what it measures in a document only rho and the
    number of query-key pairs: the others are NaN. ``provenance["code"]`` is ``"rotary"`` or
    ``"learned"``.

    Attributes:
        which: index of each head's basis in ``bases``; -1 where it has none.
        bases: a basis for each head, or one for all that share it, as under RoPE.
    """

    which: Int[Tensor, "layer head"]
    bases: tuple[QKBasis, ...]

    def basis(self, layer: int, head: int) -> QKBasis:
        """The planes of a head.

        Raises:
            PosheadsError: a head that wasn't scored, or that the model hasn't.
        """
        n_layers, n_heads = self.which.shape
        inside = 0 <= layer < n_layers and 0 <= head < n_heads
        if not inside or int(self.which[layer, head]) < 0:
            raise PosheadsError(
                f"layer {layer} head {head} was asked for; it's none of the heads scored"
            )
        return self.bases[int(self.which[layer, head])]

    def to_pandas(self) -> pd.DataFrame:
        """One row per head scored: its rho, how well its planes hold, their half-lives in tokens.

        ``sd_documents`` is the spread of rho over documents, NaN for one.
        """
        tests, by_document = self.test(), self.by_document("rho")
        rows = []
        for layer, head in torch.nonzero(self.which >= 0).tolist():
            basis = self.basis(layer, head)
            speeds = basis.plane_speeds[basis.moves]
            alone = by_document[:, layer, head]
            rows.append({
                "layer": layer, "head": head, "rho": float(self.rho[layer, head]),
                **{
                    name: float(getattr(tests, name)[layer, head])
                    for name in ("ci_low", "ci_high", "p", "p_adjusted")
                },
                "sd_documents": float(alone.std()) if len(alone) > 1 else float("nan"),
                "n_planes": len(speeds),
                "shortest_half_life": float(1 / speeds[0]) if len(speeds) else float("nan"),
                "longest_half_life": float(1 / speeds[-1]) if len(speeds) else float("nan"),
                "explained": basis.explained, "explained_change": basis.explained_change,
                "diagonal": basis.diagonal, "source": basis.source,
                "n_pairs": int(self.n_pairs[layer, head]),
            })  # fmt: skip
        return pd.DataFrame(rows)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``codes.json``, ``codes.safetensors`` and ``table.parquet`` into a folder.

        Each is written whole or not at all.

        Raises:
            PosheadsError: ``folder`` is a file.
        """
        tensors = {name: getattr(self, name).contiguous() for name in _OWN}
        for i, basis in enumerate(self.bases):
            tensors |= {f"{name}.{i}": getattr(basis, name).contiguous() for name in _OF_BASIS}
        about = [
            {name: None if (x := getattr(basis, name)) != x else x for name in _FACTS}
            for basis in self.bases
        ]
        facts = {
            "format": "tl_posheads.CodeScores", "version": 2, "bases": about,
            "document_names": list(self.document_names), "windows": list(self.windows),
            "provenance": self.provenance,
        }  # fmt: skip
        # Bases may share their shifts, which safetensors won't write twice.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        parts = {_FILE: save_tensors(tensors), _TABLE: table_bytes(self.to_pandas())}
        return write_labelled(folder, _LABEL, parts, facts)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> CodeScores:
        """Read what :meth:`save` wrote, bit for bit.

        Raises:
            PosheadsError: no such folder, another program's files, or damaged ones; scores of an
                earlier version, which pooled documents.
        """
        again = "score again"
        label, parts = read_labelled(
            folder, _LABEL, made_by="CodeScores", what="scores of codes", again=again, version=2
        )
        with damage_named(f"the scores in {folder} are", again):
            tensors = load_tensors(parts[_FILE])
            bases = []
            for i, about in enumerate(label["bases"]):
                if about["explained_change"] is None:
                    about = {**about, "explained_change": float("nan")}
                parts_of: dict[str, Any] = {x: tensors[f"{x}.{i}"] for x in _OF_BASIS}
                bases.append(QKBasis(**parts_of, **about))
            scores = HeadScores.of_values(
                tensors["values"], label["document_names"], label["windows"], label["provenance"]
            )
            return cls(
                values=scores.values,
                document_names=scores.document_names,
                which=tensors["which"],
                bases=tuple(bases),
                windows=scores.windows,
                provenance=scores.provenance,
            )

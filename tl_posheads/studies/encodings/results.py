"""Scores of a model's heads under its own positional encoding: a table, its best, its files."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.io.result import Files
from tl_posheads.scoring.head_scores import HeadScores
from tl_posheads.studies.encodings.basis import QKBasis


@dataclass(frozen=True, eq=False, repr=False)
class EncodingScores(HeadScores):
    """Positional scores under any encoding, and the planes they are computed from; NaN elsewhere.

    It has everything that :class:`HeadScores` has, but of the measures of a document only rho and
    the number of query-key pairs: the others are NaN. ``provenance["encoding"]`` is ``"rotary"`` or
    ``"learned"``.

    Attributes:
        which: index of each head's basis in ``bases``; -1 where it has none.
        bases: a basis for each head, or one for all that share it, as under RoPE.
    """

    which: Int[Tensor, "layer head"]
    bases: tuple[QKBasis, ...]

    _files = Files("encodings", "encoding scores", "score again", version=3, export="table.parquet")

    def _check(self) -> None:
        super()._check()
        if not bool(((self.which >= -1) & (self.which < len(self.bases))).all()):
            raise ValueError("heads with missing bases")
        speeds = [basis.speeds for basis in self.bases]
        if any(len(x) % 2 or not bool((x >= 0).all()) for x in speeds):
            raise ValueError("a basis without two directions per plane, or with a negative speed")

    def basis(self, layer: int, head: int) -> QKBasis:
        """The planes of a head.

        Raises:
            PosheadsError: a head that wasn't scored, or that the model doesn't have.
        """
        n_layers, n_heads = self.which.shape
        inside = 0 <= layer < n_layers and 0 <= head < n_heads
        if not inside or int(self.which[layer, head]) < 0:
            raise PosheadsError(f"layer {layer} head {head} was asked for, but it was not scored")
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
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "rho": float(self.rho[layer, head]),
                    **{
                        name: float(getattr(tests, name)[layer, head])
                        for name in ("ci_low", "ci_high", "p", "p_adjusted")
                    },
                    "sd_documents": float(alone.std()) if len(alone) > 1 else float("nan"),
                    "n_planes": len(speeds),
                    "shortest_half_life": float(1 / speeds[0]) if len(speeds) else float("nan"),
                    "longest_half_life": float(1 / speeds[-1]) if len(speeds) else float("nan"),
                    "explained": basis.explained,
                    "explained_change": basis.explained_change,
                    "diagonal": basis.diagonal,
                    "source": basis.source,
                    "n_qk_pairs": int(self.n_qk_pairs[layer, head]),
                }
            )
        return pd.DataFrame(rows)

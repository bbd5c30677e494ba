"""Scores of a model's heads: tables, rankings, tests, comparison and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int
from scipy import stats
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.heads import Head, Heads, as_head, as_heads, count_of
from tl_posheads.io.result import Files, Result
from tl_posheads.scoring.agreement import Comparison
from tl_posheads.scoring.draws import MEASURES, Settings
from tl_posheads.statistics.ranks import (
    FEW_DOCUMENTS,
    MeanTest,
    chance_overlap,
    mean_over_documents,
    split_half,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tl_posheads.hooks.rotary_geometry import RotaryGeometry

TESTED = ("rho", "rotation", "content")


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Result):
    """Positional scores of all scored heads; NaN for others.

    A head's numbers are means over documents. ``rho`` splits, up to an ``interaction``, into
    ``rotation`` (effect of the distance, with contents permuted across positions) and ``content``
    (effect of the contents at permuted positions). Intervals and p-values are over documents.

    Attributes:
        values: ``draws.MEASURES`` for every document.
        document_names: the documents' hashes, ascending.
        windows: sliding window of each layer; None without.
        provenance: how the scores were computed.
    """

    values: Float64[Tensor, "measure doc layer head"]
    document_names: Annotated[tuple[str, ...], "doc"]
    windows: Annotated[tuple[int | None, ...], "layer"]
    provenance: dict[str, Any]

    _files = Files("scores", "scores", "score again", version=2, export="table.parquet")

    def _check(self) -> None:
        if len(self.values) != len(MEASURES) or any(w is not None and w < 1 for w in self.windows):
            raise ValueError("other measures, or windows that are no numbers of tokens")
        if len({*self.document_names}) < len(self.document_names):
            raise ValueError("a document twice")
        if bool((self.values[:3].abs() > 1 + 1e-9).any()):
            raise ValueError("a correlation beyond 1")
        n = self.by_document("n_qk_pairs").nan_to_num(0.0)
        if bool(self.values.isinf().any()) or not bool(((n >= 0) & (n < 2**53)).all()):
            raise ValueError("values that are not finite, or no number of query-key pairs")

    @classmethod
    def from_rows(
        cls,
        rows: Mapping[str, Mapping[int, Float[Tensor, "measure head"]]],
        geometry: RotaryGeometry,
        settings: Settings,
        provenance: Mapping[str, Any],
    ) -> HeadScores:
        """Combine the measures of each document and layer, given in any order."""
        names = tuple(sorted(rows))
        shape = (len(MEASURES), len(names), geometry.n_layers, geometry.n_heads)
        values = torch.full(shape, float("nan"), dtype=torch.float64)
        for i, name in enumerate(names):
            for layer, row in rows[name].items():
                values[:, i, layer] = row
        layers = sorted({layer for row in rows.values() for layer in row})
        return cls(
            values=values,
            document_names=names,
            windows=tuple(layer.window for layer in geometry.layers),
            provenance={
                "model": geometry.model_name,
                **provenance,
                "layers": layers,
                "n_documents": len(names),
                **asdict(settings),
            },
        )

    def by_document(self, measure: str) -> Float[Tensor, "doc layer head"]:
        """One of ``draws.MEASURES`` for every document."""
        return self.values[MEASURES.index(measure)]

    @cached_property
    def _tests(self) -> dict[str, MeanTest]:
        return {name: mean_over_documents(self.by_document(name)) for name in TESTED}

    def test(self, measure: str = "rho") -> MeanTest:
        """Mean, interval and t test of ``"rho"``, ``"rotation"`` or ``"content"`` over documents.

        Raises:
            PosheadsError: an unknown measure.
        """
        if measure not in TESTED:
            raise PosheadsError(f"test({measure!r}) was asked; expected one of {', '.join(TESTED)}")
        return self._tests[measure]

    @property
    def rho(self) -> Float[Tensor, "layer head"]:
        """Spearman's rho between token distance and dominant dimension, mean over documents."""
        return self._tests["rho"].mean

    @property
    def ci_low(self) -> Float[Tensor, "layer head"]:
        """Lower end of rho's 95 % confidence interval over documents (Student's t)."""
        return self._tests["rho"].ci_low

    @property
    def ci_high(self) -> Float[Tensor, "layer head"]:
        """Upper end of rho's 95 % confidence interval over documents (Student's t)."""
        return self._tests["rho"].ci_high

    @property
    def p(self) -> Float[Tensor, "layer head"]:
        """Two-sided p-value of a t test over documents that the mean rho is zero."""
        return self._tests["rho"].p

    @property
    def p_adjusted(self) -> Float[Tensor, "layer head"]:
        """``p`` corrected for the number of heads (Benjamini and Hochberg)."""
        return self._tests["rho"].p_adjusted

    @property
    def rotation(self) -> Float[Tensor, "layer head"]:
        """Effect of the distance alone on D: rho of permuted contents with their new distance."""
        return self._tests["rotation"].mean

    @property
    def content(self) -> Float[Tensor, "layer head"]:
        """Effect of contents alone on D: rho of permuted contents with their original distance."""
        return self._tests["content"].mean

    @property
    def interaction(self) -> Float[Tensor, "layer head"]:
        """``rho - rotation - content``."""
        return self.rho - self.rotation - self.content

    @cached_property
    def d_near(self) -> Float[Tensor, "layer head"]:
        """Mean dominant dimension of tokens 1 or 2 apart."""
        return mean_over_documents(self.by_document("d_near")).mean

    @cached_property
    def d_far(self) -> Float[Tensor, "layer head"]:
        """Mean dominant dimension in the layer's farthest octave of distances."""
        return mean_over_documents(self.by_document("d_far")).mean

    @property
    def n_documents(self) -> int:
        return len(self.document_names)

    @cached_property
    def n_qk_pairs(self) -> Int[Tensor, "layer head"]:
        """Number of query-key pairs behind rho, over all documents."""
        return self.by_document("n_qk_pairs").nan_to_num(0.0).sum(0).long()

    @cached_property
    def documents(self) -> pd.DataFrame:
        """One row per document, layer and head, with all measures."""
        scored = torch.nonzero(self.n_qk_pairs > 0)
        layer, head = (scored[:, i].repeat(self.n_documents).numpy() for i in (0, 1))
        columns = {
            name: self.by_document(name)[:, scored[:, 0], scored[:, 1]].flatten().numpy()
            for name in MEASURES
        }
        table = pd.DataFrame(
            {
                "document": np.repeat(np.array(self.document_names, dtype=object), len(scored)),
                "layer": layer,
                "head": head,
                **columns,
            }
        )
        table["interaction"] = table["rho"] - table["rotation"] - table["content"]
        return table.astype({"n_qk_pairs": "int64"})

    def _about(self) -> str:
        n, model = len(self._ranked()), self.provenance.get("model")
        best = ", ".join(f"L{layer}H{head}" for layer, head in self._ranked()[:3])
        documents = f"{self.n_documents} document{'s' * (self.n_documents != 1)}"
        return f"{model}: {n} heads scored on {documents}, best {best}"

    def _finding(self) -> list[str]:
        return self.summary().splitlines()[:2]

    def summary(self, *, alpha: float = 0.05) -> str:
        """The findings in a few sentences."""
        n = len(self._ranked())
        if not n:
            return "No head has a score."
        lines = [self._counted(alpha, n)]
        reliability = self.split_half()
        if np.isfinite(reliability):
            halves = "Order of the heads, one half of the documents against the other"
            lines.append(f"{halves}: rank correlation {reliability:.2f}.")
        layer, head = self._ranked()[0]
        near, far = (float(x[layer, head]) for x in (self.d_near, self.d_far))
        lines.append(
            f"rho is about order, not size: in the highest, L{layer}H{head}, the mean dominant "
            f"dimension goes from {near:.1f} one or two tokens apart to {far:.1f} in the farthest "
            "octave."
        )
        low = self._ranked()[-1]
        if float(self.rho[low]) < 0 and float(self.p_adjusted[low]) < alpha:
            lines.append(
                f"Strong negative scores are not noise: in L{low[0]}H{low[1]} "
                f"({float(self.rho[low]):+.3f}) faster rotary pairs take over as distance grows."
            )
        return "\n".join(lines)

    def _counted(self, alpha: float, n: int) -> str:
        if self.n_documents < 2:
            return (
                f"{n} heads scored on one document: no intervals and no p-values; give "
                f"{FEW_DOCUMENTS} or more shorter ones."
            )
        positive = self.positional(alpha)
        negative = (self.rho < 0) & (self.p_adjusted < alpha)
        found = (
            f"{len(positive)} of {n} heads have a mean rho above zero and {int(negative.sum())} "
            f"below, over {self.n_documents} documents (t test, p < {alpha:g} corrected for "
            f"{n} heads)."
        )
        few = f" Give {FEW_DOCUMENTS} or more documents to tell more heads apart."
        return found + (few if self.n_documents < FEW_DOCUMENTS else "")

    def split_half(self, *, seed: int = 0) -> float:
        """Split-half reliability: rank correlation of scores between halves of the documents.

        The mean over a hundred random halvings; NaN with one document.
        """
        return split_half(self.by_document("rho"), seed=seed)

    def _ranked(self) -> list[Head]:
        known = torch.nonzero(torch.isfinite(self.rho)).tolist()
        return sorted(
            ((layer, head) for layer, head in known),
            key=lambda place: (-float(self.rho[place]), place),
        )

    __iter__ = None  # else Python would try scores[0], which is not a head

    def __getitem__(self, head: Head | str) -> pd.Series:
        """A head's row of :meth:`to_pandas`: ``scores[6, 6]`` or ``scores["L6H6"]``.

        Raises:
            PosheadsError: not a head, or one without a score.
        """
        (layer, index), table = as_head(head), self.to_pandas()
        found = table[(table["layer"] == layer) & (table["head"] == index)]
        if found.empty:
            n_layers, n_heads = self.rho.shape
            raise PosheadsError(
                f"L{layer}H{index} was requested, but it has no score; choose among the heads of "
                f"scores.to_pandas() (layers 0 to {n_layers - 1}, heads 0 to {n_heads - 1})"
            )
        return found.iloc[0]

    def top(self, k: int | float) -> list[Head]:
        """The top heads as ``(layer, head)``, best first.

        Args:
            k: an int is a count; a float between 0 and 1 is a fraction of the scored heads
                (rounded, at least one).

        Raises:
            PosheadsError: ``k`` is neither.
        """
        ranked = self._ranked()
        return ranked[: count_of(k, len(ranked))]

    def positional(self, alpha: float = 0.05) -> list[Head]:
        """Heads whose mean rho is significantly above zero after correction, best first.

        A two-sided t test over documents, corrected over heads (Benjamini and Hochberg). Empty
        with a single document, which gives no test.

        Raises:
            PosheadsError: an ``alpha`` that isn't between 0 and 1.
        """
        if not 0 < alpha < 1:
            raise PosheadsError(f"alpha={alpha} was given; expected a level, such as 0.05")
        return [
            place
            for place in self._ranked()
            if float(self.rho[place]) > 0 and float(self.p_adjusted[place]) < alpha
        ]

    def above(self, threshold: float) -> list[Head]:
        """Heads whose confidence interval lies entirely above ``threshold``, best first."""
        return [place for place in self._ranked() if float(self.ci_low[place]) > threshold]

    def plot(self, *, highlight: Heads | None = None, ax: Axes | None = None) -> Any:
        """Plot histograms of rho and of rotation alone, with matplotlib.

        Args:
            highlight: heads to mark with their names: ``"L6H6"``, ``(6, 6)`` or a list.
            ax: axes to draw into, which are then returned.

        Raises:
            PosheadsError: no head has a score, or one of ``highlight`` has none.
        """
        from tl_posheads.figures.scores import score_figure

        if not self._ranked():
            raise PosheadsError("no head has a score; there is nothing to draw")
        table = HeadScores.to_pandas(self)  # EncodingScores' own has other columns
        marked = () if highlight is None else as_heads(highlight)
        return score_figure(table, self.provenance.get("model", "the model"), marked, ax=ax)

    def to_pandas(self) -> pd.DataFrame:
        """One row per head of the scored layers, ordered by layer and head.

        ``rho``, ``rotation`` and ``content`` come with interval, p-value and corrected p-value;
        columns of the last two are prefixed, like ``rotation_p``.
        """
        layer, head = torch.nonzero(self.n_qk_pairs > 0).T
        columns: dict[str, Any] = {"layer": layer.numpy(), "head": head.numpy()}
        for name in TESTED:
            test, prefix = self.test(name), "" if name == "rho" else f"{name}_"
            columns[name] = test.mean[layer, head].numpy()
            for part in ("ci_low", "ci_high", "p", "p_adjusted"):
                columns[prefix + part] = getattr(test, part)[layer, head].numpy()
        for name in ("interaction", "d_near", "d_far", "n_qk_pairs"):
            columns[name] = getattr(self, name)[layer, head].numpy()
        columns["n_documents"] = self.test().n[layer, head].numpy()
        columns["window"] = [self.windows[int(i)] for i in layer]
        return pd.DataFrame(columns).astype({"window": "Int64"})

    def compare(self, other: HeadScores, *, k: int | float = 0.05) -> Comparison:
        """Rank correlation with another scoring of the same heads, and overlap of the top ``k``.

        Raises:
            PosheadsError: different layers and heads, fewer than three in common, or a ``k`` that
                :meth:`top` refuses.
        """
        if not isinstance(other, HeadScores):
            raise PosheadsError(f"{type(other).__name__} was given; expected HeadScores")
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
        count = count_of(k, n)
        overlap = len(set(mine[:count]) & set(theirs[:count]))
        chance, p = chance_overlap(n, count, count, overlap)
        rho = stats.spearmanr(self.rho[both].numpy(), other.rho[both].numpy()).statistic
        return Comparison(float(rho), n, count, overlap, chance, p, self._paired(other, both))

    def _paired(self, other: HeadScores, both: Tensor) -> pd.DataFrame:
        names = [name for name in self.document_names if name in other.document_names]
        mine, theirs = (
            x.by_document("rho")[[x.document_names.index(name) for name in names]]
            for x in (self, other)
        )
        layer, head = torch.nonzero(both).T
        columns = ("difference", "ci_low", "ci_high", "p", "p_adjusted")
        if len(names) < 2:
            return pd.DataFrame(columns=["layer", "head", *columns])
        test = mean_over_documents((theirs - mine)[:, layer, head])
        values = (test.mean, test.ci_low, test.ci_high, test.p, test.p_adjusted)
        table = dict(zip(columns, (x.numpy() for x in values), strict=True))
        return pd.DataFrame({"layer": layer.numpy(), "head": head.numpy(), **table})

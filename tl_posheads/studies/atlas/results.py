"""What a rotary atlas holds: every head and rotary pair of a model, its tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64
from scipy import stats
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.heads import Head, as_head
from tl_posheads.io.result import Files, Result
from tl_posheads.rotary.contributions import Scale, farthest
from tl_posheads.statistics.ranks import mean_over_documents
from tl_posheads.studies.atlas import head_columns
from tl_posheads.studies.atlas.measure import BY_DISTANCE, BY_HEAD, BY_PAIR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tl_posheads.studies.profile.results import HeadProfile

SCORES = ("rho", "rotation", "content")
_PAIR_COLUMNS = (
    "usage",
    "usage_share",
    "realised",
    "concentration_q",
    "concentration_k",
    "weight_near",
    "weight_far",
    "needed_rank",
    "needed_error",
)
# Of a head, in short.
_SHORT = (
    "rho",
    "centroid",
    "entropy",
    "slow_text",
    "slow_trained",
    "preferred",
    "curve_correlation",
    "separation",
    "pairs_needed",
)


@dataclass(frozen=True, eq=False, repr=False)
class RotaryAtlas(Result):
    """What every head does with every rotary pair, in the columns of ``rotary_atlas``.

    Attributes:
        by_pair: ``measure.BY_PAIR`` of every document, head and rotary pair; NaN where there is
            nothing.
        by_head: ``measure.BY_HEAD`` of every document and head.
        by_distance: ``measure.BY_DISTANCE`` of every document, head and bin of half an octave.
        wavelengths: tokens of a full turn, of the documents' own lengths where these matter.
        lengths: tokens of each document.
        document_names: the documents' hashes, ascending.
        windows: sliding window of each layer, None without.
        trained: training length in tokens; None if unknown.
        scale: of contributions, as in ``dimension_contributions``.
        scores: rho, rotation and content of the heads, where they were given.
        provenance: how it came about.
    """

    by_pair: Float64[Tensor, "pair_measure doc layer head pair"]
    by_head: Float64[Tensor, "head_measure doc layer head"]
    by_distance: Float64[Tensor, "distance_measure doc layer head bin"]
    wavelengths: Float64[Tensor, "doc layer pair"]
    lengths: Annotated[list[int], "doc"]
    document_names: Annotated[tuple[str, ...], "doc"]
    windows: Annotated[tuple[int | None, ...], "layer"]
    trained: int | None
    scale: Scale
    scores: Float64[Tensor, "score layer head"] | None
    provenance: dict[str, Any]

    _files = Files("atlas", "atlases", "make them again")

    def _check(self) -> None:
        sizes = [len(x) for x in (self.by_pair, self.by_head, self.by_distance)]
        if sizes != [len(BY_PAIR), len(BY_HEAD), len(BY_DISTANCE)]:
            raise ValueError("other measures")
        if self.scores is not None and len(self.scores) != len(SCORES):
            raise ValueError("other scores")
        if not self.lengths or min(self.lengths) < 2 or max(self.lengths) > 2**32:
            raise ValueError("no documents, or some of fewer than two tokens")
        if len({*self.document_names}) < len(self.document_names):
            raise ValueError("a document twice")
        if any(w is not None and w < 1 for w in self.windows) or (self.trained or 2) < 2:
            raise ValueError("a window or training length that is no number of tokens")
        parts = [self.by_pair, self.by_head, self.by_distance]
        if any(bool(x.isinf().any()) or bool((x.abs() > 1e30).any()) for x in parts):
            raise ValueError("values that are not finite")
        if bool((self.by_pair[0] < 0).any()) or bool((self.wavelengths <= 0).any()):
            raise ValueError("a usage or a wavelength below 0")
        if self.known.shape[1] and not bool(self.known.any()):
            raise ValueError("no head was measured")

    def _about(self) -> str:
        n, docs = int(self.known.sum()), len(self.lengths)
        pairs = self.by_pair.shape[-1]
        return f"{self.provenance.get('model')}: {n} heads x {pairs} rotary pairs, {docs} documents"

    def _finding(self) -> list[str]:
        table = self.heads()
        slow, fits = table["slow_text"], table["curve_correlation"]
        most = table.loc[slow.idxmax()] if slow.notna().any() else table.iloc[0]
        found = [
            f"usage in pairs slower than the text: median {slow.median():.2f}, most in "
            f"L{most['layer']:.0f}H{most['head']:.0f} ({most['slow_text']:.2f})"
        ]
        if "rho" in table and len(both := table[["rho", "slow_text"]].dropna()) > 2:
            rho = stats.spearmanr(both["rho"], both["slow_text"]).statistic
            found.append(f"rank correlation of rho with that share: {rho:+.2f}")
        elif fits.notna().any():
            found.append(
                f"mean curve and measured mean scores: median correlation {fits.median():.2f}"
            )
        return found

    @property
    def known(self) -> Bool[Tensor, "layer head"]:
        """Heads that were measured."""
        return self.by_pair[0].isfinite().any(-1).any(0)

    def by_document(self, column: str) -> Float[Tensor, "doc layer head *pair"]:
        """One of the tables' columns in every document.

        Raises:
            PosheadsError: no such column.
        """
        if column == "usage_share":
            usage = self.by_document("usage")
            return usage / usage.nansum(-1, keepdim=True)
        if column in BY_PAIR:
            return self.by_pair[BY_PAIR.index(column)]
        if column in BY_HEAD:
            return self.by_head[BY_HEAD.index(column)]
        if column in head_columns.COLUMNS:
            return head_columns.COLUMNS[column](self)
        names = [*_PAIR_COLUMNS, *BY_HEAD, *head_columns.COLUMNS]
        raise PosheadsError(f"column {column!r} was asked for; expected one of {', '.join(names)}")

    @property
    def mean_product(self) -> Tensor:
        """Mean query times conjugate mean key before rotation; complex, [doc, layer, head, pair].

        NaN where the rotation can't be undone.
        """
        parts = (self.by_document(f"mean_product_{x}") for x in ("real", "imag"))
        return torch.complex(*parts)

    def reach(self, layer: int) -> int:
        """How far back the layer's queries see in the longest document, in tokens."""
        return farthest(max(self.lengths), self.windows[layer])

    def to_pandas(self) -> pd.DataFrame:
        """A row per head and rotary pair: wavelength, and each column's mean with its interval.

        Columns of ``needed`` are left out where it was not asked for.
        """
        usage = self.by_document("usage")
        layer, head, pair = torch.nonzero(usage.isfinite().any(0)).T
        longest = int(np.argmax(self.lengths))
        columns: dict[str, Any] = {
            "layer": layer.numpy(),
            "head": head.numpy(),
            "pair": pair.numpy(),
            "wavelength": self.wavelengths[longest, layer, pair].numpy(),
        }
        for name in _PAIR_COLUMNS:
            values = self.by_document(name)[:, layer, head, pair]
            if name.startswith("needed") and not bool(values.isfinite().any()):
                continue
            columns |= _with_interval(name, values)
        return pd.DataFrame(columns)

    def heads(self) -> pd.DataFrame:
        """A row per head: each column's mean over documents with its interval, scores if given.

        ``preferred`` is that of the documents' mean curve and has no interval.
        """
        layer, head = torch.nonzero(self.known).T
        columns: dict[str, Any] = {"layer": layer.numpy(), "head": head.numpy()}
        if self.scores is not None:
            columns |= {
                name: row[layer, head].numpy()
                for name, row in zip(SCORES, self.scores, strict=True)
            }
        for name in (*head_columns.COLUMNS, *BY_HEAD):
            values = self.by_document(name)[:, layer, head]
            if name == "pairs_needed" and not bool(values.isfinite().any()):
                continue
            columns |= _with_interval(name, values)
        columns["preferred"] = head_columns.preferred(self)[layer, head].numpy()
        return pd.DataFrame(columns)

    def ranked(self) -> pd.DataFrame:
        """:meth:`heads` without intervals, by rho where it is given, else by ``slow_text``."""
        table = self.heads()
        by = "rho" if "rho" in table else "slow_text"
        names = ["layer", "head", *(name for name in _SHORT if name in table)]
        return table[names].sort_values(by, ascending=False, ignore_index=True)

    def mean_curve(self, head: Head | str, distances: Sequence[int] | None = None) -> pd.DataFrame:
        """Score of a head's mean query and mean key at every distance ("TriAttention").

        ``sum_m |E q_m| |E k_m| cos(theta_m d + phi_m)``, with the means taken before rotation and
        ``phi_m`` the angle between them. Where a method maps positions, ``d`` is the distance that
        the rotation sees.

        Args:
            head: ``(layer, head)``.
            distances: in tokens; by default all up to the farthest in the longest document.

        Returns:
            A row per distance: ``distance``, ``curve``, ``ci_low``, ``ci_high``.

        Raises:
            PosheadsError: a head that was not measured.
        """
        layer, number = self._place(head)
        asked = range(1, self.reach(layer) + 1) if distances is None else distances
        at = torch.tensor([int(d) for d in asked], dtype=torch.float64)
        product = self.mean_product[:, layer, number]
        speed = 2 * torch.pi / self.wavelengths[:, layer]
        here = torch.isfinite(speed[0])
        curve = head_columns.curve_at(product[:, here], speed[:, here], at)
        test = mean_over_documents(curve)
        columns = {"curve": test.mean, "ci_low": test.ci_low, "ci_high": test.ci_high}
        frame = {name: value.numpy() for name, value in columns.items()}
        return pd.DataFrame({"distance": at.long().numpy(), **frame})

    def mean_scores(self, head: Head | str) -> pd.DataFrame:
        """A head's mean scores (of its rotary part), beside the mean curve at the same pairs.

        Returns:
            A row per bin of half an octave: ``distance`` (mean), ``score`` and ``mean_curve``, with
            intervals.

        Raises:
            PosheadsError: a head that was not measured.
        """
        layer, number = self._place(head)
        values = dict(zip(BY_DISTANCE, self.by_distance[:, :, layer, number], strict=True))
        seen = values["distance"].isfinite().any(0)
        columns: dict[str, Any] = {"distance": values["distance"][:, seen].nanmean(0).numpy()}
        for name in ("score", "mean_curve"):
            columns |= _with_interval(name, values[name][:, seen])
        return pd.DataFrame(columns)

    def _place(self, head: Head | str) -> Head:
        n_layers, n_heads = self.known.shape
        layer, number = as_head(head)
        if not (0 <= layer < n_layers and 0 <= number < n_heads and self.known[layer, number]):
            raise PosheadsError(
                f"head {head!r} was asked for, which was not measured; expected (layer, head) of "
                f"layers {sorted({*torch.nonzero(self.known)[:, 0].tolist()})} and heads 0 to "
                f"{n_heads - 1}"
            )
        return layer, number

    def plot(
        self, *, sort: str = "layer", column: str = "usage_share", ax: Axes | None = None
    ) -> Any:
        """Heads x pairs as a map, wavelengths on the axis, as a matplotlib figure.

        Args:
            sort: ``"layer"``, or a column of :meth:`heads`, highest first: ``"rho"``, with scores.
            column: of :meth:`to_pandas`.
            ax: axes to draw into; they are then what is returned.

        Raises:
            PosheadsError: no such column.
        """
        from tl_posheads.figures.atlas import map_figure

        table, heads = self.to_pandas(), self.heads()
        if column not in table or (sort != "layer" and sort not in heads):
            raise PosheadsError(
                f"sort={sort!r} and column={column!r} were given; expected 'layer' or one of "
                f"{', '.join(heads.columns[2:])}, and one of {', '.join(table.columns[4:])}"
            )
        order = heads if sort == "layer" else heads.sort_values(sort, ascending=False)
        model = self.provenance.get("model", "the model")
        return map_figure(table, order, sort, column, model, ax=ax)

    def plot_families(
        self,
        profile: HeadProfile,
        k: int | float = 0.05,
        measures: Sequence[str] | None = None,
    ) -> Any:
        """Where the families of ``profile_heads`` lie, by centroid and entropy of usage.

        A panel per family, its heads before all others in grey.

        Args:
            profile: of the same model.
            k, measures: which heads are a family's, as in ``HeadProfile.families``.

        Raises:
            PosheadsError: a profile of other layers and heads; no family with a head measured
                here; what ``HeadProfile.families`` refuses.
        """
        from tl_posheads.figures.atlas import families_figure

        n_layers, n_heads = self.known.shape
        theirs = {(int(x), int(y)) for x, y in profile.table[["layer", "head"]].to_numpy()}
        if theirs != {(x, y) for x in range(n_layers) for y in range(n_heads)}:
            raise PosheadsError(
                f"a profile of {len(theirs)} heads was given, of layers up to "
                f"{max(theirs, default=(-1,))[0]}; the atlas's model has {n_layers} layers of "
                f"{n_heads} heads; give a profile of the same model"
            )
        heads = self.heads().set_index(["layer", "head"])[["centroid", "entropy"]]
        families = {
            name: heads[heads.index.isin(places)]
            for name, places in profile.families(k, measures).items()
        }
        families = {name: found for name, found in families.items() if len(found)}
        if not families:
            raise PosheadsError(
                "no head of these families was measured here; give an atlas of all layers, or "
                "other measures"
            )
        return families_figure(heads, families, self.provenance.get("model", "the model"))

    def plot_head(self, head: Head | str) -> Any:
        """A head's spectrum with its realised and needed parts, and its mean curve below.

        Raises:
            PosheadsError: a head that was not measured.
        """
        from tl_posheads.figures.atlas import head_figure

        layer, number = self._place(head)
        table = self.to_pandas()
        own = table[(table["layer"] == layer) & (table["head"] == number)]
        curves = self.mean_curve((layer, number)), self.mean_scores((layer, number))
        return head_figure(own, *curves, (layer, number), self.trained)


def _with_interval(name: str, values: Float[Tensor, " doc *rest"]) -> dict[str, Any]:
    test = mean_over_documents(values)
    return {
        name: test.mean.numpy(),
        f"{name}_ci_low": test.ci_low.numpy(),
        f"{name}_ci_high": test.ci_high.numpy(),
    }

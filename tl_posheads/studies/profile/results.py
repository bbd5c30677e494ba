"""What a profile of a model's heads holds: a table, its correlations, its overlaps, its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
from scipy import stats

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.heads import Head, count_of
from tl_posheads.io.result import Files, Result
from tl_posheads.statistics.ranks import benjamini_hochberg, chance_overlap
from tl_posheads.studies.profile.settings import FAMILIES, POSITIONAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PLACE = ("layer", "head")
_FEWEST = 3  # heads of a correlation


@dataclass(frozen=True, eq=False, repr=False)
class HeadProfile(Result):
    """Measures of every head of a model, the positional score first.

    Attributes:
        table: one row per head: ``layer``, ``head``, ``positional`` and the measures' columns as
            :func:`~tl_posheads.profile_heads` lists them; NaN where there is no value.
        provenance: how it came about; ``missing`` says of every column with NaN why,
            ``needles`` how many the model answered.
    """

    table: Annotated[pd.DataFrame, "layer:integer head:integer positional:floating"]
    provenance: dict[str, Any]

    _files = Files("profile", "profiles", "make them again")

    def _check(self) -> None:
        if self.table.duplicated([*_PLACE]).any() or (self.table[[*_PLACE]] < 0).any(axis=None):
            raise ValueError("a head twice, or of a number below 0")
        for name in self.columns:
            if self.table[name].dtype.kind not in "fiub":
                raise ValueError(f"{name} is not a measure")
        missing, needles = (self.provenance.get(x) or {} for x in ("missing", "needles"))
        if not isinstance(missing, dict) or not isinstance(needles, dict):
            raise ValueError("facts on missing values or needles of an unknown form")

    def _about(self) -> str:
        return f"{self.provenance.get('model')}: {len(self.table)} heads, {', '.join(self.columns)}"

    def _finding(self) -> list[str]:
        if POSITIONAL not in self.columns:
            return []
        found = self.correlation()[POSITIONAL].drop(POSITIONAL).dropna()
        if found.empty:
            return []
        name = found.abs().idxmax()
        rho = f"(rank correlation {found[name]:+.2f})"
        return [f"most correlated with the positional score: {name} {rho}"]

    @property
    def columns(self) -> list[str]:
        """Names of the measures, the positional score first."""
        return [str(name) for name in self.table.columns if name not in _PLACE]

    def to_pandas(self) -> pd.DataFrame:
        """One row per head, in order of layer and head; a copy."""
        return self.table.copy()

    def correlation(self, *, within_layers: bool = False) -> pd.DataFrame:
        """Spearman's rho between every two measures, over the heads that have both.

        NaN where fewer than three heads have both, or one of the two is the same for all.

        Args:
            within_layers: compare heads with those of their own layer only: of each measure's
                rank its layer's mean rank is taken away, and what is left is correlated. What
                depth alone explains, two measures that both grow with the layer, is then gone.

        Example:
            >>> import pandas as pd
            >>> table = pd.DataFrame({"layer": 0, "head": range(4),
            ...                       "positional": [0.1, 0.2, 0.3, 0.4], "sink": [4, 2, 3, 1.0]})
            >>> float(HeadProfile(table, {}).correlation().loc["positional", "sink"])
            -0.8
        """
        values = self.table[self.columns].astype(float)
        return _pairwise(values, self.table["layer"], within=within_layers)

    def overlap(self, k: int | float = 0.05) -> pd.DataFrame:
        """How many of each measure's ``k`` highest heads are among the ``k`` most positional ones.

        Args:
            k: a count, or a share of the heads that have both values (rounded, at least one).

        Returns:
            A row per measure: ``n_heads`` that have both values; ``n_positional`` and ``n_top``,
            how many heads of each list were compared; ``overlap``; ``chance``, what two random
            lists would have on average; ``p``, the probability that they have at least so many
            (hypergeometric); ``p_adjusted`` for the number of measures (Benjamini-Hochberg).
            Heads that share the value at the cut with one below it are left out of a list, so
            that it may be shorter than ``k``; NaN where none is left.

        Raises:
            PosheadsError: a ``k`` that is no count and no share.
        """
        rows = []
        for name in self.columns:
            if name == POSITIONAL:
                continue
            both = self.table[[POSITIONAL, name]].astype(float).dropna().to_numpy()
            n = len(both)
            best, kin = (_highest(column, count_of(k, n)) for column in both.T)
            row = {"measure": name, "n_heads": n, "n_positional": len(best), "n_top": len(kin)}
            shared, chance, p = float("nan"), float("nan"), float("nan")
            if best and kin:
                shared = len(best & kin)
                chance, p = chance_overlap(n, len(best), len(kin), int(shared))
            rows.append({**row, "overlap": shared, "chance": chance, "p": p})
        columns = ["measure", "n_heads", "n_positional", "n_top", "overlap", "chance", "p"]
        out = pd.DataFrame(rows, columns=columns)
        out["p_adjusted"] = benjamini_hochberg(out["p"].to_numpy(dtype=float))
        return out

    def families(
        self, k: int | float = 0.05, measures: Sequence[str] | None = None
    ) -> dict[str, list[Head]]:
        """The ``k`` highest heads of each measure, by layer and head.

        Args:
            k: as in :meth:`overlap`; heads that tie across the cut are left out.
            measures: by default those that papers name heads after: positional, retrieval,
                induction, previous-token, sink and long-context heads, as far as they are here.

        Raises:
            PosheadsError: a measure that is not here; a ``k`` that is no count and no share.

        Example:
            >>> import pandas as pd
            >>> table = pd.DataFrame({"layer": 0, "head": range(4),
            ...                       "positional": [0.1, 0.2, 0.3, 0.4], "sink": [4, 2, 3, 1.0]})
            >>> HeadProfile(table, {}).families(2)
            {'positional': [(0, 2), (0, 3)], 'sink': [(0, 0), (0, 2)]}
        """
        known = [name for name in FAMILIES if name in self.columns]
        names = known if measures is None else list(measures)
        if unknown := [name for name in names if name not in self.columns]:
            raise PosheadsError(
                f"measures={unknown} were asked for; expected some of {', '.join(self.columns)}"
            )
        out: dict[str, list[Head]] = {}
        for name in names:
            own = self.table[[*_PLACE, name]].dropna().sort_values([*_PLACE])
            chosen = _highest(own[name].to_numpy(dtype=float), count_of(k, len(own)))
            places = own[[*_PLACE]].to_numpy()
            out[name] = [(int(places[i, 0]), int(places[i, 1])) for i in sorted(chosen)]
        return out

    def plot(self, *, within_layers: bool = False, ax: Axes | None = None) -> Any:
        """The correlations as a map, similar measures side by side, as a matplotlib figure.

        Args:
            within_layers: as in :meth:`correlation`.
            ax: axes to draw into; they are then what is returned.

        Raises:
            PosheadsError: fewer than two measures can be correlated.
        """
        from tl_posheads.figures.profile import correlation_figure

        kind = "within layers" if within_layers else f"over {len(self.table):,} heads"
        model = self.provenance.get("model", "the model")
        title = f"Spearman's rho between measures of {model}'s heads, {kind}"
        return correlation_figure(self.correlation(within_layers=within_layers), title, ax=ax)


def _pairwise(values: pd.DataFrame, layer: pd.Series[Any], within: bool) -> pd.DataFrame:
    names = list(values.columns)
    out = pd.DataFrame(np.nan, index=names, columns=names)
    for i, a in enumerate(names):
        for b in names[i:]:
            both = (values[a].notna() & values[b].notna()).to_numpy()
            if both.sum() < _FEWEST:
                continue
            x, y = (stats.rankdata(values[name].to_numpy()[both]) for name in (a, b))
            if within:
                x, y = (_centred(ranks, layer.to_numpy()[both]) for ranks in (x, y))
            x, y = x - x.mean(), y - y.mean()
            norm = float(np.sqrt((x @ x) * (y @ y)))
            # Ranks are multiples of 1/2: less than this is what rounding left of a constant.
            if min(x @ x, y @ y) > 1e-9:
                out.loc[a, b] = out.loc[b, a] = np.clip(float(x @ y) / norm, -1.0, 1.0)
    return out


def _centred(ranks: np.ndarray, groups: np.ndarray) -> np.ndarray:
    means = pd.Series(ranks).groupby(groups).transform("mean")
    return np.asarray(ranks - means.to_numpy())


def _highest(values: np.ndarray, count: int) -> set[int]:
    """Places of the ``count`` highest values, those that tie across the cut left out."""
    if count >= len(values):
        return set(range(len(values)))
    cut = np.sort(values)[::-1]
    clear = cut[count - 1] > cut[count]
    chosen = values >= cut[count - 1] if clear else values > cut[count]
    return set(np.flatnonzero(chosen).tolist())

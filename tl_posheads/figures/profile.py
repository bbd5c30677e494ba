"""Correlation map of a profile, with similar measures next to each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from tl_posheads.errors import PosheadsError
from tl_posheads.figures.style import axes_for, styled

_MAP = "RdBu_r"  # red and blue through white, which colour-blind readers can distinguish
_DARK = 0.6  # correlations whose cell needs light numbers


def clustered(correlation: pd.DataFrame) -> list[str]:
    """Row names with similar ones next to each other: average linkage on one minus correlation.

    An unknown correlation counts as zero.

    Example:
        >>> names = list("abc")
        >>> rho = pd.DataFrame([[1, 0, 0.9], [0, 1, 0], [0.9, 0, 1]], names, names)
        >>> abs(clustered(rho).index("a") - clustered(rho).index("c"))
        1
    """
    names = [str(name) for name in correlation.index]
    if len(names) < 3:
        return names
    apart = 1 - correlation.fillna(0.0).to_numpy(dtype=float, copy=True)
    np.fill_diagonal(apart, 0.0)
    tree = hierarchy.linkage(
        squareform(np.clip(apart, 0.0, 2.0), checks=False), "average", optimal_ordering=True
    )
    return [names[i] for i in hierarchy.leaves_list(tree)]


@styled
def correlation_figure(rho: pd.DataFrame, title: str, *, ax: Any) -> Any:
    """Map of the correlations, with their values in the cells.

    Raises:
        PosheadsError: fewer than two measures can be correlated.
    """
    known = [name for name in rho.index if np.isfinite(rho.loc[name, name])]
    if len(known) < 2:
        raise PosheadsError(
            f"fewer than two of the measures {', '.join(rho.index)} differ between heads; there is "
            "nothing to draw"
        )
    order = clustered(rho.loc[known, known])
    values = rho.loc[order, order].to_numpy(dtype=float)
    n = len(order)
    ax, drawn = axes_for(ax, (2.6 + 0.52 * n, 1.9 + 0.46 * n))
    ax.grid(False)
    image = ax.imshow(np.ma.masked_invalid(values), cmap=_MAP, vmin=-1, vmax=1, aspect="auto")
    for i in range(n):
        for j in range(n):
            value = values[i, j]
            light = np.isfinite(value) and abs(value) > _DARK
            ax.text(
                j,
                i,
                f"{value:.2f}" if np.isfinite(value) else "-",
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if light else "black",
            )
    labels = [name.replace("_", " ") for name in order]
    ax.set_xticks(range(n), labels, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(n), labels)
    for name, label in zip(order, ax.get_yticklabels()):
        label.set_fontweight("bold" if name == "positional" else "normal")
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_title(title)
    ax.figure.colorbar(image, ax=ax, label="Spearman's rho", fraction=0.05)
    left_out = [name for name in rho.index if name not in known]
    if left_out:
        ax.set_xlabel(
            "not shown (constant over heads, or no values): "
            + ", ".join(name.replace("_", " ") for name in left_out),
            fontsize=8,
        )
    return drawn

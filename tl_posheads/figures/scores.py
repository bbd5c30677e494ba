"""Figure of all heads' scores, compared with rotation alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from tl_posheads.errors import PosheadsError
from tl_posheads.figures.style import COLOURS, axes_for, styled

_ALPHA = 0.05


@styled
def score_figure(
    table: pd.DataFrame,
    model: str,
    highlight: Sequence[tuple[int, int]],
    *,
    ax: Any,
) -> Any:
    """Histograms of rho, of rho for heads significantly above zero, and of ``rotation``.

    Args:
        table: one row per head: ``layer``, ``head``, ``rho``, ``rotation`` and ``p_adjusted``.
        model: the model's name, for the title.
        highlight: heads whose scores are marked by a vertical line with their name.
        ax: axes to draw into.

    Raises:
        PosheadsError: a head of ``highlight`` has no score.
    """
    known = table[np.isfinite(table["rho"])]
    by_head = known.set_index(["layer", "head"])["rho"]
    for layer, head in highlight:
        if (layer, head) not in by_head.index:
            raise PosheadsError(
                f"L{layer}H{head} is to be highlighted, but it has no score; choose heads of "
                "scores.to_pandas()"
            )
    rho, rotation, p = (known[name].to_numpy() for name in ("rho", "rotation", "p_adjusted"))
    above, rotation = rho[(rho > 0) & (p < _ALPHA)], rotation[np.isfinite(rotation)]
    ax, drawn = axes_for(ax, (8.0, 3.8))
    everything = np.concatenate([rho, rotation])
    edges = np.linspace(everything.min(), everything.max() + 1e-9, 41)
    ax.hist(rho, edges, color="0.8", label=f"all {len(rho):,} heads")
    if np.isfinite(p).any():  # one document gives no test
        ax.hist(
            above,
            edges,
            color=COLOURS[0],
            label=f"{len(above):,} above zero (p < {_ALPHA}, corrected)",
        )
    if len(rotation):
        ax.hist(
            rotation,
            edges,
            histtype="step",
            color=COLOURS[1],
            linewidth=1.6,
            label="rotation alone",
        )
    ax.axvline(0, color="0.4", linewidth=1)
    ink = ax.yaxis.label.get_color()
    for i, (layer, head) in enumerate(sorted({*highlight}, key=lambda place: by_head[place])):
        ax.axvline(by_head[layer, head], color=ink, linewidth=1.2)
        ax.text(
            by_head[layer, head],
            0.98 - 0.09 * (i % 5),  # so that names of heads with similar scores don't overlap
            f"L{layer}H{head}",
            transform=ax.get_xaxis_transform(),
            ha="right",
            va="top",
            fontsize=8.5,
            bbox={"facecolor": ax.get_facecolor(), "edgecolor": "none", "pad": 1.5},
        )
    ax.set_xlabel("positional score (Spearman's rho)")
    ax.set_ylabel("heads")
    ax.set_title(f"Positional scores of {model}")
    ax.legend(loc="best")
    return drawn

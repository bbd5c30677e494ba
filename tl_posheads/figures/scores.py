"""Picture of all heads' scores beside what the rotation alone gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from tl_posheads.figures.style import COLOURS, picture, styled

_ALPHA = 0.05


@styled
def score_figure(table: pd.DataFrame, model: str) -> Any:
    """Histogram of rho, of the heads above zero after correction, and of ``rotation``.

    Args:
        table: a row per head: ``rho``, ``rotation`` and ``p_adjusted``.
        model: its name, for the title.
    """
    known = table[np.isfinite(table["rho"])]
    rho, rotation, p = (known[name].to_numpy() for name in ("rho", "rotation", "p_adjusted"))
    above, rotation = rho[(rho > 0) & (p < _ALPHA)], rotation[np.isfinite(rotation)]
    fig = picture(figsize=(8.0, 3.8))
    ax = fig.subplots()
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
    ax.set_xlabel("positional score (Spearman's rho)")
    ax.set_ylabel("heads")
    ax.set_title(f"Scores of {model}")
    ax.legend(loc="best")
    return fig

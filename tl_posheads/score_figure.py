"""Picture of all heads' scores beside what the nulls leave of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tl_posheads.pictures import COLOURS, picture, styled

if TYPE_CHECKING:
    from tl_posheads.results import HeadScores


@styled
def score_figure(scores: HeadScores) -> Any:
    """Histogram of rho, of those above the shifted null, and of what geometry alone gives."""
    rho, geometry, p = (
        x.flatten().numpy() for x in (scores.rho, scores.rho_geometry, scores.p_null)
    )
    known = np.isfinite(rho)
    rho, geometry, p = rho[known], geometry[known], p[known]
    fig = picture(figsize=(8.0, 3.8))
    ax = fig.subplots()
    everything = np.concatenate([rho, geometry[np.isfinite(geometry)]])
    edges = np.linspace(everything.min(), everything.max() + 1e-9, 41)
    ax.hist(rho, edges, color="0.8", label=f"all {len(rho):,} heads")
    above = rho[p < 0.05]
    ax.hist(
        above, edges, color=COLOURS[0],
        label=f"{len(above):,} above the shifted null (p < 0.05, corrected)",
    )  # fmt: skip
    ax.hist(
        geometry, edges, histtype="step", color=COLOURS[1], linewidth=1.6,
        label="content permuted: geometry alone",
    )  # fmt: skip
    ax.axvline(0, color="0.4", linewidth=1)
    ax.set_xlabel("positional score (Spearman's rho)")
    ax.set_ylabel("heads")
    ax.set_title(f"Scores of {scores.provenance.get('model', 'the model')}")
    ax.legend(loc="best")
    return fig

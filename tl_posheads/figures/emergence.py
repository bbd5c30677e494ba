"""Figure of a training run: scores, losses and a head's curve by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_posheads.figures.style import COLOURS, DASHES, MARKERS, picture, styled


@styled
def emergence_figure(
    scores: pd.DataFrame,
    losses: pd.DataFrame,
    curve: Float[np.ndarray, "step octave"],
    heads: Sequence[tuple[int, int]],
) -> Any:
    """Three panels over the same steps; step 0 is drawn at half of the first later step.

    Args:
        scores: one row per step and head, steps ascending: ``rho``, ``ci_low``, ``ci_high``.
        losses: one row per step and octave of position.
        curve: mean dominant dimension of the first of ``heads`` by octave of distance.
        heads: heads drawn in colour.
    """
    fig = picture(figsize=(9.0, 8.0))
    score_ax, loss_ax, curve_ax = axes = fig.subplots(3, 1, sharex=True)
    steps = scores["step"].unique().astype(float)
    later = steps[steps > 0]
    at = np.where(steps > 0, steps, (later.min() if len(later) else 2.0) / 2)
    _draw_scores(score_ax, at, scores, heads)
    _draw_losses(loss_ax, at, losses)
    layer, head = heads[0]
    title = f"Dominant dimension by token distance, layer {layer}, head {head}"
    mesh = _draw_curve(curve_ax, at, curve, title)
    fig.colorbar(mesh, ax=curve_ax, label="dominant dimension\n(rotary pair, 0 = fastest)")
    for ax in axes:
        ax.set_xscale("log", base=2)
    shown = slice(None, None, max(1, len(at) // 8))
    curve_ax.set_xlabel("training step")
    curve_ax.set_xticks(at[shown], [f"{int(step):,}" for step in steps[shown]])
    curve_ax.minorticks_off()
    return fig


def _draw_scores(
    ax: Any, at: np.ndarray, scores: pd.DataFrame, heads: Sequence[tuple[int, int]]
) -> None:
    by_head = {place: own.set_index("step") for place, own in scores.groupby(["layer", "head"])}
    for place, own in by_head.items():
        if place not in heads:
            ax.plot(at, own["rho"], color="0.8", linewidth=0.8, zorder=1)
    for i, (layer, head) in enumerate(heads):
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 3,
        }
        own = by_head[layer, head]
        ax.plot(at, own["rho"], label=f"layer {layer}, head {head}", **style)
        band = own["ci_low"], own["ci_high"]
        ax.fill_between(at, *band, color=style["color"], alpha=0.12, linewidth=0)
    ax.axhline(0, color="0.5", linewidth=0.8)
    ax.set_ylabel("score (rho)")
    ax.set_title("Positional scores (grey: the other heads; band: 95 % confidence interval)")
    ax.legend(ncols=2, fontsize=8)


def _draw_losses(ax: Any, at: np.ndarray, losses: pd.DataFrame) -> None:
    """Every second octave of position, including the first and the last."""
    octaves = list(losses.groupby(["start", "end"])["loss"])
    shown = sorted({*range(len(octaves) - 1, -1, -2), 0})
    for i, octave in enumerate(shown):
        (start, end), loss = octaves[octave]
        ax.plot(
            at,
            loss,
            label=f"position {start}" if end - start == 1 else f"{start} to {end - 1}",
            color=COLOURS[i % len(COLOURS)],
            linestyle=DASHES[i % len(DASHES)],
        )
    ax.set_ylabel("loss (nats per token)")
    ax.set_title("Loss on held-out text, by position")
    ax.legend(ncols=3, fontsize=8)


def _draw_curve(ax: Any, at: np.ndarray, curve: np.ndarray, title: str) -> Any:
    n = curve.shape[1]
    edges = _edges(np.log(at))
    mesh = ax.pcolormesh(edges, np.arange(n + 1), curve.T, cmap="viridis", shading="flat")
    mesh.set_rasterized(True)
    ax.set_yticks(np.arange(n) + 0.5, [f"{2**o:,}" for o in range(n)])
    ax.set_ylabel("token distance from")
    ax.set_title(title)
    return mesh


def _edges(at: np.ndarray) -> np.ndarray:
    """Edges of the cells around points on a log axis."""
    middle = (at[1:] + at[:-1]) / 2
    first = at[0] - (middle[0] - at[0]) if len(middle) else at[0] - 0.5
    last = at[-1] + (at[-1] - middle[-1]) if len(middle) else at[-1] + 0.5
    return np.asarray(np.exp(np.concatenate([[first], middle, [last]])))

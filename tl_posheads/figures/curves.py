"""Figures of the dominant dimension by token distance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_posheads.figures.style import COLOURS, DASHES, axes_for, log2_axis, say_trained, styled

_PER_OCTAVE = 8


def _by_octave(distance: np.ndarray, n_qk_pairs: np.ndarray, values: np.ndarray) -> Any:
    """Middle of each eighth of an octave, and its mean, weighted by query-key pairs."""
    bins = np.floor(np.log2(distance) * _PER_OCTAVE).astype(int)
    places = np.unique(bins)
    weight = np.where(np.isfinite(values), n_qk_pairs, 0.0)
    filled = np.where(np.isfinite(values), values, 0.0)
    total = np.array([weight[..., bins == b].sum(-1) for b in places])
    mean = np.array([(weight * filled)[..., bins == b].sum(-1) for b in places]) / np.where(
        total > 0, total, np.nan
    )
    middle = np.array([np.exp(np.log(distance[bins == b]).mean()) for b in places])
    return middle, np.moveaxis(mean, 0, -1)


@styled
def curve_figure(table: pd.DataFrame, trained: int | None, *, ax: Any) -> Any:
    """One line per head, with a band between its outer quantiles, by eighths of an octave.

    Args:
        table: one row per head and distance: ``layer``, ``head``, ``distance``, ``n_qk_pairs``,
            ``mean`` and quantiles such as ``q5``.
        trained: training length, marked by a vertical line.
        ax: axes to draw into.
    """
    ax, drawn = axes_for(ax, (8.0, 4.2))
    quantiles = [name for name in table if name.startswith("q")]
    by_head = table.groupby(["layer", "head"], sort=False)
    for i, ((layer, head), own) in enumerate(by_head):
        distance, n_qk_pairs = (
            own[name].to_numpy(dtype=float) for name in ("distance", "n_qk_pairs")
        )
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        middle, mean = _by_octave(distance, n_qk_pairs, own["mean"].to_numpy())
        ax.plot(middle, mean, color=colour, linestyle=dash, label=f"layer {layer}, head {head}")
        if len(quantiles) > 1:
            outer = own[[quantiles[0], quantiles[-1]]].to_numpy().T
            low, high = _by_octave(distance, n_qk_pairs, outer)[1]
            ax.fill_between(middle, low, high, color=colour, alpha=0.15, linewidth=0)
    log2_axis(ax)
    ax.set_xlabel("token distance (tokens)")
    ax.set_ylabel("dominant dimension\n(rotary pair, 0 = fastest)")
    band = ""
    if len(quantiles) > 1:
        low, high = (float(quantiles[end][1:]) for end in (0, -1))
        band = f"; band: {low:.0f}% to {high:.0f}% of query-key pairs"
    ax.set_title(f"Dominant dimension by token distance{band}")
    if trained is not None:
        ax.axvline(trained, color="0.4", linewidth=1)
        say_trained(ax, trained)
    ax.legend(loc="best", ncols=1 + (by_head.ngroups > 4))
    return drawn


@styled
def allocation_figure(
    allocation: Float[np.ndarray, "pair distance"],
    distance: Float[np.ndarray, " distance"],
    n_qk_pairs: Float[np.ndarray, " distance"],
    wavelengths: Float[np.ndarray, " pair"],
    *,
    head: tuple[int, int],
    trained: int | None,
    ax: Any,
) -> Any:
    """Softmax weight of every rotary pair by distance, with wavelengths on the right axis."""
    ax, drawn = axes_for(ax, (8.0, 4.6))
    middle, weight = _by_octave(distance, n_qk_pairs, allocation)
    pairs = np.arange(weight.shape[0])
    mesh = ax.pcolormesh(middle, pairs, weight, shading="nearest", vmin=0, rasterized=True)
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02)
    bar.set_label("mean softmax weight (pairs sum to 1)")
    log2_axis(ax)
    ax.set_xlabel("token distance (tokens)")
    ax.set_xlim(1, distance[-1])
    ax.set_ylabel("rotary pair (0 = fastest)")
    ax.set_title(f"Weight of rotary pairs by token distance, layer {head[0]}, head {head[1]}")
    if trained is not None:
        ax.axvline(trained, color="white", linewidth=1.2)
    shown = pairs[:: max(1, len(pairs) // 8)]
    right = ax.twinx()
    right.set_ylim(ax.get_ylim())
    right.set_yticks(shown, [f"{wavelengths[m]:,.0f}" for m in shown])
    right.set_ylabel("wavelength (tokens)")
    return drawn

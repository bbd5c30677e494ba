"""Figure of out-of-distribution angles: curves, the effect of each pair, and the loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from tl_posheads.figures.style import (
    COLOURS,
    DASHES,
    MARKERS,
    log2_axis,
    picture,
    say_trained,
    styled,
)

_BARE: dict[str, Any] = {"color": "black", "linewidth": 2.2}
_CURVES = {
    "bare": ("unmodified model", _BARE),
    "ood": ("out-of-distribution pairs clamped", {"color": COLOURS[0], "linestyle": DASHES[1]}),
    "in_distribution": ("other pairs clamped", {"color": COLOURS[1], "linestyle": DASHES[2]}),
    "live": (
        "out-of-distribution pairs clamped in the pass",
        {"color": COLOURS[2], "linestyle": DASHES[3]},
    ),
}
_LOSSES = {
    "bare": ("unmodified model", _BARE),
    "ood": ("out-of-distribution pairs clamped", {"color": COLOURS[0]}),
    "in_distribution": ("other pairs clamped", {"color": COLOURS[1]}),
    "all": ("all clamped", {"color": COLOURS[4]}),
    "hidden": ("far keys hidden", {"color": COLOURS[3]}),
}


@styled
def ood_figure(
    curves: pd.DataFrame,
    pairs: pd.DataFrame,
    losses: pd.DataFrame,
    *,
    n_heads: int,
    trained: int,
) -> Any:
    """Right of the vertical line are distances and positions that the model was not trained on.

    Args:
        curves: mean dominant dimension by ``distance``: ``bare``, ``ood``, ``in_distribution``,
            ``live``; a column of NaN is not drawn.
        pairs: one row per pair, as in ``OODAngles.by_pair``.
        losses: one row per condition and octave of position, as in ``OODAngles.losses``.
        n_heads: number of heads that the curves are averaged over.
        trained: training length in tokens.
    """
    known = set() if losses.empty else {*losses["condition"]}
    shown = [name for name in _LOSSES if name in known]
    fig = picture(figsize=(9.0, 7.0))
    grid = fig.add_gridspec(2, 2 if len(shown) > 1 else 1, height_ratios=(1.15, 1))
    curve_ax, pair_ax = fig.add_subplot(grid[0, :]), fig.add_subplot(grid[1, 0])
    _draw_curves(curve_ax, curves, f"Mean dominant dimension of {n_heads} heads")
    _draw_pairs(pair_ax, pairs)
    axes = [curve_ax]
    if len(shown) > 1:
        axes.append(fig.add_subplot(grid[1, 1]))
        _draw_losses(axes[1], losses, shown)
    for ax in axes:
        log2_axis(ax, n_ticks=11 if ax is curve_ax else 5)
        ax.axvline(trained, color="0.5", linewidth=1)
    say_trained(curve_ax, trained, y=0)
    return fig


def _draw_curves(ax: Any, curves: pd.DataFrame, title: str) -> None:
    for name, (label, style) in _CURVES.items():
        if curves[name].notna().any():
            ax.plot(curves["distance"], curves[name], label=label, **style)
    ax.set_xlabel("token distance (tokens)")
    ax.set_ylabel("dominant dimension\n(rotary pair, 0 = fastest)")
    ax.set_title(title)
    ax.legend()


def _draw_pairs(ax: Any, table: pd.DataFrame) -> None:
    from matplotlib.patches import Patch

    pair, low, high = (
        table[name] for name in ("pair", "change_from_pair_low", "change_from_pair_high")
    )
    colours = [COLOURS[0] if ood > 0.5 else COLOURS[1] for ood in table["ood"]]
    ax.bar(pair, table["change_from_pair"], color=colours, width=0.75)
    if np.isfinite(low).all():
        ax.vlines(pair, low, high, color="0.2", linewidth=1)
    bottom, top = ax.get_ylim()
    ax.set_ylim(top=top + 0.35 * (top - bottom))  # room for the legend
    ax.axhline(0, color="0.3", linewidth=0.8)
    shown = table.iloc[:: math.ceil(len(table) / 8)]
    ax.set_xticks(
        shown["pair"], [f"{m}\n{w:,.0f}" for m, w in zip(shown["pair"], shown["wavelength"])]
    )
    ax.set_xlabel("rotary pair, and its wavelength (tokens)")
    ax.set_ylabel("share of the change\n(rotary dimensions)")
    ax.set_title("Effect of clamping each pair")
    ax.legend(
        handles=[
            Patch(color=COLOURS[0], label="less than a full turn in training"),
            Patch(color=COLOURS[1], label="a full turn or more"),
        ]
    )


def _draw_losses(ax: Any, losses: pd.DataFrame, shown: list[str]) -> None:
    for i, name in enumerate(shown):
        label, style = _LOSSES[name]
        mine = losses[losses["condition"] == name].sort_values("start")
        middle = np.sqrt(mine["start"].to_numpy(float) * mine["end"].to_numpy(float))
        ax.plot(
            middle,
            mine["loss"],
            marker=MARKERS[i],
            markersize=4,
            linestyle=DASHES[i % len(DASHES)],
            label=label,
            **style,
        )
    ax.set_xlabel("position (tokens)")
    ax.set_ylabel("loss (nats per token)")
    ax.set_title("Loss by position, pairs clamped in the pass")
    ax.legend()

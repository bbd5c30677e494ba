"""Figures of a rotary atlas: all heads' use of every rotary pair, and a close-up of one head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from tl_posheads.figures.style import (
    COLOURS,
    MARKERS,
    axes_for,
    log2_axis,
    picture,
    say_trained,
    styled,
)

_TICKS = 10
_ROWS = 400  # rows that add to the figure's height


def _wavelength_axis(ax: Any, wavelengths: np.ndarray) -> None:
    """Pairs along x, some labelled with their wavelengths."""
    n = len(wavelengths)
    shown = np.arange(0, n, max(1, -(-n // _TICKS)))
    ax.set_xticks(shown, [_tokens(wavelengths[m]) for m in shown])


def _tokens(wavelength: float) -> str:
    if wavelength >= 1e6:
        return f"{wavelength / 1e6:.3g}M"
    return f"{wavelength:,.0f}" if wavelength >= 10 else f"{wavelength:.1f}"


@styled
def map_figure(
    table: pd.DataFrame,
    order: pd.DataFrame,
    sort: str,
    column: str,
    model: str,
    *,
    ax: Any,
) -> Any:
    """A map of heads x pairs.

    Args:
        table: one row per head and pair: ``layer``, ``head``, ``pair``, ``wavelength``, ``column``.
        order: the heads from top to bottom, one row each.
        sort: what they are sorted by.
        column: the column shown.
        model: the model's name.
        ax: axes to draw into.
    """
    from matplotlib.colors import PowerNorm

    wide = table.pivot(index=["layer", "head"], columns="pair", values=column)
    places = pd.MultiIndex.from_frame(order[["layer", "head"]])
    values = wide.reindex(places).to_numpy(dtype=float)
    ax, drawn = axes_for(ax, (8.0, 2.2 + 0.012 * min(_ROWS, max(120, len(values)))))
    norm = PowerNorm(0.5, vmin=min(0.0, float(np.nanmin(values))), vmax=float(np.nanmax(values)))
    masked = np.ma.masked_invalid(values)
    image = ax.imshow(masked, norm=norm, aspect="auto", interpolation="nearest")
    ax.figure.colorbar(
        image, ax=ax, pad=0.02, label=f"{column.replace('_', ' ')} (square-root colour scale)"
    )
    by_pair = table.groupby("pair")["wavelength"]
    _wavelength_axis(ax, by_pair.first().to_numpy())
    same = bool((by_pair.nunique() == 1).all())
    first = table["layer"].iloc[0]
    ax.set_xlabel(f"wavelength (tokens{'' if same else f', of layer {first}'}), fastest pair first")
    if sort == "layer":
        layer = order["layer"].to_numpy()
        starts = np.flatnonzero(np.diff(layer, prepend=-1))
        shown = starts[:: max(1, -(-len(starts) // 16))]
        ax.set_yticks(shown, [f"layer {layer[i]}" for i in shown])
    else:
        shown = np.unique(np.linspace(0, len(order) - 1, 12).round().astype(int))
        names = order.iloc[shown][["layer", "head", sort]].to_numpy()
        ax.set_yticks(shown, [f"L{x:.0f}H{y:.0f}  {value:.2f}" for x, y, value in names])
    by = "layer" if sort == "layer" else f"{sort.replace('_', ' ')}, highest first"
    ax.set_title(f"{column.replace('_', ' ')} of {model}'s {len(order)} heads, by {by}")
    return drawn


@styled
def families_figure(heads: pd.DataFrame, families: Mapping[str, pd.DataFrame], model: str) -> Any:
    """Families of heads by centroid and entropy of usage, one panel per family.

    Args:
        heads: ``centroid`` and ``entropy`` of all heads, indexed by layer and head.
        families: the heads of each family, as rows of ``heads``.
        model: the model's name.
    """
    columns = min(3, len(families))
    rows = -(-len(families) // columns)
    fig = picture(figsize=(1.0 + 3.0 * columns, 1.0 + 2.6 * rows))
    panels = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    middle = heads["centroid"].median()
    for i, (name, own) in enumerate(families.items()):
        ax, colour = panels[i], COLOURS[i % len(COLOURS)]
        ax.plot(heads["centroid"], heads["entropy"], "o", color="0.82", ms=3, mew=0)
        ax.axvline(middle, color="0.6", lw=1, ls=":")
        marker = MARKERS[i % len(MARKERS)]
        ax.plot(own["centroid"], own["entropy"], marker, ls="", color=colour, ms=5.5, mew=0)
        ax.axvline(own["centroid"].median(), color=colour, lw=1)
        ax.set_title(f"{name.replace('_', ' ')}: {len(own)} heads")
    for ax in panels[len(families) :]:
        ax.set_axis_off()
    fig.supxlabel("centroid: mean rotary pair, weighted by usage (0 is the fastest)", fontsize=9)
    fig.supylabel("entropy of usage (1 is even use)", fontsize=9)
    title = f"Head families of {model} ({len(heads)} heads); lines: medians, dotted: of all heads"
    fig.suptitle(title, fontsize=10)
    return fig


@styled
def head_figure(
    spectrum: pd.DataFrame,
    curve: pd.DataFrame,
    scores: pd.DataFrame,
    head: tuple[int, int],
    trained: int | None,
) -> Any:
    """A head's usage of its pairs, how much of it is realised and needed, and its mean curve.

    Args:
        spectrum: one row per pair, with the atlas's columns.
        curve: ``distance`` and ``curve``.
        scores: one row per bin: ``distance``, ``score`` and ``mean_curve`` with intervals.
        head: layer and head.
        trained: training length, marked by a vertical line.
    """
    fig = picture(figsize=(8.0, 8.0))
    usage, parts, below = fig.subplots(3, 1, height_ratios=(1, 1, 1.2))
    pair = spectrum["pair"].to_numpy()
    usage.bar(pair, spectrum["usage_share"], color=COLOURS[0], width=0.8)
    usage.vlines(
        pair, spectrum["usage_share_ci_low"], spectrum["usage_share_ci_high"], color="0.3", lw=1
    )
    usage.set_ylabel("share of usage")
    usage.set_title(f"Layer {head[0]}, head {head[1]}: usage of its rotary pairs")
    named = {
        "realised": "realised",
        "concentration_q": "concentration of queries",
        "concentration_k": "concentration of keys",
    }
    for i, (name, label) in enumerate(named.items()):
        parts.plot(pair, spectrum[name], "osD"[i], ls="-", ms=3, color=COLOURS[i], label=label)
    if "needed_error" in spectrum:
        label = "error left when rotated, most needed first"
        parts.scatter(pair, spectrum["needed_error"], marker="x", s=22, color="black", label=label)
        for _, row in spectrum.nsmallest(3, "needed_rank").iterrows():
            at = (row["pair"], row["needed_error"])
            parts.annotate(f"{row['needed_rank']:.1f}", at, fontsize=8, va="bottom", ha="left")
    parts.set_ylim(0, 1.05)
    parts.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    for ax in (usage, parts):
        _wavelength_axis(ax, spectrum["wavelength"].to_numpy())
        ax.set_xlim(-0.7, len(pair) - 0.3)
    parts.set_xlabel("wavelength (tokens), fastest pair first")
    _curves(below, curve, scores)
    if trained is not None and curve["distance"].iloc[-1] >= trained:
        below.axvline(trained, color="0.4", linewidth=1)
        say_trained(below, trained)
    return fig


def _curves(ax: Any, curve: pd.DataFrame, scores: pd.DataFrame) -> None:
    """The mean curve at every distance and in bins, with the measured scores."""
    ax.plot(curve["distance"], curve["curve"], color="0.8", lw=0.8, label="mean curve")
    ax.plot(
        scores["distance"], scores["mean_curve"], color=COLOURS[0], label="mean curve, half octaves"
    )
    ax.plot(
        scores["distance"], scores["score"], "o-", ms=3.5, color=COLOURS[1], label="measured scores"
    )
    ax.fill_between(
        scores["distance"],
        scores["score_ci_low"],
        scores["score_ci_high"],
        color=COLOURS[1],
        alpha=0.2,
        linewidth=0,
    )
    log2_axis(ax)
    ax.set_xlabel("token distance (tokens)")
    ax.set_ylabel("attention score (rotary pairs)")
    ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)

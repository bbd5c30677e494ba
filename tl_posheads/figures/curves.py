"""Pictures of what heads rest on by token distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tl_posheads.figures.style import COLOURS, DASHES, picture, styled

if TYPE_CHECKING:
    from tl_posheads.scoring.curves import DominantDimensionCurve

_PER_OCTAVE = 8


def _by_octave(distance: np.ndarray, n_pairs: np.ndarray, values: np.ndarray) -> Any:
    """Middle of each eighth of an octave, and the mean of what lies in it, weighted by pairs."""
    bins = np.floor(np.log2(distance) * _PER_OCTAVE).astype(int)
    places = np.unique(bins)
    weight = np.where(np.isfinite(values), n_pairs, 0.0)
    filled = np.where(np.isfinite(values), values, 0.0)
    total = np.array([weight[..., bins == b].sum(-1) for b in places])
    mean = np.array([(weight * filled)[..., bins == b].sum(-1) for b in places]) / np.where(
        total > 0, total, np.nan
    )
    middle = np.array([np.exp(np.log(distance[bins == b]).mean()) for b in places])
    return middle, np.moveaxis(mean, 0, -1)


@styled
def curve_figure(curve: DominantDimensionCurve, trained: int | None) -> Any:
    """A line for each head with the band between its outer quantiles, by eighths of an octave."""
    fig = picture(figsize=(8.0, 4.2))
    ax = fig.subplots()
    distance = curve.distance.numpy().astype(float)
    for i, (layer, head) in enumerate(curve.heads):
        n_pairs = curve.n_pairs[i].numpy().astype(float)
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        middle, mean = _by_octave(distance, n_pairs, curve.mean[i].numpy())
        ax.plot(middle, mean, color=colour, linestyle=dash, label=f"layer {layer}, head {head}")
        if len(curve.levels) > 1:
            _, low = _by_octave(distance, n_pairs, curve.quantiles[i, 0].numpy())
            _, high = _by_octave(distance, n_pairs, curve.quantiles[i, -1].numpy())
            ax.fill_between(middle, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.set_xlabel("token distance (tokens)")
    ax.set_ylabel("dominant dimension\n(rotary pair, 0 = fastest)")
    levels = curve.levels
    band = f"; band: {levels[0]:.0%} to {levels[-1]:.0%} of pairs" if len(levels) > 1 else ""
    ax.set_title(f"Mean by token distance{band}")
    if trained is not None:
        ax.axvline(trained, color="0.4", linewidth=1)
        ax.annotate(
            f"trained on {trained:,} ",
            (trained, 1),
            color="0.3",
            fontsize=9,
            va="top",
            ha="right",
            xycoords=("data", "axes fraction"),
        )
    ax.legend(loc="best", ncols=1 + (len(curve.heads) > 4))
    return fig


@styled
def allocation_figure(curve: DominantDimensionCurve, place: int, trained: int | None) -> Any:
    """Softmax weight of every rotary pair by distance, with each pair's wavelength on the right."""
    fig = picture(figsize=(8.0, 4.6))
    ax = fig.subplots()
    n_pairs = curve.n_pairs[place].numpy().astype(float)
    distance = curve.distance.numpy().astype(float)
    middle, weight = _by_octave(distance, n_pairs, curve.allocation[place].numpy())
    pairs = np.arange(weight.shape[0])
    mesh = ax.pcolormesh(middle, pairs, weight, shading="nearest", vmin=0, rasterized=True)
    bar = fig.colorbar(mesh, ax=ax, pad=0.02)
    bar.set_label("mean softmax weight (pairs sum to 1)")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.set_xlabel("token distance (tokens)")
    ax.set_xlim(1, distance[-1])
    ax.set_ylabel("rotary pair (0 = fastest)")
    layer, head = curve.heads[place]
    ax.set_title(f"What layer {layer}, head {head} rests on")
    if trained is not None:
        ax.axvline(trained, color="white", linewidth=1.2)
    wavelengths = curve.wavelengths[place].numpy()
    shown = pairs[:: max(1, len(pairs) // 8)]
    right = ax.twinx()
    right.set_ylim(ax.get_ylim())
    right.set_yticks(shown, [f"{wavelengths[m]:,.0f}" for m in shown])
    right.set_ylabel("wavelength (tokens)")
    return fig

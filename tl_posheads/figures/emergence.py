"""The picture of a training run: scores, losses and a head's curve by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tl_posheads.figures.style import COLOURS, DASHES, MARKERS, picture, styled

if TYPE_CHECKING:
    from tl_posheads.studies.emergence.results import Emergence


@styled
def figure(found: Emergence, heads: Sequence[tuple[int, int]]) -> Any:
    """Three panels over the same steps; step 0 stands at 1/2 of the first other one."""
    fig = picture(figsize=(9.0, 8.0))
    axes = fig.subplots(3, 1, sharex=True)
    steps = found.steps.double().numpy()
    later = steps[steps > 0]
    at = np.where(steps > 0, steps, (later.min() if len(later) else 2.0) / 2)
    score_ax, loss_ax, curve_ax = axes
    for place in np.ndindex(*found.rho.shape[1:]):
        if place not in heads:
            own = found.rho[:, place[0], place[1]].numpy()
            score_ax.plot(at, own, color="0.8", linewidth=0.8, zorder=1)
    for i, (layer, head) in enumerate(heads):
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 3,
        }
        own = found.rho[:, layer, head].numpy()
        score_ax.plot(at, own, label=f"layer {layer}, head {head}", **style)
        low, high = found.ci_low[:, layer, head].numpy(), found.ci_high[:, layer, head].numpy()
        score_ax.fill_between(at, low, high, color=style["color"], alpha=0.12, linewidth=0)
    score_ax.axhline(0, color="0.5", linewidth=0.8)
    score_ax.set_ylabel("score (rho)")
    score_ax.set_title("Positional scores; grey: the other heads; band: 95 % interval")
    score_ax.legend(ncols=2, fontsize=8)

    mean = torch.nanmean(found.loss, dim=1).numpy()
    n = mean.shape[1]
    shown = sorted({*range(n - 1, -1, -2), 0})
    for i, octave in enumerate(shown):
        label = (
            f"position {2**octave}" if octave == 0 else f"{2**octave} to {2 ** (octave + 1) - 1}"
        )
        loss_ax.plot(
            at,
            mean[:, octave],
            label=label,
            color=COLOURS[i % len(COLOURS)],
            linestyle=DASHES[i % len(DASHES)],
        )
    loss_ax.set_ylabel("loss (nats a token)")
    loss_ax.set_title("Loss on texts that training doesn't read, by position")
    loss_ax.legend(ncols=3, fontsize=8)

    layer, head = heads[0]
    curve = found.curve[:, layer, head].T.numpy()
    mesh = curve_ax.pcolormesh(
        _edges(np.log(at)), np.arange(len(curve) + 1), curve, cmap="viridis", shading="flat"
    )
    mesh.set_rasterized(True)
    fig.colorbar(mesh, ax=curve_ax, label="dominant dimension\n(rotary pair, 0 = fastest)")
    curve_ax.set_yticks(np.arange(len(curve)) + 0.5, [f"{2**o:,}" for o in range(len(curve))])
    curve_ax.set_ylabel("token distance from")
    curve_ax.set_title(f"What layer {layer}, head {head} rests on")
    curve_ax.set_xlabel("training step")
    for ax in axes:
        ax.set_xscale("log", base=2)
    ticks = at[:: max(1, len(at) // 8)]
    shown_steps = steps[:: max(1, len(at) // 8)]
    curve_ax.set_xticks(ticks, [f"{int(step):,}" for step in shown_steps])
    curve_ax.minorticks_off()
    return fig


def _edges(at: np.ndarray) -> np.ndarray:
    """Edges of cells around places on a log axis."""
    middle = (at[1:] + at[:-1]) / 2
    first = at[0] - (middle[0] - at[0]) if len(middle) else at[0] - 0.5
    last = at[-1] + (at[-1] - middle[-1]) if len(middle) else at[-1] + 0.5
    return np.asarray(np.exp(np.concatenate([[first], middle, [last]])))

"""The picture of a comparison: curves, loss and answers, a line for each method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tl_posheads.figures.style import COLOURS, DASHES, MARKERS, picture, styled

if TYPE_CHECKING:
    from tl_posheads.extrapolation.comparison import ExtrapolationComparison


@styled
def figure(comparison: ExtrapolationComparison, numbers: Sequence[int]) -> Any:
    """Above, the mean curve of the heads by distance; below, loss by position and task answers.

    ``numbers`` are the methods'. The training length is the upright line; what lies right of it the
    model has never seen.
    """
    from matplotlib.ticker import LogLocator

    answers = comparison.answers()
    tasks = list(dict.fromkeys(answers["task"]))
    fig = picture(figsize=(9.0, 7.0))
    grid = fig.add_gridspec(2, 1 + len(tasks), height_ratios=(1.25, 1))
    curves_ax, loss_ax = fig.add_subplot(grid[0, :]), fig.add_subplot(grid[1, 0])
    task_axes = [fig.add_subplot(grid[1, 1 + i]) for i in range(len(tasks))]

    curves, losses = comparison.curves(per_octave=4), comparison.losses()
    for m in numbers:
        method = comparison.methods[m]
        style: dict[str, Any] = {"color": "black", "linestyle": "-", "linewidth": 2.2}
        if m > 0:
            style = {
                "color": COLOURS[(m - 1) % len(COLOURS)],
                "linewidth": 1.5,
                "linestyle": DASHES[m % len(DASHES)],
            }
        marked = {**style, "marker": MARKERS[m % len(MARKERS)], "markersize": 4}
        mine = curves[curves["method"] == method]
        by_distance = mine.groupby("distance")["mean"].mean()
        label = "bare model" if m == 0 else method
        curves_ax.plot(by_distance.index, by_distance.to_numpy(), label=label, **style)
        mine = losses[losses["method"] == method]
        middle = np.sqrt(mine["start"].to_numpy(dtype=float) * mine["end"].to_numpy(dtype=float))
        loss_ax.plot(middle, mine["loss"].to_numpy(), **marked)
        for ax, task in zip(task_axes, tasks, strict=True):
            mine = answers[(answers["method"] == method) & (answers["task"] == task)]
            by_length = mine.sort_values("length")
            ax.plot(by_length["length"], by_length["logprob"], **marked)
    heads = len(comparison.heads)
    curves_ax.set_ylabel("dominant dimension\n(rotary pair, 0 = fastest)")
    curves_ax.set_xlabel("token distance (tokens)")
    curves_ax.set_title(f"Mean of {heads} head{'s' if heads > 1 else ''} by token distance")
    loss_ax.set_ylabel("loss (nats a token)")
    loss_ax.set_xlabel("position (tokens)")
    loss_ax.set_title("Loss by position")
    for ax, task in zip(task_axes, tasks, strict=True):
        ax.set_ylabel("log-probability of the answer\n(nats a token)")
        ax.set_xlabel("length of the prompt (tokens)")
        ax.set_title(f"Task: {task}")
    for ax in (curves_ax, loss_ax, *task_axes):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(LogLocator(base=2, numticks=8 if ax is curves_ax else 5))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        ax.axvline(comparison.trained, color="0.5", linewidth=1)
    curves_ax.annotate(
        f"trained on {comparison.trained:,} ",
        (comparison.trained, 1),
        color="0.3",
        fontsize=9,
        xycoords=("data", "axes fraction"),
        va="top",
        ha="right",
    )
    fig.legend(loc="outside upper center", ncols=3)
    return fig

"""The picture of a comparison: curves, loss and answers, a line for each method."""

from __future__ import annotations

from collections.abc import Mapping
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


@styled
def comparison_figure(
    curves: pd.DataFrame,
    losses: pd.DataFrame,
    answers: pd.DataFrame,
    *,
    methods: Mapping[int, str],
    trained: int,
) -> Any:
    """Above, the mean curve of the heads by distance; below, loss by position and task answers.

    The training length is the upright line; what lies right of it the model has never seen.

    Args:
        curves, losses, answers: tables of an ``ExtrapolationComparison``.
        methods: those drawn by number, which their colours go by; 0 is the bare model.
        trained: positions of training.
    """
    tasks = list(dict.fromkeys(answers["task"]))
    fig = picture(figsize=(9.0, 7.0))
    grid = fig.add_gridspec(2, 1 + len(tasks), height_ratios=(1.25, 1))
    curves_ax, loss_ax = fig.add_subplot(grid[0, :]), fig.add_subplot(grid[1, 0])
    task_axes = {task: fig.add_subplot(grid[1, 1 + i]) for i, task in enumerate(tasks)}
    for number, method in methods.items():
        style = _style(number)
        marked = {**style, "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
        mean = curves[curves["method"] == method].groupby("distance")["mean"].mean()
        label = "bare model" if number == 0 else method
        curves_ax.plot(mean.index, mean.to_numpy(), label=label, **style)
        mine = losses[losses["method"] == method]
        middle = np.sqrt(mine["start"].to_numpy(dtype=float) * mine["end"].to_numpy(dtype=float))
        loss_ax.plot(middle, mine["loss"].to_numpy(), **marked)
        for task, ax in task_axes.items():
            mine = answers[(answers["method"] == method) & (answers["task"] == task)]
            by_length = mine.sort_values("length")
            ax.plot(by_length["length"], by_length["logprob"], **marked)
    heads = len(curves[["layer", "head"]].drop_duplicates())
    curves_ax.set_ylabel("dominant dimension\n(rotary pair, 0 = fastest)")
    curves_ax.set_xlabel("token distance (tokens)")
    curves_ax.set_title(f"Mean of {heads} head{'s' if heads > 1 else ''} by token distance")
    loss_ax.set_ylabel("loss (nats a token)")
    loss_ax.set_xlabel("position (tokens)")
    loss_ax.set_title("Loss by position")
    for task, ax in task_axes.items():
        ax.set_ylabel("log-probability of the answer\n(nats a token)")
        ax.set_xlabel("length of the prompt (tokens)")
        ax.set_title(f"Task: {task}")
    for ax in (curves_ax, loss_ax, *task_axes.values()):
        log2_axis(ax, n_ticks=8 if ax is curves_ax else 5)
        ax.axvline(trained, color="0.5", linewidth=1)
    say_trained(curves_ax, trained)
    fig.legend(loc="outside upper center", ncols=3)
    return fig


def _style(number: int) -> dict[str, Any]:
    if number == 0:
        return {"color": "black", "linestyle": "-", "linewidth": 2.2}
    return {
        "color": COLOURS[(number - 1) % len(COLOURS)],
        "linewidth": 1.5,
        "linestyle": DASHES[number % len(DASHES)],
    }

"""Figure of a comparison: curves, loss and answers, one line per method."""

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
    n_heads: int,
    trained: int,
) -> Any:
    """Top: mean curve of the heads and weight of their slow pairs; bottom: loss and tasks.

    The vertical line marks the training length; the model was never trained on what lies right of
    it. Bands are 95 % confidence intervals over texts.

    Args:
        curves, losses, answers: ``mean_curves``, ``losses`` and ``answers`` of an
            ``ExtrapolationComparison``.
        methods: methods to draw, by the number that sets their colour; 0 is the unmodified model.
        n_heads: number of heads that the curves are averaged over.
        trained: training length in positions.
    """
    tasks = list(dict.fromkeys(answers["task"]))
    fig = picture(figsize=(9.0, 7.0))
    above, below = fig.subfigures(2, 1, height_ratios=(1.15, 1))
    curves_ax, slow_ax = above.subplots(1, 2)
    loss_ax, *rest = below.subplots(1, 1 + len(tasks), squeeze=False)[0]
    task_axes = dict(zip(tasks, rest, strict=True))
    for number, method in methods.items():
        style = _style(number)
        marked = {**style, "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
        label = "unmodified model" if number == 0 else method
        mine = curves[curves["method"] == method]
        for ax, name in ((curves_ax, "mean"), (slow_ax, "slow_weight")):
            ax.plot(mine["distance"], mine[name], label=label, **style)
            _band(ax, mine["distance"], mine[f"{name}_low"], mine[f"{name}_high"], style)
        mine = losses[losses["method"] == method]
        middle = np.sqrt(mine["start"].to_numpy(dtype=float) * mine["end"].to_numpy(dtype=float))
        loss_ax.plot(middle, mine["loss"].to_numpy(), **marked)
        _band(loss_ax, middle, mine["ci_low"], mine["ci_high"], style)
        for task, ax in task_axes.items():
            mine = answers[(answers["method"] == method) & (answers["task"] == task)]
            by_length = mine.sort_values("length")
            ax.plot(by_length["length"], by_length["logprob"], **marked)
    curves_ax.set_ylabel("dominant dimension\n(rotary pair, 0 = fastest)")
    curves_ax.set_title(f"Mean dominant dimension of {n_heads} head{'s' if n_heads > 1 else ''}")
    slow_ax.set_ylabel("softmax weight of the slow pairs\n(all pairs: 1)")
    slow_ax.set_title("Weight of the slow pairs")
    for ax in (curves_ax, slow_ax):
        ax.set_xlabel("token distance (tokens)")
    loss_ax.set_ylabel("loss (nats per token)")
    loss_ax.set_xlabel("position (tokens)")
    loss_ax.set_title("Loss by position")
    for task, ax in task_axes.items():
        ax.set_ylabel("log-probability of the answer\n(nats per token)")
        ax.set_xlabel("length of the prompt (tokens)")
        ax.set_title(f"Task: {task}")
    for ax in (curves_ax, slow_ax, loss_ax, *task_axes.values()):
        log2_axis(ax, n_ticks=5)
        ax.axvline(trained, color="0.5", linewidth=1)
    say_trained(curves_ax, trained)
    fig.legend(*curves_ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def _band(ax: Any, x: Any, low: Any, high: Any, style: dict[str, Any]) -> None:
    ax.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _style(number: int) -> dict[str, Any]:
    if number == 0:
        return {"color": "black", "linestyle": "-", "linewidth": 2.2}
    return {
        "color": COLOURS[(number - 1) % len(COLOURS)],
        "linewidth": 1.5,
        "linestyle": DASHES[number % len(DASHES)],
    }

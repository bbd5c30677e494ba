"""Figure of a dose-response run: effect against strength, with each control's draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_posheads.figures.style import COLOURS, picture, styled

_ASKED = "#000000"


@styled
def dose_figure(
    table: pd.DataFrame,
    draws: Mapping[str, Float[np.ndarray, "draw strength"]],
    *,
    titles: Mapping[str, str],
    label: str,
    xlabel: str,
) -> Any:
    """One panel per control: the effect with its interval, and a thin line for every draw.

    Args:
        table: one row per strength and control: ``control``, ``strength``, ``effect``, ``ci_low``
            and ``ci_high``.
        draws: mean effect of each draw, by control.
        titles: of the controls.
        label: what was edited.
        xlabel: what the strength measures.
    """
    fig = picture(figsize=(max(5.0, 3.2 * len(draws)), 3.8))
    axes = fig.subplots(1, len(draws), sharey=True, squeeze=False)[0]
    for ax, (control, lines) in zip(axes, draws.items(), strict=True):
        rows = table[table["control"] == control]
        strength = rows["strength"]
        ax.axhline(0, color="0.5", linewidth=0.8)
        for i, line in enumerate(lines):
            name = "control (one line per draw)" if i == 0 else None
            style = dict(color=COLOURS[4], marker=".", markersize=3, linewidth=0.8, alpha=0.6)
            ax.plot(strength, line, label=name, **style)
        name = f"{label}, 95 % confidence interval over prompts"
        ax.plot(strength, rows["effect"], color=_ASKED, marker="o", linewidth=2, label=name)
        interval = rows["ci_low"], rows["ci_high"]
        ax.fill_between(strength, *interval, color=_ASKED, alpha=0.12, linewidth=0)
        ax.vlines(strength, *interval, color=_ASKED, linewidth=0.8)  # one strength fills no area
        ax.set_title(titles[control])
        ax.set_xlabel(xlabel)
    axes[0].set_ylabel("change (nats per token)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return fig

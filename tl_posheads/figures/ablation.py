"""Figures of an ablation study: the effect of ablating the top heads against controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_posheads.figures.style import COLOURS, picture, styled

_STYLE = {
    "random": (COLOURS[5], "o"),
    "layer_matched": (COLOURS[4], "s"),
    "norm_matched": (COLOURS[2], "^"),
    "lowest": (COLOURS[3], "D"),
    "retrieval": (COLOURS[1], "X"),
}
_OTHER = ("0.4", "o")
_TOP = "#000000"


@styled
def ablation_figure(table: pd.DataFrame, draws: pd.DataFrame) -> Any:
    """One row per task: long prompts on the left, their short controls on the right.

    Every small mark is one draw of a control, or the retrieval heads. The black point is the top
    heads with their 95 % confidence interval. Zero means no effect.

    Args:
        table: one row per task, variant, fraction and control, as in ``AblationStudy``.
        draws: ``effect`` with one row per task, variant and control draw (``kind``, ``fraction``).
    """
    tasks = list(dict.fromkeys(table["task"]))
    controls = list(dict.fromkeys([*table["control"], *draws["kind"]]))
    fractions = sorted(table["fraction"].unique())
    fig = picture(figsize=(9.0, 0.9 + 2.3 * len(tasks)))
    axes = fig.subplots(len(tasks), 2, squeeze=False, sharex=True, sharey="row")
    for row, task in enumerate(tasks):
        axes[row, 0].set_ylabel("change (nats per token)")
        for ax, variant in zip(axes[row], ("long", "short"), strict=True):
            top, drawn = (
                t[(t["task"] == task) & (t["variant"] == variant)] for t in (table, draws)
            )
            ax.axhline(0, color="0.5", linewidth=0.8)
            if top.empty:
                ax.text(0.5, 0.5, "no short control", ha="center", transform=ax.transAxes)
                continue
            for place, fraction in enumerate(fractions):
                mine, others = (t[t["fraction"] == fraction] for t in (top, drawn))
                _draw_fraction(ax, place, mine.iloc[0], others, controls)
            ax.set_title(f"{task}, {variant} context")
    for ax in axes[-1]:
        ax.set_xticks(range(len(fractions)), [f"{100 * fraction:.2g} %" for fraction in fractions])
        ax.set_xlabel("share of heads ablated")
    fig.legend(handles=_handles(controls), loc="outside upper center", ncols=6)
    return fig


@styled
def head_effects_figure(effects: Mapping[str, Float[np.ndarray, "layer head"]]) -> Any:
    """Heatmaps of the mean effect of ablating each head, one per task; white: none, red: harm.

    Args:
        effects: by task, NaN where a head wasn't ablated.
    """
    n = len(effects)
    layers, heads = next(iter(effects.values())).shape
    fig = picture(figsize=(1.5 + n * max(2.2, 0.22 * heads), max(2.8, 1.2 + 0.15 * layers)))
    axes = fig.subplots(1, n, squeeze=False, sharey=True)[0]
    for ax, (task, values) in zip(axes, effects.items(), strict=True):
        # Scaled to the largest effect, all others would be white.
        size = float(np.nanquantile(np.abs(values), 0.98)) or 1.0
        image = ax.imshow(values, cmap="RdBu", vmin=-size, vmax=size, aspect="auto", origin="lower")
        ax.grid(False)
        ax.set_title(task)
        ax.set_xlabel("head")
        fig.colorbar(image, ax=ax, extend="both", label="change in the answers' log-probability")
    axes[0].set_ylabel("layer")
    return fig


def _draw_fraction(
    ax: Any, place: int, top: pd.Series[Any], draws: pd.DataFrame, controls: Sequence[str]
) -> None:
    """The top heads' point, with each control's draws next to it."""
    width = 0.8 / (len(controls) + 1)
    left = place - 0.4
    for i, control in enumerate(controls):
        effects = draws.loc[draws["kind"] == control, "effect"]
        x = left + width * (i + 1.5)
        # Fixed offsets instead of random jitter: the same study gives the same figure.
        fan = [x + width * 0.35 * ((7 * k) % 11 / 5 - 1) for k in range(len(effects))]
        colour, marker = _STYLE.get(control, _OTHER)
        at = fan if len(effects) > 1 else [x]
        ax.scatter(at, effects, s=18, color=colour, marker=marker, alpha=0.7, linewidths=0)
    error = [[top["effect"] - top["ci_low"]], [top["ci_high"] - top["effect"]]]
    ax.errorbar([left + width * 0.5], [top["effect"]], yerr=error, fmt="o", color=_TOP, capsize=3)


def _handles(controls: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    entries = [("top heads, 95 % confidence interval", _TOP, "o")]
    entries += [(name, *_STYLE.get(name, _OTHER)) for name in controls]
    return [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=name.replace("_", "-"))
        for name, colour, marker in entries
    ]

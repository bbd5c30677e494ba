"""The picture of a dose-response run: effect against strength, over the draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_posheads.figures.style import COLOURS, picture, styled

_HEADS = "#000000"


@styled
def dose_figure(
    table: pd.DataFrame, draws: Float[np.ndarray, "draw strength"], *, n_heads: int, xlabel: str
) -> Any:
    """The heads' effect with its interval, and a thin line for every draw of as many others.

    Args:
        table: a row per strength: ``strength``, ``effect``, ``ci_low`` and ``ci_high``.
        draws: mean effect of each.
        n_heads: how many heads were edited.
        xlabel: what a strength is.
    """
    fig = picture(figsize=(6.5, 4.0))
    ax = fig.subplots()
    ax.axhline(0, color="0.5", linewidth=0.8)
    strength = table["strength"]
    for i, draw in enumerate(draws):
        label = "layer-matched heads, a line a draw" if i == 0 else None
        ax.plot(strength, draw, color=COLOURS[4], linewidth=0.8, alpha=0.6, label=label)
    label = f"the {n_heads} heads, 95 % interval over prompts"
    ax.plot(strength, table["effect"], color=_HEADS, marker="o", linewidth=2, label=label)
    interval = table["ci_low"], table["ci_high"]
    ax.fill_between(strength, *interval, color=_HEADS, alpha=0.12, linewidth=0)
    ax.set_xlabel(xlabel)
    ax.set_ylabel("change (nats a token)")
    ax.legend()
    return fig

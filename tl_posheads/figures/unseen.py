"""The picture of unseen angles: curves bare and clamped, each pair's part, and the loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tl_posheads.figures.style import COLOURS, DASHES, MARKERS, picture, styled

if TYPE_CHECKING:
    from tl_posheads.studies.unseen.results import UnseenAngles

_LABELS = {
    "unseen": "unseen pairs clamped",
    "seen": "other pairs clamped",
    "all": "all clamped",
    "hidden": "far keys hidden",
}


@styled
def figure(found: UnseenAngles, n_boot: int = 500) -> Any:
    """Right of the upright line the model sees distances and positions it was not trained on."""
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator

    losses = found.losses(n_boot=n_boot)
    shown = [] if losses.empty else [c for c in ("bare", *_LABELS) if c in set(losses["condition"])]
    fig = picture(figsize=(9.0, 7.0))
    grid = fig.add_gridspec(2, 2 if len(shown) > 1 else 1, height_ratios=(1.15, 1))
    curve_ax, pair_ax = fig.add_subplot(grid[0, :]), fig.add_subplot(grid[1, 0])

    n = found.n_pairs.sum(0).numpy().astype(float)
    middle = np.sqrt(found.bin_start.numpy() * (found.bin_end.numpy() - 1.0))
    past = found.bin_octave.numpy() >= 0

    def mean(total: np.ndarray) -> np.ndarray:
        """Over heads, each alike."""
        with np.errstate(invalid="ignore", divide="ignore"):
            by_head = np.where(n > 0, total / n, np.nan)
        held = np.isfinite(by_head).any(0)
        out = np.full(by_head.shape[1], np.nan)
        out[held] = np.nanmean(by_head[:, held], axis=0)
        return out

    curve_ax.plot(
        middle, mean(found.bare.sum(0).numpy()), color="black", linewidth=2.2, label="bare model"
    )
    joint = found.joint.sum(0).numpy()
    for s, (name, label) in enumerate(_LABELS.items()):
        if name in ("unseen", "seen"):
            curve_ax.plot(
                middle[past],
                mean(joint[:, s])[past],
                color=COLOURS[s],
                linestyle=DASHES[s + 1],
                label=label,
            )
    if found.live is not None:
        curve_ax.plot(
            middle,
            mean(found.live.sum(0).numpy()),
            color=COLOURS[2],
            linestyle=DASHES[3],
            label="unseen clamped as it reads",
        )
    curve_ax.set_xlabel("token distance (tokens)")
    curve_ax.set_ylabel("dominant dimension\n(rotary pair, 0 = fastest)")
    curve_ax.set_title(f"Mean of {len(found.heads)} heads by token distance")
    curve_ax.legend()

    table = found.by_pair(n_boot=n_boot)
    value, low, high = (table[f"change_from_pair{end}"].to_numpy() for end in ("", "_low", "_high"))
    colours = [COLOURS[0] if unseen > 0.5 else COLOURS[1] for unseen in table["unseen"]]
    pair_ax.bar(table["pair"], value, color=colours, width=0.75)
    if np.isfinite(low).all():
        pair_ax.vlines(table["pair"], low, high, color="0.2", linewidth=1)
    pair_ax.set_ylim(top=pair_ax.get_ylim()[1] + 0.35 * np.ptp(pair_ax.get_ylim()))  # the legend's
    pair_ax.axhline(0, color="0.3", linewidth=0.8)
    step = math.ceil(len(table) / 8)
    pair_ax.set_xticks(
        table["pair"][::step],
        [f"{m}\n{w:,.0f}" for m, w in zip(table["pair"][::step], table["wavelength"][::step])],
    )
    pair_ax.set_xlabel("rotary pair, and its wavelength (tokens)")
    pair_ax.set_ylabel("part in the change\n(rotary dimensions)")
    pair_ax.set_title("What clamping one pair takes away")
    pair_ax.legend(
        handles=[
            Patch(color=COLOURS[0], label="less than a turn in training"),
            Patch(color=COLOURS[1], label="a turn or more"),
        ]
    )

    axes = [curve_ax]
    if len(shown) > 1:
        loss_ax = fig.add_subplot(grid[1, 1])
        axes.append(loss_ax)
        for i, name in enumerate(shown):
            mine = losses[losses["condition"] == name].sort_values("start")
            at = np.sqrt(mine["start"].to_numpy(float) * mine["end"].to_numpy(float))
            black = dict(color="black", linewidth=2.2)
            style = black if name == "bare" else dict(color=COLOURS[(0, 1, 4, 3)[i - 1]])
            loss_ax.plot(
                at,
                mine["loss"],
                marker=MARKERS[i],
                markersize=4,
                linestyle=DASHES[i % len(DASHES)],
                label=_LABELS.get(name, "bare model"),
                **style,
            )
        loss_ax.set_xlabel("position (tokens)")
        loss_ax.set_ylabel("loss (nats a token)")
        loss_ax.set_title("Loss by position, clamped as it reads")
        loss_ax.legend()
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(LogLocator(base=2, numticks=11 if ax is curve_ax else 5))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        ax.axvline(found.trained, color="0.5", linewidth=1)
    curve_ax.annotate(
        f"trained on {found.trained:,} ",
        (found.trained, 0),
        color="0.3",
        fontsize=9,
        xycoords=("data", "axes fraction"),
        va="bottom",
        ha="right",
    )
    return fig

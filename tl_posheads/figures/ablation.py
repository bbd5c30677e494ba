"""The picture of an ablation study: the top heads' effects over the controls' draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tl_posheads.figures.style import COLOURS, picture, styled

if TYPE_CHECKING:
    from tl_posheads.interventions.study.results import AblationStudy

_STYLE = {
    "random": (COLOURS[5], "o"),
    "layer_matched": (COLOURS[4], "s"),
    "norm_matched": (COLOURS[2], "^"),
    "lowest": (COLOURS[3], "D"),
}
_TOP = "#000000"


@styled
def figure(study: AblationStudy) -> Any:
    """A row per task; on the left the long prompts, on the right their short controls.

    Every small mark is one draw of a control, the black point the top heads with their 95 %
    interval; at zero nothing was lost.
    """
    table = study.to_pandas()
    tasks, fractions, controls = study.tasks, study.fractions, study.controls
    fig = picture(figsize=(9.0, 0.9 + 2.3 * len(tasks)))
    axes = fig.subplots(len(tasks), 2, squeeze=False, sharex=True, sharey="row")
    width = 0.8 / (len(controls) + 1)
    for row, task in enumerate(tasks):
        for column, variant in enumerate(("long", "short")):
            ax = axes[row, column]
            mine = table[(table["task"] == task) & (table["variant"] == variant)]
            ax.axhline(0, color="0.5", linewidth=0.8)
            if mine.empty:
                ax.text(0.5, 0.5, "no short control", ha="center", transform=ax.transAxes)
                continue
            effects = study.effects(task, variant).mean(axis=0)
            for place, fraction in enumerate(fractions):
                for i, control in enumerate(controls):
                    ids = study.condition_ids(control, fraction)
                    x = place - 0.4 + width * (i + 1.5)
                    colour, marker = _STYLE.get(control, ("0.4", "o"))
                    # A fixed fan instead of random jitter: the same study gives the same picture.
                    fan = [x + width * 0.35 * ((7 * k) % 11 / 5 - 1) for k in range(len(ids))]
                    ax.scatter(
                        fan if len(ids) > 1 else [x],
                        effects[ids],
                        s=18,
                        color=colour,
                        marker=marker,
                        alpha=0.7,
                        linewidths=0,
                    )
                best = mine[mine["fraction"] == fraction].iloc[0]
                x = place - 0.4 + width * 0.5
                error = [
                    [best["effect"] - best["ci_low"]],
                    [best["ci_high"] - best["effect"]],
                ]
                ax.errorbar([x], [best["effect"]], yerr=error, fmt="o", color=_TOP, capsize=3)
            ax.set_title(f"{task}, {variant} context")
            if column == 0:
                ax.set_ylabel("change (nats a token)")
    for ax in axes[-1]:
        ax.set_xticks(range(len(fractions)), [f"{100 * fraction:.2g} %" for fraction in fractions])
        ax.set_xlabel("share of heads ablated")
    fig.legend(handles=_handles(controls), loc="outside upper center", ncols=5)
    return fig


def _handles(controls: list[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    entries = [("top heads, 95 % interval", _TOP, "o")]
    entries += [(name, *_STYLE.get(name, ("0.4", "o"))) for name in controls]
    return [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=name.replace("_", "-"))
        for name, colour, marker in entries
    ]

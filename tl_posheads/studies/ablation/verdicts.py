"""What a study found, in a sentence per task that says no more than its numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tl_posheads.tasks.calibration import HIGH, LOW

if TYPE_CHECKING:
    from tl_posheads.studies.ablation.results import AblationStudy

ALPHA = 0.05
_NAMES = {
    "random": "random heads",
    "layer_matched": "heads of the same layers",
    "norm_matched": "heads of similar output norm",
    "lowest": "the lowest heads",
}


def verdict(study: AblationStudy, task: str) -> str:
    """One sentence on a task, from the rows of :meth:`AblationStudy.to_pandas`.

    It reports the fraction where the largest corrected p-value over controls is smallest: what
    holds there holds against every control. ``lowest``, a single set, is reported but decides
    nothing if there are controls with draws: over few prompts its test has no power.
    """
    table = study.to_pandas()
    everything = table[(table["task"] == task) & (table["variant"] == "long")]
    rows = table[table["task"] == task]
    if (rows["n_draws"] > 1).any():
        rows = rows[rows["n_draws"] > 1]
    far = rows[rows["variant"] == "long"]
    worst = far.groupby("fraction")["p_adjusted"].max()
    fraction = float(worst.idxmin() if worst.notna().any() else worst.index[0])
    here = far[far["fraction"] == fraction]
    hardest = here.loc[here["p_adjusted"].fillna(2).idxmax()]
    found = bool(hardest["p_adjusted"] <= ALPHA)
    n_heads, n_prompts = int(hardest["n_heads"]), int(hardest["n_prompts"])
    asked = f"{n_prompts} prompt{'s' if n_prompts > 1 else ''}"
    what, unit = "log-probability per token", " nats"
    if _is_metric(study, task):
        what, unit = "score", ""
    others = ", ".join(
        f"{_NAMES.get(row.control, row.control)} {_signed(row.control_effect)}"
        for row in everything[everything["fraction"] == fraction].itertuples()
    )
    start = (
        f"{task} ({asked}): without the top {100 * fraction:.2g} % of heads ({n_heads}) the "
        f"answers' {what} goes from {hardest['unablated']:.2f} to "
        f"{hardest['unablated'] + hardest['effect']:.2f}{unit} ({_signed(hardest['effect'])}"
        f"{_interval(hardest)}), against {others} on average"
    )
    p = _p(hardest["p_adjusted"])
    if found:
        return (
            f"{start}: evidence that these heads matter more than every control drawn, on these "
            f"prompts (p = {p} or less, corrected){_range(rows, fraction)}."
        )
    blind = _could_not_find(study, task, here)
    if blind:
        return f"{start}: this study could not have detected harm from these heads, as {blind}."
    against = _NAMES.get(hardest["control"], hardest["control"])
    return (
        f"{start}: no evidence that these heads matter more than {against}, on these prompts "
        f"(p = {p} corrected{_could_find(here)}){_positive(study, task, fraction)}."
    )


def _is_metric(study: AblationStudy, task: str) -> bool:
    return bool((study.provenance.get("tasks") or {}).get(task, {}).get("metric"))


def _could_not_find(study: AblationStudy, task: str, rows: pd.DataFrame) -> str:
    """Why the task could not have shown harm; empty if it could."""
    least = max(map(_least_p, rows.itertuples()))
    if least > ALPHA:
        return f"no p-value of so few draws or prompts can be below {least:.3f}"
    facts = (study.provenance.get("tasks") or {}).get(task, {})
    if facts.get("rungs") and not len(study.calibration):
        mine = study.cells[(study.cells["task"] == task) & (study.cells["variant"] == "long")]
        clean = mine[mine["condition"] == -1]["value"]
        p = float(np.exp(clean).mean())
        if not LOW <= p <= HIGH:
            side = "at its ceiling" if p > HIGH else "at its floor"
            return f"the task is {side} (probability {p:.2f} per token without ablation)"
    positive = study.positive_control()
    mine = positive[positive["task"] == task]
    if len(mine) and not _harmed(mine).any():
        worst = mine.loc[mine["effect"].idxmin()]
        return (
            f"the {int(worst['n_heads'])} best retrieval heads show no harm either "
            f"({_signed(worst['effect'])}{_interval(worst)}; p = {_p(worst['p_adjusted'])})"
        )
    return ""


def _least_p(row: Any) -> float:
    """The smallest p-value that there can be: of a rank among draws, or of flipped signs."""
    return float(0.5**row.n_prompts if row.control == "lowest" else 1 / (1 + row.n_draws))


def _harmed(rows: pd.DataFrame) -> pd.Series[bool]:
    return (rows["p_adjusted"] <= ALPHA) & (rows["effect"] < 0)


def _positive(study: AblationStudy, task: str, fraction: float) -> str:
    """Effect of the same number of retrieval heads, if they did harm."""
    positive = study.positive_control()
    mine = positive[positive["task"] == task]
    if mine.empty:
        facts = study.provenance.get("positive_control") or {}
        why = facts.get("reason", "no head copied what was asked")
        why = "no control has several draws" if facts.get("n_heads") else why
        return f"; there is no positive control, because {why}"
    same = mine[mine["fraction"] == fraction].iloc[0]
    worst = (
        same if _harmed(mine[mine["fraction"] == fraction]).any() else mine[_harmed(mine)].iloc[0]
    )
    return (
        f"; the study can find harm: without {int(worst['n_heads'])} retrieval heads it is "
        f"{_signed(worst['effect'])} (p = {_p(worst['p_adjusted'])})"
    )


def _range(rows: pd.DataFrame, fraction: float) -> str:
    """Whether long context is harmed in particular, or the model in general."""
    near = rows[(rows["variant"] == "short") & (rows["fraction"] == fraction)]
    gap = rows[(rows["variant"] == "long - short") & (rows["fraction"] == fraction)]
    if near.empty or gap.empty:
        return "; there is no short-context control to tell harm to long context from general harm"
    lost, p = near.iloc[0]["effect"], gap["p_adjusted"].max()
    if p <= ALPHA:
        return (
            f"; at short range it changes by {_signed(lost)}, so that long context suffers more "
            f"(p = {_p(p)})"
        )
    return (
        f"; but at short range it changes by {_signed(lost)}, so that harm to long context "
        f"can't be told from general harm (p = {_p(p)})"
    )


def _could_find(rows: pd.DataFrame) -> str:
    size = rows["smallest_detectable"].max()
    if math.isnan(size):
        return ""
    if math.isinf(size):
        return "; no effect, however large, would have been found in 4 of 5 such studies"
    return f"; minimum detectable effect: {size:.2f} below the draws' mean, in 4 of 5 such studies"


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _interval(row: pd.Series) -> str:
    if math.isnan(row["ci_low"]):
        return ", no interval from one prompt"
    return f", 95 % interval over prompts like these {row['ci_low']:+.2f} to {row['ci_high']:+.2f}"


def _p(value: float) -> str:
    if math.isnan(value):
        return "unknown"
    return "below 0.001" if value < 0.001 else f"{value:.3f}"

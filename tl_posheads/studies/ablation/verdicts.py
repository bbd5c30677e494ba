"""What a study found, in a sentence per task that says no more than its numbers."""

from __future__ import annotations

import math

import pandas as pd

ALPHA = 0.05
_NAMES = {
    "random": "random heads",
    "layer_matched": "heads of the same layers",
    "norm_matched": "heads of like output norm",
    "lowest": "the lowest heads",
}


def verdict(table: pd.DataFrame, task: str) -> str:
    """One sentence on a task, from the rows of :meth:`AblationStudy.to_pandas`.

    The fraction told of is the one where the worst of the controls' corrected p-values is
    smallest: what holds there holds against every control. ``lowest``, a single set, is told of
    but decides nothing where there are controls with draws: over few prompts its test has no power.
    """
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
    start = (
        f"{task} ({n_prompts} prompt{'s' if n_prompts > 1 else ''}): without the top "
        f"{100 * fraction:.2g} % of heads ({n_heads}) the scored tokens' log-probability goes from "
        f"{hardest['unablated']:.2f} to {hardest['unablated'] + hardest['effect']:.2f} nats a "
        f"token ({_signed(hardest['effect'])}{_interval(hardest)})"
    )
    others = ", ".join(
        f"{_NAMES.get(row.control, row.control)} {_signed(row.control_effect)}"
        for row in everything[everything["fraction"] == fraction].itertuples()
    )
    p = _p(hardest["p_adjusted"])
    if not found:
        return (
            f"{start}, against {others} on average: no evidence that these heads matter more than "
            f"{_NAMES.get(hardest['control'], hardest['control'])} (p = {p} corrected"
            f"{_could_find(here)})."
        )
    return (
        f"{start}, against {others} on average: evidence that these heads matter more than every "
        f"control drawn (p = {p} or less, corrected){_range(rows, fraction)}."
    )


def _range(rows: pd.DataFrame, fraction: float) -> str:
    """Whether the loss is one of long context, or of any ability."""
    near = rows[(rows["variant"] == "short") & (rows["fraction"] == fraction)]
    gap = rows[(rows["variant"] == "long - short") & (rows["fraction"] == fraction)]
    if near.empty or gap.empty:
        return "; there is no short-context control to tell long context from any ability"
    lost, p = near.iloc[0]["effect"], gap["p_adjusted"].max()
    if p <= ALPHA:
        return (
            f"; at short range it changes by {_signed(lost)}, so that long context suffers more "
            f"(p = {_p(p)})"
        )
    return (
        f"; but at short range it changes by {_signed(lost)}, so that long context is not told "
        f"from any ability (p = {_p(p)})"
    )


def _could_find(rows: pd.DataFrame) -> str:
    size = rows["smallest_detectable"].max()
    if math.isnan(size):
        return ""
    if math.isinf(size):
        return "; with so few draws no effect could have been found"
    return (
        f"; an effect of {size:.2f} below the draws' mean would have been found in 4 of 5 studies"
    )


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _interval(row: pd.Series) -> str:
    if math.isnan(row["ci_low"]):
        return ", no interval from one prompt"
    return f", 95 % interval {row['ci_low']:+.2f} to {row['ci_high']:+.2f}"


def _p(value: float) -> str:
    if math.isnan(value):
        return "unknown"
    return "below 0.001" if value < 0.001 else f"{value:.3f}"

"""The ablations of a study, and what the screen says of many more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from tl_posheads.scoring.head_scores import HeadScores
from tl_posheads.statistics.effects import rank_tests
from tl_posheads.studies.ablation.controls import Head, control_sets, top_sets

N_SCREEN_DRAWS = 2000


@dataclass(frozen=True)
class Condition:
    """A set of heads that is ablated: the top ones, or one draw of a control, at a fraction."""

    kind: str
    draw: int
    fraction: float
    heads: tuple[Head, ...]

    @property
    def first_layer(self) -> int:
        return min(layer for layer, _ in self.heads)

    def row(self, number: int) -> dict[str, Any]:
        return {
            "condition": number,
            "kind": self.kind,
            "draw": self.draw,
            "fraction": self.fraction,
            "n_heads": len(self.heads),
            "heads": json.dumps([list(head) for head in self.heads]),
        }


def conditions_of(
    scores: HeadScores,
    fractions: Sequence[float],
    controls: Sequence[str],
    *,
    n: int,
    seed: int,
    norms: Float[Tensor, "layer head"] | None,
) -> list[Condition]:
    """The top sets, then every control's draws; fewer draws are the first of more."""
    out = [
        Condition("top", 0, fraction, tuple(heads))
        for fraction, heads in zip(fractions, top_sets(scores, fractions), strict=True)
    ]
    for kind in controls:
        drawn = control_sets(scores, fractions, kind, n=n, seed=seed, norms=norms)
        out += [
            Condition(kind, draw, fraction, tuple(heads))
            for draw, sets in enumerate(drawn)
            for fraction, heads in zip(fractions, sets, strict=True)
        ]
    return out


def screen_tests(
    screen: pd.DataFrame,
    scores: HeadScores,
    fractions: Sequence[float],
    controls: Sequence[str],
    norms: Float[Tensor, "layer head"] | None,
    seed: int,
) -> pd.DataFrame:
    """The rank test on estimated effects, over ``N_SCREEN_DRAWS`` draws of each control.

    Args:
        screen: columns ``task``, ``variant``, ``prompt``, ``layer``, ``head``, ``effect``.

    Returns:
        One row per task, variant, fraction and control: ``screen_effect`` of the top heads, nats a
        token; ``p_screen``, its rank; ``n_screen_draws``. No p for ``"lowest"``, a single set.
    """
    tables: dict[tuple[str, str], dict[int, Float[np.ndarray, "layer head"]]] = {}
    for (task, variant, prompt), rows in screen.groupby(["task", "variant", "prompt"], sort=False):
        table = np.full(tuple(scores.rho.shape), np.nan)
        table[rows["layer"], rows["head"]] = rows["effect"]
        tables.setdefault((task, variant), {})[prompt] = table
    for task, variant in list(tables):
        if variant == "long" and (task, "short") in tables:
            far, near = tables[task, "long"], tables[task, "short"]
            tables[task, "long - short"] = {i: far[i] - near[i] for i in far if i in near}
    means = {key: np.mean(list(by_prompt.values()), axis=0) for key, by_prompt in tables.items()}
    tops = top_sets(scores, fractions)
    out = []
    for control in controls:
        drawn = control_sets(scores, fractions, control, n=N_SCREEN_DRAWS, seed=seed, norms=norms)
        for i, fraction in enumerate(fractions):
            sets = np.array([draw[i] for draw in drawn])
            for (task, variant), table in means.items():
                top = float(sum(table[head] for head in tops[i]))
                values = table[sets[..., 0], sets[..., 1]].sum(1)
                single = len(drawn) == 1
                out.append(
                    {
                        "task": task,
                        "variant": variant,
                        "fraction": fraction,
                        "control": control,
                        "screen_effect": top,
                        "n_screen_draws": 0 if single else len(drawn),
                        "p_screen": np.nan
                        if single
                        else float(rank_tests(np.array([top]), values[:, None]).p[0]),
                    }
                )
    return pd.DataFrame(out)

"""The sets of heads that a study ablates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_posheads.hooks.heads import Head
from tl_posheads.scoring.head_scores import HeadScores
from tl_posheads.studies.ablation.controls import control_sets, top_sets

RETRIEVAL = "retrieval"


@dataclass(frozen=True)
class Condition:
    """A set of heads that is ablated: the top ones, retrieval heads, or one draw of a control."""

    kind: str
    draw: int
    fraction: float
    heads: tuple[Head, ...]

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
    retrieval: Sequence[Head],
) -> list[Condition]:
    """The top sets, equally many retrieval heads, then every control draw by draw.

    The conditions of fewer draws come first among those of more.

    Args:
        retrieval: the model's retrieval heads, best first; none gives no such sets.
    """
    tops = list(zip(fractions, top_sets(scores, fractions), strict=True))
    out = [Condition("top", 0, fraction, tuple(heads)) for fraction, heads in tops]
    if retrieval:
        out += [
            Condition(RETRIEVAL, 0, fraction, tuple(retrieval[: len(heads)]))
            for fraction, heads in tops
        ]
    drawn = {
        kind: control_sets(scores, fractions, kind, n=n, seed=seed, norms=norms)
        for kind in controls
    }
    for draw in range(n):
        for kind, draws in drawn.items():
            if draw < len(draws):
                out += [
                    Condition(kind, draw, fraction, tuple(heads))
                    for fraction, heads in zip(fractions, draws[draw], strict=True)
                ]
    return out

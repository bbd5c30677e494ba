"""Agreement between two scorings of the same heads."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd


@dataclass(frozen=True)
class Comparison:
    """Agreement between two scorings of the same heads.

    Attributes:
        rank_correlation: Spearman's rho between the two lists of scores.
        n_heads: number of heads scored by both.
        k: number of top heads compared.
        overlap: number of top heads in common.
        chance: expected overlap of two random choices.
        p_chance: probability that two random choices overlap at least that much.
        by_head: one row per head, over the documents in common: ``difference`` (the other's rho
            minus this one's, mean over documents), ``ci_low``, ``ci_high``, ``p`` (paired t test)
            and ``p_adjusted`` (over heads). Empty with fewer than two documents in common.
    """

    rank_correlation: float
    n_heads: int
    k: int
    overlap: int
    chance: float
    p_chance: float
    by_head: pd.DataFrame = field(repr=False)

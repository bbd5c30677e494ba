"""What is measured of a head, under which names, and with which settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tl_posheads.errors import PosheadsError

# measure -> its columns in the table
MEASURES: dict[str, tuple[str, ...]] = {
    "retrieval": ("retrieval",),
    "induction": ("induction",),
    "previous_token": ("previous_token",),
    "sink": ("sink",),
    "distance": ("distance", "distance_beyond_sink"),
    "long_context": ("long_context", "long_context_oracle"),
    "massive": ("massive_q", "massive_k", "slow_norm_q", "slow_norm_k"),
    "utility": ("dimensions_used", "slow_utility"),
}
POSITIONAL = "positional"
# Columns that papers name heads after.
FAMILIES = (
    POSITIONAL,
    "retrieval",
    "induction",
    "previous_token",
    "sink",
    "long_context_oracle",
)


@dataclass(frozen=True)
class ProfileSettings:
    """Settings of the measures; the defaults are the papers' where they have any.

    Attributes:
        local_window: keys just before a query that are local; None takes an eighth of the longest
            text, 16 to 1,024.
        n_sink: keys at a text's beginning that are also local.
        threshold: a query needs long context where its local keys' share of attention is less.
        massive_factor: a dimension is massive above so many times the head's mean norm.
        utility_queries: queries of every text, evenly spread, whose output the mask keeps.
        utility_penalty: of keeping every dimension. utility_steps: of the mask's optimiser.
    """

    local_window: int | None = None
    n_sink: int = 16
    threshold: float = 0.6
    massive_factor: float = 5.0
    utility_queries: int = 32
    utility_penalty: float = 0.1
    utility_steps: int = 100

    def window_for(self, longest: int) -> int:
        """The local window for texts of so many tokens."""
        if self.local_window is not None:
            return self.local_window
        return max(16, min(1024, longest // 8))


def measures_of(measures: Sequence[str] | None) -> list[str]:
    """The measures asked for, checked, in their own order.

    Raises:
        PosheadsError: one that doesn't exist.

    Example:
        >>> measures_of(["sink", "retrieval"])
        ['retrieval', 'sink']
    """
    wanted = list(MEASURES) if measures is None else list(measures)
    wrong = [name for name in wanted if name not in MEASURES]
    if isinstance(measures, str) or wrong:
        raise PosheadsError(
            f"measures={measures!r} was given; expected a list of some of {', '.join(MEASURES)}"
        )
    return [name for name in MEASURES if name in wanted]


def columns_of(measures: Sequence[str]) -> list[str]:
    return [column for name in measures for column in MEASURES[name]]

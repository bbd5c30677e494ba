"""A study's time: how it is given, and what is left of it."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, field
from datetime import timedelta

from tl_posheads.errors import PosheadsError

# Reserve for what no plan foresees: other programs on the machine, the final statistics.
_MARGIN = 0.95
_UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


def seconds_of(budget: str | float | timedelta | None) -> float | None:
    """A time like ``"60min"``, ``"1.5h"``, ``"90s"`` or a number of seconds; None is no limit.

    Raises:
        PosheadsError: anything else, or no time at all.

    Example:
        >>> seconds_of("1.5h"), seconds_of("90s"), seconds_of(None)
        (5400.0, 90.0, None)
    """
    if budget is None:
        return None
    value = math.nan
    if isinstance(budget, timedelta):
        value = budget.total_seconds()
    elif isinstance(budget, str):
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", budget)
        if found and (found[2] or "s") in _UNITS:
            value = float(found[1]) * _UNITS[found[2] or "s"]
    elif isinstance(budget, int | float) and not isinstance(budget, bool):
        value = float(budget)
    if not (value > 0 and math.isfinite(value)):
        raise PosheadsError(
            f"budget={budget!r} was given; expected a time like '60min', '1.5h' or '90s'"
        )
    return value


@dataclass
class Clock:
    """Time that a run has spent, including an earlier part that was stopped.

    Attributes:
        budget: seconds, None without a limit.
        before: seconds that finished work took in an earlier run.
    """

    budget: float | None
    before: float = 0.0
    began: float = field(default_factory=lambda: time.monotonic())

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began + self.before

    def allows(self, seconds: float) -> bool:
        """Whether work of this length would still end in time."""
        return self.budget is None or self.spent + seconds <= self.budget * _MARGIN

    def require(self, seconds: float, what: str) -> None:
        """Refuse a budget in which not even ``what`` fits.

        Raises:
            PosheadsError: it doesn't fit.
        """
        if self.budget is not None and not self.allows(seconds):
            least = math.ceil((self.spent + seconds) / _MARGIN / 60)
            raise PosheadsError(
                f"a budget of {self.budget / 60:.3g} min was given, but {what} needs {least} min "
                "here; raise it, or give fewer tasks, fractions or controls, or shorter prompts"
            )

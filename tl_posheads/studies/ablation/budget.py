"""How much of an ablation study fits into a given time, and what it could then find."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
from jaxtyping import Float

from tl_posheads.errors import PosheadsError
from tl_posheads.statistics.power import smallest_detectable

LEAST_DRAWS = 12
LEAST_PROMPTS = 2
# 19 draws are the fewest among which a rank can reach 5 %; 12 only where nothing else fits.
_DRAWS = (32, 24, 19, LEAST_DRAWS)
# Left for what no plan foresees: another program on the machine, the statistics in the end.
_MARGIN = 0.92
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


@dataclass(frozen=True)
class Cost:
    """Measured seconds for one prompt of a task, its short control included.

    Attributes:
        whole_pass: a pass through all layers.
        saved_per_layer: what a pass saves for every layer below the first ablated one.
        screening: a forward and a backward pass.
    """

    whole_pass: float
    saved_per_layer: float
    screening: float

    def ablated_passes(self, first_layers: Sequence[int]) -> float:
        """Seconds of one pass for each first ablated layer."""
        return sum(
            max(self.whole_pass - self.saved_per_layer * first, 0.0) for first in first_layers
        )


@dataclass(frozen=True)
class Spread:
    """What the pilot says of a task at a fraction, in nats.

    Attributes:
        draw_sd: standard deviation of the effect over draws of a control.
        prompt_sd: that over prompts of the difference between the top heads' effect and a draw's.
    """

    draw_sd: float
    prompt_sd: float


@dataclass(frozen=True)
class Plan:
    """How many prompts and draws a study takes.

    Attributes:
        n_prompts: of each task, or as many as it has.
        n_control: draws of each random control.
        seconds: expected for the rest of the study; NaN without a budget.
        budget: seconds given, None without.
        smallest_detectable: by task and fraction (as text), nats a token below the mean draw of
            the first random control, found with a power of 80 % at 5 % after correction.
    """

    n_prompts: int
    n_control: int
    seconds: float
    budget: float | None
    smallest_detectable: dict[str, dict[str, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite become None."""
        out = asdict(self)
        out["seconds"] = _finite(self.seconds)
        out["smallest_detectable"] = {
            task: {fraction: _finite(value) for fraction, value in values.items()}
            for task, values in self.smallest_detectable.items()
        }
        return out

    def describe(self, n_conditions: int, agreements: Mapping[str, float]) -> str:
        """What the user is told before the study starts.

        Args:
            n_conditions: ablations a prompt.
            agreements: by task, the rank correlation of the screen, on which the sizes rest, with
                the pilot's ablations.
        """
        time = ""
        if self.budget is not None:
            time = f", about {self.seconds / 60:.0f} of {self.budget / 60:.0f} minutes"
        lines = [
            f"plan: {self.n_prompts} prompts a task, {self.n_control} draws a control, "
            f"{n_conditions} ablations a prompt{time}",
            "smallest effect that could be told from chance (nats a token below the mean draw, "
            "80 % power, 5 % after correction):",
        ]
        for task, values in self.smallest_detectable.items():
            sizes = [f"{100 * float(f):.2g} %: {_shown(value)}" for f, value in values.items()]
            rho = agreements.get(task, math.nan)
            trust = "unknown" if math.isnan(rho) else f"{rho:+.2f}"
            lines.append(
                f"  {task}: {', '.join(sizes)} (by a screen whose rank correlation with "
                f"the pilot's ablations is {trust})"
            )
        return "\n".join(lines)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(value: float) -> str:
    if math.isnan(value):
        return "unknown"
    return "none, too few draws" if math.isinf(value) else f"{value:.2f}"


def spread_of(
    top: Float[np.ndarray, "prompt"], draws: Float[np.ndarray, "prompt draw"], scale: float
) -> Spread:
    """Spreads of a pilot's effects, times ``scale``: true effects per estimated one."""
    if len(top) < 2:
        return Spread(math.nan, math.nan)
    between = draws.mean(0).std(ddof=1)
    within = (top[:, None] - draws).std(axis=0, ddof=1).mean()
    return Spread(float(between) * scale, float(within) * scale)


def make_plan(
    costs: Mapping[str, Cost],
    first_layers: Mapping[int, Sequence[int]],
    spreads: Mapping[tuple[str, float], Spread],
    *,
    n_prompts: int,
    n_control: int,
    budget: float | None,
    spent: float,
    seed: int,
) -> Plan:
    """Choose prompts and draws so that the smallest detectable effect is smallest.

    Args:
        costs: by task.
        first_layers: for a number of draws, the first ablated layer of every condition.
        spreads: by task and fraction.
        n_prompts: the most, what the longest task has.
        n_control: the most draws.
        budget: seconds for all; None takes the most of both.
        spent: seconds that are gone.
        seed: of the simulation.

    Raises:
        PosheadsError: not even ``LEAST_PROMPTS`` with ``LEAST_DRAWS`` fit.
    """
    n_tests = len(spreads)

    def found(prompts: int, draws: int) -> dict[str, dict[str, float]]:
        out: dict[str, dict[str, float]] = {}
        for (task, fraction), spread in spreads.items():
            out.setdefault(task, {})[str(fraction)] = smallest_detectable(
                draw_sd=spread.draw_sd,
                prompt_sd=spread.prompt_sd,
                n_draws=draws,
                n_prompts=prompts,
                n_tests=n_tests,
                seed=seed,
                n_sim=1000,
            )
        return out

    if budget is None:
        return Plan(n_prompts, n_control, math.nan, None, found(n_prompts, n_control))
    left = budget * _MARGIN - spent
    plans, per_prompt = [], math.inf
    for draws in first_layers:
        per_prompt = sum(
            cost.whole_pass + cost.screening + cost.ablated_passes(first_layers[draws])
            for cost in costs.values()
        )
        prompts = min(n_prompts, int(left // per_prompt))
        if prompts >= min(LEAST_PROMPTS, n_prompts):
            sizes = found(prompts, draws)
            values = [v for by_fraction in sizes.values() for v in by_fraction.values()]
            known = [v for v in values if not math.isnan(v)]
            size = float(np.mean(known)) if known else math.nan
            # Nothing known of the spreads: more draws first, down to the fewest prompts.
            rank = (size if math.isfinite(size) else math.inf, -draws, -prompts)
            plans.append((rank, Plan(prompts, draws, prompts * per_prompt, budget, sizes)))
    if not plans:
        least = (spent + min(LEAST_PROMPTS, n_prompts) * per_prompt) / _MARGIN
        raise PosheadsError(
            f"a budget of {budget / 60:.0f} min was given, but {LEAST_PROMPTS} prompts a task with "
            f"{min(first_layers)} draws a control need {math.ceil(least / 60)} min here; raise it, "
            "or give fewer tasks, fractions or controls, or shorter prompts"
        )
    return min(plans, key=lambda plan: plan[0])[1]


def draws_to_try(n_control: int) -> list[int]:
    """Numbers of draws that a plan chooses among, from the most to the fewest.

    Example:
        >>> draws_to_try(32), draws_to_try(20), draws_to_try(64)
        ([32, 24, 19, 12], [20, 19, 12], [64, 32, 24, 19, 12])
    """
    return [n_control, *(n for n in _DRAWS if n < n_control)]

"""Prompts under every ablation, in the order that gains most precision in a given time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.hooks.model import LensModel
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.statistics.effects import paired_effect
from tl_posheads.studies.ablation.budget import Clock
from tl_posheads.studies.ablation.conditions import Condition
from tl_posheads.studies.ablation.trial import Trial
from tl_posheads.tasks.base import Prompt
from tl_posheads.tasks.prompts import in_turns

FIRST_DRAWS = 19  # the fewest among which a rank can reach 5 %
LEAST_PROMPTS = 3
_ENOUGH_PROMPTS = 5  # before the interval is compared with the draws' spread
_ABLATED_SHARE = 0.7  # of a whole pass, what an ablated one takes on average; before one was timed

Answers = dict[tuple[str, int], dict[str, Tensor]]
Evaluate = Callable[[LensModel, Prompt], float] | None


@dataclass(eq=False)
class Rounds:
    """A study's passes: one prompt of every task a round, so that it may stop after any of them.

    Within a budget, prompts come before draws beyond 19, until the intervals of the top heads'
    effects are narrower than the draws' spread; then the other draws, and then more prompts.

    Attributes:
        conditions: with all draws; those of fewer draws first.
        n_first: how many of them belong to the first draws.
        done: by task and prompt, ``long`` and ``short`` as :meth:`Trial.run` gives them.
    """

    trial: Trial
    prompts: Mapping[str, Sequence[Prompt]]
    evaluate: Mapping[str, Evaluate]
    conditions: Sequence[Condition]
    n_first: int
    kept: Checkpoint
    clock: Clock
    progress: bool
    done: Answers = field(default_factory=dict)
    longest: float = 0.0

    def run(self) -> list[Condition]:
        """Run what there is time for; returns the conditions under which all prompts were run."""
        n, most = self.n_first, len(self.conditions)
        if self.clock.budget is None:
            n = most
        self._require_time(n)
        with self._bar(n) as self.bar:
            self._prompts(n, stop_when_narrow=n < most)
            if n < most:
                n = self._more_draws(n)
                self._prompts(n)
        return list(self.conditions[:n])

    @property
    def _rounds(self) -> list[list[tuple[str, int]]]:
        return in_turns(self.prompts)

    def _require_time(self, n: int) -> None:
        """Time one unablated pass a task, and refuse a budget that holds too few prompts."""
        if self.clock.budget is None:
            return
        start = time.monotonic()
        for name, these in self.prompts.items():
            self.trial.run(these[0], 0, [], lambda n: None, evaluate=self.evaluate[name])
        passes = LEAST_PROMPTS * (1 + _ABLATED_SHARE * n)
        what = f"{LEAST_PROMPTS} prompts a task under {n} ablations"
        self.clock.require((time.monotonic() - start) * passes, what)

    def _bar(self, n: int) -> Any:
        return tqdm(
            total=sum(map(len, self._rounds)) * (n + 1),
            desc="ablating" if self.clock.budget is None else "ablating, at most",
            unit="pass",
            disable=not self.progress,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def _prompts(self, n: int, *, stop_when_narrow: bool = False) -> None:
        """Rounds under the first ``n`` conditions while there is time; their number is kept."""
        name = "first-rounds" if stop_when_narrow else "rounds"
        ended = self.kept.read(name)
        for number, units in enumerate(self._rounds):
            if all(unit in self.done for unit in units):
                continue
            if ended is not None:
                enough = number >= int(ended["n"])
            else:
                enough = self._late(number, units, n)
                narrow = stop_when_narrow and number >= _ENOUGH_PROMPTS
                enough = enough or (narrow and self._narrow(n))
            if enough:
                break
            before = self.clock.spent
            for unit in units:
                self.done[unit] = self._answered(unit, 0, n)
            self.longest = max(self.longest, self.clock.spent - before)
        if ended is None:
            self.kept.write(name, {"n": torch.tensor(len(self._finished))})

    def _late(self, number: int, units: Sequence[tuple[str, int]], n: int) -> bool:
        """Whether there is no time for another round, where it isn't there from an earlier run."""
        if number < LEAST_PROMPTS or self.clock.allows(self.longest):
            return False
        return any(self.kept.read(self._name(unit, n)) is None for unit in units)

    def _more_draws(self, n: int) -> int:
        """The other draws for the prompts that were run, if all of them fit."""
        most, decision = len(self.conditions), self.kept.read("draws")
        if decision is None:
            share = (most - n) / (n + 1)
            fits = self.clock.allows(self.longest * share * len(self._finished))
            decision = {"more": torch.tensor(fits)}
            self.kept.write("draws", decision)
        if not bool(decision["more"]):
            return n
        # Each finished prompt is run once more without ablation.
        self.bar.total += (most - n) * sum(map(len, self._rounds)) + len(self.done)
        for unit, found in self.done.items():
            more = self._answered(unit, n, most)
            for variant, table in more.items():
                found[variant] = torch.cat([found[variant], table[:, 1:]], 1)
        return most

    @property
    def _finished(self) -> set[int]:
        return {i for _, i in self.done}

    def _name(self, unit: tuple[str, int], stop: int) -> str:
        task, i = unit
        return f"{list(self.prompts).index(task):02d}-{i:04d}-to-{stop:05d}"

    def _answered(self, unit: tuple[str, int], start: int, stop: int) -> dict[str, Tensor]:
        """A prompt under some of the conditions, its unablated pass first; kept when it is done."""
        task, i = unit
        found = self.kept.read(self._name(unit, stop))
        if found is None:
            began = time.monotonic()
            found = dict(
                self.trial.run(
                    self.prompts[task][i],
                    i,
                    [condition.heads for condition in self.conditions[start:stop]],
                    self.bar.update,
                    evaluate=self.evaluate[task],
                )
            )
            found["seconds"] = torch.tensor(time.monotonic() - began, dtype=torch.float64)
            self.kept.write(self._name(unit, stop), found)
        else:
            self.bar.update(1 + stop - start)
            self.clock.before += float(found["seconds"])
        return {variant: found[variant] for variant in ("long", "short") if variant in found}

    def _narrow(self, n: int) -> bool:
        """Whether every top effect is known better than the draws differ."""
        chosen = self.conditions[:n]
        kinds = [c.kind for c in chosen if c.draw > 0]
        for task in self.prompts:
            tables = [found["long"] for (name, _), found in self.done.items() if name == task]
            values = torch.stack([table[0] for table in tables]).numpy()
            effects = values[:, 1:] - values[:, :1]
            for fraction in {c.fraction for c in chosen}:
                same = [j for j, c in enumerate(chosen) if c.fraction == fraction]
                top = next(j for j in same if chosen[j].kind == "top")
                drawn = [j for j in same if kinds and chosen[j].kind == kinds[0]]
                effect = paired_effect(effects[:, top], np.zeros(len(effects)))
                half = (effect.ci_high - effect.ci_low) / 2
                if not half < effects[:, drawn].mean(0).std(ddof=1):
                    return False
        return True

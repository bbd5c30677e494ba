"""What an ablation study found: tables, tests, sentences, files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import pandas as pd

from tl_posheads.errors import PosheadsError
from tl_posheads.io.result import Files, Result
from tl_posheads.statistics.effects import holm, paired_effect, rank_tests, sign_flip_p
from tl_posheads.statistics.power import smallest_detectable
from tl_posheads.studies.ablation.conditions import RETRIEVAL

VARIANTS = ("long", "short", "long - short")
UNABLATED = -1
# Passes in float32 that should agree differ by less than this, in nats.
RESOLUTION = 1e-4


@dataclass(frozen=True, eq=False, repr=False)
class AblationStudy(Result):
    """Every prompt's answer under every condition, and what follows from it.

    Attributes:
        conditions: one row per ablation: ``condition``, ``kind`` (``top``, ``retrieval`` or a
            control), ``draw``, ``fraction``, ``n_heads``, ``heads`` (a list of ``[layer, head]``
            as JSON).
        cells: one row per task, variant (``long``, ``short``), prompt and condition, -1 being
            the unablated model: ``value``, mean log-probability of the scored tokens in nats, or
            the task's own metric; ``accuracy``, the share of the tokens that were the likeliest;
            ``exact``, all of them were.
        calibration: the rungs of difficulty that were tried, a row each
            (:func:`tl_posheads.tasks.calibrate`); empty where the tasks were taken as they were.
        provenance: how the study came about.
    """

    conditions: Annotated[
        pd.DataFrame,
        "condition:integer kind:string draw:integer fraction:floating heads:string",
    ]
    cells: Annotated[
        pd.DataFrame,
        "task:string variant:string prompt:integer condition:integer value:floating "
        "accuracy:floating exact:boolean",
    ]
    calibration: Annotated[
        pd.DataFrame, "task:string rung:integer probability:floating taken:boolean"
    ]
    provenance: dict[str, Any]

    _files = Files("study", "study results", "run the study again", version=2)

    def _check(self) -> None:
        seed, ids = self.provenance.get("seed"), [UNABLATED, *self._heads]
        if not isinstance(seed, int) or seed < 0:
            raise ValueError("no seed")
        for name in ("tasks", "left_out", "positive_control"):
            if not isinstance(self.provenance.get(name, {}), dict):
                raise ValueError(f"{name} of an unknown form")
        if len(ids) != len(self.conditions) + 1 or not all(map(_are_heads, self._heads.values())):
            raise ValueError("two conditions of one number, or invalid heads")
        draws = self.conditions.pivot_table("draw", "kind", "fraction", "count", fill_value=0)
        if not (draws.loc["top"] == 1).all() or not draws.gt(0).all(axis=None):
            raise ValueError("fractions without their top heads or a control")
        if not draws.eq(draws.iloc[:, 0], axis=0).all(axis=None):
            raise ValueError("more draws of a control at one fraction than at another")
        for (_, variant), rows in self.cells.groupby(["task", "variant"]):
            n = rows.groupby(["prompt", "condition"]).size().unstack(fill_value=0)
            if variant not in VARIANTS or {*n.columns} != {*ids} or not n.eq(1).all(axis=None):
                raise ValueError("prompts without one answer under every condition")

    def _about(self) -> str:
        n = self.cells.groupby("task")["prompt"].nunique()
        return (
            f"{self.provenance.get('model')}: {', '.join(self.tasks)}; "
            f"{n.min() if len(n) else 0} prompts each, {len(self.conditions)} conditions"
        )

    def _finding(self) -> list[str]:
        return [f"{task}: {said}" for task, said in list(self.verdict().items())[:2]]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(self.cells["task"]))

    @property
    def fractions(self) -> list[float]:
        return sorted(self.conditions["fraction"].unique().tolist())

    @property
    def controls(self) -> list[str]:
        kinds = dict.fromkeys(self.conditions["kind"])
        return [kind for kind in kinds if kind not in ("top", RETRIEVAL)]

    def effects(self, task: str, variant: str = "long", column: str = "value") -> pd.DataFrame:
        """Ablated minus unablated, a row per prompt and a column per condition.

        Args:
            task: a task's name.
            variant: ``long``, ``short``, or ``long - short``: how much more is lost far than near.
            column: ``value``, ``accuracy`` or ``exact``.

        Raises:
            PosheadsError: no such task or variant in the study.
        """
        if variant == "long - short":
            return self.effects(task, "long", column) - self.effects(task, "short", column)
        cells = self.cells[(self.cells["task"] == task) & (self.cells["variant"] == variant)]
        if cells.empty:
            raise PosheadsError(
                f"the study has no {variant!r} results of {task!r}; it has {', '.join(self.tasks)}"
            )
        table = cells.pivot(index="prompt", columns="condition", values=column).astype(float)
        return table.drop(columns=UNABLATED).sub(table[UNABLATED], axis=0)

    def unablated(self, task: str, variant: str = "long", column: str = "value") -> float:
        """Mean over prompts without any ablation."""
        if variant == "long - short":
            return self.unablated(task, "long", column) - self.unablated(task, "short", column)
        cells = self.cells[
            (self.cells["task"] == task)
            & (self.cells["variant"] == variant)
            & (self.cells["condition"] == UNABLATED)
        ]
        return float(cells[column].astype(float).mean())

    def to_pandas(self) -> pd.DataFrame:
        """One row per task, variant, fraction and control.

        Columns: ``n_heads``, ``n_prompts``; ``unablated`` log-probability (nats per token, or the
        task's own metric); ``effect`` of ablating the top heads on it, with ``ci_low`` and
        ``ci_high`` (95 %, Student's t over prompts); ``exact`` and ``exact_ablated``, shares of
        prompts answered exactly; ``control``, with the mean of its draws' effects
        (``control_effect``) and their ``control_min`` and ``control_max``, ``n_draws``; ``p``, the
        rank of ``effect`` among them (for ``lowest``, one set, a sign-flip test over prompts);
        ``p_adjusted``, corrected over tasks and fractions (Westfall-Young; Holm for ``lowest``);
        ``smallest_detectable``, the minimum detectable effect: how far below the draws' mean an
        effect must lie for 4 of 5 such studies to find it, simulated from the draws and prompts.
        """
        return self._table.copy()

    def positive_control(self) -> pd.DataFrame:
        """What ablating retrieval heads does, in the columns of :meth:`to_pandas`; long prompts.

        Their ``p`` is their rank among the draws of the first control that has several. Empty
        where the model has no retrieval heads.
        """
        return self._positive.copy()

    def verdict(self) -> dict[str, str]:
        """One sentence per task on what was found, with its numbers.

        "Evidence" needs the top heads' effect to be worse than every control's at 5 % after
        correction. Otherwise the sentence says "no evidence", or that the study could not have
        detected harm: if the positive control did none, or the task was at its ceiling or floor.
        """
        from tl_posheads.studies.ablation.verdicts import verdict

        return {task: verdict(self, task) for task in self.tasks} | {
            task: f"{task}: left out, {why}"
            for task, why in (self.provenance.get("left_out") or {}).items()
        }

    def plot(self) -> Any:
        """Effects of the top heads with their intervals over the controls' draws.

        Returns:
            A ``matplotlib.figure.Figure``; a row per task, long and short side by side.
        """
        from tl_posheads.figures.ablation import ablation_figure

        return ablation_figure(self._table, self._draws())

    def _draws(self) -> pd.DataFrame:
        """The controls' conditions, once a task and variant, with their mean effects."""
        controls = self.conditions[self.conditions["kind"] != "top"].sort_values("draw")
        frames = []
        for task in self.tasks:
            for variant in (x for x in ("long", "short") if self._has(task, x)):
                effect = controls["condition"].map(self.effects(task, variant).mean())
                frames.append(controls.assign(task=task, variant=variant, effect=effect))
        return pd.concat(frames)

    @cached_property
    def _heads(self) -> dict[int, list[tuple[int, int]]]:
        return {
            int(row.condition): [(layer, head) for layer, head in json.loads(row.heads)]
            for row in self.conditions.itertuples()
        }

    def condition_ids(self, kind: str, fraction: float) -> list[int]:
        """Conditions of a kind at a fraction, by draw."""
        table = self.conditions
        mine = table[(table["kind"] == kind) & (table["fraction"] == fraction)]
        return [int(i) for i in mine.sort_values("draw")["condition"]]

    def _has(self, task: str, variant: str) -> bool:
        found = set(self.cells.loc[self.cells["task"] == task, "variant"])
        return {"long", "short"} <= found if variant == "long - short" else variant in found

    @cached_property
    def _table(self) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        for variant in VARIANTS:
            tasks = [task for task in self.tasks if self._has(task, variant)]
            for control in self.controls if tasks else []:
                rows += self._rows("top", control, variant, tasks)
        order = {name: i for i, name in enumerate(self.tasks)}
        frame = pd.DataFrame(rows)
        if frame.empty:
            return frame
        keys = frame["task"].map(order)
        ranked = frame.assign(_t=keys, _v=frame["variant"].map(VARIANTS.index))
        ranked = ranked.sort_values(["_t", "_v", "fraction"], kind="stable")
        return ranked.drop(columns=["_t", "_v"]).reset_index(drop=True)

    @cached_property
    def _positive(self) -> pd.DataFrame:
        counts = self.conditions[self.conditions["draw"] > 0]["kind"]
        if RETRIEVAL not in set(self.conditions["kind"]) or counts.empty:
            return pd.DataFrame(columns=self._table.columns)
        control = next(kind for kind in self.controls if kind in set(counts))
        return pd.DataFrame(self._rows(RETRIEVAL, control, "long", self.tasks))

    def _rows(
        self, kind: str, control: str, variant: str, tasks: Sequence[str]
    ) -> list[dict[str, Any]]:
        """A set's effects beside a control's draws: a row a task and fraction."""
        tests = [(task, fraction) for task in tasks for fraction in self.fractions]
        effects = {task: self.effects(task, variant) for task in tasks}
        sets = [effects[task][self.condition_ids(kind, f)[0]].to_numpy() for task, f in tests]
        draws = [effects[task][self.condition_ids(control, f)].to_numpy() for task, f in tests]
        means = np.array([d.mean(0) for d in draws]).T
        seed, detectable = self.provenance["seed"], np.full(len(tests), np.nan)
        if control == "lowest":
            both = zip(sets, draws, strict=True)
            p = np.array([sign_flip_p(mine - d[:, 0], seed=seed) for mine, d in both])
            adjusted = holm(p)
        else:
            ranks = rank_tests(np.array([x.mean() for x in sets]), means, resolution=RESOLUTION)
            p, adjusted = ranks.p, ranks.p_adjusted
            n = min(map(len, sets))  # prompts that every task has
            detectable = smallest_detectable(
                np.stack([x[:n] for x in sets], 1),
                np.stack([d[:n] for d in draws], 2),
                resolution=RESOLUTION,
                seed=seed,
            )
        rows = []
        for i, (task, fraction) in enumerate(tests):
            effect = paired_effect(sets[i], np.zeros_like(sets[i]))
            own = self.condition_ids(kind, fraction)[0]
            exact = self.unablated(task, variant, "exact")
            rows.append(
                {
                    "task": task,
                    "variant": variant,
                    "fraction": fraction,
                    "n_heads": len(self._heads[own]),
                    "n_prompts": effect.n_prompts,
                    "unablated": self.unablated(task, variant),
                    "effect": effect.mean,
                    "ci_low": effect.ci_low,
                    "ci_high": effect.ci_high,
                    "exact": exact,
                    "exact_ablated": exact
                    + float(self.effects(task, variant, "exact")[own].mean()),
                    "control": control,
                    "control_effect": float(means[:, i].mean()),
                    "control_min": float(means[:, i].min()),
                    "control_max": float(means[:, i].max()),
                    "n_draws": means.shape[0],
                    "p": float(p[i]),
                    "p_adjusted": float(adjusted[i]),
                    "smallest_detectable": float(detectable[i]),
                }
            )
        return rows


def _are_heads(heads: list[tuple[int, int]]) -> bool:
    numbers = [number for head in heads for number in head]
    fits = all(type(number) is int and number >= 0 for number in numbers)
    return bool(heads) and fits and len({*heads}) == len(heads)

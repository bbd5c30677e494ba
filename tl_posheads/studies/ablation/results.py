"""What an ablation study found: tables, tests, sentences, files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_posheads.errors import PosheadsError
from tl_posheads.io.result import Files, Result
from tl_posheads.statistics.effects import (
    Agreement,
    holm,
    paired_effect,
    rank_tests,
    screen_agreement,
    sign_flip_p,
)
from tl_posheads.statistics.power import smallest_detectable

VARIANTS = ("long", "short", "long - short")
UNABLATED = -1
# Passes in float32 that should agree differ by less than this, in nats.
RESOLUTION = 1e-4


@dataclass(frozen=True, eq=False, repr=False)
class AblationStudy(Result):
    """Every prompt's answer under every condition, and what follows from it.

    Attributes:
        conditions: one row per ablation: ``condition``, ``kind`` (``top`` or a control),
            ``draw``, ``fraction``, ``n_heads``, ``heads`` (a list of ``[layer, head]`` as JSON).
        cells: one row per task, variant (``long``, ``short``), prompt and condition, -1 being
            the unablated model: ``logprob``, mean log-probability of the scored tokens in nats;
            ``accuracy``, the share of them that were the likeliest; ``exact``, all of them were.
        screen: estimated effect on ``logprob`` of ablating each head alone, one row per task,
            variant, prompt, layer and head (:func:`tl_posheads.head_effects`).
        screen_tests: what these estimates say of the top heads and of many more draws of each
            control than were run, one row per task, variant, fraction and control.
        provenance: how the study came about, the plan among it.
    """

    conditions: Annotated[
        pd.DataFrame,
        "condition:integer kind:string draw:integer fraction:floating heads:string",
    ]
    cells: Annotated[
        pd.DataFrame,
        "task:string variant:string prompt:integer condition:integer logprob:floating "
        "accuracy:floating exact:boolean",
    ]
    screen: Annotated[
        pd.DataFrame,
        "task:string variant:string prompt:integer layer:integer head:integer effect:floating",
    ]
    screen_tests: Annotated[
        pd.DataFrame,
        "task:string variant:string fraction:floating control:string screen_effect:floating "
        "p_screen:floating n_screen_draws:integer",
    ]
    provenance: dict[str, Any]

    _files = Files("study", "study results", "run the study again")

    def _check(self) -> None:
        seed, ids = self.provenance.get("seed"), [UNABLATED, *self._heads]
        if not isinstance(seed, int) or seed < 0:
            raise ValueError("no seed")
        if len(ids) != len(self.conditions) + 1 or not all(map(_are_heads, self._heads.values())):
            raise ValueError("two conditions of one number, or heads that are none")
        draws = self.conditions.pivot_table("draw", "kind", "fraction", "count", fill_value=0)
        if not (draws.loc["top"] == 1).all() or not draws.gt(0).all(axis=None):
            raise ValueError("fractions without their top heads or a control")
        if not draws.eq(draws.iloc[:, 0], axis=0).all(axis=None):
            raise ValueError("more draws of a control at one fraction than at another")
        for (_, variant), rows in self.cells.groupby(["task", "variant"]):
            n = rows.groupby(["prompt", "condition"]).size().unstack(fill_value=0)
            if variant not in VARIANTS or {*n.columns} != {*ids} or not n.eq(1).all(axis=None):
                raise ValueError("prompts without one answer under every condition")
        if len(self.screen):
            screen = self.screen.assign(place=[*zip(self.screen["layer"], self.screen["head"])])
            places = {head for heads in self._heads.values() for head in heads}
            for _, rows in screen.groupby(["task", "variant"]):
                if not places <= {*rows["place"]} or rows.duplicated(["prompt", "place"]).any():
                    raise ValueError("a screen without the heads ablated, or with one twice")

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
        return [kind for kind in dict.fromkeys(self.conditions["kind"]) if kind != "top"]

    def effects(self, task: str, variant: str = "long", value: str = "logprob") -> pd.DataFrame:
        """Ablated minus unablated, a row per prompt and a column per condition.

        Args:
            task: a task's name.
            variant: ``long``, ``short``, or ``long - short``: how much more is lost far than near.
            value: ``logprob``, ``accuracy`` or ``exact``.

        Raises:
            PosheadsError: no such task or variant in the study.
        """
        if variant == "long - short":
            return self.effects(task, "long", value) - self.effects(task, "short", value)
        cells = self.cells[(self.cells["task"] == task) & (self.cells["variant"] == variant)]
        if cells.empty:
            raise PosheadsError(
                f"the study has no {variant!r} results of {task!r}; it has {', '.join(self.tasks)}"
            )
        table = cells.pivot(index="prompt", columns="condition", values=value).astype(float)
        return table.drop(columns=UNABLATED).sub(table[UNABLATED], axis=0)

    def unablated(self, task: str, variant: str = "long", value: str = "logprob") -> float:
        """Mean over prompts without any ablation."""
        if variant == "long - short":
            return self.unablated(task, "long", value) - self.unablated(task, "short", value)
        cells = self.cells[
            (self.cells["task"] == task)
            & (self.cells["variant"] == variant)
            & (self.cells["condition"] == UNABLATED)
        ]
        return float(cells[value].astype(float).mean())

    def agreement(self, task: str, variant: str = "long") -> Agreement | None:
        """How well the screen foretells the ablations that were done; None without a screen.

        Over all sets of heads that were ablated; prompts that have both.
        """
        alone = self.estimates(task, variant)
        if alone is None:
            return None
        true = self.effects(task, variant)
        both = true.index.intersection(alone.index)
        guess = np.array(
            [
                float(alone.loc[both, list(self._heads[i])].to_numpy().sum(1).mean())
                for i in true.columns
            ]
        )
        return screen_agreement(
            guess, true.loc[both].mean(axis=0).to_numpy(), seed=self.provenance["seed"]
        )

    def estimates(self, task: str, variant: str = "long") -> pd.DataFrame | None:
        """The screen's effects of each head alone, a row per prompt, columns ``(layer, head)``."""
        if variant == "long - short":
            far, near = self.estimates(task, "long"), self.estimates(task, "short")
            return None if far is None or near is None else far - near
        if self.screen.empty:
            return None
        rows = self.screen[(self.screen["task"] == task) & (self.screen["variant"] == variant)]
        if rows.empty:
            return None
        return rows.pivot(index="prompt", columns=["layer", "head"], values="effect")

    def to_pandas(self) -> pd.DataFrame:
        """One row per task, variant, fraction and control.

        Columns: ``n_heads``, ``n_prompts``; ``unablated`` log-probability (nats a token);
        ``effect`` of ablating the top heads on it, with ``ci_low`` and ``ci_high`` (95 %,
        bootstrap over prompts); ``exact`` and ``exact_ablated``, shares of prompts answered
        exactly; ``control``, the mean of its draws' effects with their ``control_min`` and
        ``control_max``, ``n_draws``; ``p``, the rank of ``effect`` among them (for ``lowest``,
        one set, a sign-flip test over prompts); ``p_adjusted``, corrected over tasks and
        fractions (Westfall-Young; Holm for ``lowest``); ``smallest_detectable`` effect below the
        draws' mean, which 4 of 5 such studies would have found, simulated from the spreads
        measured. From the screen, all estimates: ``screen_effect``, ``p_screen`` among
        ``n_screen_draws``, and ``screen_rho``, its rank correlation with the ablations that were
        done, with ``screen_rho_low`` and ``screen_rho_high``.
        """
        return self._table.copy()

    def verdict(self) -> dict[str, str]:
        """One sentence per task on what was found, with its numbers.

        "Evidence" needs the top heads' effect to be worse than every control's at 5 % after
        correction; otherwise the sentence says "no evidence".
        """
        from tl_posheads.studies.ablation.verdicts import verdict

        return {task: verdict(self._table, task) for task in self.tasks}

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
            tests = [(task, fraction) for task in tasks for fraction in self.fractions]
            if not tests:
                continue
            effects = {task: self.effects(task, variant) for task in tasks}
            for control in self.controls:
                rows += self._control_rows(control, variant, tests, effects)
        order = {name: i for i, name in enumerate(self.tasks)}
        frame = pd.DataFrame(rows)
        if frame.empty:
            return frame
        keys = frame["task"].map(order)
        ranked = frame.assign(_t=keys, _v=frame["variant"].map(VARIANTS.index))
        ranked = ranked.sort_values(["_t", "_v", "fraction"], kind="stable")
        return ranked.drop(columns=["_t", "_v"]).reset_index(drop=True)

    def _control_rows(
        self,
        control: str,
        variant: str,
        tests: Sequence[tuple[str, float]],
        effects: dict[str, pd.DataFrame],
    ) -> list[dict[str, Any]]:
        seed = self.provenance["seed"]
        tops = [effects[task][self.condition_ids("top", f)[0]].to_numpy() for task, f in tests]
        draws = [effects[task][self.condition_ids(control, f)].to_numpy() for task, f in tests]
        top_means = np.array([top.mean() for top in tops])
        draw_means = np.array([d.mean(0) for d in draws]).T
        if control == "lowest":
            p = np.array(
                [sign_flip_p(top - d[:, 0], seed=seed) for top, d in zip(tops, draws, strict=True)]
            )
            adjusted = holm(p)
        else:
            ranks = rank_tests(top_means, draw_means, resolution=RESOLUTION)
            p, adjusted = ranks.p, ranks.p_adjusted
        rows = []
        for i, (task, fraction) in enumerate(tests):
            effect = paired_effect(tops[i], np.zeros_like(tops[i]), seed=seed)
            top_id = self.condition_ids("top", fraction)[0]
            exact = self.unablated(task, variant, "exact")
            exact_change = float(self.effects(task, variant, "exact")[top_id].mean())
            rows.append(
                {
                    "task": task,
                    "variant": variant,
                    "fraction": fraction,
                    "n_heads": len(self._heads[top_id]),
                    "n_prompts": effect.n_prompts,
                    "unablated": self.unablated(task, variant),
                    "effect": effect.mean,
                    "ci_low": effect.ci_low,
                    "ci_high": effect.ci_high,
                    "exact": exact,
                    "exact_ablated": exact + exact_change,
                    "control": control,
                    "control_effect": float(draw_means[:, i].mean()),
                    "control_min": float(draw_means[:, i].min()),
                    "control_max": float(draw_means[:, i].max()),
                    "n_draws": draw_means.shape[0],
                    "p": float(p[i]),
                    "p_adjusted": float(adjusted[i]),
                    "smallest_detectable": _detectable(tops[i], draws[i], len(tests), seed),
                    **self._screened(task, variant, fraction, control),
                }
            )
        return rows

    def _screened(
        self, task: str, variant: str, fraction: float, control: str
    ) -> dict[str, float | int]:
        table, agreement = self.screen_tests, self._agreements.get((task, variant))
        out: dict[str, float | int] = {
            "screen_effect": np.nan,
            "p_screen": np.nan,
            "n_screen_draws": 0,
            "screen_rho": np.nan,
            "screen_rho_low": np.nan,
            "screen_rho_high": np.nan,
        }
        if agreement is None or table.empty:
            return out
        mine = table[
            (table["task"] == task)
            & (table["variant"] == variant)
            & (table["fraction"] == fraction)
            & (table["control"] == control)
        ]
        if len(mine):
            row = mine.iloc[0]
            out |= {name: float(row[name]) for name in ("screen_effect", "p_screen")}
            out["n_screen_draws"] = int(row["n_screen_draws"])
        out["screen_rho"] = agreement.rank_correlation
        out["screen_rho_low"], out["screen_rho_high"] = agreement.ci_low, agreement.ci_high
        return out

    @cached_property
    def _agreements(self) -> dict[tuple[str, str], Agreement | None]:
        return {
            (task, variant): self.agreement(task, variant)
            for task in self.tasks
            for variant in VARIANTS
            if self._has(task, variant)
        }


def _are_heads(heads: list[tuple[int, int]]) -> bool:
    numbers = [number for head in heads for number in head]
    fits = all(type(number) is int and number >= 0 for number in numbers)
    return bool(heads) and fits and len({*heads}) == len(heads)


def _detectable(
    top: Float[np.ndarray, "prompt"],
    draws: Float[np.ndarray, "prompt draw"],
    n_tests: int,
    seed: int,
) -> float:
    """What could have been found, from how the effects that were measured spread."""
    n_prompts, n_draws = draws.shape
    if n_prompts < 2 or n_draws < 2:
        return float("nan")
    prompt_sd = float((top[:, None] - draws).std(axis=0, ddof=1).mean())
    # The draws' means differ by what prompts do to them, too; smallest_detectable adds that again.
    between = draws.mean(axis=0).var(ddof=1) - prompt_sd**2 / (2 * n_prompts)
    return smallest_detectable(
        draw_sd=float(max(between, 0.0)) ** 0.5,
        prompt_sd=prompt_sd,
        n_draws=n_draws,
        n_prompts=n_prompts,
        n_tests=n_tests,
        seed=seed,
        n_sim=1000,
    )

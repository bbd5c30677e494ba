"""What ablating each head by itself did: tables, files, picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.io.result import Files, Result
from tl_posheads.statistics.effects import paired_effect

VARIANTS = ("long", "short", "long - short")


@dataclass(frozen=True, eq=False, repr=False)
class HeadEffects(Result):
    """Effect of ablating each head alone on each prompt: ablated minus unablated.

    In nats a scored token (the change of their mean log-probability), or in the unit of the task's
    own metric. Below zero is harm. NaN where a head wasn't ablated.

    Attributes:
        prompts: a row a prompt: ``task``, ``prompt`` (its number), ``n_tokens``; of the unablated
            model ``clean`` log-probability, ``accuracy`` (share of scored tokens that were the
            likeliest), ``exact`` (all of them), ``clean_short`` of the short control.
        long: effects on the prompts.
        short: effects on their short controls, NaN where there is none.
        norms: mean length of what each head writes into the residual stream.
        agreement: of estimates with ablations, a row a task: Spearman's ``rank_correlation`` over
            ``n_heads``, ``ci_low``, ``ci_high`` (95 %), ``slope``. Empty for true ablations.
        provenance: how the effects came about.
    """

    prompts: Annotated[
        pd.DataFrame,
        "task:string prompt:integer n_tokens:integer clean:floating accuracy:floating "
        "exact:boolean clean_short:floating",
    ]
    long: Float[Tensor, "prompt layer head"]
    short: Float[Tensor, "prompt layer head"]
    norms: Float[Tensor, "layer head"]
    agreement: Annotated[pd.DataFrame, "task:string n_heads:integer rank_correlation:floating"]
    provenance: dict[str, Any]

    _files = Files("head_effects", "effects of heads", "ablate the heads again")

    def _check(self) -> None:
        if len(self.prompts) != len(self.long) or not len(self.prompts):
            raise ValueError("effects without a row for each prompt")
        if self.prompts.duplicated(["task", "prompt"]).any() or self.prompts["task"].isna().any():
            raise ValueError("a prompt that occurs twice, or has no task")
        ablated = self.long.isfinite()
        if not bool(ablated[0].any()) or not bool((ablated == ablated[0]).all()):
            raise ValueError("no ablated head, or different ones on different prompts")

    def _about(self) -> str:
        counts = self.prompts.groupby("task", sort=False).size()
        tasks = ", ".join(f"{n} prompts of {task}" for task, n in counts.items())
        n_heads = int(torch.isfinite(self.long[0]).sum())
        return f"{self.provenance.get('model')}: {n_heads} heads, each by itself; {tasks}"

    def _finding(self) -> list[str]:
        lines, table = [], self.to_pandas()
        for task in self.tasks[:2]:
            worst = table[table["task"] == task].nsmallest(1, "effect").iloc[0]
            lines.append(
                f"{task}: most harm from L{worst['layer']:.0f}H{worst['head']:.0f}, "
                f"{worst['effect']:+.2f} ({worst['ci_low']:+.2f} to {worst['ci_high']:+.2f})"
            )
        return lines

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(self.prompts["task"]))

    def of(self, task: str, variant: str = "long") -> Float[Tensor, "prompt layer head"]:
        """Effects on a task's prompts.

        Args:
            task: its name.
            variant: ``long``, ``short``, or ``long - short``: how much more is lost far than near.

        Raises:
            PosheadsError: no such task or variant.
        """
        if task not in self.tasks or variant not in VARIANTS:
            raise PosheadsError(
                f"task={task!r} and variant={variant!r} were given; expected one of "
                f"{', '.join(self.tasks)} and one of {', '.join(VARIANTS)}"
            )
        mine = torch.tensor(np.flatnonzero(self.prompts["task"] == task))
        if variant == "long - short":
            return self.long[mine] - self.short[mine]
        return (self.long if variant == "long" else self.short)[mine]

    def to_pandas(self) -> pd.DataFrame:
        """A row per task and ablated head.

        Columns: ``task``, ``layer``, ``head``; ``effect``, the mean over prompts, with ``ci_low``
        and ``ci_high`` (95 %, Student's t over prompts); ``effect_short`` on the short controls;
        ``norm`` of what the head writes; ``n_prompts``.
        """
        rows = []
        for task in self.tasks:
            long, short = self.of(task).numpy(), self.of(task, "short").numpy()
            for layer, head in np.argwhere(np.isfinite(long).all(0)):
                effect = paired_effect(long[:, layer, head], np.zeros(len(long)))
                rows.append(
                    {
                        "task": task,
                        "layer": int(layer),
                        "head": int(head),
                        "effect": effect.mean,
                        "ci_low": effect.ci_low,
                        "ci_high": effect.ci_high,
                        "effect_short": float(short[:, layer, head].mean()),
                        "norm": float(self.norms[layer, head]),
                        "n_prompts": effect.n_prompts,
                    }
                )
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """Mean effect of every head, a map of layers and heads for each task.

        Returns:
            A ``matplotlib.figure.Figure``.
        """
        from tl_posheads.figures.ablation import head_effects_figure

        return head_effects_figure({task: self.of(task).mean(0).numpy() for task in self.tasks})

"""Calibrate the difficulty of tasks: at a ceiling or a floor, ablation can't show harm."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.hooks.model import LensModel
from tl_posheads.tasks.base import Calibrated, Prompt, Task, check_length
from tl_posheads.tasks.prompts import named, require_tasks

LOW, HIGH = 0.3, 0.9  # between these probabilities, harm and its absence can both be seen
_SHIFT = 1_000_003  # added to the seed, for prompts other than the study's
_COLUMNS = ["task", "rung", "settings", "n_tokens", "probability", "accuracy", "exact"]


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """The variants of tasks that are neither too easy nor too hard for a model.

    Attributes:
        tasks: the chosen variants, and tasks without rungs, in the order given.
        left_out: the reason for each task that was left out, by name; a second task of the same
            name is ``name#2``.
        table: one row per rung tried, and one per task without rungs. ``task``; ``rung``, 0 is
            the easiest; ``settings`` that differ between rungs; ``n_tokens`` of the longest
            prompt; ``probability``, ``accuracy`` and ``exact`` as in :func:`calibrate`;
            ``taken``; ``note``, why a rung was skipped, else empty.
    """

    tasks: tuple[Task, ...]
    left_out: dict[str, str]
    table: pd.DataFrame

    def __repr__(self) -> str:
        names = list(dict.fromkeys(self.table["task"]))
        taken = self.table[self.table["taken"]].set_index("task")
        lines = [f"Calibration({len(self.tasks)} of {len(names)} tasks taken)"]
        for name in names:
            if name in self.left_out:
                lines.append(f"{name}: left out, {self.left_out[name]}")
                continue
            row = taken.loc[name]
            figures = f": {_figures(row)}" if row["settings"] else ""
            lines.append(f"{name}: {row['settings'] or row['note']}{figures}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = self.table.to_html(index=False, float_format="{:.3g}".format)
        return f"<pre>{html.escape(repr(self))}</pre>{rows}"


@dataclass(frozen=True)
class _Rung:
    task: Task
    settings: str
    prompts: list[Prompt]
    note: str


def calibrate(
    model: LensModel,
    tasks: Sequence[Task],
    *,
    n: int = 4,
    low: float = LOW,
    high: float = HIGH,
    progress: bool = True,
) -> Calibration:
    """Make each task as hard as the model can still solve, or leave it out.

    A task's rungs are tried from easy to hard, up to the first with a probability below ``low``;
    the hardest one between ``low`` and ``high`` is taken. The prompts aren't the task's own, so the
    choice doesn't bias a study of these. Measured on them, without their short controls:

    - ``probability``: geometric mean over the answer's tokens, averaged over prompts. An
      arithmetic mean would hide a missed first token behind later ones that follow from it.
    - ``accuracy``: share of the answers' tokens that were the most likely.
    - ``exact``: share of the prompts for which all tokens of the answer were.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay active.
        tasks: from :mod:`tl_posheads.tasks`, or any that are
            :class:`~tl_posheads.tasks.Calibrated`. A task without rungs is taken as it is.
        n: prompts per rung.
        low, high: smallest and largest accepted probability.
        progress: show a progress bar.

    Raises:
        PosheadsError: before any pass, a task that isn't ``Calibrated``, or whose prompts are too
            long for the model on every rung; log-probabilities that are NaN or infinite.

    Example:
        >>> calibrate(model, [tasks.MultiKey(length=512)])             # doctest: +SKIP
        Calibration(1 of 1 tasks taken)
        multi_key: length=512, n_keys=8, near_duplicates=7: probability .74, accuracy .93, exact .50
        >>> from tl_posheads.tasks import Passkey
        >>> calibrate(None, [Passkey()], low=0.9, high=0.3)
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: low=0.9 and high=0.3 were given; expected
        0 <= low < high <= 1
    """
    _check_request(tasks, n, low, high)
    built = {name: (task, _built(model, name, task, n)) for name, task in named(tasks)}
    total = sum(len(rung.prompts) for _, rungs in built.values() for rung in rungs)
    rows: list[dict[str, Any]] = []
    chosen: list[Task] = []
    left_out: dict[str, str] = {}
    with (
        fused_attention(model),
        tqdm(
            total=total, desc="calibration", unit="prompt", disable=not progress, dynamic_ncols=True
        ) as bar,
    ):
        for name, (task, rungs) in built.items():
            tried = _tried(model, name, rungs, low, bar)
            fit = [row for row in tried if low <= row["probability"] <= high]
            if not rungs:
                tried = [{"task": name, "rung": 0, "settings": "", "note": "taken as it is"}]
                chosen.append(task)
            elif fit:
                chosen.append(rungs[fit[-1]["rung"]].task)
            else:
                left_out[name] = _reason([row for row in tried if not row["note"]], low)
            taken = None if name in left_out else (fit or tried)[-1]
            rows += [{**row, "taken": row is taken} for row in tried]
    table = pd.DataFrame(rows, columns=[*_COLUMNS, "taken", "note"])
    figures = dict.fromkeys(["probability", "accuracy", "exact"], float)
    return Calibration(tuple(chosen), left_out, table.astype({"n_tokens": "Int64", **figures}))


def _check_request(tasks: Any, n: Any, low: float, high: float) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise PosheadsError(f"n={n!r} was given; expected a whole number of 1 or more")
    if not 0 <= low < high <= 1:
        raise PosheadsError(
            f"low={low!r} and high={high!r} were given; expected 0 <= low < high <= 1"
        )
    require_tasks(tasks)
    require_rungs(tasks)


def require_rungs(tasks: Sequence[Task]) -> None:
    """Refuse tasks that can't be calibrated.

    Raises:
        PosheadsError: for the first task without a method ``rungs``.
    """
    for task in tasks:
        if not isinstance(task, Calibrated):
            raise PosheadsError(
                f"the task {task.name} has no rungs; add a method rungs() that returns variants "
                "from easy to hard, or () to take it as it is, or go without calibration"
            )


def _built(model: LensModel, name: str, task: Any, n: int) -> list[_Rung]:
    """A task's rungs, each with ``n`` new prompts, or with the reason why it has none."""
    rungs, out = list(task.rungs()), []
    names = [{f.name for f in fields(x)} if is_dataclass(x) else set() for x in (task, *rungs)]
    if rungs and not all({"n", "seed"} <= own for own in names):
        raise PosheadsError(
            f"the task {name} has rungs without the fields n and seed; make it a dataclass that "
            "has them, so that it can draw other prompts"
        )
    differ = _differing(rungs)
    for rung in rungs:
        settings = ", ".join(f"{x}={getattr(rung, x)!r}" for x in differ)
        prompts, note = [], ""
        try:
            prompts = replace(rung, n=n, seed=task.seed + _SHIFT).prompts(model)
            check_length(model, prompts)
            if not prompts or not all(len(prompt.targets) for prompt in prompts):
                note = "it has no prompts, or some that score nothing"
        except PosheadsError as error:
            note = str(error)
        own = replace(rung, n=task.n, seed=task.seed)
        out.append(_Rung(own, settings, [] if note else prompts, note))
    if out and all(rung.note for rung in out):
        raise PosheadsError(f"no rung of {name} can be run: {out[-1].note}")
    return out


def _differing(rungs: Sequence[Any]) -> list[str]:
    """Names of the fields that differ between rungs, in order."""
    names = [f.name for f in fields(rungs[0]) if f.compare] if rungs else []
    different = {x for x in names for r in rungs if getattr(r, x) != getattr(rungs[0], x)}
    return [x for x in names if x in different]


def _tried(
    model: LensModel, name: str, rungs: Sequence[_Rung], low: float, bar: Any
) -> list[dict[str, Any]]:
    """Rows of the table, from easy to hard up to the first rung that is below ``low``."""
    rows: list[dict[str, Any]] = []
    for k, rung in enumerate(rungs):
        row: dict[str, Any] = {
            "task": name,
            "rung": k,
            "settings": rung.settings,
            "note": rung.note,
        }
        row |= dict.fromkeys(["probability", "accuracy", "exact"], float("nan"))
        rows.append(row)
        if rung.note:
            continue
        row |= _measured(model, rung.prompts, bar)
        if not 0 <= row["probability"] <= 1:
            raise PosheadsError(
                f"answers to {name} ({rung.settings}) have log-probabilities that are not numbers; "
                "load the model in float32"
            )
        if row["probability"] < low:
            bar.total -= sum(len(later.prompts) for later in rungs[k + 1 :])
            break
    return rows


def _measured(model: LensModel, prompts: Sequence[Prompt], bar: Any) -> dict[str, float]:
    probabilities, hits = [], []
    for prompt in prompts:
        logprob, hit = target_logprobs(model, prompt.tokens, prompt.targets)
        probabilities.append(float(logprob.double().mean().exp()))
        hits.append(hit)
        bar.update()
    return {
        "n_tokens": max(len(prompt.tokens) for prompt in prompts),
        "probability": sum(probabilities) / len(prompts),
        "accuracy": float(torch.cat(hits).double().mean()),
        "exact": sum(bool(hit.all()) for hit in hits) / len(prompts),
    }


def _reason(rows: Sequence[dict[str, Any]], low: float) -> str:
    """The reason for leaving out a task without a suitable rung."""
    first, last = rows[0], rows[-1]
    if first["probability"] < low:
        return f"at its floor on the easiest rung ({first['settings']}: {_figures(first)})"
    if last["probability"] < low:
        before = rows[-2]
        return (
            f"jumps from probability {_share(before['probability'])} ({before['settings']}) to "
            f"{_share(last['probability'])} ({last['settings']})"
        )
    return f"at its ceiling on every rung, the hardest too ({last['settings']}: {_figures(last)})"


def _figures(row: Any) -> str:
    return ", ".join(f"{name} {_share(row[name])}" for name in ("probability", "accuracy", "exact"))


def _share(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")

"""Every head ablated by itself: what each does to each prompt."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.heads import Head, Heads, heads_of
from tl_posheads.hooks.model import (
    LensModel,
    attention_of,
    require_clean,
    require_rotary,
)
from tl_posheads.hooks.provenance import model_facts, versions
from tl_posheads.interventions.ablation import Mode
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.statistics.effects import agreement as agreement_of
from tl_posheads.studies.ablation.attribution import attributed_effects
from tl_posheads.studies.ablation.head_effects_results import VARIANTS, HeadEffects
from tl_posheads.studies.ablation.norms import norms_over
from tl_posheads.studies.ablation.trial import Trial
from tl_posheads.tasks.base import Prompt, Task
from tl_posheads.tasks.prompts import (
    evaluator,
    in_turns,
    named,
    prompts_of,
    request_of,
    task_facts,
)

_CHECKED_HEADS = 24  # ablated beside their estimates
_CHECKED_PROMPTS = 3


def head_effects(
    model: LensModel,
    tasks: Sequence[Task],
    *,
    mode: Mode = "zero",
    heads: Heads | None = None,
    method: Literal["ablation", "attribution"] = "ablation",
    short: bool = True,
    reference: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]] | None = None,
    per_position: bool = False,
    on: Literal["z", "pattern"] = "z",
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> HeadEffects:
    """Ablate every head by itself, on every prompt: 270 heads are 270 observations.

    A set of top heads is one observation; single heads show whether harm *correlates with* a score
    (:func:`tl_posheads.association`). Single ablations can't show the role of heads that back each
    other up.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE; left as it was.
        tasks: from :mod:`tl_posheads.tasks`, calibrated best (:func:`tl_posheads.tasks.calibrate`):
            a task that is too easy or too hard for the model shows no harm.
        mode, reference, per_position, on: as for :func:`tl_posheads.ablate`.
        heads: as for :func:`tl_posheads.ablate`; None is all.
        method: ``"ablation"`` runs every ablation. ``"attribution"`` estimates all heads from one
            backward pass a prompt (attribution patching, Nanda 2023; Kramár et al. 2024, arXiv
            2403.00745), and ablates 24 heads on three prompts of each task to say how far the
            estimates can be trusted (``effects.agreement``).
        short: also on the prompts' short controls.
        seed: of resampled texts and of the heads that attribution is compared on.
        checkpoint: folder that keeps every finished prompt; the same call resumes from it.
        progress: show a bar.

    Returns:
        :class:`HeadEffects`.

    Time: for each prompt half a forward pass a head, since blocks below the head aren't run again.
    Memory: as for :func:`tl_posheads.ablation_study`.

    Raises:
        PosheadsError: before any forward pass: a model without RoPE or with forgotten hooks, tasks
            without prompts or longer than the context, heads that don't exist, an unknown method,
            a reference that doesn't fit. A checkpoint of another run.

    Example:
        >>> effects = head_effects(model, [tasks.MultiKey(length=512)])   # doctest: +SKIP
        >>> effects.to_pandas().nsmallest(5, "effect")                    # doctest: +SKIP
    """
    require_rotary(model)
    require_clean(model)
    if method not in ("ablation", "attribution"):
        raise PosheadsError(f"method={method!r} was given; expected 'ablation' or 'attribution'")
    chosen = _all_heads(model) if heads is None else heads_of(model, heads)
    if not chosen:
        raise PosheadsError("heads=[] was given; expected at least one, or None for all")
    trial = Trial.of(model, mode, reference, per_position, on, seed)
    prompts = prompts_of(model, tasks)
    evaluate = {name: evaluator(task) for name, task in named(tasks)}
    if method == "attribution" and (on == "pattern" or any(evaluate.values())):
        raise PosheadsError(
            "method='attribution' estimates log-probabilities from z; give method='ablation' for "
            "on='pattern' and for tasks with a metric of their own"
        )
    trial.require_reference(prompts, any(evaluate.values()))
    request = {
        **request_of(model, tasks, prompts),
        "heads": [list(head) for head in chosen],
        "method": method,
        "short": short,
        **trial.facts,
    }
    kept, began = Checkpoint(checkpoint, request), time.monotonic()
    trial.prepare()
    norms = norms_over(model, prompts)
    run = _ablated if method == "ablation" else _estimated
    rows, tables = run(trial, prompts, chosen, evaluate, short, kept, progress)
    agreement = pd.DataFrame()
    if method == "attribution":
        agreement = _agreement(trial, prompts, chosen, rows, tables["long"], kept, progress)
    facts = {
        **model_facts(model),
        **trial.facts,
        "method": method,
        "prompts_sha256": request["prompts"],
        "tasks": {name: task_facts(task) for name, task in named(tasks)},
        "fused_attention": trial.fused,
        "seconds": round(time.monotonic() - began),
        "versions": versions(),
    }
    facts = json.loads(json.dumps(facts, default=repr))
    return HeadEffects(rows, tables["long"], tables["short"], norms, agreement, facts)


def _all_heads(model: LensModel) -> list[Head]:
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    layers = [i for i in range(n_layers) if attention_of(model, i) is not None]
    return [(layer, head) for layer in layers for head in range(n_heads)]


def _units(prompts: Mapping[str, Sequence[Prompt]]) -> list[tuple[str, int, str]]:
    """Task, number and name of every prompt; the tasks take turns."""
    number = {name: n for n, name in enumerate(prompts)}
    units = chain.from_iterable(in_turns(prompts))
    return [(name, i, f"{number[name]:02d}-{i:04d}") for name, i in units]


def _ablated(
    trial: Trial,
    prompts: Mapping[str, Sequence[Prompt]],
    heads: Sequence[Head],
    evaluate: Mapping[str, Callable[[LensModel, Prompt], float] | None],
    short: bool,
    kept: Checkpoint,
    progress: bool,
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    units, found = _units(prompts), {}
    bar = tqdm(
        total=len(units) * (len(heads) + 1),
        desc="ablating",
        unit="pass",
        disable=not progress,
        dynamic_ncols=True,
        smoothing=0.05,
    )
    with bar:
        for name, i, unit in units:
            table = kept.read(unit)
            if table is None:
                sets = [[head] for head in heads]
                prompt = prompts[name][i]
                table = dict(
                    trial.run(prompt, i, sets, bar.update, short=short, evaluate=evaluate[name])
                )
                kept.write(unit, table)
            else:
                bar.update(len(heads) + 1)
            found[name, i] = table
    return _collected(trial.model, prompts, heads, found)


def _estimated(
    trial: Trial,
    prompts: Mapping[str, Sequence[Prompt]],
    heads: Sequence[Head],
    evaluate: Mapping[str, Any],
    short: bool,
    kept: Checkpoint,
    progress: bool,
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    found, at = {}, tuple(torch.tensor(list(heads)).T)
    units = tqdm(
        _units(prompts), desc="estimating", unit="prompt", disable=not progress, dynamic_ncols=True
    )
    for name, i, unit in units:
        table = kept.read(unit)
        if table is None:
            prompt = prompts[name][i]
            # The unablated columns: log-probability, accuracy and exact match.
            table = dict(trial.run(prompt, i, [], lambda n: None, short=short))
            with fused_attention(trial.model):
                for variant, clean in table.items():
                    one = prompt if variant == "long" else prompt.short
                    assert one is not None
                    estimate = attributed_effects(
                        trial.model, one.tokens, one.targets, trial.replacement(i)
                    )
                    columns = (clean[0] + estimate.effects[at].double()).expand(3, -1)
                    table[variant] = torch.cat([clean, columns], 1)
            kept.write(unit, table)
        found[name, i] = table
    return _collected(trial.model, prompts, heads, found)


def _collected(
    model: LensModel,
    prompts: Mapping[str, Sequence[Prompt]],
    heads: Sequence[Head],
    found: Mapping[tuple[str, int], Mapping[str, Tensor]],
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """A row a prompt, in order of task, and ``[prompt, layer, head]`` of each variant."""
    order = [(name, i) for name, these in prompts.items() for i in range(len(these))]
    shape = (len(order), int(model.cfg.n_layers), int(model.cfg.n_heads))
    tables = {v: torch.full(shape, float("nan"), dtype=torch.float64) for v in VARIANTS[:2]}
    layer, head = torch.tensor(list(heads)).T
    rows = []
    for row, (name, i) in enumerate(order):
        table, prompt = found[name, i], prompts[name][i]
        for variant, values in table.items():
            tables[variant][row, layer, head] = values[0, 1:] - values[0, 0]
        clean = table["long"][:, 0].tolist()
        near = float(table["short"][0, 0]) if "short" in table else np.nan
        rows.append((name, i, len(prompt.tokens), clean[0], clean[1], clean[2] > 0.5, near))
    columns = ["task", "prompt", "n_tokens", "clean", "accuracy", "exact", "clean_short"]
    return pd.DataFrame(rows, columns=columns), tables


def _agreement(
    trial: Trial,
    prompts: Mapping[str, Sequence[Prompt]],
    heads: Sequence[Head],
    rows: pd.DataFrame,
    estimates: Tensor,
    kept: Checkpoint,
    progress: bool,
) -> pd.DataFrame:
    """Some heads ablated on a few prompts of each task, beside their estimated effects."""
    order = np.random.default_rng(trial.seed).permutation(len(heads))[:_CHECKED_HEADS]
    some, out = [heads[i] for i in sorted(order)], []
    for number, (name, these) in enumerate(
        tqdm(prompts.items(), desc="comparing", unit="task", disable=not progress)
    ):
        true = []
        for i, prompt in enumerate(these[:_CHECKED_PROMPTS]):
            unit = f"checked-{number:02d}-{i:04d}"
            table = kept.read(unit)
            if table is None:
                sets = [[head] for head in some]
                table = dict(trial.run(prompt, i, sets, lambda n: None, short=False))
                kept.write(unit, table)
            true.append(table["long"][0, 1:] - table["long"][0, 0])
        at = rows.index[rows["task"] == name][: len(true)].tolist()
        guess = estimates[at][:, [h[0] for h in some], [h[1] for h in some]].mean(0)
        mean = torch.stack(true).mean(0)
        found = agreement_of(guess.numpy(), mean.numpy(), seed=trial.seed)
        out.append(
            {
                "task": name,
                "n_heads": len(some),
                "rank_correlation": found.rank_correlation,
                "ci_low": found.ci_low,
                "ci_high": found.ci_high,
                "slope": found.slope,
            }
        )
    return pd.DataFrame(out)

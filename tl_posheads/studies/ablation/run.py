"""Do the heads with the highest scores matter? They and their controls, ablated side by side."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.model import (
    LensModel,
    model_name,
    require_clean,
    require_own_biases,
    require_rotary,
)
from tl_posheads.hooks.provenance import model_facts, versions
from tl_posheads.interventions.ablation import Mode
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.scoring.head_scores import HeadScores
from tl_posheads.studies.ablation.budget import (
    LEAST_DRAWS,
    LEAST_PROMPTS,
    Plan,
    draws_to_try,
    make_plan,
    seconds_of,
)
from tl_posheads.studies.ablation.conditions import Condition, conditions_of, screen_tests
from tl_posheads.studies.ablation.controls import CONTROLS, top_sets
from tl_posheads.studies.ablation.pilot import Pilot, run_pilot
from tl_posheads.studies.ablation.prompts import (
    named,
    prompts_digest,
    prompts_of,
    task_facts,
    tensor_digest,
    with_short,
)
from tl_posheads.studies.ablation.results import UNABLATED, AblationStudy
from tl_posheads.studies.ablation.trial import Trial
from tl_posheads.tasks.base import Prompt, Task


def ablation_study(
    model: LensModel,
    scores: HeadScores,
    *,
    tasks: Sequence[Task],
    fractions: Sequence[float] = (0.02, 0.05, 0.10, 0.20),
    controls: Sequence[str] = CONTROLS,
    n_control: int = 32,
    mode: Mode = "zero",
    reference: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, "pos"]] | None = None,
    per_position: bool = False,
    budget: str | float | timedelta | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> AblationStudy:
    """Ablate the top heads and their controls, and compare what each does to the same prompts.

    Every prompt is answered without ablation and under every ablation, at long and at short range.
    The top heads' effect is then ranked among the controls' draws. Beside it, a screen by
    attribution patching estimates every head's effect; its agreement with the ablations that were
    done is part of the result.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE; left as it was.
        scores: of the same model.
        tasks: from :mod:`tl_posheads.tasks`, or anything with ``name`` and ``prompts(model)``.
        fractions: ascending shares of the scored heads that are ablated.
        controls: ``"random"``, ``"layer_matched"``, ``"norm_matched"`` and ``"lowest"``
            (:func:`tl_posheads.control_sets`).
        n_control: draws of each random control, at least 12. With fewer than 19 no p-value can
            reach 5 %.
        mode, reference, per_position: as for :func:`tl_posheads.ablate`.
        budget: time for all of it, like ``"60min"``. A pilot times a few passes, chooses prompts
            and draws, and says before the study starts how small an effect it could find. None
            runs everything.
        seed: of the draws, the bootstrap and the simulation.
        checkpoint: folder that keeps every finished prompt; the same call goes on from there.
        progress: show the plan and a bar, on stderr.
        provenance: more facts to keep with the result.

    Returns:
        :class:`AblationStudy`.

    Memory: one prompt at a time; beyond a forward pass, ``pos * d_model`` numbers for every layer
    that an ablation starts at, and once a prompt a backward pass. Modes ``"mean"`` and
    ``"resample"`` hold what :func:`tl_posheads.ablation_hooks` says, for all heads.

    Raises:
        PosheadsError: before any forward pass: a model without RoPE or with forgotten hooks, scores
            of another model, tasks without prompts or longer than the context, a reference shorter
            than the prompts, fewer than 12 draws, unknown controls, fractions that give no heads or
            the same ones. After the pilot: a budget that is too small. A checkpoint of another run.

    Example:
        >>> task = tasks.Passkey(length=2048, depths=5, n=50, seed=0)    # doctest: +SKIP
        >>> study = ablation_study(model, scores, tasks=[task])          # doctest: +SKIP
        >>> print(study.verdict()["passkey"])                            # doctest: +SKIP
    """
    began = time.monotonic()
    limit = seconds_of(budget)
    _check_request(model, scores, tasks, controls, n_control)
    top_sets(scores, fractions)
    fractions = [float(fraction) for fraction in fractions]
    trial = Trial.of(model, mode, reference, per_position, seed)
    prompts = prompts_of(model, tasks)
    for these in prompts.values():
        trial.require_reference(max(len(prompt.tokens) for prompt in with_short(these)))
    request = {
        "model": [model_name(model), str(next(model.parameters()).dtype)],
        "rho": tensor_digest(scores.rho),
        "fractions": fractions,
        "controls": list(controls),
        "n_control": n_control,
        "mode": mode,
        "per_position": per_position,
        "seed": seed,
        "reference": trial.digest,
        "budget": limit,
        "prompts": {name: prompts_digest(these) for name, these in prompts.items()},
    }
    kept = Checkpoint(checkpoint, request)
    trial.prepare()
    pilot = run_pilot(trial, prompts, scores, fractions, controls, kept, progress)

    def conditions(n: int) -> list[Condition]:
        return conditions_of(scores, fractions, controls, n=n, seed=seed, norms=pilot.norms)

    plan = _plan(pilot, conditions, prompts, n_control, limit, time.monotonic() - began, seed, kept)
    chosen = conditions(plan.n_control)
    if progress:
        print(plan.describe(len(chosen), pilot.agreements), file=sys.stderr, flush=True)
    done = _run(trial, prompts, chosen, plan, kept, began, progress)
    screen = _screen_more(trial, prompts, kept, done, plan, began, progress)
    cells = _cells(done, chosen)
    tests = screen_tests(screen, scores, fractions, controls, pilot.norms, seed)
    facts = {
        **model_facts(model),
        "mode": mode,
        "per_position": per_position,
        "reference_sha256": trial.digest,
        "seed": seed,
        "tasks": {name: task_facts(task) for name, task in named(tasks)},
        "scores": scores.provenance,
        "plan": plan.as_dict(),
        "fused_attention": trial.fused,
        "seconds": round(time.monotonic() - began),
        "versions": versions(),
    }
    return AblationStudy(
        pd.DataFrame([condition.row(i) for i, condition in enumerate(chosen)]),
        cells,
        screen,
        tests,
        json.loads(json.dumps({**facts, **(provenance or {})}, default=repr)),
    )


def _check_request(
    model: LensModel, scores: Any, tasks: Any, controls: Sequence[str], n_control: int
) -> None:
    require_rotary(model)
    require_clean(model)
    shape = (int(model.cfg.n_layers), int(model.cfg.n_heads))
    if not isinstance(scores, HeadScores) or tuple(scores.rho.shape) != shape:
        found = tuple(scores.rho.shape) if isinstance(scores, HeadScores) else type(scores).__name__
        raise PosheadsError(
            f"scores of {found} were given, but {model_name(model)} has {shape[0]} layers of "
            f"{shape[1]} heads; give what score_heads returned for this model"
        )
    wrong = [task for task in tasks if not isinstance(task, Task)]
    if not tasks or wrong:
        raise PosheadsError(
            f"tasks={list(tasks)!r} was given; expected at least one of tl_posheads.tasks, like "
            "tasks.Passkey(length=1024)"
        )
    unknown = [kind for kind in controls if kind not in CONTROLS]
    if unknown or not controls or len(set(controls)) < len(controls):
        raise PosheadsError(
            f"controls={list(controls)} was given; expected some of {', '.join(CONTROLS)}, each "
            "once"
        )
    if "norm_matched" in controls:
        what = "a control by the length of what each head writes"
        require_own_biases(model, range(shape[0]), what)
    if isinstance(n_control, bool) or not isinstance(n_control, int) or n_control < LEAST_DRAWS:
        raise PosheadsError(
            f"n_control={n_control!r} was given; expected a whole number of at least {LEAST_DRAWS}"
        )


def _plan(
    pilot: Pilot,
    conditions: Any,
    prompts: Mapping[str, Sequence[Prompt]],
    n_control: int,
    budget: float | None,
    spent: float,
    seed: int,
    kept: Checkpoint,
) -> Plan:
    """A plan rests on the clock, so that a run that goes on must not make another one."""
    found = kept.read("plan")
    if found is not None:
        n_prompts, draws = found["numbers"].tolist()
        fixed = make_plan(
            pilot.costs,
            {},
            pilot.spreads,
            n_prompts=n_prompts,
            n_control=draws,
            budget=None,
            spent=0.0,
            seed=seed,
        )
        return Plan(n_prompts, draws, float(found["seconds"]), budget, fixed.smallest_detectable)
    tries = draws_to_try(n_control) if budget is not None else [n_control]
    plan = make_plan(
        pilot.costs,
        {n: [c.first_layer for c in conditions(n)] for n in tries},
        pilot.spreads,
        n_prompts=max(map(len, prompts.values())),
        n_control=n_control,
        budget=budget,
        spent=spent,
        seed=seed,
    )
    kept.write(
        "plan",
        {
            "numbers": torch.tensor([plan.n_prompts, plan.n_control]),
            "seconds": torch.tensor(plan.seconds, dtype=torch.float64),
        },
    )
    return plan


def _run(
    trial: Trial,
    prompts: Mapping[str, Sequence[Prompt]],
    conditions: Sequence[Condition],
    plan: Plan,
    kept: Checkpoint,
    began: float,
    progress: bool,
) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Rounds of one prompt of every task, so that a study that has to stop early is balanced."""
    done: dict[tuple[str, int], dict[str, Tensor]] = {}
    rounds = [
        [(name, i) for name, these in prompts.items() if i < len(these)]
        for i in range(plan.n_prompts)
    ]
    total = sum(map(len, rounds)) * (len(conditions) + 1)
    bar = tqdm(
        total=total,
        desc="ablating",
        unit="pass",
        disable=not progress,
        dynamic_ncols=True,
        smoothing=0.05,
    )
    longest = before = 0.0
    with bar:
        for number, units in enumerate(rounds):
            spent = time.monotonic() - began + before
            out_of_time = plan.budget is not None and spent + longest > plan.budget * 0.98
            if number >= LEAST_PROMPTS and out_of_time:
                break
            seconds = 0.0
            for name, i in units:
                unit = f"{list(prompts).index(name):02d}-{i:04d}"
                found = kept.read(unit)
                if found is None:
                    start = time.monotonic()
                    found = trial.run(prompts[name][i], i, conditions, bar)
                    found["seconds"] = torch.tensor(time.monotonic() - start, dtype=torch.float64)
                    kept.write(unit, found)
                else:
                    bar.update(len(conditions) + 1)
                    before += float(found["seconds"])
                seconds += float(found["seconds"])
                done[name, i] = found
            longest = max(longest, seconds)
    return done


def _screen_more(
    trial: Trial,
    prompts: Mapping[str, Sequence[Prompt]],
    kept: Checkpoint,
    done: Mapping[tuple[str, int], Any],
    plan: Plan,
    began: float,
    progress: bool,
) -> pd.DataFrame:
    """Screen the prompts that were run and, while time is left, the tasks' others."""
    order = sorted(
        ((i, name) for name, these in prompts.items() for i in range(len(these))),
        key=lambda unit: ((unit[1], unit[0]) not in done, unit[0]),
    )
    frames, slowest = [], 0.0
    for i, name in tqdm(
        order, desc="screening", unit="prompt", disable=not progress, dynamic_ncols=True
    ):
        started = time.monotonic()
        late = plan.budget is not None and started - began + slowest > plan.budget * 0.98
        if late and (name, i) not in done:
            break
        unit = f"screen-{list(prompts).index(name):02d}-{i:04d}"
        found = trial.screened(prompts[name][i], i, unit, kept)
        slowest = max(slowest, time.monotonic() - started)
        for variant in ("long", "short"):
            if variant in found:
                table = found[variant]
                layer, head = torch.meshgrid(*map(torch.arange, table.shape), indexing="ij")
                frames.append(
                    pd.DataFrame(
                        {
                            "task": name,
                            "variant": variant,
                            "prompt": i,
                            "layer": layer.flatten().numpy(),
                            "head": head.flatten().numpy(),
                            "effect": table.flatten().double().numpy(),
                        }
                    )
                )
    return pd.concat(frames, ignore_index=True).dropna(subset="effect", ignore_index=True)


def _cells(
    done: Mapping[tuple[str, int], Mapping[str, Tensor]], conditions: Sequence[Condition]
) -> pd.DataFrame:
    ids = np.array([UNABLATED, *range(len(conditions))])
    frames = []
    for (name, i), found in done.items():
        for variant in ("long", "short"):
            if variant in found:
                logprob, accuracy, exact = found[variant].double().numpy()
                frames.append(
                    pd.DataFrame(
                        {
                            "task": name,
                            "variant": variant,
                            "prompt": i,
                            "condition": ids,
                            "logprob": logprob,
                            "accuracy": accuracy,
                            "exact": exact > 0.5,
                        }
                    )
                )
    return pd.concat(frames, ignore_index=True)

"""Do the heads with the highest scores matter? They and their controls, ablated side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

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
from tl_posheads.studies.ablation.budget import Clock, seconds_of
from tl_posheads.studies.ablation.conditions import conditions_of
from tl_posheads.studies.ablation.controls import CONTROLS, top_sets
from tl_posheads.studies.ablation.norms import norms_over
from tl_posheads.studies.ablation.positive_control import retrieval_heads
from tl_posheads.studies.ablation.results import UNABLATED, AblationStudy
from tl_posheads.studies.ablation.rounds import FIRST_DRAWS, Answers, Rounds
from tl_posheads.studies.ablation.trial import Trial
from tl_posheads.studies.profile.needles import needle_prompts
from tl_posheads.tasks.base import Prompt, Task
from tl_posheads.tasks.calibration import Calibration, calibrate, require_rungs
from tl_posheads.tasks.prompts import (
    evaluator,
    named,
    prompts_digest,
    prompts_of,
    request_of,
    task_facts,
    tensor_digest,
)

LEAST_DRAWS = 12


def ablation_study(
    model: LensModel,
    scores: HeadScores,
    *,
    tasks: Sequence[Task],
    fractions: Sequence[float] = (0.02, 0.05, 0.10, 0.20),
    controls: Sequence[str] = CONTROLS,
    n_control: int = 32,
    mode: Mode = "zero",
    reference: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]] | None = None,
    per_position: bool = False,
    on: Literal["z", "pattern"] = "z",
    calibrated: bool = True,
    needles: int | Task | Sequence[Prompt] = 12,
    budget: str | float | timedelta | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> AblationStudy:
    """Ablate the top heads and their controls, and compare what each does to the same prompts.

    Each task is first calibrated: made as hard as the model can still do, so that harm shows.
    Every prompt is then answered without ablation and under every ablation, at long and at short
    range. The top heads' effect is ranked among the controls' draws. The same number of retrieval
    heads is the positive control: if ablating them does no harm, the study could not have detected
    any.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE; left as it was.
        scores: of the same model.
        tasks: from :mod:`tl_posheads.tasks`, or anything with ``name`` and ``prompts(model)``.
        fractions: ascending shares of the scored heads that are ablated.
        controls: ``"random"``, ``"layer_matched"``, ``"norm_matched"`` and ``"lowest"``
            (:func:`tl_posheads.control_sets`).
        n_control: draws of each random control, at least 12. With fewer than 19 no p-value can
            reach 5 %.
        mode, reference, per_position, on: as for :func:`tl_posheads.ablate`. The paper masks the
            heads' patterns, ``on="pattern"``.
        calibrated: choose each task's difficulty (:func:`tl_posheads.tasks.calibrate`); False
            takes the tasks as they are.
        needles: questions that identify the retrieval heads, as for
            :func:`tl_posheads.profile_heads`; 0 skips the positive control.
        budget: time for all of it, like ``"60min"``: as many prompts as fit with 19 draws, and
            more draws once the intervals are narrower than the draws' spread. None runs everything.
        seed: of the draws and of the simulated studies that give the minimum detectable effect.
        checkpoint: folder that keeps every finished prompt; the same call resumes from it.
        progress: show a bar, on stderr.
        provenance: more facts to keep with the result.

    Returns:
        :class:`AblationStudy`.

    Memory: one prompt at a time; beyond a forward pass, ``pos * d_model`` numbers for every layer
    that an ablation starts at. Modes ``"mean"`` and ``"resample"`` hold what
    :func:`tl_posheads.ablation_hooks` says, for all heads.

    Raises:
        PosheadsError: before any forward pass: a model without RoPE or with forgotten hooks, scores
            of another model, tasks without prompts, without rungs of difficulty or longer than the
            context, a reference shorter than the prompts, fewer than 12 draws, unknown controls,
            fractions that give no heads or the same ones. After a few passes: no task that could
            show harm, a budget that holds too few prompts. A checkpoint of another run.

    Example:
        >>> task = tasks.MultiKey(length=2048, depths=5, n=50, seed=0)   # doctest: +SKIP
        >>> study = ablation_study(model, scores, tasks=[task])          # doctest: +SKIP
        >>> print(study.verdict()["multi_key"])                          # doctest: +SKIP
    """
    clock = Clock(seconds_of(budget))
    _check_request(model, scores, controls, n_control)
    top_sets(scores, fractions)
    fractions = [float(fraction) for fraction in fractions]
    trial = Trial.of(model, mode, reference, per_position, on, seed)
    asked = prompts_of(model, tasks)
    if calibrated:
        require_rungs(tasks)
    trial.require_reference(asked, any(map(evaluator, tasks)))
    questions = needle_prompts(model, needles, seed)
    request = {
        **request_of(model, tasks, asked),
        "rho": tensor_digest(scores.rho),
        "fractions": fractions,
        "controls": list(controls),
        "n_control": n_control,
        "calibrated": calibrated,
        "needles": prompts_digest(questions),
        **trial.facts,
        "budget": clock.budget,
    }
    kept = Checkpoint(checkpoint, request)
    chosen = _chosen(model, tasks, calibrated, progress)
    # Two tasks may share a name: each chosen one keeps its number.
    given = {name: task for name, task in named(tasks) if name not in chosen.left_out}
    taken = dict(zip(given, chosen.tasks, strict=True))
    prompts = {
        name: asked[name] if task is given[name] else prompts_of(model, [task])[task.name]
        for name, task in taken.items()
    }
    trial.prepare()
    heads, positive = retrieval_heads(model, questions, kept)
    norms = norms_over(model, prompts) if "norm_matched" in controls else None
    fixed: dict[str, Any] = {"seed": seed, "norms": norms, "retrieval": heads}
    conditions = partial(conditions_of, scores, fractions, controls, **fixed)
    evaluate = {name: evaluator(task) for name, task in taken.items()}
    n_first = len(conditions(n=min(n_control, FIRST_DRAWS)))
    every = conditions(n=n_control)
    rounds = Rounds(trial, prompts, evaluate, every, n_first, kept, clock, progress)
    run = rounds.run()
    facts = {
        **model_facts(model),
        **trial.facts,
        "budget": clock.budget,
        "tasks": {name: task_facts(task) for name, task in taken.items()},
        "left_out": chosen.left_out,
        "positive_control": {"n_heads": len(heads), **positive},
        "scores": scores.provenance,
        "fused_attention": trial.fused,
        "seconds": round(clock.spent),
        "versions": versions(),
    }
    return AblationStudy(
        pd.DataFrame([condition.row(i) for i, condition in enumerate(run)]),
        _cells(rounds.done, len(run)),
        chosen.table,
        json.loads(json.dumps({**facts, **(provenance or {})}, default=repr)),
    )


def _chosen(
    model: LensModel, tasks: Sequence[Task], calibrated: bool, progress: bool
) -> Calibration:
    if not calibrated:
        return Calibration(tuple(tasks), {}, pd.DataFrame())
    found = calibrate(model, tasks, progress=progress)
    if not found.tasks:
        why = "; ".join(f"{name} {reason}" for name, reason in found.left_out.items())
        raise PosheadsError(
            f"no task could show harm in {model_name(model)} ({why}); give other tasks or lengths, "
            "or calibrated=False (--as-they-are) to take them as they are"
        )
    return found


def _check_request(model: LensModel, scores: Any, controls: Sequence[str], n_control: int) -> None:
    require_rotary(model)
    require_clean(model)
    shape = (int(model.cfg.n_layers), int(model.cfg.n_heads))
    if not isinstance(scores, HeadScores) or tuple(scores.rho.shape) != shape:
        found = tuple(scores.rho.shape) if isinstance(scores, HeadScores) else type(scores).__name__
        raise PosheadsError(
            f"scores of {found} were given, but {model_name(model)} has {shape[0]} layers of "
            f"{shape[1]} heads; give what score_heads returned for this model"
        )
    unknown = [kind for kind in controls if kind not in CONTROLS]
    if unknown or not controls or len(set(controls)) < len(controls):
        raise PosheadsError(
            f"controls={list(controls)} was given; expected some of {', '.join(CONTROLS)}, each "
            "once"
        )
    if "norm_matched" in controls:
        what = "a control matched by the norm of head outputs"
        require_own_biases(model, range(shape[0]), what)
    if isinstance(n_control, bool) or not isinstance(n_control, int) or n_control < LEAST_DRAWS:
        raise PosheadsError(
            f"n_control={n_control!r} was given; expected a whole number of at least {LEAST_DRAWS}"
        )


def _cells(done: Answers, n: int) -> pd.DataFrame:
    """A row per task, variant, prompt and condition."""
    ids = np.array([UNABLATED, *range(n)])
    frames = []
    for (name, i), found in done.items():
        for variant, table in found.items():
            value, accuracy, exact = table.numpy()
            frames.append(
                pd.DataFrame(
                    {
                        "task": name,
                        "variant": variant,
                        "prompt": i,
                        "condition": ids,
                        "value": value,
                        "accuracy": accuracy,
                        "exact": exact > 0.5,
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)

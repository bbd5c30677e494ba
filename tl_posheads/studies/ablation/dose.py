"""Effect against strength: rotary pairs of some heads edited more and more, and of other heads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.changes import changes_of
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.heads import by_layer, heads_of
from tl_posheads.hooks.logprobs import cached_prefix, run_from_layer
from tl_posheads.hooks.model import LensModel, model_name, require_clean, require_rotary
from tl_posheads.hooks.provenance import model_facts, versions
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.interventions.rotary_edits import Edit, PairNumbers, edited_rotary, pairs_of
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.studies.ablation.controls import Head
from tl_posheads.studies.ablation.dose_results import DoseResponse
from tl_posheads.studies.ablation.prompts import prompts_digest, prompts_of, task_facts
from tl_posheads.tasks.base import Prompt, Task

EDITS = ("scale", "shift")


def dose_response(
    model: LensModel,
    heads: Sequence[Head],
    pairs: PairNumbers,
    strengths: Sequence[float],
    task: Task,
    *,
    edit: str = "scale",
    controls: int = 19,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> DoseResponse:
    """What a task loses as rotary pairs of ``heads`` are edited, beside layer-matched heads.

    A cause should act by degrees: if these pairs of these heads carry the task, the more of them is
    taken the more is lost, and taking the same pairs of other heads of the same layers does less.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE.
        heads: ``(layer, head)`` pairs, edited together.
        pairs: rotary pairs, as :func:`~tl_posheads.edit_rotary` takes them.
        strengths: for ``"scale"`` the share of the pairs' contribution that is taken away (0 none,
            1 all); for ``"shift"`` tokens that the query is moved on. At 0 nothing is run.
        task: its prompts' scored tokens are the measure.
        edit: ``"scale"`` or ``"shift"``.
        controls: draws of as many heads from each layer. They are drawn from all of the layer's
            heads, ``heads`` among them, so that the rank of the effect among the draws' is an
            exact test; 19 draws can show p = 0.05.
        seed: of the draws, 0 or more.
        checkpoint: folder that keeps every finished prompt; the same call goes on from there.
        progress: show a bar.

    Returns:
        :class:`DoseResponse`.

    Memory: a forward pass's, and what leaves the block below each set's first layer.

    Raises:
        PosheadsError: what :func:`~tl_posheads.edit_rotary` refuses; no heads; strengths that
            aren't finite, ascending numbers of 0 or more; another edit; fewer than one control; a
            negative seed; no task, or prompts that the model can't read or that score nothing.

    Example:
        >>> found = dose_response(                              # doctest: +SKIP
        ...     model, scores.top(5), range(24, 32), [0.25, 0.5, 1.0], ph.tasks.Passkey(length=512))
        >>> found.to_pandas(); found.plot()                     # doctest: +SKIP
    """
    require_rotary(model)
    require_clean(model)
    top = heads_of(model, heads)
    doses = _strengths(strengths)
    if edit not in EDITS or not top:
        raise PosheadsError(
            f"edit={edit!r} and heads={list(heads)} were given; expected 'scale' or 'shift' and at "
            "least one head"
        )
    if isinstance(controls, bool) or not isinstance(controls, int) or controls < 1:
        raise PosheadsError(f"controls={controls!r} was given; expected 1 or more draws")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise PosheadsError(f"seed={seed!r} was given; expected a whole number of 0 or more")
    if not isinstance(task, Task):
        raise PosheadsError(
            f"task={task!r} was given; expected one of tl_posheads.tasks, like "
            "tasks.Passkey(length=1024)"
        )
    numbers = pairs_of(pairs, edit)
    sets = [sorted(top), *layer_matched(top, int(model.cfg.n_heads), controls, seed)]
    geometry = RotaryGeometry.from_model(model, layers=list(by_layer(top)))  # every set's layers
    for dose in doses:
        with edited_rotary(model, by_layer(top), _edit(edit, numbers, dose), geometry):
            pass  # refused before the first pass
    prompts = prompts_of(model, [task])[task.name]
    facts: dict[str, Any] = {
        **model_facts(model),
        "inside": [change.name for change in changes_of(model)],
        "heads": [list(h) for h in top],
        "pairs": list(numbers),
        "edit": edit,
        "strengths": doses,
        "task": json.loads(json.dumps({"name": task.name, **task_facts(task)}, default=repr)),
        "controls": controls,
        "seed": seed,
        "prompts_sha256": prompts_digest(prompts),
    }
    kept = Checkpoint(checkpoint, facts)
    rows: list[pd.DataFrame] = []
    with tqdm(total=len(prompts), desc="doses", disable=not progress, dynamic_ncols=True) as bar:
        for number, prompt in enumerate(prompts):
            seen = kept.read(f"{number}")
            if seen is None:
                seen = _one_prompt(model, prompt, sets, doses, edit, numbers, geometry)
                kept.write(f"{number}", seen)
            rows.append(_rows(number, seen, doses))
            bar.update(1)
    return DoseResponse(
        cells=pd.concat(rows, ignore_index=True),
        sets=[list(one) for one in sets],
        provenance={**facts, "versions": versions()},
    )


def layer_matched(top: Sequence[Head], n_heads: int, n: int, seed: int) -> list[list[Head]]:
    """Draws of as many heads of each layer as ``top`` has; draw ``i`` depends on seed and ``i``.

    Example:
        >>> [len(draw) for draw in layer_matched([(3, 1), (3, 0), (5, 2)], 8, 2, seed=0)]
        [3, 3]
    """
    draws = []
    for i in range(n):
        generator = np.random.default_rng([seed, i])
        draw = [
            (layer, int(head))
            for layer, mine in by_layer(top).items()
            for head in generator.choice(n_heads, size=len(mine), replace=False)
        ]
        draws.append(sorted(draw))
    return draws


def _strengths(strengths: Sequence[float]) -> list[float]:
    try:
        values = [float(strength) for strength in strengths]
    except (TypeError, ValueError):
        values = []
    ascending = all(a < b for a, b in pairwise(values))
    if not values or not ascending or values[0] < 0 or not math.isfinite(values[-1]):
        raise PosheadsError(
            f"strengths={strengths!r} was given; expected ascending numbers of 0 or more, like "
            "[0.25, 0.5, 1.0]"
        )
    return values


def _edit(edit: str, pairs: Sequence[int], strength: float) -> Edit:
    if edit == "scale":
        return Edit(scale=dict.fromkeys(pairs, 1.0 - strength))
    return Edit(shift=dict.fromkeys(pairs, strength))


def _one_prompt(
    model: LensModel,
    prompt: Prompt,
    sets: Sequence[Sequence[Head]],
    doses: Sequence[float],
    edit: str,
    pairs: Sequence[int],
    geometry: RotaryGeometry,
) -> dict[str, Tensor]:
    """``logprob`` and ``exact``, ``[set, dose]``, and the unedited pass's as ``clean``."""
    firsts = {min(layer for layer, _ in one) for one in sets}
    logprob = torch.zeros(len(sets), len(doses), dtype=torch.float64)
    exact = torch.zeros(len(sets), len(doses), dtype=torch.float64)
    with fused_attention(model):
        prefix = cached_prefix(model, prompt.tokens, prompt.targets, sorted(firsts))
    clean = prefix.logprob.double().mean()
    done: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
    for s, one in enumerate(sets):
        first = min(layer for layer, _ in one)
        for d, dose in enumerate(doses):
            if dose == 0:
                logprob[s, d], exact[s, d] = clean, prefix.hit.double().min()
                continue
            same = (*one, dose)  # small layers give the same draw twice
            if same not in done:
                change = _edit(edit, pairs, dose)
                with edited_rotary(model, by_layer(one), change, geometry), fused_attention(model):
                    done[same] = run_from_layer(
                        model, prompt.tokens, prompt.targets, prefix, first, []
                    )
            found, hit = done[same]
            logprob[s, d], exact[s, d] = found.double().mean(), hit.double().min()
    out = {"logprob": logprob, "exact": exact, "clean": clean[None]}
    if not all(bool(torch.isfinite(value).all()) for value in out.values()):
        raise PosheadsError(
            f"{model_name(model)} gives NaN or infinite log-probabilities; load it with dtype "
            "float32 or bfloat16"
        )
    return out


def _rows(number: int, seen: dict[str, Tensor], doses: Sequence[float]) -> pd.DataFrame:
    n_sets = seen["logprob"].shape[0]
    return pd.DataFrame(
        {
            "prompt": number,
            "set": np.repeat(np.arange(n_sets), len(doses)),
            "strength": np.tile(np.asarray(doses), n_sets),
            "logprob": seen["logprob"].flatten().numpy(),
            "exact": seen["exact"].flatten().numpy() > 0,
            "clean": float(seen["clean"]),
        }
    )

"""Dose response: effect by strength of editing rotary pairs of some heads, with controls."""

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
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.changes import changes_of
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.heads import Head, Heads, by_layer, heads_of
from tl_posheads.hooks.logprobs import cached_prefix, require_finite_logprobs, run_from_layer
from tl_posheads.hooks.model import LensModel, require_clean, require_rotary
from tl_posheads.hooks.provenance import model_facts, versions
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.interventions.rotary_edits import Edit, PairNumbers, edited_rotary, pairs_of
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.studies.ablation.dose_controls import (
    CONTROLS,
    EditedSet,
    check_controls,
    edited_sets,
    other_pairs,
    pair_norms,
)
from tl_posheads.studies.ablation.dose_results import DoseResponse
from tl_posheads.tasks.base import Prompt, Task
from tl_posheads.tasks.prompts import evaluator, prompts_digest, prompts_of, task_facts

EDITS = ("scale", "shift")


def dose_response(
    model: LensModel,
    heads: Heads,
    rotary_pairs: PairNumbers,
    strengths: Sequence[float],
    task: Task,
    *,
    edit: str = "scale",
    controls: Sequence[str] = CONTROLS,
    draws: int = 19,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> DoseResponse:
    """Harm to a task by strength of an edit to rotary pairs of ``heads``, with controls.

    A cause should act by degrees: if these pairs of these heads carry the task, removing more of
    them does more harm, and removing as much elsewhere does less. In the retrieval heads of OLMo-2
    the 32 slowest of 128 dimensions take recall from 1.00 to 0.18, 32 random ones to 0.98 (Bayram
    2026, arXiv 2606.21249).

    Each control tests one rival explanation:

    - ``"layer_matched_heads"``, any heads would do: the same pairs of as many heads from each
      layer. They are drawn from all of the layer's heads, ``heads`` among them, so that the rank
      of the effect among the draws' is an exact test.
    - ``"random_rotary_pairs"``, any pairs would do: the same heads and as many of the pairs that
      aren't edited, at random.
    - ``"norm_matched_rotary_pairs"``, pairs of similar norm would do: the same, but each edited
      pair is replaced by one of the four nearest others by ``E|q_m| E|k_m|``, the product of mean
      lengths, averaged over ``heads`` and measured in an unedited pass over the prompts. The
      result's ``norm_ratio`` shows how close the match is.

    Draws of pairs are distinct sets that exclude the edited ones: ``p`` says how rare their harm is
    among other pairs. It doesn't test how they were chosen. If a single one of ``n`` pairs does all
    the harm, ``k`` pairs chosen blindly include it with probability ``k / n``, and ``p`` is then as
    low as it can be.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE.
        heads: edited together; as for :func:`tl_posheads.ablate`.
        rotary_pairs: of every head's dimensions, 0 being the fastest: one, a range or several.
        strengths: for ``"scale"`` the share of the pairs' contribution that is taken away (0 none,
            1 all); for ``"shift"`` tokens by which the query is moved forward. At 0 nothing is run.
        task: effects are measured on its prompts' scored tokens.
        edit: ``"scale"`` or ``"shift"``.
        controls: some of the three above. Each costs as many passes.
        draws: of each control; 19 can show p = 0.05. Where there are fewer sets of other pairs, all
            that were found are taken.
        seed: of the draws, 0 or more.
        checkpoint: folder that keeps every finished prompt; the same call resumes from it.
        progress: show a bar.

    Returns:
        :class:`DoseResponse`.

    Memory: a forward pass's, and what leaves the block below each set's first layer.

    Raises:
        PosheadsError: what :func:`~tl_posheads.edit_rotary` refuses; no heads; strengths that
            aren't finite, ascending numbers of 0 or more; another edit; unknown controls; fewer
            than one draw; more pairs than there are others; a negative seed; no task, one with a
            metric of its own, or prompts that the model can't read or that score nothing.

    Example:
        >>> found = dose_response(                              # doctest: +SKIP
        ...     model, scores.top(5), range(24, 32), [0.25, 0.5, 1.0], ph.tasks.Passkey(length=512))
        >>> found.to_pandas(); found.plot()                     # doctest: +SKIP
    """
    require_rotary(model)
    require_clean(model)
    top = heads_of(model, heads)
    doses = _strengths(strengths)
    if not top:
        raise PosheadsError(f"heads={heads!r} were given; expected at least one head")
    named = _check_request(edit, controls, draws, seed, task)
    numbers = sorted(set(pairs_of(rotary_pairs, edit)))
    geometry = RotaryGeometry.from_model(model, layers=list(by_layer(top)))  # every set's layers
    for dose in doses:
        with edited_rotary(model, by_layer(top), _edit(edit, numbers, dose), geometry):
            pass  # refused before the first pass
    over_pairs = named != CONTROLS[:1]
    others = other_pairs(numbers, top, geometry) if over_pairs else []
    prompts = prompts_of(model, [task])[task.name]
    facts: dict[str, Any] = {
        **model_facts(model),
        "inside": [change.name for change in changes_of(model)],
        "heads": [list(h) for h in top],
        "rotary_pairs": numbers,
        "edit": edit,
        "strengths": doses,
        "task": json.loads(json.dumps({"name": task.name, **task_facts(task)}, default=repr)),
        "controls": list(named),
        "draws": draws,
        "seed": seed,
        "prompts_sha256": prompts_digest(prompts),
    }
    kept = Checkpoint(checkpoint, facts)
    norms = _norms(kept, model, prompts, top, geometry) if over_pairs else np.zeros(0)
    sets = edited_sets(
        top,
        numbers,
        named,
        n_heads=int(model.cfg.n_heads),
        others=others,
        norms=norms,
        n=draws,
        seed=seed,
    )
    rows: list[pd.DataFrame] = []
    with tqdm(total=len(prompts), desc="doses", disable=not progress, dynamic_ncols=True) as bar:
        for number, prompt in enumerate(prompts):
            seen = kept.read(f"{number}")
            if seen is None:
                seen = _one_prompt(model, prompt, sets, doses, edit, geometry)
                kept.write(f"{number}", seen)
            rows.append(_rows(number, seen, doses))
            bar.update(1)
    return DoseResponse(
        cells=pd.concat(rows, ignore_index=True),
        sets=sets,
        norms=norms.tolist(),
        provenance={**facts, "versions": versions()},
    )


def _check_request(
    edit: object, controls: object, draws: object, seed: object, task: object
) -> tuple[str, ...]:
    """Names of the controls."""
    if edit not in EDITS:
        raise PosheadsError(f"edit={edit!r} was given; expected 'scale' or 'shift'")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise PosheadsError(f"draws={draws!r} was given; expected 1 or more draws of each control")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise PosheadsError(f"seed={seed!r} was given; expected a whole number of 0 or more")
    if not isinstance(task, Task):
        raise PosheadsError(
            f"task={task!r} was given; expected one of tl_posheads.tasks, like "
            "tasks.Passkey(length=1024)"
        )
    if evaluator(task) is not None:
        raise PosheadsError(
            f"the task {task.name} has a metric of its own, but doses are measured by the "
            "log-probability of scored tokens; give a task that has some, like tasks.Passkey"
        )
    return check_controls(controls)


def _norms(
    kept: Checkpoint,
    model: LensModel,
    prompts: Sequence[Prompt],
    heads: Sequence[Head],
    geometry: RotaryGeometry,
) -> Float[np.ndarray, " pair"]:
    """Kept, since another machine's rounding could draw other pairs for the rest of the prompts."""
    seen = kept.read("norms")
    if seen is None:
        seen = {"norms": pair_norms(model, prompts, heads, geometry)}
        kept.write("norms", seen)
    norms: np.ndarray = seen["norms"].numpy()
    return norms


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
    sets: Sequence[EditedSet],
    doses: Sequence[float],
    edit: str,
    geometry: RotaryGeometry,
) -> dict[str, Tensor]:
    """``logprob`` and ``exact``, ``[set, dose]``, and the unedited pass's as ``clean``."""
    firsts = {min(one.heads)[0] for one in sets}
    logprob = torch.zeros(len(sets), len(doses), dtype=torch.float64)
    exact = torch.zeros(len(sets), len(doses), dtype=torch.float64)
    with fused_attention(model):
        prefix = cached_prefix(model, prompt.tokens, prompt.targets, sorted(firsts))
    clean = prefix.logprob.double().mean()
    done: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
    for s, one in enumerate(sets):
        first, members = min(one.heads)[0], by_layer(one.heads)
        for d, dose in enumerate(doses):
            if dose == 0:
                logprob[s, d], exact[s, d] = clean, prefix.hit.double().min()
                continue
            same = (*one.heads, *one.rotary_pairs, dose)  # small layers give a draw twice
            if same not in done:
                change = _edit(edit, one.rotary_pairs, dose)
                with edited_rotary(model, members, change, geometry), fused_attention(model):
                    done[same] = run_from_layer(
                        model, prompt.tokens, prompt.targets, prefix, first, []
                    )
            found, hit = done[same]
            logprob[s, d], exact[s, d] = found.double().mean(), hit.double().min()
    out = {"logprob": logprob, "exact": exact, "clean": clean[None]}
    require_finite_logprobs(model, out.values())
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

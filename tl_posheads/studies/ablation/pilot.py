"""The few passes before a study: what they cost, how far effects spread, which heads write much."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.logprobs import cached_prefix, run_from_layer
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.scoring.head_scores import HeadScores
from tl_posheads.statistics.effects import Agreement, screen_agreement
from tl_posheads.studies.ablation.budget import Cost, Spread, spread_of
from tl_posheads.studies.ablation.conditions import conditions_of
from tl_posheads.studies.ablation.trial import Trial
from tl_posheads.tasks.base import Prompt

N_PROMPTS = 3
_N_DRAWS = 64
_N_TRUE = 3


@dataclass(frozen=True, eq=False)
class Pilot:
    """What a plan needs to know.

    Attributes:
        costs: by task.
        spreads: by task and fraction, from the screen and scaled to true ablations.
        agreements: by task, rank correlation of the screen with the few ablations done.
        norms: mean output norm of every head over the pilot's prompts, ``[layer, head]``.
    """

    costs: dict[str, Cost]
    spreads: dict[tuple[str, float], Spread]
    agreements: dict[str, float]
    norms: Float[Tensor, "layer head"]


def run_pilot(
    trial: Trial,
    prompts: Mapping[str, Sequence[Prompt]],
    scores: HeadScores,
    fractions: Sequence[float],
    controls: Sequence[str],
    kept: Checkpoint,
    progress: bool,
) -> Pilot:
    """Screen the first prompts of every task, and time and ablate a few sets on the first one."""
    screens: dict[str, list[dict[str, Tensor]]] = {}
    seconds: dict[str, list[float]] = {}
    units = [(name, i) for name, these in prompts.items() for i in range(len(these))[:N_PROMPTS]]
    for name, i in tqdm(
        units, desc="pilot", unit="prompt", disable=not progress, dynamic_ncols=True
    ):
        start = time.monotonic()
        unit = f"screen-{list(prompts).index(name):02d}-{i:04d}"
        screens.setdefault(name, []).append(trial.screened(prompts[name][i], i, unit, kept))
        seconds.setdefault(name, []).append(time.monotonic() - start)
    norms = torch.stack([s["norms"] for these in screens.values() for s in these]).mean(0)
    costs, spreads, agreements = {}, {}, {}
    for name, these in prompts.items():
        cost, found = _timed(trial, these[0], screens[name][0], scores, fractions, controls, norms)
        agreements[name], scale = found.rank_correlation, abs(found.slope)
        scale = scale if np.isfinite(scale) and scale > 0 else 1.0
        # The fastest: the first pass of a process also fills caches.
        costs[name] = replace(cost, screening=min(seconds[name]))
        effects = torch.stack([s["long"] for s in screens[name]]).double().numpy()
        kinds = [kind for kind in controls if kind != "lowest"][:1]
        drawn = conditions_of(scores, fractions, kinds, n=_N_DRAWS, seed=trial.seed, norms=norms)
        for fraction in fractions:
            sums = {
                kind: np.array(
                    [
                        effects[:, [h[0] for h in c.heads], [h[1] for h in c.heads]].sum(1)
                        for c in drawn
                        if c.fraction == fraction and (c.kind == "top") == (kind == "top")
                    ]
                )
                for kind in ("top", "draws")
            }
            if len(sums["draws"]):
                spreads[name, fraction] = spread_of(sums["top"][0], sums["draws"].T, scale)
    return Pilot(costs, spreads, agreements, norms)


def _timed(
    trial: Trial,
    prompt: Prompt,
    screened: Mapping[str, Tensor],
    scores: HeadScores,
    fractions: Sequence[float],
    controls: Sequence[str],
    norms: Tensor,
) -> tuple[Cost, Agreement]:
    """Seconds of passes over a prompt and its short control; the screen beside true effects."""
    model, middle = trial.model, int(trial.model.cfg.n_layers) // 2
    sets = conditions_of(scores, fractions, controls, n=_N_TRUE, seed=trial.seed, norms=norms)
    sets = [c for c in sets if c.fraction == fractions[-1]][: 1 + _N_TRUE]
    whole_seconds = half_seconds = 0.0
    estimated, true = [], []
    with fused_attention(model):
        for name, one in (("long", prompt), ("short", prompt.short)):
            if one is None:
                continue
            firsts = [middle, *(c.first_layer for c in sets)]
            prefix = cached_prefix(model, one.tokens, one.targets, firsts)
            start = time.monotonic()
            run_from_layer(model, one.tokens, one.targets, prefix, 0, [])
            whole = time.monotonic()
            run_from_layer(model, one.tokens, one.targets, prefix, middle, [])
            half = time.monotonic()
            whole_seconds += whole - start
            half_seconds += half - whole
            if name == "short":
                continue
            for c in sets:
                hooks = trial.hooks(c.heads, 0)
                logprob, _ = run_from_layer(
                    model, one.tokens, one.targets, prefix, c.first_layer, hooks
                )
                true.append(float((logprob - prefix.logprob).double().mean()))
                estimated.append(float(sum(screened["long"][head] for head in c.heads)))
    saved = max(whole_seconds - half_seconds, 0.0) / max(middle, 1)
    agreement = screen_agreement(np.array(estimated), np.array(true), seed=trial.seed)
    return Cost(whole_seconds, saved, 0.0), agreement

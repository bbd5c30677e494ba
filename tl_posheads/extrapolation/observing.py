"""One text under one method: curves, scores and losses from a single pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.hooks.capture import rotary_consumer
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.heads import Head, by_layer
from tl_posheads.hooks.inputs import require_finite
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.hooks.model import LensModel
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.scoring.curves import curves_by_distance
from tl_posheads.scoring.draws import DocumentDraws, Settings, measure
from tl_posheads.scoring.head_scores import HeadScores


@dataclass(eq=False)
class TextUnder:
    """Measurements of one text.

    Attributes:
        whole: mean dominant dimension of the chosen heads by distance from 1, ``[head, distance]``.
        n_whole: query-key pairs that it is the mean of, ``[distance]``.
        within: the same where query and key both stand within the training length.
        n_within: query-key pairs of that.
        whole_slow, within_slow: softmax weight of the slow rotary pairs together, of the same two;
            NaN where a head has no such pair.
        whole_rows, within_rows: ``draws.MEASURES`` of the plan's layers, of the same two.
        loss: negative log-probability of the tokens at ``positions``, nats.
        positions: of the scored tokens.
    """

    whole: Float[Tensor, "head distance"]
    n_whole: Int[Tensor, " distance"]
    within: Float[Tensor, "head distance"]
    n_within: Int[Tensor, " distance"]
    whole_slow: Float[Tensor, "head distance"]
    within_slow: Float[Tensor, "head distance"]
    whole_rows: Float[Tensor, "measure layer head"]
    within_rows: Float[Tensor, "measure layer head"]
    loss: Float[Tensor, " target"]
    positions: Int[Tensor, " target"]


@dataclass(frozen=True)
class Asked:
    """What to measure in every text.

    Attributes:
        heads: those whose curves are measured.
        slow: rotary pairs of each of these heads whose softmax weight is summed.
        layers: those whose heads are scored.
        trained: positions of training.
        settings: of the scores; curves leave the same positions out, and have the same scale.
        n_queries: queries per text that curves are computed from.
        n_scored: tokens per text whose loss is measured.
    """

    heads: tuple[Head, ...]
    slow: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    trained: int
    settings: Settings
    n_queries: int
    n_scored: int


def scored_positions(n_pos: int, n_scored: int) -> Int[Tensor, " target"]:
    """Up to ``n_scored`` positions from 1 on, evenly spread."""
    n = min(n_pos - 1, n_scored)
    rows: Tensor = torch.linspace(1, n_pos - 1, n, dtype=torch.float64).round().long().unique()
    return rows


def observe(
    model: LensModel,
    document: Int[Tensor, " pos"],
    unit: str,
    geometry: RotaryGeometry,
    plan: Asked,
) -> TextUnder:
    """One pass over a text longer than ``plan.trained``; ``unit``, hexadecimal, names its draws.

    Memory: fused attention's, where the model allows it; ``head * pos`` numbers for the curves,
    four times, and :func:`tl_posheads.scoring.draws.measure`'s.
    """
    members, settings = by_layer(plan.heads), plan.settings
    first, near, last = settings.skip_first, plan.trained, len(document)
    draws = {stop: DocumentDraws(unit, stop - first, settings) for stop in (near, last)}
    slow = {layer: pairs for (layer, _), pairs in zip(plan.heads, plan.slow, strict=True)}
    curves: dict[Head, list[Tensor]] = {head: [] for head in plan.heads}
    weights: dict[Head, list[Tensor]] = {head: [] for head in plan.heads}
    counts: list[Tensor] = []
    rows: dict[int, list[Tensor]] = {near: [], last: []}

    def consumer(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
        here = geometry[layer].after(first)
        require_finite(layer, rot_q[0], rot_k[0], here.kv_head)
        for stop in (near, last):
            q, k = rot_q[0, first:stop], rot_k[0, first:stop]
            if layer in plan.layers:
                rows[stop].append(measure(q, k, here, draws[stop]).cpu())
            if layer in members:
                mean, weight, n_qk_pairs = curves_by_distance(
                    q,
                    k,
                    here,
                    members[layer],
                    slow[layer],
                    n_queries=plan.n_queries,
                    scale=settings.scale,
                )
                counts.append(n_qk_pairs)
                for i, head in enumerate(members[layer]):
                    curves[layer, head].append(mean[i])
                    weights[layer, head].append(weight[i])

    targets = scored_positions(last, plan.n_scored)
    layers = sorted({*plan.layers, *members})
    with rotary_consumer(model, consumer, layers), fused_attention(model):
        logprob, _ = target_logprobs(model, document, targets)
    return TextUnder(
        whole=torch.stack([curves[head][1] for head in plan.heads]),
        n_whole=counts[1],
        within=torch.stack([curves[head][0] for head in plan.heads]),
        n_within=counts[0],
        whole_slow=torch.stack([weights[head][1] for head in plan.heads]),
        within_slow=torch.stack([weights[head][0] for head in plan.heads]),
        whole_rows=torch.stack(rows[last], 1),
        within_rows=torch.stack(rows[near], 1),
        loss=-logprob.double(),
        positions=targets,
    )


def observe_once(
    model: LensModel,
    document: Int[Tensor, " pos"],
    unit: str,
    geometry: RotaryGeometry,
    plan: Asked,
    kept: Checkpoint,
    name: str,
) -> TextUnder:
    """:func:`observe`, or its result in a checkpoint."""
    seen = kept.read(name)
    if seen is None:
        seen = dict(vars(observe(model, document, unit, geometry, plan)))
        kept.write(name, seen)
    return TextUnder(**seen)


def scored_layers(geometry: RotaryGeometry, layers: Sequence[int]) -> tuple[int, ...]:
    """Layers asked for whose pairs have an order."""
    return tuple(layer for layer in sorted(set(layers)) if geometry[layer].n_pairs > 1)


def scores_of(
    rows: Mapping[str, Float[Tensor, "measure layer head"]],
    geometry: RotaryGeometry,
    plan: Asked,
    provenance: Mapping[str, Any],
) -> HeadScores:
    """Positional scores from what was measured of each text in ``plan.layers``, by its hash."""
    by_unit = {
        unit: dict(zip(plan.layers, found.unbind(1), strict=True)) for unit, found in rows.items()
    }
    return HeadScores.from_rows(by_unit, geometry, plan.settings, provenance)

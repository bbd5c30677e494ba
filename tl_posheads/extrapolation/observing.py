"""One text under one method: curves, scores and losses from a single pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.ablation import by_layer
from tl_posheads.accumulator import ScoreAccumulator
from tl_posheads.capture import rotary_consumer
from tl_posheads.checkpoint import TableCheckpoint
from tl_posheads.curves import mean_by_distance
from tl_posheads.fused import fused_attention
from tl_posheads.geometry import RotaryGeometry
from tl_posheads.passes import target_logprobs

Head = tuple[int, int]


@dataclass(eq=False)
class TextUnder:
    """What one text showed.

    Attributes:
        whole: mean dominant dimension of the chosen heads by distance from 1, ``[head, distance]``.
        n_whole: pairs that it is the mean of, ``[distance]``.
        within: the same where query and key both stand within the training length.
        n_within: pairs of that.
        loss: negative log-probability of the tokens at ``positions``, nats.
        positions: of the scored tokens.
    """

    whole: Float[Tensor, "head distance"]
    n_whole: Int[Tensor, "distance"]
    within: Float[Tensor, "head distance"]
    n_within: Int[Tensor, "distance"]
    loss: Float[Tensor, "target"]
    positions: Int[Tensor, "target"]


@dataclass(frozen=True)
class Plan:
    """What is looked at in every text.

    Attributes:
        heads: those whose curves are drawn.
        layers: those whose heads are scored.
        trained: positions of training.
        skip_first: positions at the start that are left out of curves and scores.
        n_queries: queries of a text that curves are made of.
        n_scored: tokens of a text whose loss is measured.
    """

    heads: tuple[Head, ...]
    layers: tuple[int, ...]
    trained: int
    skip_first: int
    n_queries: int
    n_scored: int


def scored_positions(n_pos: int, n_scored: int) -> Int[Tensor, "target"]:
    """Up to ``n_scored`` positions from 1 on, evenly spread."""
    n = min(n_pos - 1, n_scored)
    return torch.linspace(1, n_pos - 1, n, dtype=torch.float64).round().long().unique()


def observe(
    model: Any,
    document: Int[Tensor, "pos"],
    unit: str,
    geometry: RotaryGeometry,
    scores: tuple[ScoreAccumulator, ScoreAccumulator],
    plan: Plan,
) -> TextUnder:
    """One forward pass; ``scores`` count the text within the training length, and the whole.

    Memory: fused attention's, where the model allows it; ``head * pos`` numbers for the curves.
    """
    members = by_layer(plan.heads)
    first, trained = plan.skip_first, plan.trained
    curves: dict[Head, tuple[Tensor, ...]] = {}

    def consumer(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
        n = min(trained, rot_q.shape[1])
        for accumulator, stop in zip(scores, (n, rot_q.shape[1]), strict=True):
            if layer in accumulator.layers:
                accumulator.update(layer, rot_q[:, :stop], rot_k[:, :stop], [unit])
        for stop in (n, rot_q.shape[1]):
            if layer not in members:
                break
            mean, n_pairs = mean_by_distance(
                rot_q[0, first:stop], rot_k[0, first:stop], geometry[layer].after(first),
                members[layer], n_queries=plan.n_queries,
            )  # fmt: skip
            for head, curve in zip(members[layer], mean, strict=True):
                curves[layer, head] = (*curves.get((layer, head), ()), curve, n_pairs)

    targets = scored_positions(len(document), plan.n_scored)
    layers = sorted({*plan.layers, *members})
    with rotary_consumer(model, consumer, layers), fused_attention(model):
        logprob, _ = target_logprobs(model, document, targets)
    any_head = curves[plan.heads[0]]
    return TextUnder(
        whole=torch.stack([curves[head][2] for head in plan.heads]),
        n_whole=any_head[3],
        within=torch.stack([curves[head][0] for head in plan.heads]),
        n_within=any_head[1],
        loss=-logprob.double(),
        positions=targets,
    )


def observe_once(
    model: Any,
    document: Int[Tensor, "pos"],
    unit: str,
    geometry: RotaryGeometry,
    scores: tuple[ScoreAccumulator, ScoreAccumulator],
    plan: Plan,
    kept: TableCheckpoint,
    name: str,
) -> TextUnder:
    """:func:`observe`, or what a checkpoint has of it; ``scores`` get the text either way."""
    parts = ("within", "whole")
    loaded = [kept.load(f"{name}-{part}") for part in parts]
    seen = kept.read(name)
    if seen is not None and all(part is not None for part in loaded):
        counted = [part for part in loaded if part is not None]
    else:
        alone = (scores[0].like(), scores[1].like())
        found = observe(model, document, unit, geometry, alone, plan)
        counted = [(one.tables, one.grids) for one in alone]
        for part, (tables, grids) in zip(parts, counted, strict=True):
            kept.save(f"{name}-{part}", tables, grids)
        seen = dict(vars(found))
        kept.write(name, seen)  # the last: it says that the others are whole
    for accumulator, (tables, grids) in zip(scores, counted, strict=True):
        for layer, table in tables.items():
            accumulator.grids.setdefault(layer, grids[layer])
            accumulator.put(layer, table)
    return TextUnder(**seen)


def scored_layers(geometry: RotaryGeometry, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Layers asked for whose pairs have an order."""
    wanted = range(geometry.n_layers) if layers is None else sorted(set(layers))
    return tuple(layer for layer in wanted if geometry[layer].n_pairs > 1)

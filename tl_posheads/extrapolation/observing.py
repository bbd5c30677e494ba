"""One text under one method: curves, scores and losses from a single pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.ablation import by_layer
from tl_posheads.capture import capture_rotary, rotary_consumer
from tl_posheads.checkpoint import Checkpoint
from tl_posheads.counting import draw_pairs, farthest
from tl_posheads.curves import mean_by_distance
from tl_posheads.fused import fused_attention
from tl_posheads.geometry import LayerGeometry, RotaryGeometry
from tl_posheads.inputs import require_finite
from tl_posheads.passes import target_logprobs
from tl_posheads.remapping import pair_vectors
from tl_posheads.results import HeadScores
from tl_posheads.statistics import sampled_standard_error, spearman_by_distance

Head = tuple[int, int]


@dataclass(eq=False)
class TextUnder:
    """What one text showed.

    Attributes:
        whole: mean dominant dimension of the chosen heads by distance from 1, ``[head, distance]``.
        n_whole: pairs that it is the mean of, ``[distance]``.
        within: the same where query and key both stand within the training length.
        n_within: pairs of that.
        whole_pairs, within_pairs: distance and dominant dimension of pairs drawn for the scores.
        loss: negative log-probability of the tokens at ``positions``, nats.
        positions: of the scored tokens.
    """

    whole: Float[Tensor, "head distance"]
    n_whole: Int[Tensor, "distance"]
    within: Float[Tensor, "head distance"]
    n_within: Int[Tensor, "distance"]
    whole_pairs: Float[Tensor, "two layer head n"]
    within_pairs: Float[Tensor, "two layer head n"]
    loss: Float[Tensor, "target"]
    positions: Int[Tensor, "target"]


@dataclass(frozen=True)
class Plan:
    """What is looked at in every text.

    Attributes:
        heads: those whose curves are drawn.
        layers: those whose heads are scored.
        trained: positions of training.
        pairs: drawn per head and text for the scores.
        skip_first: positions at the start that are left out of curves and scores.
        n_queries: queries of a text that curves are made of.
        n_scored: tokens of a text whose loss is measured.
        seed: of the draws.
    """

    heads: tuple[Head, ...]
    layers: tuple[int, ...]
    trained: int
    pairs: int
    skip_first: int
    n_queries: int
    n_scored: int
    seed: int


def scored_positions(n_pos: int, n_scored: int) -> Int[Tensor, "target"]:
    """Up to ``n_scored`` positions from 1 on, evenly spread."""
    n = min(n_pos - 1, n_scored)
    rows: Tensor = torch.linspace(1, n_pos - 1, n, dtype=torch.float64).round().long().unique()
    return rows


def observe(
    model: Any, document: Int[Tensor, "pos"], unit: str, geometry: RotaryGeometry, plan: Plan
) -> TextUnder:
    """One pass over a text longer than ``plan.trained``; ``unit``, hexadecimal, names its draws.

    Memory: fused attention's, where the model allows it; ``head * pos`` numbers for the curves and
    ``2 * layer * head * pairs`` for the scores, twice.
    """
    members = by_layer(plan.heads)
    first, last = plan.skip_first, len(document)
    near = plan.trained
    curves: dict[Head, list[Tensor]] = {head: [] for head in plan.heads}
    counts: list[Tensor] = []
    drawn: dict[int, list[Tensor]] = {near: [], last: []}

    def consumer(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
        here = geometry[layer].after(first)
        require_finite(layer, rot_q[0], rot_k[0], here.kv_head)
        for stop in (near, last):
            q, k = rot_q[0, first:stop], rot_k[0, first:stop]
            if layer in plan.layers:
                drawn[stop].append(_drawn(q, k, here, unit, plan))
            if layer in members:
                mean, n_pairs = mean_by_distance(
                    q, k, here, members[layer], n_queries=plan.n_queries
                )
                counts.append(n_pairs)
                for head, curve in zip(members[layer], mean, strict=True):
                    curves[layer, head].append(curve)

    targets = scored_positions(last, plan.n_scored)
    layers = sorted({*plan.layers, *members})
    with rotary_consumer(model, consumer, layers), fused_attention(model):
        logprob, _ = target_logprobs(model, document, targets)
    return TextUnder(
        whole=torch.stack([curves[head][1] for head in plan.heads]),
        n_whole=counts[1],
        within=torch.stack([curves[head][0] for head in plan.heads]),
        n_within=counts[0],
        whole_pairs=torch.stack(drawn[last], 1),
        within_pairs=torch.stack(drawn[near], 1),
        loss=-logprob.double(),
        positions=targets,
    )


def _drawn(
    rot_q: Tensor, rot_k: Tensor, geometry: LayerGeometry, unit: str, plan: Plan
) -> Float[Tensor, "two head n"]:
    """Distance and dominant dimension of pairs; text, layer and seed decide which."""
    vectors = pair_vectors(rot_q, rot_k, geometry)
    generator = np.random.default_rng([plan.seed, int(unit[:15], 16), geometry.layer])
    longest = max(1, farthest(rot_q.shape[0], geometry.window))
    apart, query = draw_pairs(vectors, plan.pairs, longest, generator)
    dominant = vectors.dominant_pairs(query, query - apart)
    return torch.stack([apart.float(), dominant.float()]).cpu()


def bare_scores(
    model: Any, by_key: Sequence[tuple[str, Tensor]], geometry: RotaryGeometry, plan: Plan
) -> HeadScores:
    """Scores of the texts' first ``trained`` tokens, as :func:`scores_of` gives them."""
    found = []
    for unit, document in by_key:
        layers: list[Tensor] = []

        def consumer(layer: int, rot_q: Tensor, rot_k: Tensor, unit: str = unit) -> None:
            q, k = rot_q[0, plan.skip_first :], rot_k[0, plan.skip_first :]
            here = geometry[layer].after(plan.skip_first)
            require_finite(layer, q, k, here.kv_head)
            layers.append(_drawn(q, k, here, unit, plan))  # noqa: B023

        capture_rotary(model, document[None, : plan.trained], consumer, layers=plan.layers)
        found.append(torch.stack(layers, 1))
    return scores_of(found, geometry, plan, {})


def observe_once(
    model: Any,
    document: Int[Tensor, "pos"],
    unit: str,
    geometry: RotaryGeometry,
    plan: Plan,
    kept: Checkpoint,
    name: str,
) -> TextUnder:
    """:func:`observe`, or what a checkpoint has of it."""
    seen = kept.read(name)
    if seen is None:
        seen = dict(vars(observe(model, document, unit, geometry, plan)))
        kept.write(name, seen)
    return TextUnder(**seen)


def scored_layers(geometry: RotaryGeometry, layers: Sequence[int]) -> tuple[int, ...]:
    """Layers asked for whose pairs have an order."""
    return tuple(layer for layer in sorted(set(layers)) if geometry[layer].n_pairs > 1)


def scores_of(
    texts: Sequence[Float[Tensor, "two layer head n"]],
    geometry: RotaryGeometry,
    plan: Plan,
    provenance: Mapping[str, Any],
) -> HeadScores:
    """Positional scores from pairs drawn, texts pooled; no null was computed.

    The interval is 1.96 standard errors of the draw on either side.
    """
    shape = (geometry.n_layers, geometry.n_heads)
    rho, se = np.full(shape, np.nan), np.full(shape, np.nan)
    pooled = torch.cat(list(texts), -1).double()
    for i, layer in enumerate(plan.layers):
        for head in range(shape[1]):
            distance, dominant = pooled[0, i, head].long(), pooled[1, i, head]
            rho[layer, head] = float(spearman_by_distance(distance, dominant[None])[0])
            se[layer, head] = sampled_standard_error(distance.numpy(), dominant.numpy())
    n_pairs = np.where(np.isfinite(rho), pooled.shape[-1], 0)
    nothing = torch.full(shape, float("nan"), dtype=torch.float64)
    return HeadScores(
        rho=torch.as_tensor(rho), se=torch.as_tensor(se),
        ci_low=torch.as_tensor(rho - 1.96 * se), ci_high=torch.as_tensor(rho + 1.96 * se),
        rho_geometry=nothing, p_null=nothing.clone(), n_pairs=torch.as_tensor(n_pairs),
        windows=tuple(layer.window for layer in geometry.layers),
        provenance={
            "model": geometry.model_name, "layers": list(plan.layers), "pairs": plan.pairs,
            "estimator": "exact ranks of a sample", "interval": "standard errors of the draw",
            "skip_first": plan.skip_first, "seed": plan.seed, "n_documents": len(texts),
            **provenance,
        },
    )  # fmt: skip

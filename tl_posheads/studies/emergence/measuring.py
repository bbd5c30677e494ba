"""What is measured in a model at one step of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.hooks.capture import rotary_consumer, rotary_hook_points
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.inputs import by_content, documents_of
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.hooks.model import LensModel, require_clean, require_rotary
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.rotary.contributions import Scale
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.scoring.accumulator import Consumer
from tl_posheads.scoring.curves import mean_by_distance
from tl_posheads.scoring.draws import Settings
from tl_posheads.scoring.score import empty_accumulator, facts_of, geometry_by_length

SCORES = ("rho", "ci_low", "ci_high", "rotation", "content", "p_adjusted")


@dataclass(frozen=True, eq=False)
class Moment:
    """One step of training.

    Attributes:
        rho, ci_low, ci_high, rotation, content, p_adjusted: as :class:`tl_posheads.HeadScores` has
            them; of one text neither interval nor p-value.
        doc_rho: rho of every text by itself.
        curve: mean dominant dimension by octave of distance.
        loss: mean negative log-probability by text and octave of position, nats per token.
    """

    rho: Float[Tensor, "layer head"]
    ci_low: Float[Tensor, "layer head"]
    ci_high: Float[Tensor, "layer head"]
    rotation: Float[Tensor, "layer head"]
    content: Float[Tensor, "layer head"]
    p_adjusted: Float[Tensor, "layer head"]
    doc_rho: Float[Tensor, "doc layer head"]
    curve: Float[Tensor, "layer head octave"]
    loss: Float[Tensor, "doc octave"]


def octaves(longest: int) -> Int[np.ndarray, " edge"]:
    """Edges 1, 2, 4 ... of the octaves that hold 1 to ``longest - 1``.

    >>> octaves(256).tolist()
    [1, 2, 4, 8, 16, 32, 64, 128, 256]
    """
    return 2 ** np.arange(int(longest - 1).bit_length() + 1)


def texts_of(model: LensModel, tokens: Any) -> list[tuple[str, Tensor]]:
    """Texts by the hash of their content, checked.

    Raises:
        PosheadsError: what ``score_heads`` refuses.
    """
    require_rotary(model)
    return by_content(documents_of(model, tokens, None, 0))


def measure_step(
    model: LensModel, by_key: Sequence[tuple[str, Tensor]], *, scale: Scale = "none", seed: int = 0
) -> tuple[Moment, dict[str, Any]]:
    """Scores, curves and loss of a model as it is now, and how they came about.

    One pass over every text. Scores and provenance are those of ``score_heads``.
    """
    require_clean(model)
    settings = Settings.of("auto", len(by_key), scale=scale, seed=seed)
    edges = torch.as_tensor(octaves(max(len(document) for _, document in by_key)))
    losses = []
    with evaluating(model), torch.no_grad(), rotary_hook_points(model):
        accumulator = empty_accumulator(model, by_key, range(int(model.cfg.n_layers)), settings)
        curve = _Curve(accumulator.geometry, edges, scale)
        geometry_of = geometry_by_length(model, accumulator.geometry, accumulator.layers)
        for unit, document in by_key:
            geometry = geometry_of(len(document))
            measure_layer = accumulator.consumer(unit, geometry)

            def consumer(
                layer: int,
                q: Tensor,
                k: Tensor,
                measure_layer: Consumer = measure_layer,
                geometry: RotaryGeometry = geometry,
            ) -> None:
                measure_layer(layer, q, k)
                curve.add(layer, geometry[layer], q[0], k[0])

            with rotary_consumer(model, consumer, accumulator.layers), fused_attention(model):
                losses.append(_loss(model, document, edges))
    scores = accumulator.scores({**facts_of(model, by_key), "qk_pairs": "auto"})
    moment = Moment(
        **{name: getattr(scores, name) for name in SCORES},
        doc_rho=scores.by_document("rho"),
        curve=curve.mean(),
        loss=torch.stack(losses),
    )
    return moment, scores.provenance


@contextmanager
def evaluating(model: LensModel) -> Iterator[None]:
    """Put every module in eval mode inside, and restore its mode afterwards."""
    # A Bridge's modules don't hold the model that it was made from, but its eval() reaches it.
    whole = [*model.modules(), *getattr(model, "original_model", model).modules()]
    training = [module for module in whole if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Curve:
    """The mean dominant dimension of every head by octave of distance, a text at a time."""

    def __init__(self, geometry: RotaryGeometry, edges: Int[Tensor, " edge"], scale: Scale) -> None:
        self._edges, self._scale = edges, scale
        shape = (geometry.n_layers, geometry.n_heads, len(edges) - 1)
        self._total = torch.zeros(shape, dtype=torch.float64)
        self._count = torch.zeros_like(self._total[:, :1])

    def add(
        self,
        layer: int,
        geometry: LayerGeometry,
        rot_q: Float[Tensor, "pos head d_head"],
        rot_k: Float[Tensor, "pos kv_head d_head"],
    ) -> None:
        heads = range(geometry.n_heads)
        mean, n_qk_pairs = mean_by_distance(rot_q, rot_k, geometry, heads, scale=self._scale)
        octave = _octave_of(torch.arange(1, len(n_qk_pairs) + 1), self._edges)
        self._total[layer].index_add_(1, octave, mean.nan_to_num(0.0) * n_qk_pairs)
        self._count[layer].index_add_(1, octave, n_qk_pairs[None].double())

    def mean(self) -> Float[Tensor, "layer head octave"]:
        """NaN where there is no pair."""
        return self._total / self._count


def _octave_of(numbers: Int[Tensor, " n"], edges: Int[Tensor, " edge"]) -> Int[Tensor, " n"]:
    return torch.bucketize(numbers, edges, right=True) - 1


def _loss(
    model: LensModel, document: Int[Tensor, " pos"], edges: Int[Tensor, " edge"]
) -> Float[Tensor, " octave"]:
    """Mean by octave of position; NaN in those beyond the text's end."""
    targets = torch.arange(1, len(document))
    loss = -target_logprobs(model, document, targets)[0].double()
    octave = _octave_of(targets, edges)
    n = len(edges) - 1
    return octave.bincount(loss, n) / octave.bincount(minlength=n)

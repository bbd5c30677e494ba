"""What is looked at in a model at one step of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.capture import capture_rotary, rotary_hook_points
from tl_posheads.checkpoint import TableCheckpoint
from tl_posheads.curves import mean_by_distance
from tl_posheads.errors import PosheadsError
from tl_posheads.fused import fused_attention
from tl_posheads.geometry import RotaryGeometry
from tl_posheads.inputs import by_content, documents_of
from tl_posheads.lens import require_clean, require_rotary
from tl_posheads.passes import target_logprobs
from tl_posheads.results import HeadScores
from tl_posheads.scoring import empty_accumulator, facts_of, finer_bins, sweep
from tl_posheads.statistics import spearman_of_tables
from tl_posheads.tables import N_BUCKETS

_SCORES = ("rho", "ci_low", "ci_high", "rho_geometry", "p_null")


@dataclass(frozen=True, eq=False)
class Moment:
    """One step of training.

    Attributes:
        rho, ci_low, ci_high, rho_geometry, p_null: as :class:`tl_posheads.HeadScores` has them.
        doc_rho: rho of every text by itself, from counts in coarse cells; for its spread.
        curve: mean dominant dimension by octave of distance.
        loss: mean negative log-probability by text and octave of position, nats a token.
    """

    rho: Float[Tensor, "layer head"]
    ci_low: Float[Tensor, "layer head"]
    ci_high: Float[Tensor, "layer head"]
    rho_geometry: Float[Tensor, "layer head"]
    p_null: Float[Tensor, "layer head"]
    doc_rho: Float[Tensor, "doc layer head"]
    curve: Float[Tensor, "layer head octave"]
    loss: Float[Tensor, "doc octave"]


def octaves(longest: int) -> Int[np.ndarray, "edge"]:
    """Edges 1, 2, 4 ... of the octaves that hold 1 to ``longest - 1``.

    >>> octaves(256).tolist()
    [1, 2, 4, 8, 16, 32, 64, 128, 256]
    """
    return 2 ** np.arange(int(longest - 1).bit_length() + 1)


def texts_of(model: Any, tokens: Any) -> list[tuple[str, Tensor]]:
    """Texts by the hash of their content, checked.

    Raises:
        PosheadsError: what ``score_heads`` refuses; more than 64 texts.
    """
    require_rotary(model)
    documents = documents_of(model, tokens, None, 0)
    if len(documents) > N_BUCKETS:
        raise PosheadsError(
            f"{len(documents)} texts were given; expected at most {N_BUCKETS}, every step of "
            "training reads them all"
        )
    return by_content(documents)


def look(
    model: Any, by_key: Sequence[tuple[str, Tensor]], *, seed: int
) -> tuple[Moment, dict[str, Any]]:
    """Scores, curves and loss of a model as it is now, and how they came about.

    Two passes over every text for scores and curves, one for the loss.
    """
    require_clean(model)
    with evaluating(model), torch.no_grad():
        scores, doc_rho = _scores(model, by_key, seed)
        curve = _curves(model, by_key)
        loss = _losses(model, by_key)
    moment = Moment(
        **{name: getattr(scores, name) for name in _SCORES},
        doc_rho=doc_rho, curve=curve, loss=loss,
    )  # fmt: skip
    return moment, scores.provenance


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Every module in eval mode inside, and as it was afterwards."""
    # A Bridge's modules don't hold the model that it was made from, but its eval() reaches it.
    whole = [*model.modules(), *getattr(model, "original_model", model).modules()]
    training = [module for module in whole if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _scores(
    model: Any, by_key: Sequence[tuple[str, Tensor]], seed: int
) -> tuple[HeadScores, Float[Tensor, "doc layer head"]]:
    with rotary_hook_points(model), tqdm(disable=True) as bar:
        bar.total = 0
        accumulator = empty_accumulator(
            model, by_key, layers=range(int(model.cfg.n_layers)), pairs="all", skip_first=0,
            exact=False, seed=seed,
        )  # fmt: skip
        nothing = TableCheckpoint(None, {})
        sweep(model, accumulator, by_key, accumulator.layers, nothing, bar)
        for _ in range(2):
            sweep(model, accumulator, by_key, finer_bins(accumulator), nothing, bar)
    geometry = accumulator.geometry
    shape = (len(by_key), geometry.n_layers, geometry.n_heads)
    doc_rho = np.full(shape, np.nan)
    for layer, table in accumulator.tables.items():
        for i, (unit, _) in enumerate(by_key):
            counts = table.blocks[unit].sum(0).double().numpy()
            doc_rho[i, layer] = spearman_of_tables(counts)
    return accumulator.scores(facts_of(model, by_key)), torch.as_tensor(doc_rho)


def _curves(model: Any, by_key: Sequence[tuple[str, Tensor]]) -> Float[Tensor, "layer head octave"]:
    longest = max(len(document) for _, document in by_key)
    edges = torch.as_tensor(octaves(longest))
    n_layers = int(model.cfg.n_layers)
    with rotary_hook_points(model):
        geometry = RotaryGeometry.from_model(model, length=longest)
        total = torch.zeros(n_layers, geometry.n_heads, len(edges) - 1, dtype=torch.float64)
        count = torch.zeros(n_layers, 1, len(edges) - 1, dtype=torch.float64)
        layers = [layer for layer in range(n_layers) if geometry[layer].n_pairs > 1]

        def consumer(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
            heads = list(range(geometry.n_heads))
            mean, n_pairs = mean_by_distance(rot_q[0], rot_k[0], geometry[layer], heads)
            octave = torch.bucketize(torch.arange(1, len(n_pairs) + 1), edges, right=True) - 1
            total[layer].index_add_(1, octave, mean.nan_to_num(0.0) * n_pairs)
            count[layer].index_add_(1, octave, n_pairs[None].double())

        for _, document in by_key:
            capture_rotary(model, document[None], consumer, layers=layers)
    return total / count.masked_fill(count == 0, float("nan"))


def _losses(model: Any, by_key: Sequence[tuple[str, Tensor]]) -> Float[Tensor, "doc octave"]:
    edges = octaves(max(len(document) for _, document in by_key))
    out = torch.full((len(by_key), len(edges) - 1), float("nan"), dtype=torch.float64)
    with fused_attention(model):
        for i, (_, document) in enumerate(by_key):
            targets = torch.arange(1, len(document))
            loss = -target_logprobs(model, document, targets)[0].double()
            for o in range(len(edges) - 1):
                inside = (targets >= int(edges[o])) & (targets < int(edges[o + 1]))
                if bool(inside.any()):
                    out[i, o] = loss[inside].mean()
    return out

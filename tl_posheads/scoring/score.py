"""Score every head of a model: capture, measure, combine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import capture_rotary, rotary_hook_points
from tl_posheads.hooks.changes import changes_of, length_matters
from tl_posheads.hooks.inputs import by_content, digest_of, documents_of, layers_of
from tl_posheads.hooks.model import LensModel, model_name, require_clean, require_rotary
from tl_posheads.hooks.provenance import model_facts, versions
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.rotary.contributions import Scale
from tl_posheads.scoring.accumulator import Consumer, ScoreAccumulator
from tl_posheads.scoring.all_pairs import Weighting
from tl_posheads.scoring.draws import Settings
from tl_posheads.scoring.head_scores import HeadScores

Units = Sequence[tuple[str, Tensor]]


def score_heads(
    model: LensModel,
    tokens: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]],
    *,
    layers: Sequence[int] | None = None,
    qk_pairs: Literal["auto", "all"] | int = "auto",
    weighting: Weighting = "pair",
    scale: Scale = "none",
    target_se: float = 0.005,
    attention_mask: Int[Tensor, "doc pos"] | None = None,
    skip_first: int = 0,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> HeadScores:
    """The positional score of every head (Hong et al. 2024, arXiv 2410.08703), with uncertainty.

    In a document, a head's score is Spearman's rho between token distance and dominant dimension
    over the query-key pairs under causal attention. Its overall score is the mean over documents,
    which are the replicates for its interval and p-value. Give eight or more documents.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE. Hooks of an open
            ``with model.hooks(...)`` stay active; the model is left unchanged.
        tokens: documents of at least two positions, no two the same, as ids (a tensor or numpy
            array) or as texts (a string or a list of them); a list holds texts of unequal
            length.
        layers: layers to score; all by default.
        qk_pairs: ``"auto"`` draws as many query-key pairs per document as ``target_se`` needs;
            ``"all"`` ranks every pair, at any length; a number draws that many per document.
            If a document has no more, all are used. ``rotation`` and ``content`` use sampled
            pairs even with ``"all"``.
        weighting: ``"pair"``: every pair has the same weight, so short distances, which have more
            pairs, count more; ``"distance"``: every distance has the same weight.
        scale: ``"none"`` takes contributions to ``q . k``; ``"attention"`` multiplies them by the
            model's factor on attention scores. The two rank heads differently.
        target_se: with ``"auto"``, standard error that sampling may add to a head's mean rho.
        attention_mask: 1 for tokens, 0 for padding, on the left or the right. Each document is
            run alone and without its padding. A tensor with padding needs it.
        skip_first: positions to leave out at the start of every document, as queries and as keys
            (the attention sink).
        seed: of all sampling. The same seed gives the same numbers.
        checkpoint: folder for finished documents; the same call resumes from there.
        progress: show a progress bar.
        provenance: more facts to store with the result, such as the corpus's name.

    Returns:
        :class:`HeadScores`; NaN for heads of layers that were not requested or have no RoPE, and
        for heads whose dominant dimension is constant.

    Memory: one layer of one document at a time; about 100 MB on a CPU beyond the model's own
    forward pass. ``qk_pairs="all"``: 1.8 GB.

    Raises:
        PosheadsError: a model without RoPE or with forgotten hooks; tokens that are too short,
            outside the vocabulary or too long for the model; padding without a mask; the same
            text twice; layers it doesn't have; NaN or infinity in a head; a checkpoint of another
            run.

    Example:
        >>> scores = score_heads(model, tokens)                 # doctest: +SKIP
        >>> scores.positional()                                 # doctest: +SKIP
    """
    require_rotary(model)
    Settings.of(qk_pairs, 1, target_se=target_se, weighting=weighting, scale=scale)
    require_clean(model)
    documents = documents_of(model, tokens, attention_mask, skip_first)
    wanted = layers_of(model, layers)
    units = by_content(documents)
    settings = Settings.of(
        qk_pairs,
        len(units),
        target_se=target_se,
        weighting=weighting,
        scale=scale,
        skip_first=skip_first,
        seed=seed,
    )
    with rotary_hook_points(model):
        accumulator = empty_accumulator(model, units, wanted, settings)
        kept = Checkpoint(checkpoint, plan_of(model, accumulator, units))
        sweep(model, accumulator, units, kept, progress=progress)
    facts = {**facts_of(model, units), "qk_pairs": qk_pairs}
    return accumulator.scores({**facts, **(provenance or {})})


def empty_accumulator(
    model: LensModel, units: Units, layers: Sequence[int], settings: Settings
) -> ScoreAccumulator:
    """An empty accumulator for these documents.

    Raises:
        PosheadsError: none of the layers has RoPE.
    """
    longest = max(len(document) for _, document in units)
    geometry = RotaryGeometry.from_model(model, length=longest, layers=layers)
    accumulator = ScoreAccumulator.of(geometry, layers, settings)
    if not accumulator.layers:
        raise PosheadsError(
            f"none of the requested layers of {model_name(model)} has RoPE; choose others"
        )
    return accumulator


def geometry_by_length(
    model: LensModel, geometry: RotaryGeometry, layers: Sequence[int]
) -> Callable[[int], RotaryGeometry]:
    """Geometry by text length; the same for all unless frequencies depend on the length."""
    if not length_matters(model):
        return lambda length: geometry
    return cache(lambda length: RotaryGeometry.from_model(model, length=length, layers=layers))


def plan_of(model: LensModel, accumulator: ScoreAccumulator, units: Units) -> dict[str, Any]:
    """Everything that determines the numbers; identifies the run of a checkpoint."""
    geometry = accumulator.geometry
    return {
        **inputs_of(model, units),
        "settings": repr(accumulator.settings),
        "layers": accumulator.layers,
        "inv_freq": [geometry[layer].inv_freq.tolist() for layer in accumulator.layers],
    }


def inputs_of(model: LensModel, units: Units) -> dict[str, Any]:
    """Model and texts, for a checkpoint's plan."""
    return {
        "texts": [unit for unit, _ in units],
        "model": [model_name(model), str(next(model.parameters()).dtype)],
        "inside": [change.name for change in changes_of(model)],
    }


def facts_of(model: LensModel, units: Units) -> dict[str, Any]:
    """Provenance of scores of these documents."""
    return {
        **model_facts(model),
        "inside": [change.name for change in changes_of(model)],
        "n_tokens": sum(len(document) for _, document in units),
        "longest": max(len(document) for _, document in units),
        "tokens_sha256": digest_of(units),
        "versions": versions(),
    }


def sweep(
    model: LensModel,
    accumulator: ScoreAccumulator,
    units: Units,
    kept: Checkpoint,
    *,
    progress: bool = False,
) -> None:
    """Measure every document in one pass each, except those already in the checkpoint."""
    layers = accumulator.layers
    geometry_of = geometry_by_length(model, accumulator.geometry, layers)
    total = len(layers) * sum(len(document) for _, document in units)
    bar = tqdm(
        total=total,
        desc="scoring",
        unit=" tokens x layers",
        unit_scale=True,
        disable=not progress,
        dynamic_ncols=True,
    )
    with bar:
        for unit, document in units:
            found = kept.read(unit)
            if found is not None and sorted(found) == sorted(map(str, layers)):
                accumulator.rows[unit] = {int(layer): row for layer, row in found.items()}
                bar.update(len(document) * len(layers))
                continue
            consumer = accumulator.consumer(unit, geometry_of(len(document)))

            def measured(layer: int, q: Tensor, k: Tensor, consumer: Consumer = consumer) -> None:
                consumer(layer, q, k)
                bar.update(q.shape[1])

            capture_rotary(model, document[None], measured, layers=layers)
            kept.write(unit, {str(layer): row for layer, row in accumulator.rows[unit].items()})

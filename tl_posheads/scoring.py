"""Scores every head of a model: capture, contributions, statistics, result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.accumulator import ScoreAccumulator
from tl_posheads.capture import capture_rotary, rotary_hook_points
from tl_posheads.checkpoint import TableCheckpoint
from tl_posheads.errors import PosheadsError
from tl_posheads.geometry import RotaryGeometry
from tl_posheads.inputs import by_content, digest_of, documents_of, layers_of, pairs_to_draw
from tl_posheads.lens import changes_of, model_name, require_clean, require_rotary
from tl_posheads.provenance import model_facts, versions
from tl_posheads.results import HeadScores
from tl_posheads.statistics import DominantGrid
from tl_posheads.tables import FEW_DOCUMENTS, N_BLOCKS, Grids, LayerTable, Weighting

EXACT_UP_TO = 512  # tokens
_LISTS_AT_ONCE = 1 << 30  # bytes of exact lists held, a few layers' worth
_LISTS_AT_MOST = 8 << 30  # bytes of one layer's exact lists


def score_heads(
    model: Any,
    tokens: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, "pos"]],
    *,
    layers: Sequence[int] | None = None,
    pairs: Weighting | Literal["auto"] = "all",
    error: float | None = None,
    attention_mask: Int[Tensor, "doc pos"] | None = None,
    skip_first: int = 0,
    exact: bool | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> HeadScores:
    """The positional score of every head (Hong et al. 2024, arXiv 2410.08703), with uncertainty.

    A head's score is Spearman's rho between token distance and dominant dimension over the
    query-key pairs that attention sees, pooled over the documents.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE. Hooks inside a
            ``with model.hooks(...)`` stay in force; the model is left as it was.
        tokens: documents of at least two positions; a list holds texts of unequal length.
        layers: those to score; all by default.
        pairs: ``"all"`` counts every pair once; ``"per_distance"`` lets every distance weigh the
            same; a number draws that many pairs per head and document, distance first and then
            position, and gives a standard error in ``se``; ``"auto"`` draws as many as ``error``
            asks for.
        error: with ``pairs="auto"``, what ``se`` stays under; 0.01 by default.
        attention_mask: 1 for tokens, 0 for padding, on the left or the right. Each document is
            run by itself and without its padding.
        skip_first: positions at the start of every document that are left out, as queries and as
            keys (the attention sink).
        exact: rank every pair exactly. None does so up to 512 tokens; beyond, pairs are counted in
            bins that change rho by less than 1e-3.
        seed: of everything drawn. The same seed gives the same numbers.
        checkpoint: folder that keeps every finished document; the same call goes on from there.
        progress: show a bar.
        provenance: more facts to keep with the result, the corpus' name for one.

    Returns:
        :class:`HeadScores`, NaN for heads of layers that were not asked for, have no RoPE, or
        whose dominant dimension is constant.

    Memory: one layer of one document at a time; beyond the model's own forward pass 30 MB and, for
    every layer, ``16 * head * 144 * (64 + 32 * log2(pos / 64))`` bytes of counts. Exact: 1 GB, or
    one layer's pairs times 8 bytes where that is more.

    Raises:
        PosheadsError: a model without RoPE or with forgotten hooks; tokens that are too short,
            outside the vocabulary or too long for the model; layers it doesn't have; NaN or
            infinity in a head; a checkpoint of another run; an ``error`` without ``"auto"``.

    Example:
        >>> scores = score_heads(model, tokens)                 # doctest: +SKIP
        >>> scores.top(0.05)                                    # doctest: +SKIP
    """
    require_rotary(model)
    pairs_to_draw(pairs, error, 1)
    require_clean(model)
    documents = documents_of(model, tokens, attention_mask, skip_first)
    pairs = pairs_to_draw(pairs, error, len(documents))
    wanted = layers_of(model, layers)
    longest = max(len(document) for document in documents)
    if exact is None:
        exact = longest <= EXACT_UP_TO
    by_key = by_content(documents)
    with rotary_hook_points(model):
        accumulator = empty_accumulator(
            model, by_key, layers=wanted, pairs=pairs, skip_first=skip_first, exact=exact, seed=seed
        )
        groups = _groups(accumulator, documents, exact and not isinstance(pairs, int))
        kept = TableCheckpoint(checkpoint, plan_of(model, accumulator, by_key))
        bar = tqdm(
            total=len(documents) * len(accumulator.layers), desc="scoring", unit="layer",
            disable=not progress, dynamic_ncols=True,
        )  # fmt: skip
        with bar:
            for group in groups:
                sweep(model, accumulator, by_key, group, kept, bar)
                if exact and not isinstance(pairs, int):
                    for layer in group:
                        accumulator.settle(layer)
            for attempt in (1, 2):
                coarse = finer_bins(accumulator)
                bar.total += len(coarse) * len(by_key)
                sweep(model, accumulator, by_key, coarse, kept, bar, name=f"again{attempt}-")
    return accumulator.scores({**facts_of(model, by_key), **(provenance or {})})


def empty_accumulator(
    model: Any,
    by_key: Sequence[tuple[str, Tensor]],
    *,
    layers: Sequence[int],
    pairs: Weighting,
    skip_first: int,
    exact: bool,
    seed: int,
) -> ScoreAccumulator:
    """What these documents' counts are put into.

    Raises:
        PosheadsError: none of the layers has RoPE.
    """
    longest = max(len(document) for _, document in by_key)
    geometry = RotaryGeometry.from_model(model, length=longest, layers=layers)
    few = len(by_key) < FEW_DOCUMENTS
    accumulator = ScoreAccumulator(
        geometry, layers=layers, pairs=pairs, skip_first=skip_first, exact=exact, seed=seed,
        n_blocks=-(-N_BLOCKS // len(by_key)) if few else 1,
    )  # fmt: skip
    if not accumulator.layers:
        raise PosheadsError(
            f"none of the layers asked for in {model_name(model)} has RoPE; ask for others"
        )
    return accumulator


def plan_of(
    model: Any, accumulator: ScoreAccumulator, by_key: Sequence[tuple[str, Tensor]]
) -> dict[str, Any]:
    """What decides the numbers: a checkpoint of another plan is another run's."""
    geometry = accumulator.geometry
    return {
        "texts": [unit for unit, _ in by_key], "settings": repr(accumulator.settings),
        "layers": accumulator.layers, "skip_first": accumulator.skip_first,
        "model": [model_name(model), str(next(model.parameters()).dtype)],
        "inside": [change.name for change in changes_of(model)],
        "inv_freq": [geometry[layer].inv_freq.tolist() for layer in accumulator.layers],
    }  # fmt: skip


def facts_of(model: Any, by_key: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """Provenance of scores of these documents."""
    return {
        **model_facts(model),
        "inside": [change.name for change in changes_of(model)],
        "n_tokens": sum(len(document) for _, document in by_key),
        "longest": max(len(document) for _, document in by_key),
        "tokens_sha256": digest_of(by_key),
        "versions": versions(),
    }


def _groups(
    accumulator: ScoreAccumulator, documents: Sequence[Tensor], lists: bool
) -> list[list[int]]:
    """Layers whose exact lists are held at once; all of them where no lists are kept."""
    layers = accumulator.layers
    if not lists:
        return [layers]
    n_pairs = sum((n := len(d) - accumulator.skip_first) * (n - 1) // 2 for d in documents)
    size = 8 * n_pairs * (accumulator.geometry.n_heads + 1)
    if size > _LISTS_AT_MOST:
        raise PosheadsError(
            f"exact ranks of {n_pairs:,} pairs would hold {size / 2**30:.0f} GiB for one layer; "
            "leave exact out (the binned ranks differ by less than 1e-3) or give shorter documents"
        )
    step = max(1, _LISTS_AT_ONCE // size)
    return [layers[i : i + step] for i in range(0, len(layers), step)]


def sweep(
    model: Any,
    accumulator: ScoreAccumulator,
    by_key: Sequence[tuple[str, Tensor]],
    layers: Sequence[int],
    kept: TableCheckpoint,
    bar: Any,
    name: str = "",
) -> None:
    """Count every document in some layers; those that the checkpoint holds are read from it."""
    if not layers:
        return
    for unit, document in by_key:
        file = f"{name}{layers[0]:03d}-{layers[-1]:03d}-{unit}"
        found = kept.load(file)
        if found is not None and sorted(found[0]) == sorted(layers):
            tables, grids = found
            bar.update(len(layers))
        else:
            tables, grids = _one_document(model, accumulator, unit, document, layers, bar)
            kept.save(file, tables, grids)
        for layer in layers:
            accumulator.grids.setdefault(layer, grids[layer])
            accumulator.put(layer, tables[layer])


def _one_document(
    model: Any,
    accumulator: ScoreAccumulator,
    unit: str,
    document: Tensor,
    layers: Sequence[int],
    bar: Any,
) -> tuple[dict[int, LayerTable], dict[int, Grids]]:
    alone = accumulator.like()

    def consumer(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
        alone.update(layer, rot_q, rot_k, [unit])
        bar.update(1)

    capture_rotary(model, document[None], consumer, layers=layers)
    return alone.tables, alone.grids


def finer_bins(accumulator: ScoreAccumulator) -> list[int]:
    """Layers to count again: their D bins, made from the first document, were too coarse."""
    coarse = accumulator.coarse_layers()
    for layer in coarse:
        n_pairs = accumulator.geometry[layer].n_pairs
        table = accumulator.tables.pop(layer)
        old = accumulator.grids[layer]
        accumulator.grids[layer] = Grids(
            DominantGrid.from_sample(table.sample.to(old.dominant.edges.device), n_pairs),
            old.geometry,
        )
    return coarse

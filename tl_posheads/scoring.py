"""Scores every head of a model: capture, contributions, statistics, result."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.accumulator import ScoreAccumulator, check_pairs, token_run
from tl_posheads.capture import (
    capture_rotary,
    model_name,
    require_clean,
    require_rotary,
    rotary_hook_points,
)
from tl_posheads.checkpoint import Checkpoint
from tl_posheads.errors import PosheadsError
from tl_posheads.geometry import RotaryGeometry
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
    pairs: Weighting = "all",
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
            position, and gives a standard error in ``se``.
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
            infinity in a head; a checkpoint of another run.

    Example:
        >>> scores = score_heads(model, tokens)                 # doctest: +SKIP
        >>> scores.top(0.05)                                    # doctest: +SKIP
    """
    require_rotary(model)
    check_pairs(pairs)
    require_clean(model)
    documents = _documents(model, tokens, attention_mask, skip_first)
    wanted = _layers(model, layers)
    longest = max(len(document) for document in documents)
    if exact is None:
        exact = longest <= EXACT_UP_TO
    by_key = _by_key(documents)
    with rotary_hook_points(model):
        geometry = RotaryGeometry.from_model(
            model, length=longest if _length_matters(model) else 64, layers=wanted
        )
        accumulator = ScoreAccumulator(
            geometry, layers=wanted, pairs=pairs, skip_first=skip_first, exact=exact, seed=seed,
            n_blocks=1 if len(documents) >= FEW_DOCUMENTS else -(-N_BLOCKS // len(documents)),
        )  # fmt: skip
        if not accumulator.layers:
            raise PosheadsError(
                f"none of the layers asked for in {model_name(model)} has RoPE; ask for others"
            )
        groups = _groups(accumulator, documents, exact and not isinstance(pairs, int))
        plan = {
            "texts": [unit for unit, _ in by_key], "settings": repr(accumulator.settings),
            "layers": accumulator.layers, "skip_first": skip_first,
            "model": [model_name(model), str(next(model.parameters()).dtype)],
            "inv_freq": [geometry[layer].inv_freq.tolist() for layer in accumulator.layers],
        }  # fmt: skip
        kept = Checkpoint(checkpoint, plan)
        bar = tqdm(
            total=len(documents) * len(accumulator.layers), desc="scoring", unit="layer",
            disable=not progress, dynamic_ncols=True,
        )  # fmt: skip
        with bar:
            for group in groups:
                _sweep(model, accumulator, by_key, group, kept, bar)
                if exact and not isinstance(pairs, int):
                    for layer in group:
                        accumulator.settle(layer)
            for attempt in (1, 2):
                _refine(model, accumulator, by_key, kept, bar, attempt)
    facts = {
        "model": model_name(model),
        "model_class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "n_tokens": sum(len(document) for document in documents),
        "longest": longest,
        "tokens_sha256": hashlib.sha256("".join(u for u, _ in by_key).encode()).hexdigest(),
        "versions": _versions(),
    }
    return accumulator.scores({**facts, **(provenance or {})})


def _versions() -> dict[str, str]:
    out = {}
    for package in ("tl-posheads", "transformer-lens", "torch", "transformers"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "not installed"
    return out


def _documents(
    model: Any, tokens: Any, attention_mask: Tensor | None, skip_first: int
) -> list[Tensor]:
    """Texts without their padding, checked."""
    if isinstance(tokens, list | tuple):
        rows = [torch.as_tensor(row) for row in tokens]
        if attention_mask is not None:
            raise PosheadsError(
                "an attention_mask was given with a list of texts; a list needs none, give the "
                "texts without padding"
            )
    elif isinstance(tokens, Tensor):
        rows = list(tokens[None] if tokens.ndim == 1 else tokens)
    else:
        raise PosheadsError(
            f"tokens of type {type(tokens).__name__} were given; expected a tensor [doc, pos] of "
            "token ids or a list of them (model.to_tokens(text) makes one)"
        )
    if not rows or any(row.ndim != 1 or row.is_floating_point() for row in rows):
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else [tuple(r.shape) for r in rows]
        raise PosheadsError(
            f"tokens of shape {shape} were given; expected whole numbers of shape [doc, pos]"
        )
    if attention_mask is not None:
        if attention_mask.shape != (len(rows), len(rows[0])):
            raise PosheadsError(
                f"an attention mask of shape {tuple(attention_mask.shape)} was given for tokens of "
                f"shape {(len(rows), len(rows[0]))}; expected the same"
            )
        rows = [row[token_run(mask.cpu(), i)] for i, (row, mask) in enumerate(zip(rows, attention_mask, strict=True))]
    if isinstance(skip_first, bool) or not isinstance(skip_first, int) or skip_first < 0:
        raise PosheadsError(f"skip_first={skip_first!r} was given; expected a whole number from 0")
    shortest = min(len(row) for row in rows)
    if shortest - skip_first < 2:
        raise PosheadsError(
            f"a document of {shortest} tokens was given with skip_first={skip_first}; a pair of "
            "tokens needs at least 2 positions beyond those skipped"
        )
    low, high = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
    n_vocab = int(model.cfg.d_vocab)
    if low < 0 or high >= n_vocab:
        raise PosheadsError(
            f"token id {low if low < 0 else high} was given, but {model_name(model)} has ids 0 to "
            f"{n_vocab - 1}; were the tokens made by another model's tokenizer?"
        )
    longest, n_ctx = max(len(row) for row in rows), getattr(model.cfg, "n_ctx", None)
    if n_ctx and longest > int(n_ctx):
        raise PosheadsError(
            f"a document of {longest} tokens was given, but {model_name(model)} is set up for at "
            f"most {n_ctx}; give shorter documents or load it with a larger n_ctx"
        )
    return [row.long().cpu() for row in rows]


def _layers(model: Any, layers: Sequence[int] | None) -> list[int]:
    n_layers = int(model.cfg.n_layers)
    wanted = sorted({int(layer) for layer in (range(n_layers) if layers is None else layers)})
    wrong = [layer for layer in wanted if not 0 <= layer < n_layers]
    if wrong or not wanted:
        raise PosheadsError(
            f"layers={list(layers or [])} was given, but {model_name(model)} has layers 0 to "
            f"{n_layers - 1}; choose among those"
        )
    return wanted


def _by_key(documents: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """Documents by the hash of their tokens: their order in the batch then decides nothing."""
    seen: Counter[str] = Counter()
    out = []
    for document in documents:
        digest = hashlib.sha256(document.numpy().tobytes()).hexdigest()
        out.append((f"{digest[:24]}-{seen[digest]}", document))
        seen[digest] += 1
    return sorted(out, key=lambda pair: pair[0])


def _length_matters(model: Any) -> bool:
    """Whether the frequencies depend on the text's length (dynamic NTK, LongRoPE)."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)] if isinstance(rope, dict) else []
    kinds = {str(p.get("rope_type", p.get("type"))) for p in [rope, *nested] if isinstance(p, dict)}
    return bool(kinds & {"dynamic", "longrope"}) or bool(
        getattr(model.cfg, "use_dynamic_ntk_rope", False)
    )


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


def _sweep(
    model: Any,
    accumulator: ScoreAccumulator,
    by_key: Sequence[tuple[str, Tensor]],
    layers: Sequence[int],
    kept: Checkpoint,
    bar: Any,
    name: str = "",
) -> None:
    """Count every document in some layers; those that the checkpoint holds are read from it."""
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


def _refine(
    model: Any,
    accumulator: ScoreAccumulator,
    by_key: Sequence[tuple[str, Tensor]],
    kept: Checkpoint,
    bar: Any,
    attempt: int,
) -> None:
    """Count layers again whose D bins, made from the first document, were too coarse for others."""
    coarse = accumulator.coarse_layers()
    if not coarse:
        return
    for layer in coarse:
        n_pairs = accumulator.geometry[layer].n_pairs
        table = accumulator.tables.pop(layer)
        old = accumulator.grids[layer]
        accumulator.grids[layer] = Grids(
            DominantGrid.from_sample(table.sample.to(old.dominant.edges.device), n_pairs),
            old.geometry,
        )
    bar.total += len(coarse) * len(by_key)
    _sweep(model, accumulator, by_key, coarse, kept, bar, name=f"again{attempt}-")

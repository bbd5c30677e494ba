"""``score_encoding``: the positional score of a live model under its positional encoding."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import capture_rotary, rotary_hook_points
from tl_posheads.hooks.inputs import by_content, documents_of, layers_of, require_finite
from tl_posheads.hooks.model import POSITIONS, LensModel, model_name, require_clean, require_lens
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.rotary.contributions import Scale, check_scale, expand_keys, scale_factor
from tl_posheads.scoring.draws import MEASURES
from tl_posheads.scoring.score import Units, facts_of, geometry_by_length, inputs_of
from tl_posheads.statistics.ranks import correlation, midranks
from tl_posheads.studies.encodings.basis import QKBasis, ordered_planes
from tl_posheads.studies.encodings.planes import PlaneVectors, Unmoved, dominant_by_distance
from tl_posheads.studies.encodings.positions import attention_scales, capture_moved, moved_bases
from tl_posheads.studies.encodings.results import EncodingScores
from tl_posheads.studies.encodings.transport import log_shifts, rotation_operators

_AT_MOST = 8 << 30  # bytes of one document's query-key pairs in one layer
_LONGEST_TURN = 1 << 16  # tokens; a rotation is known at any distance

Read = Callable[[Tensor, Callable[[int, Tensor, Tensor], None]], None]


def score_encoding(
    model: LensModel,
    tokens: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]],
    *,
    layers: Sequence[int] | None = None,
    scale: Scale = "none",
    skip_first: int = 0,
    unmoved: Unmoved = "left_out",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> EncodingScores:
    """The positional score with planes of the q-k space in place of rotary pairs.

    A plane is two directions that the encoding moves at similar speed; planes are ordered from fast
    to slow by what moving the positions does to queries and keys
    (:func:`~tl_posheads.encodings.ordered_planes`). Then as Hong et al. 2024 (arXiv 2410.08703):
    the dominant dimension is the softmax-weighted mean index, and a document's score Spearman's rho
    between it and the token distance, over all query-key pairs that attention sees. A head's score
    is the mean over documents.

    With RoPE the operators are the rotations that the layer really applies, the planes are the
    rotary pairs, and rho is that of ``score_heads(..., qk_pairs="all")``. With learned positions
    the texts are run again with the position embeddings of later positions, and the operators are
    regressions; ``explained_change`` says how much of the change they describe.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE or learned positions.
        tokens: documents of at least two positions, no two the same.
        layers: those to score; all by default.
        scale: ``"none"`` takes contributions as they are, ``"attention"`` times the factor on the
            model's scores.
        skip_first: positions at the start of every document that are left out, as queries and as
            keys.
        unmoved: planes that stand still under the encoding, like partial rotary's unrotated
            coordinates: ``"left_out"``, as the paper's score has it, or ``"last"``.
        checkpoint: folder that keeps every finished document, and the sums that learned positions'
            operators follow from; the same call resumes from it.
        progress: show a bar.

    Memory: beyond the model's forward pass 8 bytes for every query-key pair and head of one
    document and layer, and some 100 for every query-key pair. Learned positions: see
    ``moved_bases``; a pass for every text and shift besides, some two for every doubling of the
    context.

    Raises:
        PosheadsError: a model with neither encoding, by name; one inside a method that moves
            positions (SelfExtend, ReRoPE); what ``score_heads`` refuses; a document whose query-key
            pairs take more than 8 GB a layer; a checkpoint of another run.

    Example:
        >>> scores = score_encoding(model, tokens)              # doctest: +SKIP
        >>> scores.to_pandas()                                  # doctest: +SKIP
    """
    encoding = encoding_of(model)
    check_scale(scale)
    require_clean(model)
    units = by_content(documents_of(model, tokens, None, skip_first))
    documents = [document for _, document in units]
    wanted = layers_of(model, layers)
    _require_room(model, documents, skip_first)
    facts = {"encoding": encoding, "scale": scale, "skip_first": skip_first, "unmoved": unmoved}
    plan = {**inputs_of(model, units), **facts, "layers": wanted}
    bar = tqdm(total=0, desc="scoring", unit="pass", disable=not progress, dynamic_ncols=True)
    with bar, rotary_hook_points(model) if encoding == "rotary" else nullcontext():
        if encoding == "rotary":
            geometry = _geometry(model, documents, wanted)
            found = _rotary(model, geometry, wanted, scale)
            plan["inv_freq"] = [geometry[layer].inv_freq.tolist() for layer in wanted]
            kept = Checkpoint(checkpoint, plan)
        else:
            kept = Checkpoint(checkpoint, plan)
            found = _learned(model, documents, wanted, scale, bar, kept)
        vectors = partial(PlaneVectors, unmoved=unmoved)
        values = _values(model, units, found, vectors, skip_first, bar, kept)
    facts |= {"layers": list(found.bases), "n_documents": len(units), "qk_pairs": "all"}
    return _put_together(model, values, units, found, facts)


@dataclass(frozen=True, eq=False)
class _Encoding:
    """A model's positional encoding, by layer.

    Attributes:
        bases: each head's planes. windows: sliding windows. factors: on the contributions.
        read: one pass over a text, as ``capture_moved`` has it.
    """

    bases: dict[int, list[QKBasis]]
    windows: dict[int, int | None]
    factors: dict[int, float]
    read: Read


def encoding_of(model: LensModel) -> str:
    """``"rotary"`` or ``"learned"``.

    Raises:
        PosheadsError: another encoding, by name, with what to do instead.
    """
    require_lens(model)
    kind = str(getattr(model.cfg, "positional_embedding_type", None) or "none")
    if kind == "rotary":
        return "rotary"
    name = model_name(model)
    if kind == "standard" and getattr(model.cfg, "attention_dir", "causal") != "bidirectional":
        return "learned"
    if kind == "none" and not any(key.endswith("attn.hook_q") for key in model.hook_dict):
        raise PosheadsError(
            f"{name} has no queries and keys (a recurrent or convolutional model, like Mamba or "
            "RWKV), so there is no q-k space to find planes in; Ali et al. 2024, 'The hidden "
            "attention of Mamba models' (arXiv 2403.01590), say what takes the pattern's place"
        )
    used = POSITIONS.get(kind, f"positions of the kind {kind!r}")
    if kind == "none":
        used = "no positional encoding"
    elif kind == "standard":
        used += ", seen from both sides"
    raise PosheadsError(
        f"{name} uses {used}; score_encoding takes RoPE and learned positions of causal models. "
        "Encodings that leave q and k where they are can be scored from tensors, with "
        "tl_posheads.studies.encodings.distance_products and planes_by_products"
    )


def _require_room(model: LensModel, documents: Sequence[Tensor], skip_first: int) -> None:
    n = max(len(document) for document in documents) - skip_first
    size = 8 * n * (n - 1) // 2 * (int(model.cfg.n_heads) + 1)
    if size > _AT_MOST:
        raise PosheadsError(
            f"the query-key pairs of one document and layer would take {size / 2**30:.0f} GiB; "
            "give shorter documents"
        )


def _learned(
    model: LensModel,
    documents: Sequence[Tensor],
    layers: Sequence[int],
    scale: Scale,
    bar: Any,
    kept: Checkpoint,
) -> _Encoding:
    bases = moved_bases(model, documents, layers, bar, kept)
    factors = dict.fromkeys(layers, 1.0)
    if scale == "attention":
        factors = attention_scales(model, documents[0], layers)
    read = partial(capture_moved, model, layers=layers)
    return _Encoding(bases, dict.fromkeys(layers), factors, read)


def _rotary(
    model: LensModel, geometry: RotaryGeometry, layers: Sequence[int], scale: Scale
) -> _Encoding:
    layers = [layer for layer in layers if geometry[layer].n_pairs]
    if not layers:
        raise PosheadsError(
            f"none of the layers asked for in {model_name(model)} has RoPE; ask for others"
        )
    windows = {layer: geometry[layer].window for layer in layers}
    factors = {layer: scale_factor(scale, geometry[layer]) for layer in layers}
    bases = _rotary_bases(geometry, layers)
    return _Encoding(bases, windows, factors, _read_rotary(model, geometry, layers))


def _geometry(
    model: LensModel, documents: Sequence[Tensor], layers: Sequence[int]
) -> RotaryGeometry:
    longest = max(len(document) for document in documents)
    geometry = RotaryGeometry.from_model(model, length=longest, layers=layers)
    own = geometry_by_length(model, geometry, layers)
    for length in {len(document) for document in documents}:
        for one, other in ((geometry[layer], own(length)[layer]) for layer in layers):
            if one.n_pairs and not torch.allclose(one.inv_freq, other.inv_freq, rtol=1e-5):
                raise PosheadsError(
                    f"texts of {length} and of {longest} tokens were given, at which the "
                    f"frequencies of {model_name(model)} are not the same; give texts of one "
                    "length, or use score_heads, which takes each text's own"
                )
    if any(geometry[layer].remapping is not None for layer in layers):
        raise PosheadsError(
            f"{model_name(model)} is inside a method that moves positions, where a query has more "
            "than one place; leave the method's context, or use score_heads"
        )
    return geometry


def _rotary_bases(geometry: RotaryGeometry, layers: Sequence[int]) -> dict[int, list[QKBasis]]:
    """One basis for all heads and layers that rotate alike."""
    shifts = log_shifts(_LONGEST_TURN)
    known: dict[tuple[Any, ...], QKBasis] = {}
    out = {}
    for layer in layers:
        turns = geometry[layer]
        key = (turns.layout, turns.d_head, tuple(turns.inv_freq.tolist()))
        if key not in known:
            known[key] = ordered_planes(rotation_operators(turns, shifts), shifts)
        out[layer] = [known[key]] * turns.n_heads
    return out


def _read_rotary(model: LensModel, geometry: RotaryGeometry, layers: Sequence[int]) -> Read:
    def read(document: Tensor, consumer: Any) -> None:
        def expanded(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
            require_finite(layer, rot_q[0], rot_k[0], geometry[layer].kv_head)
            consumer(layer, rot_q[0], expand_keys(rot_k, rot_q, geometry[layer])[0])

        capture_rotary(model, document[None], expanded, layers=layers)

    return read


def _values(
    model: LensModel,
    units: Units,
    encoding: _Encoding,
    vectors_of: Callable[..., PlaneVectors],
    skip_first: int,
    bar: Any,
    kept: Checkpoint,
) -> Float[Tensor, "measure doc layer head"]:
    """What is measured of every document; those that the checkpoint holds are read from it."""
    bar.total += len(units)
    shape = len(MEASURES), int(model.cfg.n_layers), len(next(iter(encoding.bases.values())))
    rows = []
    for unit, document in units:
        found = kept.read(unit)
        if found is None:
            row = torch.full(shape, float("nan"), dtype=torch.float64)

            def keep(layer: int, q: Tensor, k: Tensor, row: Tensor = row) -> None:
                q, k = (x[skip_first:].detach().cpu().double() for x in (q, k))
                vectors = vectors_of(q * encoding.factors[layer], k, encoding.bases[layer])
                distance, dominant = dominant_by_distance(vectors, encoding.windows[layer])
                ranks = midranks(distance)
                # Head by head: ranking takes ten times the memory of what is ranked.
                rho = torch.stack([correlation(midranks(head), ranks) for head in dominant])
                row[MEASURES.index("rho"), layer] = rho
                row[MEASURES.index("n_qk_pairs"), layer] = len(distance)

            encoding.read(document, keep)
            found = {"values": row}
            kept.write(unit, found)
        rows.append(found["values"])
        bar.update(1)
    return torch.stack(rows, dim=1)


def _put_together(
    model: LensModel, values: Tensor, units: Units, encoding: _Encoding, facts: dict[str, Any]
) -> EncodingScores:
    n_layers, n_heads = values.shape[2:]
    different = {id(basis): basis for bases in encoding.bases.values() for basis in bases}
    places = {key: i for i, key in enumerate(different)}
    which = torch.full((n_layers, n_heads), -1, dtype=torch.long)
    for layer, bases in encoding.bases.items():
        which[layer] = torch.tensor([places[id(basis)] for basis in bases])
    return EncodingScores(
        values=values,
        document_names=tuple(unit for unit, _ in units),
        which=which,
        bases=tuple(different.values()),
        windows=tuple(encoding.windows.get(layer) for layer in range(n_layers)),
        provenance={**facts_of(model, units), **facts},
    )

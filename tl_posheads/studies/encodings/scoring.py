"""``score_any_code``: the positional score of a live model under the code that it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import capture_rotary, rotary_hook_points
from tl_posheads.hooks.inputs import by_content, documents_of, layers_of, require_finite
from tl_posheads.hooks.model import POSITIONS, model_name, require_clean, require_lens
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.rotary.contributions import Scale, check_scale, expand_keys, scale_factor
from tl_posheads.scoring.draws import MEASURES
from tl_posheads.scoring.score import Units, facts_of, geometry_by_length
from tl_posheads.statistics.ranks import correlation, midranks
from tl_posheads.studies.encodings.basis import QKBasis, ordered_planes
from tl_posheads.studies.encodings.planes import PlaneVectors, Unmoved, dominant_by_distance
from tl_posheads.studies.encodings.positions import attention_scales, capture_moved, moved_bases
from tl_posheads.studies.encodings.results import CodeScores
from tl_posheads.studies.encodings.transport import log_shifts, rotation_operators

_AT_MOST = 8 << 30  # bytes of one document's query-key pairs in one layer
_LONGEST_TURN = 1 << 16  # tokens; a rotation is known at any distance

Read = Callable[[Tensor, Callable[[int, Tensor, Tensor], None]], None]


def score_any_code(
    model: Any,
    tokens: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, "pos"]],
    *,
    layers: Sequence[int] | None = None,
    scale: Scale = "none",
    skip_first: int = 0,
    unmoved: Unmoved = "left_out",
    progress: bool = True,
) -> CodeScores:
    """The positional score with planes of the q-k space in place of rotary pairs.

    A plane is two directions that the code moves at like speed; planes are ordered from fast to
    slow by what moving the positions does to queries and keys
    (:func:`~tl_posheads.codes.ordered_planes`). Then as Hong et al. 2024 (arXiv 2410.08703):
    the dominant dimension is the softmax-weighted mean index, and a document's score Spearman's rho
    between it and the token distance, over all query-key pairs that attention sees. A head's score
    is the mean over documents.

    With RoPE the operators are the rotations that the layer really applies, the planes are the
    rotary pairs, and rho is that of ``score_heads(..., pairs="all")``. With learned positions the
    texts are run again with the position embeddings of later positions, and the operators are
    regressions; ``explained_change`` says how much of the change they describe.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE or learned positions.
        tokens: documents of at least two positions, no two the same.
        layers: those to score; all by default.
        scale: ``"none"`` takes contributions as they are, ``"attention"`` times the factor on the
            model's scores.
        skip_first: positions at the start of every document that are left out, as queries and as
            keys.
        unmoved: planes that stand still under the code, like partial rotary's unrotated
            coordinates: ``"left_out"``, as the paper's score has it, or ``"last"``.
        progress: show a bar.

    Memory: beyond the model's forward pass 8 bytes for every query-key pair and head of one
    document and layer, and some 100 for every query-key pair. Learned positions: see
    ``moved_bases``; a pass for every text and shift besides, some two for every doubling of the
    context.

    Raises:
        PosheadsError: a model with neither code, by name; one inside a method that moves
            positions (SelfExtend, ReRoPE); what ``score_heads`` refuses; a document whose query-key
            pairs take more than 8 GB a layer.

    Example:
        >>> scores = score_any_code(model, tokens)              # doctest: +SKIP
        >>> scores.to_pandas()                                  # doctest: +SKIP
    """
    code = code_of(model)
    check_scale(scale)
    require_clean(model)
    units = by_content(documents_of(model, tokens, None, skip_first))
    documents = [document for _, document in units]
    wanted = layers_of(model, layers)
    _require_room(model, documents, skip_first)
    facts = {"code": code, "scale": scale}
    bar = tqdm(total=0, desc="scoring", unit="pass", disable=not progress, dynamic_ncols=True)
    with bar:
        if code == "rotary":
            with rotary_hook_points(model):
                geometry = _geometry(model, documents, wanted)
                wanted = [layer for layer in wanted if geometry[layer].n_pairs]
                if not wanted:
                    raise PosheadsError(
                        f"none of the layers asked for in {model_name(model)} has RoPE; ask for "
                        "others"
                    )
                bases = _rotary_bases(geometry, wanted)
                windows = {layer: geometry[layer].window for layer in wanted}
                factors = {layer: scale_factor(scale, geometry[layer]) for layer in wanted}
                read = _read_rotary(model, geometry, wanted)
                return _scored(
                    model, units, bases, windows, factors, read, bar, skip_first, unmoved, facts
                )
        bases = moved_bases(model, documents, wanted, bar)
        windows, factors = dict.fromkeys(wanted), dict.fromkeys(wanted, 1.0)
        if scale == "attention":
            factors = attention_scales(model, documents[0], wanted)

        def read(document: Tensor, consumer: Any) -> None:
            capture_moved(model, document, consumer, layers=wanted)

        return _scored(model, units, bases, windows, factors, read, bar, skip_first, unmoved, facts)


def code_of(model: Any) -> str:
    """``"rotary"`` or ``"learned"``.

    Raises:
        PosheadsError: another code, by name, with what to do instead.
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
        used = "no position code"
    elif kind == "standard":
        used += ", seen from both sides"
    raise PosheadsError(
        f"{name} uses {used}; score_any_code takes RoPE and learned positions of causal models. "
        "Codes that leave q and k where they are can be scored from tensors, with "
        "tl_posheads.studies.encodings.distance_products and planes_by_products"
    )


def _require_room(model: Any, documents: Sequence[Tensor], skip_first: int) -> None:
    n = max(len(document) for document in documents) - skip_first
    size = 8 * n * (n - 1) // 2 * (int(model.cfg.n_heads) + 1)
    if size > _AT_MOST:
        raise PosheadsError(
            f"the query-key pairs of one document and layer would take {size / 2**30:.0f} GiB; "
            "give shorter documents"
        )


def _geometry(model: Any, documents: Sequence[Tensor], layers: Sequence[int]) -> RotaryGeometry:
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


def _read_rotary(model: Any, geometry: RotaryGeometry, layers: Sequence[int]) -> Read:
    def read(document: Tensor, consumer: Any) -> None:
        def expanded(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
            require_finite(layer, rot_q[0], rot_k[0], geometry[layer].kv_head)
            consumer(layer, rot_q[0], expand_keys(rot_k, rot_q, geometry[layer])[0])

        capture_rotary(model, document[None], expanded, layers=layers)

    return read


def _scored(
    model: Any,
    units: Units,
    bases: dict[int, list[QKBasis]],
    windows: dict[int, int | None],
    factors: dict[int, float],
    read: Read,
    bar: Any,
    skip_first: int,
    unmoved: Unmoved,
    facts: dict[str, Any],
) -> CodeScores:
    layers = list(bases)
    n_layers, n_heads = int(model.cfg.n_layers), len(bases[layers[0]])
    values = torch.full(
        (len(MEASURES), len(units), n_layers, n_heads), float("nan"), dtype=torch.float64
    )
    bar.total += len(units)
    for i, (_, document) in enumerate(units):

        def keep(layer: int, q: Tensor, k: Tensor, i: int = i) -> None:
            q, k = (x[skip_first:].detach().cpu().double() for x in (q, k))
            vectors = PlaneVectors(q * factors[layer], k, bases[layer], unmoved=unmoved)
            distance, dominant = dominant_by_distance(vectors, windows[layer])
            ranks = midranks(distance)
            # Head by head: ranking takes ten times the memory of what is ranked.
            rho = torch.stack([correlation(midranks(head), ranks) for head in dominant])
            values[MEASURES.index("rho"), i, layer] = rho
            values[MEASURES.index("n_pairs"), i, layer] = len(distance)

        read(document, keep)
        bar.update(1)
    different = {id(basis): basis for layer in layers for basis in bases[layer]}
    places = {key: i for i, key in enumerate(different)}
    which = torch.full((n_layers, n_heads), -1, dtype=torch.long)
    for layer in layers:
        which[layer] = torch.tensor([places[id(basis)] for basis in bases[layer]])
    return CodeScores(
        values=values,
        document_names=tuple(unit for unit, _ in units),
        which=which,
        bases=tuple(different.values()),
        windows=tuple(windows.get(layer) for layer in range(n_layers)),
        provenance={
            **facts_of(model, units),
            **facts,
            "layers": layers,
            "n_documents": len(units),
            "pairs": "all",
            "skip_first": skip_first,
            "unmoved": unmoved,
        },
    )

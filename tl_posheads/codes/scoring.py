"""``score_any_code``: the positional score of a live model under the code that it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.capture import capture_rotary, rotary_hook_points
from tl_posheads.codes.basis import QKBasis, ordered_planes
from tl_posheads.codes.planes import PlaneVectors, Unmoved, dominant_by_distance
from tl_posheads.codes.positions import capture_moved, moved_bases
from tl_posheads.codes.results import CodeScores
from tl_posheads.codes.transport import log_shifts, rotation_operators
from tl_posheads.contributions import expand_keys
from tl_posheads.errors import PosheadsError
from tl_posheads.geometry import RotaryGeometry
from tl_posheads.inputs import by_content, documents_of, layers_of, require_finite
from tl_posheads.lens import POSITIONS, model_name, require_clean, require_lens
from tl_posheads.scoring import facts_of
from tl_posheads.statistics import spearman_by_distance

_AT_ONCE = 1 << 30  # bytes of pairs held, of some layers
_AT_MOST = 8 << 30  # bytes of one layer's pairs
_LONGEST_TURN = 1 << 16  # tokens; a rotation is known at any distance

Read = Callable[[Tensor, Sequence[int], Callable[[int, Tensor, Tensor], None]], None]


def score_any_code(
    model: Any,
    tokens: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, "pos"]],
    *,
    layers: Sequence[int] | None = None,
    skip_first: int = 0,
    unmoved: Unmoved = "left_out",
    progress: bool = True,
) -> CodeScores:
    """The positional score with planes of the q-k space in place of rotary pairs.

    A plane is two directions that the code moves at like speed; planes are ordered from fast to
    slow by what moving the positions does to queries and keys
    (:func:`~tl_posheads.codes.basis.ordered_planes`). Then as Hong et al. 2024 (arXiv 2410.08703):
    the dominant dimension is the softmax-weighted mean index, and the score Spearman's rho
    between it and the token distance, over all pairs that attention sees, ranked exactly.

    With RoPE the operators are the rotations that the layer really applies, the planes are the
    rotary pairs, and rho is that of ``score_heads(..., exact=True)``. With learned positions the
    texts are run again with the position embeddings of later positions, and the operators are
    regressions; ``explained_change`` says how much of the change they describe.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE or learned positions.
        tokens: documents of at least two positions.
        layers: those to score; all by default.
        skip_first: positions at the start of every document that are left out of the pairs.
        unmoved: planes that stand still under the code, like partial rotary's unrotated
            coordinates: ``"left_out"``, as the paper's score has it, or ``"last"``.
        progress: show a bar.

    Memory: beyond the model's forward pass 8 bytes for every pair and head, a layer at a time
    where all don't fit into 1 GB. Learned positions: see ``moved_bases``; a pass for every text and
    shift besides, some two for every doubling of the context.

    Raises:
        PosheadsError: a model with neither code, by name; one inside a method that moves
            positions (SelfExtend, ReRoPE); what ``score_heads`` refuses; more pairs than 8 GB.

    Example:
        >>> scores = score_any_code(model, tokens)              # doctest: +SKIP
        >>> scores.to_pandas()                                  # doctest: +SKIP
    """
    code = code_of(model)
    require_clean(model)
    documents = documents_of(model, tokens, None, skip_first)
    wanted = layers_of(model, layers)
    _require_room(model, documents, skip_first)
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
                read = _read_rotary(model, geometry)
                return _scored(model, documents, wanted, bases, windows, read, skip_first,
                               unmoved, bar)  # fmt: skip
        bases = moved_bases(model, documents, wanted, bar)
        windows = dict.fromkeys(wanted)

        def read(document: Tensor, some: Sequence[int], consumer: Any) -> None:
            capture_moved(model, document, consumer, layers=some)

        return _scored(model, documents, wanted, bases, windows, read, skip_first, unmoved, bar)


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
        "tl_posheads.codes.distance_products and planes_by_products"
    )


def _require_room(model: Any, documents: Sequence[Tensor], skip_first: int) -> None:
    size = _pair_bytes(documents, skip_first, int(model.cfg.n_heads))
    if size > _AT_MOST:
        raise PosheadsError(
            f"the pairs of one layer would take {size / 2**30:.0f} GiB; give fewer or shorter "
            "documents"
        )


def _pair_bytes(documents: Sequence[Tensor], skip_first: int, n_heads: int) -> int:
    n_pairs = sum((n := len(d) - skip_first) * (n - 1) // 2 for d in documents)
    return 8 * n_pairs * (n_heads + 1)


def _geometry(model: Any, documents: Sequence[Tensor], layers: Sequence[int]) -> RotaryGeometry:
    longest = max(len(document) for document in documents)
    geometry = RotaryGeometry.from_model(model, length=longest, layers=layers)
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


def _read_rotary(model: Any, geometry: RotaryGeometry) -> Read:
    def read(document: Tensor, some: Sequence[int], consumer: Any) -> None:
        def expanded(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
            require_finite(layer, rot_q[0], rot_k[0], geometry[layer].kv_head)
            consumer(layer, rot_q[0], expand_keys(rot_k, rot_q, geometry[layer])[0])

        capture_rotary(model, document[None], expanded, layers=some)

    return read


def _scored(
    model: Any,
    documents: Sequence[Tensor],
    layers: Sequence[int],
    bases: dict[int, list[QKBasis]],
    windows: dict[int, int | None],
    read: Read,
    skip_first: int,
    unmoved: Unmoved,
    bar: Any,
) -> CodeScores:
    n_layers, n_heads = int(model.cfg.n_layers), len(bases[layers[0]])
    rho = torch.full((n_layers, n_heads), float("nan"), dtype=torch.float64)
    alone = rho.expand(len(documents), -1, -1).clone()
    n_pairs = torch.zeros(n_layers, n_heads, dtype=torch.long)
    step = max(1, _AT_ONCE // max(1, _pair_bytes(documents, skip_first, n_heads)))
    groups = [layers[i : i + step] for i in range(0, len(layers), step)]
    bar.total += len(groups) * len(documents)
    for group in groups:
        lists: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in group}

        def keep(layer: int, q: Tensor, k: Tensor, lists: Any = lists) -> None:
            vectors = PlaneVectors(q[skip_first:], k[skip_first:], bases[layer], unmoved=unmoved)
            lists[layer].append(dominant_by_distance(vectors, windows[layer]))

        for document in documents:
            read(document, group, keep)
            bar.update(1)
        for layer in group:
            found = lists.pop(layer)
            for i, (distance, dominant) in enumerate(found):
                alone[i, layer] = spearman_by_distance(distance, dominant)
            distance = torch.cat([one[0] for one in found])
            rho[layer] = spearman_by_distance(distance, torch.cat([one[1] for one in found], 1))
            n_pairs[layer] = len(distance)
    different = {id(basis): basis for layer in layers for basis in bases[layer]}
    places = {key: i for i, key in enumerate(different)}
    which = torch.full((n_layers, n_heads), -1, dtype=torch.long)
    for layer in layers:
        which[layer] = torch.tensor([places[id(basis)] for basis in bases[layer]])
    provenance = {
        **facts_of(model, by_content(documents)), "code": code_of(model), "skip_first": skip_first,
        "unmoved": unmoved, "pairs": "all", "estimator": "exact ranks of all pairs",
    }  # fmt: skip
    return CodeScores(
        rho=rho, by_document=alone, n_pairs=n_pairs, which=which, bases=tuple(different.values()),
        windows=tuple(windows.get(layer) for layer in range(n_layers)), provenance=provenance,
    )  # fmt: skip

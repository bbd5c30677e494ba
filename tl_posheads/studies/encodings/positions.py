"""Queries and keys of a live model with learned positions, in place and moved by s tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.changes import trained_length
from tl_posheads.hooks.measured_geometry import declared_scale, measured_scale
from tl_posheads.hooks.model import LensModel, model_name, own_hooks, read_pass
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.studies.encodings.basis import QKBasis, ordered_planes
from tl_posheads.studies.encodings.transport import TransportSums, log_shifts

_POINT = "hook_pos_embed"
_SUMS = "moved"  # in the checkpoint
_N_MEASURED = 64  # tokens that a layer's factor is read from
Consumer = Callable[[int, Tensor, Tensor], None]


def position_table(model: LensModel, n: int) -> Float[Tensor, "pos d_model"]:
    """What the model adds to the tokens at positions 0 to ``n - 1``, as a pass shows it.

    Measured, not read from a weight: families begin at another row than 0, and the Bridge of 3.9
    has no ``W_pos``.

    Raises:
        PosheadsError: the model shows no position embeddings, or they depend on the tokens.
    """
    point = model.hook_dict.get(_POINT)
    seen: list[Tensor] = []

    if point is not None:
        for token in (0, 1):
            tokens = torch.full((1, n), token % int(model.cfg.d_vocab))
            read_pass(model, tokens, [(point, seen.append)])
    if len(seen) != 2 or seen[0].ndim != 3 or not torch.equal(*seen):
        why = "never came" if len(seen) != 2 else "aren't the same for every text"
        raise PosheadsError(
            f"the position embeddings of {model_name(model)} {why}, so its positions can't be "
            "moved; choose a model with RoPE, or learned positions as GPT-2 has them"
        )
    return seen[0][0]


def capture_moved(
    model: LensModel,
    document: Int[Tensor, " pos"],
    consumer: Consumer,
    *,
    layers: Sequence[int],
    at: Float[Tensor, "pos d_model"] | None = None,
) -> None:
    """One pass; ``consumer(layer, q, k)`` gets ``[pos, head, d_head]``, a key for each query head.

    Args:
        model: with learned positions.
        document: one text.
        consumer: must not change what it gets.
        layers: those wanted, ascending. The pass ends with the last.
        at: position embeddings in place of the text's own.

    Raises:
        PosheadsError: attention that shows no queries and keys.
    """
    waiting: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    done: list[int] = []

    def keep(layer: int, which: str, value: Tensor) -> None:
        waiting[layer][which] = value
        if len(waiting[layer]) < 2:
            return
        q, k = (waiting[layer].pop(x)[0] for x in "qk")
        if q.ndim != 3 or k.ndim != 3 or q.shape[1] % k.shape[1]:
            return
        done.append(layer)
        consumer(layer, q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))

    def put(value: Tensor, hook: Any) -> Tensor | None:
        return None if at is None else at.expand_as(value).to(value)

    points = {(i, which): f"blocks.{i}.attn.hook_{which}" for i in layers for which in "qk"}
    readers = [
        (model.hook_dict[point], partial(keep, *place))
        for place, point in points.items()
        if point in model.hook_dict
    ]
    with own_hooks([(model.hook_dict[_POINT], put)]):
        read_pass(model, document[None], readers)
    missing = sorted(set(layers) - set(done))
    if missing:
        raise PosheadsError(
            f"the queries and keys of layer {missing[0]} of {model_name(model)} never came as "
            "[batch, pos, head, d_head]; leave the layer out of `layers`, or choose another model"
        )


def attention_scales(
    model: LensModel, document: Int[Tensor, " pos"], layers: Sequence[int]
) -> dict[int, float]:
    """The factor of every layer's scores on ``q . k``, as a pass over the text's start shows it.

    Raises:
        PosheadsError: scores that are no multiple of ``q . k``.
    """
    seen: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    names = ("q", "k", "attn_scores")
    points = {(i, name): f"blocks.{i}.attn.hook_{name}" for i in layers for name in names}
    readers = [
        (model.hook_dict[point], partial(seen[layer].__setitem__, name))
        for (layer, name), point in points.items()
        if point in model.hook_dict
    ]
    read_pass(model, document[None, :_N_MEASURED], readers)
    out = {}
    for layer, found in seen.items():
        q, k = (found[name][0].transpose(0, 1) for name in "qk")
        declared, softcap = declared_scale(model, layer, q.shape[-1])
        k = k.repeat_interleave(len(q) // len(k), dim=0)
        where = f"layer {layer} of {model_name(model)}"
        out[layer] = measured_scale(q, k, found.get("attn_scores"), softcap, declared, where)
    return out


def moved_bases(
    model: LensModel,
    documents: Sequence[Int[Tensor, " pos"]],
    layers: Sequence[int],
    bar: Any,
    kept: Checkpoint,
) -> dict[int, list[QKBasis]]:
    """Every head's planes under learned positions, from texts whose positions are moved.

    Texts are cut to half of the model's context, so that they can be moved by the other half, or
    by the longest text's length where that is less.

    Args:
        model: with learned positions. documents: the texts.
        layers: those wanted. bar: a progress bar, whose length is set here.
        kept: keeps the sums over the texts that are done.

    Memory: queries and keys of all wanted layers of one text, and ``8 * head * shift *
    d_head**2`` bytes for each layer.

    Raises:
        PosheadsError: texts or a context of fewer than 4 tokens; see :func:`position_table`.
    """
    n_ctx, longest = trained_length(model), max(len(document) for document in documents)
    cut = min(longest, n_ctx // 2)
    farthest = min(n_ctx - cut, longest - 1)
    if farthest < 3:
        raise PosheadsError(
            f"texts of at most {longest} tokens and a context of {n_ctx} were given; moving "
            "positions takes texts of 4 tokens or more, and as much room in the context"
        )
    shifts = log_shifts(farthest)
    table = position_table(model, cut + farthest)
    bar.total += len(documents) * (len(shifts) + 1)
    done, sums = _sums_so_far(kept)
    bar.update(done * (len(shifts) + 1))
    for number, document in enumerate(documents[done:], done + 1):
        _add_moved(model, document[:cut], shifts, table, layers, sums, bar)
        state = {f"{i}.{x}": part for i in sums for x, part in sums[i].tensors().items()}
        kept.write(_SUMS, {"done": torch.tensor(number), **state})
    return {
        layer: [ordered_planes(operators, shifts) for operators in sums[layer].solve()]
        for layer in layers
    }


def _add_moved(
    model: LensModel,
    text: Int[Tensor, " pos"],
    shifts: Sequence[int],
    table: Float[Tensor, "pos d_model"],
    layers: Sequence[int],
    sums: dict[int, TransportSums],
    bar: Any,
) -> None:
    """One text in place, and moved by every shift."""
    here: dict[int, Tensor] = {}

    def keep(layer: int, q: Tensor, k: Tensor) -> None:
        here[layer] = torch.cat([q, k]).double().cpu()
        if layer not in sums:
            sums[layer] = TransportSums(q.shape[1], q.shape[2], len(shifts))
        sums[layer].add(here[layer])

    capture_moved(model, text, keep, layers=layers)
    bar.update(1)
    for i, shift in enumerate(shifts):

        def keep_moved(layer: int, q: Tensor, k: Tensor, i: int = i) -> None:
            sums[layer].add_moved(i, here[layer], torch.cat([q, k]))

        at = table[shift : shift + len(text)]
        capture_moved(model, text, keep_moved, layers=layers, at=at)
        bar.update(1)


def _sums_so_far(kept: Checkpoint) -> tuple[int, dict[int, TransportSums]]:
    """How many texts are done, and each layer's sums over them."""
    found = kept.read(_SUMS) or {}
    done = int(found.pop("done", 0))
    parts: dict[int, dict[str, Tensor]] = {}
    for key, value in found.items():
        layer, _, name = key.partition(".")
        parts.setdefault(int(layer), {})[name] = value
    return done, {layer: TransportSums.of(tensors) for layer, tensors in parts.items()}

"""Checks of documents, layers and vectors, done before anything expensive begins."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.lengths import context_length
from tl_posheads.hooks.model import LensModel, model_name
from tl_posheads.hooks.tokenizer import begin, token_ids, tokenizer_of


def token_run(attention_mask: Int[Tensor, " pos"], document: int) -> slice:
    """The part of a padded row that holds the text.

    Raises:
        PosheadsError: the mask is not one run of ones.
    """
    on = torch.nonzero(attention_mask).flatten()
    if len(on) == 0 or int(on[-1] - on[0]) + 1 != len(on):
        raise PosheadsError(
            f"the attention mask of document {document} is not one run of ones; pad texts on the "
            "left or on the right, and put each in a row of its own"
        )
    return slice(int(on[0]), int(on[-1]) + 1)


def require_unpadded(model: LensModel, tokens: Int[Tensor, "doc pos"]) -> None:
    """Refuse a batch whose rows look padded, because no mask says where their texts are.

    A pad token at either end of a row counts as padding. If the tokenizer also begins or ends texts
    with that token (GPT-2, Pythia), a single one at the same end of all rows counts as text; two of
    them, or one in only some rows, count as padding.

    Raises:
        PosheadsError: a row looks padded.
    """
    tokenizer = getattr(model, "tokenizer", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return
    special = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    allowed = int(pad in special)
    is_pad = (tokens == pad).long()
    for end, row in (("begins", is_pad), ("ends", is_pad.flip(1))):
        lengths = row.cumprod(1).sum(1)
        if int(lengths.max()) > allowed or int(lengths.max()) > int(lengths.min()):
            first = int(lengths.argmax())
            raise PosheadsError(
                f"row {first} of the tokens {end} with {int(lengths[first])} of the pad token "
                f"{pad}, and nothing says where its text is; give attention_mask= if the function "
                "takes it, or a list of the texts without padding: [row[on.bool()] for row, "
                "on in zip(tokens, mask)] (list(tokens) if the pad token is text)"
            )


def documents_of(
    model: LensModel, tokens: Any, attention_mask: Tensor | None, skip_first: int
) -> list[Int[Tensor, " pos"]]:
    """Checked texts without their padding.

    Args:
        tokens: ``[doc, pos]``, ``[pos]``, or a list of ``[pos]`` without padding; numpy arrays;
            or texts, which the model's tokenizer tokenises after its BOS.
        attention_mask: 1 for tokens, 0 for padding; without it, a tensor must not be padded.

    Raises:
        PosheadsError: invalid input, before anything is run.
    """
    tokens = torch.as_tensor(tokens) if isinstance(tokens, np.ndarray) else tokens
    rows = _rows(model, tokens, attention_mask)
    if not rows or any(row.ndim != 1 or row.is_floating_point() for row in rows):
        shape: object = (
            tuple(tokens.shape) if isinstance(tokens, Tensor) else [tuple(r.shape) for r in rows]
        )
        if rows and all(row.ndim == 0 for row in rows):
            shape = f"({len(rows)},), in a list,"
        raise PosheadsError(
            f"tokens of shape {shape} were given; expected whole numbers of shape [doc, pos]"
        )
    if attention_mask is None and isinstance(tokens, Tensor):
        require_unpadded(model, tokens[None] if tokens.ndim == 1 else tokens)
    if attention_mask is not None:
        if attention_mask.shape != (len(rows), len(rows[0])):
            raise PosheadsError(
                f"an attention mask of shape {tuple(attention_mask.shape)} was given for tokens of "
                f"shape {(len(rows), len(rows[0]))}; expected the same"
            )
        rows = [
            row[token_run(mask.cpu(), i)]
            for i, (row, mask) in enumerate(zip(rows, attention_mask, strict=True))
        ]
    if isinstance(skip_first, bool) or not isinstance(skip_first, int) or skip_first < 0:
        raise PosheadsError(f"skip_first={skip_first!r} was given; expected a whole number from 0")
    shortest = min(len(row) for row in rows)
    if shortest - skip_first < 2:
        raise PosheadsError(
            f"a document of {shortest} tokens was given with skip_first={skip_first}; a pair of "
            "tokens needs at least 2 positions after those skipped"
        )
    low, high = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
    n_vocab = int(model.cfg.d_vocab)
    if low < 0 or high >= n_vocab:
        raise PosheadsError(
            f"token id {low if low < 0 else high} was given, but {model_name(model)} has ids 0 to "
            f"{n_vocab - 1}; were the tokens made by another model's tokenizer?"
        )
    longest, n_ctx = max(len(row) for row in rows), context_length(model)
    if n_ctx and longest > n_ctx:
        raise PosheadsError(
            f"a document of {longest} tokens was given, but {model_name(model)} is set up for at "
            f"most {n_ctx}; give shorter documents, or call it inside a method of "
            "tl_posheads.extrapolation (`with Unchanged()(model):` lifts the context-length check)"
        )
    return [row.long().cpu() for row in rows]


def _rows(model: LensModel, tokens: Any, attention_mask: Tensor | None) -> list[Tensor]:
    """The given tokens or texts as a list with one tensor per text."""
    tokens = [tokens] if isinstance(tokens, str) else tokens
    if isinstance(tokens, list | tuple):
        if attention_mask is not None:
            raise PosheadsError(
                "an attention_mask was given with a list of texts; a list needs no mask: give the "
                "texts without padding"
            )
        return [
            _read(model, row) if isinstance(row, str) else torch.as_tensor(row) for row in tokens
        ]
    if isinstance(tokens, Tensor):
        return list(tokens[None] if tokens.ndim == 1 else tokens)
    raise PosheadsError(
        f"tokens of type {type(tokens).__name__} were given; expected a tensor [doc, pos] of "
        "token ids, a list of them, or texts"
    )


def _read(model: LensModel, text: str) -> Int[Tensor, " pos"]:
    tokenizer = tokenizer_of(model)
    return torch.tensor(begin(tokenizer) + token_ids(text, tokenizer), dtype=torch.long)


def layers_of(model: LensModel, layers: Sequence[int] | int | None) -> list[int]:
    """Layers in ascending order, by default all; refuses layers that the model doesn't have."""
    n_layers = int(model.cfg.n_layers)
    layers = [layers] if isinstance(layers, int) else layers
    if isinstance(layers, str):
        raise PosheadsError(f"layers={layers!r} was given; expected numbers, like 3 or [0, 3]")
    wanted = sorted({int(layer) for layer in (range(n_layers) if layers is None else layers)})
    wrong = [layer for layer in wanted if not 0 <= layer < n_layers]
    if wrong or not wanted:
        raise PosheadsError(
            f"layers={list(layers or [])} was given, but {model_name(model)} has layers 0 to "
            f"{n_layers - 1}; choose among those"
        )
    return wanted


def by_content(documents: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """Documents sorted by the hash of their tokens, so that batch order doesn't matter.

    Raises:
        PosheadsError: the same text twice; documents are replicates, and a copy isn't one.
    """
    found: dict[str, int] = {}
    for number, document in enumerate(documents):
        digest = hashlib.sha256(document.numpy().tobytes()).hexdigest()[:24]
        if digest in found:
            raise PosheadsError(
                f"documents {found[digest]} and {number} are the same text; give every text once: "
                "confidence intervals and p-values assume independent documents"
            )
        found[digest] = number
    return sorted(((digest, documents[i]) for digest, i in found.items()), key=lambda pair: pair[0])


def digest_of(by_key: Sequence[tuple[str, Tensor]]) -> str:
    """SHA-256 of the result of :func:`by_content`."""
    return hashlib.sha256("".join(unit for unit, _ in by_key).encode()).hexdigest()


def require_finite(layer: int, rot_q: Tensor, rot_k: Tensor, kv_head: Sequence[int]) -> None:
    """Refuse NaN and infinity in ``[pos, head, d_head]`` tensors, by layer and head."""
    for kind, x in (("queries", rot_q), ("keys", rot_k)):
        if bool(x.sum(dtype=torch.float32).isfinite()):  # one cheap pass in the usual case
            continue
        bad = ~torch.isfinite(x).all(-1).all(0)
        if bool(bad.any()):
            at = int(torch.nonzero(bad)[0])
            head = at if kind == "queries" else list(kv_head).index(at)
            raise PosheadsError(
                f"the {kind} of layer {layer} head {head} hold NaN or infinity; load the model "
                "with dtype float32 or bfloat16, or leave the layer out"
            )

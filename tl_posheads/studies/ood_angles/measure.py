"""Reads texts longer than those of training, with and without clamps, and sums up D and loss."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import require_longer
from tl_posheads.extrapolation.methods.unchanged import Unchanged
from tl_posheads.extrapolation.observing import scored_positions
from tl_posheads.hooks.capture import rotary_consumer, rotary_hook_points
from tl_posheads.hooks.changes import any_length, length_matters, require_bare, trained_of
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.heads import Head, Heads, by_layer, heads_of
from tl_posheads.hooks.inputs import by_content, digest_of, documents_of, require_finite
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.hooks.model import LensModel, model_name, require_clean, require_rotary
from tl_posheads.hooks.provenance import model_facts, versions
from tl_posheads.hooks.rescoring import remapped
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.rotary.contributions import Scale, check_scale, evenly, farthest
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.scoring.score import Units, inputs_of
from tl_posheads.studies.ood_angles.clamped_model import clamped, hiding, require_room
from tl_posheads.studies.ood_angles.clamping import (
    JOINT,
    DistanceBins,
    bare_by_bin,
    clamp_by_bin,
    ood_pairs,
)
from tl_posheads.studies.ood_angles.results import OODAngles

Live = Literal["pairs", "joint", "none"]
# Of one text under one condition: loss and position of the scored tokens, and by layer, as NAME.3,
# the sums of ClampSums in the unmodified model, and of D (live) with all out-of-distribution pairs
# clamped.
Pass = dict[str, Tensor]

_SUMS = "bare", "paired", "joint", "single"
_NEAREST = -3  # octave, from the training length, that has all nearer positions' losses


def ood_angles(
    model: LensModel,
    tokens: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]],
    *,
    trained: int | None = None,
    heads: Heads | None = None,
    factor: float = 4,
    n_queries: int = 256,
    n_scored: int = 4096,
    per_octave: int = 4,
    scale: Scale = "none",
    live: Live = "pairs",
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> OODAngles:
    """How much of the change beyond the training length comes from angles never seen in training.

    A rotary pair whose wavelength is longer than the training length has seen angles up to
    ``theta * (trained - 1)`` and no others: an out-of-distribution pair. Beyond, its relative angle
    is held there, ``theta * min(d, trained - 1)``, and the dominant dimension D (Hong et al. 2024,
    arXiv 2410.08703) is measured again: pair by pair, all out-of-distribution pairs together, and,
    as a control, all others together, whose angles are not new. The change in D is a pair's part.

    Two levels. *Direct*: the unmodified model's rotated queries and keys, with the pair's angle in
    the score clamped; earlier layers stay as they are. *Through the model*: the clamp is in force
    in all chosen heads as the texts are read (:func:`clamp_rotary`), so that later layers change
    too; this gives the loss, and D once more.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE.
        tokens: texts longer than the training length. ``load_corpus`` makes them inside
            ``with Unchanged()(model):``.
        trained: training length in tokens; the checkpoint's own by default.
        heads: ``(layer, head)`` pairs; by default all that see further than the training length.
        factor: distances up to this many times the training length; texts are cut there.
        n_queries: queries per text at which D is measured, evenly spaced.
        n_scored: tokens per text whose loss is measured, evenly spaced.
        per_octave: bins in a doubling of the distance; one begins at the training length.
        scale: of the contributions behind D, as in ``score_heads``.
        live: what is clamped through the model: all out-of-distribution pairs, all others and all
            pairs (``"joint"``), each out-of-distribution pair by itself too (``"pairs"``), or
            nothing (``"none"``). In addition, a pass in which the heads can't attend to keys that
            far away at all.
        seed: of the bootstrap in the result's tables; nothing else is drawn.
        checkpoint: folder that keeps every finished pass over a text; the same call goes on from
            there.
        progress: show a bar.
        provenance: more facts to keep with the result, for example the corpus' name.

    Returns:
        :class:`OODAngles`.

    Memory: one text and layer at a time, ``12 * pair * head * pos`` doubles and chunks of 100 MB,
    beside what a forward pass needs: fused attention where the model allows it, else the lens's
    eager ``[head, pos, pos]``. Linear in the text's length where fused.

    Raises:
        PosheadsError: no RoPE; texts no longer than the training length; heads that don't exist or
            see no further; another method or edit in force; frequencies that depend on the text's
            length; with ``live``, GPT-J and DeepSeek, whose scores can't be computed again; a
            checkpoint of another run.

    Example:
        >>> found = ood_angles(model, tokens, trained=256)           # doctest: +SKIP
        >>> found.summary(); found.by_pair(); found.losses(); found.plot()  # doctest: +SKIP
    """
    require_rotary(model)
    check_scale(scale)
    require_clean(model)
    require_bare(model)
    known = trained_of(model, trained)
    _check(model, factor, live, n_queries=n_queries, n_scored=n_scored, per_octave=per_octave)
    asked = None if heads is None else heads_of(model, heads)
    last = math.floor(factor * known)
    with any_length(model):
        documents = [text[:last] for text in documents_of(model, tokens, None, 0)]
    require_longer(documents, known)
    units = by_content(documents)
    longest = max(len(document) for document in documents)
    options = {
        "trained": known,
        "factor": factor,
        "n_queries": n_queries,
        "n_scored": n_scored,
        "per_octave": per_octave,
        "scale": scale,
        "live": live,
    }
    with Unchanged()(model, trained=known), rotary_hook_points(model):
        geometry = RotaryGeometry.from_model(model)
        chosen = _heads(model, geometry, asked, known, longest)
        inv_freq = _inv_freq(geometry, chosen)
        bins = DistanceBins.up_to(longest - 1, known, per_octave)
        reader = _Reader(model, geometry, by_layer(chosen), bins, n_queries, n_scored, scale)
        plan = {
            **inputs_of(model, units),
            **options,
            "heads": chosen,
            "inv_freq": inv_freq.tolist(),
        }
        kept = Checkpoint(checkpoint, plan)
        passes = list(_passes(reader, units, live, kept, progress))
    losses = [row for text, name, found in passes for row in _by_octave(found, name, text, known)]
    return OODAngles(
        heads=list(chosen),
        trained=known,
        bin_start=bins.start,
        bin_end=bins.end,
        bin_octave=bins.octave,
        inv_freq=inv_freq,
        **_sums(passes, chosen),
        loss=pd.DataFrame(losses),
        seed=seed,
        provenance={
            **model_facts(model),
            **options,
            "seed": seed,
            "tokens_sha256": digest_of(units),
            "n_documents": len(units),
            "longest": longest,
            "versions": versions(),
            **(provenance or {}),
            "inside": ["Unchanged()"],
        },
    )


def _passes(
    reader: _Reader, units: Units, live: Live, kept: Checkpoint, progress: bool
) -> Iterator[tuple[int, str, Pass]]:
    """Number of the text, condition, and what the pass showed; read where the checkpoint has it."""
    conditions = reader.conditions(live)
    bar = tqdm(
        total=len(units) * len(conditions),
        desc="out-of-distribution angles",
        unit="pass",
        disable=not progress,
        dynamic_ncols=True,
    )
    with bar:
        for text, (unit, document) in enumerate(units):
            for name, pairs in conditions.items():
                place = f"{unit}.{name.replace(' ', '-')}"
                found = kept.read(place)
                if found is None:
                    found = reader.read(document, name, pairs)
                    kept.write(place, found)
                yield text, name, found
                bar.update(1)


def _sums(passes: Sequence[tuple[int, str, Pass]], heads: Sequence[Head]) -> dict[str, Any]:
    """Sums of D by text, head and bin, of the unmodified model and under the clamp."""
    bare = [found for _, name, found in passes if name == "bare"]
    through = [_by_layer(found, "live") for _, name, found in passes if name == "ood"]
    counts = [torch.stack([found[f"n_qk_pairs.{layer}"] for layer, _ in heads]) for found in bare]
    return {
        "n_qk_pairs": torch.stack(counts),
        **{name: _stacked([_by_layer(found, name) for found in bare], heads) for name in _SUMS},
        "live": _stacked(through, heads) if through else None,
    }


def _check(model: LensModel, factor: Any, live: Any, **whole: Any) -> None:
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 < factor < math.inf:
        raise PosheadsError(f"factor={factor!r} was given; expected a number above 1")
    for name, value in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PosheadsError(f"{name}={value!r} was given; expected a whole number from 1")
    if live not in ("pairs", "joint", "none"):
        raise PosheadsError(f"live={live!r} was given; expected 'pairs', 'joint' or 'none'")
    if live != "none":
        try:
            require_room(model)
        except PosheadsError as problem:
            raise PosheadsError(f"{problem}; or give live='none'") from None
    elif length_matters(model):
        raise PosheadsError(
            f"{model_name(model)} was given, whose frequencies depend on the text's length, so "
            "that its training angles are unknown; give another model"
        )


def _heads(
    model: LensModel,
    geometry: RotaryGeometry,
    asked: Sequence[Head] | None,
    trained: int,
    longest: int,
) -> list[Head]:
    """Heads that see further than the training length, or all that were asked for."""

    def sees(layer: int) -> bool:
        here = geometry[layer]
        return here.n_pairs > 0 and farthest(longest, here.window) >= trained

    far = [layer for layer in range(geometry.n_layers) if sees(layer)]
    if asked is None:
        asked = [(layer, head) for layer in far for head in range(geometry[layer].n_heads)]
    short = [head for head in asked if head[0] not in far]
    if short or not asked:
        what = f"layer {short[0][0]} head {short[0][1]}" if short else "no head"
        raise PosheadsError(
            f"{what} of {model_name(model)} sees {'no' if short else 'any'} distance of {trained} "
            "tokens by RoPE (it has none, or a sliding window); choose other heads or trained="
        )
    return list(asked)


class _Reader:
    """Reads texts under clamps of chosen heads."""

    def __init__(
        self,
        model: LensModel,
        geometry: RotaryGeometry,
        members: dict[int, list[int]],
        bins: DistanceBins,
        n_queries: int,
        n_scored: int,
        scale: Scale,
    ) -> None:
        self.model, self.geometry, self.members, self.bins = model, geometry, members, bins
        self.n_queries, self.n_scored, self.scale = n_queries, n_scored, scale
        self.ood = {
            layer: torch.nonzero(ood_pairs(geometry[layer].inv_freq, bins.trained))
            .flatten()
            .tolist()
            for layer in members
        }

    def conditions(self, live: Live) -> dict[str, dict[int, list[int]]]:
        """Pairs clamped in every layer, by the condition's name; the unmodified model first."""
        out: dict[str, dict[int, list[int]]] = {"bare": {}}
        if live == "none":
            return out
        every = {layer: list(range(self.geometry[layer].n_pairs)) for layer in self.members}
        other = {i: [m for m in pairs if m not in self.ood[i]] for i, pairs in every.items()}
        out |= dict(zip(JOINT, (self.ood, other, every), strict=True))
        out["hidden"] = every
        if live == "pairs":
            for pair in sorted({m for pairs in self.ood.values() for m in pairs}):
                mine = {i: [pair] for i, pairs in self.ood.items() if pair in pairs}
                out[f"pair {pair}"] = mine
        return out

    def read(
        self, document: Int[Tensor, " pos"], name: str, pairs: Mapping[int, list[int]]
    ) -> Pass:
        """One pass over one text."""
        layers: dict[int, LayerGeometry] = {
            layer: clamped(self.geometry[layer], self.members[layer], held, self.bins.trained)
            for layer, held in pairs.items()
            if held
        }
        sums_of: Pass = {}

        def consumer(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
            here = layers.get(layer, self.geometry[layer])
            q, k = rot_q[0], rot_k[0]
            require_finite(layer, q, k, here.kv_head)
            rows = evenly(len(q), self.n_queries, q.device)
            given = (q, k, here, self.members[layer], self.bins, rows, self.scale)
            if name == "bare":
                sums = vars(clamp_by_bin(*given))
            else:
                sums = {"live": bare_by_bin(*given)[0]}
            sums_of.update({f"{what}.{layer}": value for what, value in sums.items()})

        targets = scored_positions(len(document), self.n_scored)
        with ExitStack() as stack:
            if name == "hidden":
                stack.enter_context(hiding(self.model, layers, self.bins.trained))
            elif layers:
                stack.enter_context(remapped(self.model, layers, name=f"clamp of {name}"))
            watched = name in ("bare", "ood")
            watch = rotary_consumer(self.model, consumer, list(self.members))
            stack.enter_context(watch if watched else nullcontext())
            stack.enter_context(fused_attention(self.model))
            logprob, _ = target_logprobs(self.model, document, targets)
        return {**sums_of, "loss": -logprob.double().cpu(), "position": targets.cpu()}


def _by_layer(found: Pass, name: str) -> dict[int, Tensor]:
    """One kind of a pass' sums."""
    parts = ((*key.partition("."), value) for key, value in found.items())
    return {int(layer): value for what, _, layer, value in parts if what == name}


def _by_octave(found: Pass, condition: str, text: int, trained: int) -> list[dict[str, Any]]:
    """Mean loss by octave of the position, counted from the training length; near ones are one."""
    values, position = found["loss"], found["position"]
    octave = torch.floor(torch.log2(position.double() / trained)).long().clamp(min=_NEAREST)
    rows = []
    for number in octave.unique().tolist():
        mine = values[octave == number]
        rows.append(
            {
                "condition": condition,
                "text": text,
                "octave": number,
                "n": len(mine),
                "loss": float(mine.mean()),
            }
        )
    return rows


def _stacked(
    texts: Sequence[Mapping[int, Float[Tensor, " head *rest"]]], heads: Sequence[Head]
) -> Float[Tensor, "doc head *rest"]:
    """By text and head; layers with fewer rotary pairs are filled up with NaN."""
    members = by_layer(heads)
    rows = [[text[layer][members[layer].index(head)] for layer, head in heads] for text in texts]
    widest = max(row.shape[0] for row in rows[0])
    return torch.stack([torch.stack([_filled(row, widest) for row in text]) for text in rows])


def _inv_freq(geometry: RotaryGeometry, heads: Sequence[Head]) -> Float[Tensor, "head pair"]:
    widest = max(geometry[layer].n_pairs for layer, _ in heads)
    return torch.stack([_filled(geometry[layer].inv_freq.cpu(), widest) for layer, _ in heads])


def _filled(row: Tensor, size: int) -> Tensor:
    more = row.new_full((size - row.shape[0], *row.shape[1:]), math.nan)
    return torch.cat([row, more])

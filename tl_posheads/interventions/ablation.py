"""Head ablation: a head's output is replaced in every forward pass inside a ``with`` block.

A head's output is ``hook_z``, ``[batch, pos, head, d_head]``, before the output projection. It is
replaced by zero, by its mean over a reference corpus, or by the head's output on another text.
The paper masks heads in the attention pattern (Hong et al. 2024, arXiv 2410.08703), which
``on="pattern"`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.heads import Heads, by_layer, heads_of
from tl_posheads.hooks.inputs import documents_of
from tl_posheads.hooks.model import (
    LensModel,
    attention_of,
    is_native,
    model_name,
    own_hooks,
    read_pass,
    require_own_biases,
)
from tl_posheads.hooks.positions import TextPositions

Mode = Literal["zero", "mean", "resample"]
ChosenPositions = slice | Sequence[int] | Int[Tensor, " n"] | None
MODES = ("zero", "mean", "resample")


def ablation_hooks(
    model: LensModel,
    heads: Heads,
    mode: Mode = "zero",
    *,
    reference: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]] | None = None,
    per_position: bool = False,
    positions: ChosenPositions = None,
    on: Literal["z", "pattern"] = "z",
    seed: int = 0,
) -> list[tuple[str, Callable[..., Tensor | None]]]:
    """Hooks that ablate ``heads``, for ``model.run_with_hooks(tokens, fwd_hooks=...)``.

    Args:
        model: HookedTransformer or TransformerBridge.
        heads: pairs ``(layer, head)`` as ``scores.top`` gives, names like ``"L6H6"``, one of
            either, or scores, whose top 5 % are taken; none gives no hooks.
        mode: ``"zero"``; ``"mean"``, the head's mean over ``reference``; ``"resample"``, the
            head's output at the same position of a text in ``reference``, drawn with the seed for
            every row of the batch.
        reference: texts, run when this is called: later hooks don't change their mean. No padding:
            give texts of unequal length as a list.
        per_position: the mean over texts at each position, not one mean over all positions.
        positions: positions to ablate, a slice or a list; None ablates all. Here, and in
            ``per_position`` and ``"resample"``, 0 is the text's first token, even after padding
            and when a KV cache holds part of the text.
        on: ``"z"``, or ``"pattern"``, which sets the head's attention weights to zero (with mode
            ``"zero"`` alone; z is then zero too).
        seed: of the choice of texts in ``"resample"``.

    Returns:
        Pairs of a hook point's name and a hook. They depend on each other; use all or none. If
        several hooks share a hook point, the last one wins (see :func:`ablate`).

    Memory: ``head * d_head`` numbers, times the reference's positions with ``per_position`` and
    once more times its texts with ``"resample"``.

    Raises:
        PosheadsError: heads that don't exist or come twice; a mode, positions or reference that
            don't fit; a padded reference; mode ``"zero"`` where value biases are folded. From the
            hooks, in the first layer: a text too long for a reference used position by position.

    Example:
        >>> hooks = ablation_hooks(model, [(7, 8)])             # doctest: +SKIP
        >>> logits = model.run_with_hooks(tokens, fwd_hooks=hooks)  # doctest: +SKIP
    """
    pairs = heads_of(model, heads)
    keep = _positions(positions)
    check_mode(mode, reference, per_position)
    check_on(on, mode)
    if not pairs:
        return []
    layers = by_layer(pairs)
    if mode == "zero":
        require_own_biases(model, layers, "zero-ablation")
    placed = keep is not None or per_position or mode == "resample"
    check_native(model, layers, on, placed)
    windowed = _windowed(model)
    hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
    if on == "pattern":
        for layer, members in layers.items():
            at = None if keep is None else TextPositions(windowed)
            if at is not None:
                hooks.append((f"blocks.{layer}.attn.hook_attn_scores", at.read))
            hooks.append((f"blocks.{layer}.attn.hook_pattern", _zero_pattern(members, keep, at)))
        return hooks
    values: dict[int, Tensor | None] = dict.fromkeys(layers)
    if mode != "zero":
        documents = documents_of(model, reference, None, 0)
        shortest = min(len(document) for document in documents)
        values |= reference_z(model, layers, documents, mode, per_position)
        if per_position or mode == "resample":
            names = (f"blocks.{i}.attn.hook_attn_scores" for i in range(model.cfg.n_layers))
            first = next(name for name in names if name in model.hook_dict)
            hooks.append((first, _refuse_longer_than(shortest, TextPositions(windowed))))
    for layer, members in layers.items():
        at = TextPositions(windowed) if placed else None
        if at is not None:
            hooks.append((f"blocks.{layer}.attn.hook_attn_scores", at.read))
        hook = replacing(members, values[layer], keep=keep, at=at, seed=seed)
        hooks.append((f"blocks.{layer}.attn.hook_z", hook))
    return hooks


@contextmanager
def ablate(
    model: LensModel,
    heads: Heads,
    mode: Mode = "zero",
    *,
    reference: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]] | None = None,
    per_position: bool = False,
    positions: ChosenPositions = None,
    on: Literal["z", "pattern"] = "z",
    seed: int = 0,
) -> Iterator[Any]:
    """Ablate ``heads`` in everything that the model does inside the ``with`` block.

    Forward passes, ``generate`` with a KV cache, ``run_with_cache``, ``transformer_lens.patching``,
    ``head_detector`` and your own hooks all see the ablated model. When the block ends, even by an
    exception, all hooks are removed; the weights are never touched.

    Hooks at one hook point run in the order in which they were added, and the last value wins. So
    an activation patched into ``hook_z`` inside restores an ablated head, a cache holds the
    replaced values, and of two ablations of one head the inner one wins (its reference is run
    under the outer one). Entered inside ``model.hooks(...)``, the ablation replaces what those
    hooks patched. Changes to an ablated head's queries or pattern have no effect: ``hook_z`` comes
    after them.

    Arguments, memory and errors are those of :func:`ablation_hooks`.

    Yields:
        The model.

    Example:
        >>> with ablate(model, scores.top(0.05), "mean", reference=tokens):   # doctest: +SKIP
        ...     logits, cache = model.run_with_cache(prompt)
    """
    hooks = ablation_hooks(
        model,
        heads,
        mode,
        reference=reference,
        per_position=per_position,
        positions=positions,
        on=on,
        seed=seed,
    )
    points = model.hook_dict
    with own_hooks([(points[name], hook) for name, hook in hooks]):
        yield model


def reference_z(
    model: LensModel,
    layers: dict[int, list[int]],
    documents: Sequence[Int[Tensor, " pos"]],
    mode: Mode,
    per_position: bool = False,
) -> dict[int, Tensor | None]:
    """Outputs of the heads of ``layers`` on the documents, in the form that ``mode`` needs.

    Returns:
        For each layer ``[head, d_head]``; ``[pos, head, d_head]`` with ``per_position``, up to the
        shortest document; ``[doc, pos, head, d_head]`` with mode ``"resample"``; None for
        ``"zero"``, where nothing is run.
    """
    if mode == "zero":
        return dict.fromkeys(layers)
    shortest = min(len(document) for document in documents)
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    n_positions = 0

    def take(layer: int, z: Float[Tensor, "1 pos head d_head"]) -> None:
        mine = z[0][:, layers[layer]]
        if mode == "resample":
            kept[layer].append(mine[:shortest].clone())
        elif not kept[layer]:
            kept[layer].append(_summed(mine, per_position, shortest))
        else:
            kept[layer][0] += _summed(mine, per_position, shortest)

    points = model.hook_dict
    readers = [(points[f"blocks.{i}.attn.hook_z"], partial(take, i)) for i in layers]
    for document in documents:
        n_positions += len(document)
        read_pass(model, document[None], readers)
    if mode == "resample":
        return {layer: torch.stack(texts) for layer, texts in kept.items()}
    count = len(documents) if per_position else n_positions
    dtype = next(model.parameters()).dtype
    return {layer: (sums[0] / count).to(dtype) for layer, sums in kept.items()}


def _summed(z: Float[Tensor, "pos head d_head"], per_position: bool, shortest: int) -> Tensor:
    # MPS has no float64.
    wide = z.float() if z.device.type == "mps" else z.double()
    return wide[:shortest] if per_position else wide.sum(0)


def _windowed(model: LensModel) -> bool:
    config = getattr(getattr(model, "original_model", None), "config", None)
    return bool(getattr(config, "sliding_window", None) or getattr(model.cfg, "window_size", None))


def replacing(
    heads: Sequence[int],
    values: Tensor | None,
    *,
    keep: Callable[[Tensor], Tensor] | None = None,
    at: TextPositions | None = None,
    seed: int = 0,
) -> Callable[..., Tensor]:
    """A hook that sets ``hook_z`` to ``values``, as :func:`reference_z` gives them, or to zero.

    Without ``at``, every row of every pass begins a text.
    """
    members = list(heads)

    def hook(z: Float[Tensor, "batch pos head d_head"], hook: Any) -> Tensor:
        where = torch.arange(z.shape[1]).expand(z.shape[:2]) if at is None else at.q
        where = where.to(z.device)  # [batch, pos], negative in padding
        new = torch.zeros((), dtype=z.dtype, device=z.device)
        if values is not None:
            new = values.to(z)
            if values.ndim > 2:
                if int(where.max()) >= values.shape[-3]:
                    raise reference_too_short(int(where.max()) + 1, values.shape[-3])
                # Padding gets the value of position 0; nothing reads it.
                row = where.clamp_min(0)
                if values.ndim == 4:
                    text = chosen_text(len(new), z.shape[0], seed).to(z.device)
                    new = new[text[:, None], row]
                else:
                    new = new[row]
        index = torch.tensor(members, device=z.device)
        mine = z[:, :, index]
        new = new.expand_as(mine)
        if keep is not None:
            new = torch.where(rearrange(keep(where), "batch pos -> batch pos 1 1"), new, mine)
        # Not in place: others may hold the tensor, and autograd may need it.
        return z.index_copy(2, index, new)

    return hook


def chosen_text(n_docs: int, n_rows: int, seed: int) -> Int[Tensor, " row"]:
    order = torch.randperm(n_docs, generator=torch.Generator().manual_seed(seed))
    return order[torch.arange(n_rows) % n_docs]


def _zero_pattern(
    heads: Sequence[int], keep: Callable[[Tensor], Tensor] | None, at: TextPositions | None
) -> Callable[..., Tensor]:
    members = list(heads)

    def hook(pattern: Float[Tensor, "batch head q_pos k_pos"], hook: Any) -> Tensor:
        out = pattern.clone()
        if keep is None or at is None:
            out[:, members] = 0
        else:
            here = rearrange(keep(at.q), "batch pos -> batch 1 pos 1")
            out[:, members] = out[:, members].masked_fill(here, 0)
        return out

    return hook


def _refuse_longer_than(length: int, at: TextPositions) -> Callable[..., None]:
    def hook(scores: Float[Tensor, "batch head q_pos k_pos"], hook: Any) -> None:
        at.read(scores, hook)
        if int(at.q.max()) >= length:
            raise reference_too_short(int(at.q.max()) + 1, length)

    return hook


def reference_too_short(needed: int, length: int) -> PosheadsError:
    return PosheadsError(
        f"a text of {needed} tokens was given, but the reference has {length} positions; give "
        "longer reference texts, or mode 'mean' without per_position"
    )


def _positions(positions: ChosenPositions) -> Callable[[Tensor], Tensor] | None:
    """A predicate on absolute positions; None accepts all."""
    if positions is None:
        return None
    if isinstance(positions, slice):
        first, last, step = positions.start or 0, positions.stop, positions.step or 1
        if first < 0 or step < 1 or (last is not None and last <= first):
            raise PosheadsError(
                f"positions={positions} was given; expected a slice that goes up from 0 or later "
                "and isn't empty"
            )

        def in_slice(at: Tensor) -> Tensor:
            inside = (at >= first) & ((at - first) % step == 0)
            return inside if last is None else inside & (at < last)

        return in_slice
    try:
        wanted = torch.as_tensor(list(positions), dtype=torch.long)
    except (TypeError, ValueError, RuntimeError):
        wanted = torch.tensor([], dtype=torch.long)
    if wanted.ndim != 1 or not len(wanted) or int(wanted.min()) < 0:
        raise PosheadsError(
            f"positions={positions!r} was given; expected a slice or whole numbers from 0"
        )
    return lambda at: torch.isin(at, wanted.to(at.device))


def check_native(model: LensModel, layers: Iterable[int], on: str, placed: bool) -> None:
    """Refuse what can't be done where transformers computes attention and the lens only observes.

    Raises:
        PosheadsError: an ablation of the pattern, or of some positions only, in such a layer.
    """
    asked = on == "pattern" or placed
    if asked and any(is_native(attention_of(model, layer)) for layer in layers):
        what = "on='pattern'" if on == "pattern" else "an ablation by position"
        raise PosheadsError(
            f"{what} was asked of {model_name(model)}, whose attention in TransformerLens exposes "
            "its pattern only after use; use on='z' without positions, mode 'zero' or 'mean'"
        )


def check_on(on: str, mode: str) -> None:
    """Refuse ``on`` other than z or pattern, and pattern ablation in another mode than zero.

    Raises:
        PosheadsError: either of these.
    """
    if on not in ("z", "pattern"):
        raise PosheadsError(f"on={on!r} was given; expected 'z' or 'pattern'")
    if on == "pattern" and mode != "zero":
        raise PosheadsError(
            f"mode={mode!r} was given with on='pattern'; a pattern can only be set to zero, use "
            "on='z'"
        )


def check_mode(mode: str, reference: Any, per_position: bool) -> None:
    """Refuse a mode and a reference that don't fit together.

    Raises:
        PosheadsError: an unknown mode, or a reference that is missing or not used by the mode.
    """
    if mode not in MODES:
        raise PosheadsError(f"mode={mode!r} was given; expected one of {', '.join(MODES)}")
    if mode == "zero" and reference is not None:
        raise PosheadsError(
            "a reference was given with mode 'zero'; leave it out, or choose 'mean'"
        )
    if mode != "zero" and reference is None:
        raise PosheadsError(
            f"mode={mode!r} was given without a reference; give reference=tokens [doc, pos], as "
            "load_corpus returns"
        )
    if per_position and mode != "mean":
        raise PosheadsError(f"per_position was given with mode {mode!r}; it belongs to 'mean'")

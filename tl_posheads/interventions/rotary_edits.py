"""Causal edits of rotary pairs in chosen heads: what happens to attention if a pair carries less
information about token distance, or other information.

A pair's contribution is ``q_m(i) . k_m(j)`` after rotation (design: ``c_m(i, j)``). Edits that
need only the query change the query. Grouped-query attention shares keys between heads, so edits
that would change keys recompute the scores of the chosen heads instead; other heads are unaffected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import rotary_hook_points
from tl_posheads.hooks.changes import changes_of, require_fixed_frequencies
from tl_posheads.hooks.heads import Heads, by_layer, heads_of
from tl_posheads.hooks.model import LensModel, model_name, own_hooks, require_rotary
from tl_posheads.hooks.rescoring import remapped, require_scores
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.rotary.contributions import turn
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.rotary.remapping import Region, Remapping, every_pair

PairNumbers = int | range | Sequence[int]
"""Rotary pairs, 0 being the fastest: one, a range, or a tuple of them."""


@dataclass(frozen=True)
class Edit:
    """The edit of each edited pair, by pair number.

    Attributes:
        scale: factor on the contribution.
        shift: tokens by which the query is moved forward.
        freeze: the distance, in tokens, that the pair sees whatever the real one is.
        source: the pair whose frequency it takes.
    """

    scale: dict[int, float] = field(default_factory=dict)
    shift: dict[int, float] = field(default_factory=dict)
    freeze: dict[int, float] = field(default_factory=dict)
    source: dict[int, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        kinds = {k: v for k, v in vars(self).items() if v}
        return ", ".join(f"{'remap' if k == 'source' else k}={v}" for k, v in kinds.items())

    @property
    def in_scores(self) -> bool:
        """Whether keys would have to change."""
        return bool(self.freeze or self.source)

    @property
    def pairs(self) -> list[int]:
        named = [pair for edit in vars(self).values() for pair in edit]
        return sorted({*named, *self.source.values()})


@contextmanager
def edit_rotary(
    model: LensModel,
    heads: Heads,
    *,
    scale: Mapping[PairNumbers, float] | None = None,
    shift: Mapping[PairNumbers, float] | None = None,
    freeze: Mapping[PairNumbers, float] | PairNumbers | None = None,
    swap: Sequence[tuple[int, int]] | None = None,
    remap: Mapping[int, int] | None = None,
) -> Iterator[Any]:
    """Edit the contribution of rotary pairs of ``heads`` inside the ``with`` block.

    Forward passes, ``generate`` with a KV cache, ``run_with_cache`` and everything of this package
    see the edited model. Scores of all other heads stay the same bit for bit, even where they share
    a key. An edit may be entered inside an extrapolation method that changes frequencies; it then
    edits the changed pairs. When the block ends, even by an exception, the model is as it was.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE.
        heads: as for :func:`tl_posheads.ablate`.
        scale: factor on the contribution of pairs; 0 removes them from the scores.
        shift: tokens by which the query is moved forward, for these pairs; may be negative.
        freeze: the distance in tokens that pairs see instead of the real one; pairs without a
            number see 0. Their content stays, their position is removed.
        swap: two pairs that exchange their frequencies.
        remap: a pair to the pair whose frequency it takes.

        The keys of ``scale``, ``shift`` and ``freeze`` are one pair, a range or a tuple of them. A
        pair takes one edit.

    Yields:
        The model.

    Memory: for ``freeze``, ``swap`` and ``remap`` copies of the edited layer's queries, keys and
    scores; attention stays fused where it was.

    Raises:
        PosheadsError: no RoPE; heads or pairs that don't exist; no edit, or two of one pair;
            numbers that aren't finite; a pair that doesn't turn; an edit inside an edit; edits of
            scores inside a method of distances (SelfExtend), on GPT-J or on DeepSeek; edits of
            positions where the frequencies depend on the text's length.

    Example:
        >>> with edit_rotary(model, scores.top(5), scale={range(20, 32): 0.0}):  # doctest: +SKIP
        ...     loss = model(tokens, return_type="loss")
    """
    require_rotary(model)
    members = by_layer(heads_of(model, heads))
    edit = _edit_of(scale, shift, freeze, swap, remap)
    with edited_rotary(model, members, edit):
        yield model


@contextmanager
def edited_rotary(
    model: LensModel,
    members: Mapping[int, list[int]],
    edit: Edit,
    geometry: RotaryGeometry | None = None,
) -> Iterator[Any]:
    """:func:`edit_rotary` for the heads of each layer; known geometries are not measured again."""
    _require_room(model, edit)
    with ExitStack() as stack:
        stack.enter_context(rotary_hook_points(model))
        if geometry is None:
            geometry = RotaryGeometry.from_model(model, layers=list(members) or None)
        for layer in members:
            _check_layer(model, geometry[layer], edit)
        points = model.hook_dict
        rotations = [
            (points[f"blocks.{layer}.attn.hook_rot_q"], _on_queries(chosen, geometry[layer], edit))
            for layer, chosen in members.items()
            if edit.scale or edit.shift
        ]
        stack.enter_context(own_hooks(rotations))
        layers = {
            layer: replace(geometry[layer], remapping=_remapping(chosen, edit, geometry[layer]))
            for layer, chosen in members.items()
            if edit.in_scores
        }
        named = [(layer, head) for layer, chosen in members.items() for head in chosen]
        stack.enter_context(remapped(model, layers, f"edit_rotary({named}, {edit.name})"))
        yield model


def _edit_of(scale: Any, shift: Any, freeze: Any, swap: Any, remap: Any) -> Edit:
    if freeze is not None and not isinstance(freeze, Mapping):
        freeze = dict.fromkeys(pairs_of(freeze, "freeze"), 0.0)
    source: dict[int, int] = {}
    for given, name in ((_both_ways(swap), "swap"), (_plain(remap, "remap"), "remap")):
        for pair, other in given:
            to, like = _pair_of(pair, name), _pair_of(other, name)
            if to in source:
                raise _twice(to)
            source[to] = like
    edit = Edit(
        _numbers(scale, "scale"), _numbers(shift, "shift"), _numbers(freeze, "freeze"), source
    )
    seen: set[int] = set()
    for pairs in vars(edit).values():
        for pair in pairs:
            if pair in seen:
                raise _twice(pair)
            seen.add(pair)
    if not seen:
        raise PosheadsError(
            "no edit was given; expected scale=, shift=, freeze=, swap= or remap=, like "
            "scale={range(20, 32): 0.0}"
        )
    return edit


def _twice(pair: int) -> PosheadsError:
    return PosheadsError(f"pair {pair} was given two edits; give every pair one")


def _plain(given: Any, name: str) -> list[tuple[Any, Any]]:
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise PosheadsError(f"{name}={given!r} was given; expected a dict from pairs to pairs")
    return list(given.items())


def _both_ways(swap: Any) -> list[tuple[Any, Any]]:
    try:
        return [both for a, b in swap or () for both in ((a, b), (b, a))]
    except (TypeError, ValueError):
        raise PosheadsError(
            f"swap={swap!r} was given; expected pairs of pairs, like [(0, 31)]"
        ) from None


def pairs_of(pairs: Any, name: str) -> tuple[int, ...]:
    many = pairs if isinstance(pairs, Sequence) and not isinstance(pairs, str) else (pairs,)
    if not many or not all(isinstance(p, Integral) and not isinstance(p, bool) for p in many):
        raise PosheadsError(
            f"{name} of the pairs {pairs!r} was given; expected a pair's number, a range or a "
            "tuple of numbers"
        )
    return tuple(int(pair) for pair in many)


def _pair_of(pair: Any, name: str) -> int:
    found = pairs_of(pair, name)
    if isinstance(pair, Sequence):
        raise PosheadsError(f"{name} of the pairs {pair!r} was given; expected one pair's number")
    return found[0]


def _numbers(given: Any, name: str) -> dict[int, float]:
    out: dict[int, float] = {}
    if given is not None and not isinstance(given, Mapping):
        raise PosheadsError(
            f"{name}={given!r} was given; expected a dict from pairs to numbers, like "
            "{range(20, 32): 0.0}"
        )
    for pairs, value in (given or {}).items():
        for pair in pairs_of(pairs, name):
            number = math.nan
            if isinstance(value, Real) and not isinstance(value, bool):
                with suppress(OverflowError):  # a whole number beyond every float
                    number = float(value)
            if not math.isfinite(number):
                raise PosheadsError(
                    f"{name}={value!r} was given for pair {pair}; expected a finite number"
                )
            if pair in out:
                raise _twice(pair)
            out[pair] = number
    return out


def _require_room(model: LensModel, edit: Edit) -> None:
    for change in changes_of(model):
        if change.kind == "edit":
            raise PosheadsError(
                f"an edit was asked of a {model_name(model)} on which {change.name} is in force; "
                "give all edits in one call"
            )
        if change.remapped and (edit.in_scores or edit.shift):
            raise PosheadsError(
                f"{edit.name} was asked inside {change.name}, which changes token distances; "
                "use scale= there, or edit inside a method that changes frequencies"
            )
    if edit.in_scores or edit.shift:
        require_fixed_frequencies(model, edit.name, "use scale= there")
    if edit.in_scores:
        require_scores(model, edit.name)


def _check_layer(model: LensModel, layer: LayerGeometry, edit: Edit) -> None:
    where = f"layer {layer.layer} of {model_name(model)}"
    if not layer.n_pairs:
        raise PosheadsError(f"{where} has no RoPE; leave its heads out")
    wrong = [pair for pair in edit.pairs if not 0 <= pair < layer.n_pairs]
    if wrong:
        raise PosheadsError(
            f"pair {wrong[0]} was given, but {where} has rotary pairs 0 to {layer.n_pairs - 1}; "
            "choose among those"
        )
    still = [pair for pair in edit.source if float(layer.inv_freq[pair]) == 0]
    if still:
        raise PosheadsError(
            f"pair {still[0]} of {where} doesn't turn, so it can't be given another's frequency; "
            "leave it out"
        )


def _on_queries(heads: Sequence[int], layer: LayerGeometry, edit: Edit) -> Callable[..., Tensor]:
    size = torch.ones(layer.n_pairs, dtype=torch.float64)
    angle = torch.zeros(layer.n_pairs, dtype=torch.float64)
    for pair, factor in edit.scale.items():
        size[pair] = factor
    for pair, tokens in edit.shift.items():
        angle[pair] = tokens * layer.inv_freq[pair].cpu()
    cos, sin = size * angle.cos(), size * angle.sin()

    def hook(rot_q: Float[Tensor, "batch pos head d_head"], hook: Any) -> Tensor:
        index = torch.tensor(list(heads), device=rot_q.device)
        mine = turn(rot_q[:, :, index], cos.to(rot_q.device), sin.to(rot_q.device), layer)
        return rot_q.index_copy(2, index, mine)

    return hook


def _remapping(heads: Sequence[int], edit: Edit, layer: LayerGeometry) -> Remapping:
    """Queries and keys at ``ratio * position``, where a pair turns as the other one would."""
    ratio = torch.ones(layer.n_pairs, dtype=torch.float64)
    ahead = torch.zeros(layer.n_pairs, dtype=torch.float64)
    for pair, other in edit.source.items():
        ratio[pair] = layer.inv_freq[other] / layer.inv_freq[pair]
    for pair, distance in edit.freeze.items():
        ratio[pair], ahead[pair] = 0.0, distance

    def queries(position: Tensor) -> Tensor:
        return keys(position) + ahead.to(position.device)

    def keys(position: Tensor) -> Tensor:
        return position[..., None, None].double() * ratio.to(position.device)

    return Remapping((Region(queries, keys),), every_pair, heads=tuple(heads))

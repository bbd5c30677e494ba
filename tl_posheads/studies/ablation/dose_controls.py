"""Controls of a dose-response run: other rotary pairs and heads to edit."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import capture_rotary
from tl_posheads.hooks.heads import Head, by_layer
from tl_posheads.hooks.model import LensModel, model_name
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.rotary.contributions import expand_keys, split_pairs
from tl_posheads.rotary.precision import widened
from tl_posheads.tasks.base import Prompt

_HEADS, _RANDOM, _NORMS = CONTROLS = (
    "layer_matched_heads",
    "random_rotary_pairs",
    "norm_matched_rotary_pairs",
)

# Others that may stand for a pair: few enough to be like it, and three pairs have 64 sets.
_NEAREST = 4
_ATTEMPTS = 100  # for each draw, to find one that isn't there yet


@dataclass(frozen=True)
class EditedSet:
    """What is edited together.

    Attributes:
        control: whose draw it is; empty for the edit under test.
        heads: ``(layer, head)``, ascending.
        rotary_pairs: 0 being the fastest, ascending.
    """

    control: str
    heads: list[Head]
    rotary_pairs: list[int]


def check_controls(controls: object) -> tuple[str, ...]:
    """The names of controls, each once.

    Raises:
        PosheadsError: none, unknown ones, or one twice.
    """
    named = tuple(controls) if isinstance(controls, list | tuple) else ()
    if not named or any(x not in CONTROLS for x in named) or len(set(named)) < len(named):
        raise PosheadsError(
            f"controls={controls!r} was given; expected some of {', '.join(CONTROLS)}, each once "
            "(their number is draws=)"
        )
    return named


def other_pairs(
    rotary_pairs: Sequence[int], heads: Sequence[Head], geometry: RotaryGeometry
) -> list[int]:
    """Pairs that aren't edited and turn in every layer of ``heads``.

    Raises:
        PosheadsError: there are fewer of them than are edited.
    """
    layers = [geometry[layer] for layer in by_layer(heads)]
    n_pairs = min(layer.n_pairs for layer in layers)
    turning = [m for m in range(n_pairs) if all(float(x.inv_freq[m]) != 0 for x in layers)]
    others = [m for m in turning if m not in set(rotary_pairs)]
    if len(others) < len(rotary_pairs):
        raise PosheadsError(
            f"{len(rotary_pairs)} rotary pairs were given, but only {len(others)} others turn in "
            f"these heads, too few to draw as many from; edit fewer pairs, or give "
            f"controls=[{_HEADS!r}]"
        )
    return others


def edited_sets(
    heads: Sequence[Head],
    rotary_pairs: Sequence[int],
    controls: Sequence[str],
    *,
    n_heads: int,
    others: Sequence[int],
    norms: Float[np.ndarray, " pair"] | None,
    n: int,
    seed: int,
) -> list[EditedSet]:
    """The edit under test, then every control's draws.

    Args:
        heads, rotary_pairs: of the edit under test.
        controls: some of ``CONTROLS``.
        n_heads: heads of a layer.
        others: pairs to draw from.
        norms: of every pair, as :func:`pair_norms` gives them; for the matched control.
        n: draws of each control; fewer where there are no more sets of pairs.
        seed: of all draws.
    """
    mine, pairs = sorted(heads), sorted(rotary_pairs)
    sets = [EditedSet("", mine, pairs)]
    for control in controls:
        if control == _HEADS:
            sets += [EditedSet(control, x, pairs) for x in layer_matched(mine, n_heads, n, seed)]
        else:
            like = norms if control == _NORMS else None
            draws = pair_draws(pairs, others, n, seed, norms=like)
            sets += [EditedSet(control, mine, x) for x in draws]
    return sets


def layer_matched(top: Sequence[Head], n_heads: int, n: int, seed: int) -> list[list[Head]]:
    """Draws of as many heads of each layer as ``top`` has; draw ``i`` depends on seed and ``i``.

    Example:
        >>> [len(draw) for draw in layer_matched([(3, 1), (3, 0), (5, 2)], 8, 2, seed=0)]
        [3, 3]
    """
    draws = []
    for i in range(n):
        generator = np.random.default_rng([seed, i])
        draw = [
            (layer, int(head))
            for layer, mine in by_layer(top).items()
            for head in generator.choice(n_heads, size=len(mine), replace=False)
        ]
        draws.append(sorted(draw))
    return draws


def pair_draws(
    rotary_pairs: Sequence[int],
    others: Sequence[int],
    n: int,
    seed: int,
    *,
    norms: Float[np.ndarray, " pair"] | None = None,
) -> list[list[int]]:
    """Distinct sets of as many other pairs: any, or with ``norms`` those of similar norm.

    To match norms, pairs are taken in random order. Each is replaced by one of the four others of
    nearest log norm that are still free, with equal probability.

    Returns:
        ``n`` sets, ascending; fewer where no more were found. With a larger ``n`` the first stay.

    Example:
        >>> sorted(pair_draws([0], [1, 2], 19, seed=0))
        [[1], [2]]
    """
    control = _RANDOM if norms is None else _NORMS
    generator = np.random.default_rng([seed, zlib.crc32(control.encode())])
    size = len(rotary_pairs)
    wanted = min(n, math.comb(len(others), size))
    log = None if norms is None else np.log(np.maximum(norms, np.finfo(np.float64).tiny))
    found: dict[tuple[int, ...], None] = {}
    for _ in range(_ATTEMPTS * n):
        if log is None:
            draw = generator.choice(others, size, replace=False).tolist()
        else:
            draw = _of_like_norm(rotary_pairs, others, log, generator)
        found[tuple(sorted(draw))] = None
        if len(found) == wanted:
            break
    return [list(draw) for draw in found]


def _of_like_norm(
    rotary_pairs: Sequence[int],
    others: Sequence[int],
    log: Float[np.ndarray, " pair"],
    generator: np.random.Generator,
) -> list[int]:
    free, draw = np.asarray(others), []
    for pair in generator.permutation(rotary_pairs):
        nearest = np.argsort(np.abs(log[free] - log[pair]), kind="stable")[:_NEAREST]
        at = generator.choice(nearest)
        draw.append(int(free[at]))
        free = np.delete(free, at)
    return draw


def pair_norms(
    model: LensModel, prompts: Sequence[Prompt], heads: Sequence[Head], geometry: RotaryGeometry
) -> Float[Tensor, " pair"]:
    """``E|q_m| E|k_m|`` of every rotary pair: what it can add to a score, in ``q . k``'s unit.

    Both means are over all tokens of the prompts, in a pass of each without an edit; the product
    is a head's (Barbero et al. 2024, arXiv 2410.06205), and the mean over ``heads`` is returned.

    Raises:
        PosheadsError: queries or keys that aren't finite.
    """
    members = by_layer(heads)
    n_pairs = min(geometry[layer].n_pairs for layer in members)
    total = {layer: torch.zeros(2, len(members[layer]), n_pairs).double() for layer in members}

    def add(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
        for i, x in enumerate((rot_q, expand_keys(rot_k, rot_q, geometry[layer]))):
            first, second = split_pairs(widened(x[0, :, members[layer]]), geometry[layer])
            length = torch.hypot(first, second).sum(0, dtype=torch.float64)
            total[layer][i] += length[:, :n_pairs].cpu()

    for prompt in prompts:
        capture_rotary(model, prompt.tokens[None], add, layers=list(members))
    n_tokens = sum(len(prompt.tokens) for prompt in prompts)
    q, k = torch.cat(list(total.values()), 1) / n_tokens
    norms: Tensor = (q * k).mean(0)
    if not bool(torch.isfinite(norms).all()):
        raise PosheadsError(
            f"{model_name(model)} has NaN or infinite queries or keys; load it with dtype float32 "
            "or bfloat16"
        )
    return norms

"""Control heads, ablated for comparison with the top heads.

Each control tests one rival explanation: any heads would do (``"random"``), heads of these layers
would do (``"layer_matched"``), heads that write as much would do (``"norm_matched"``). The heads
with the lowest scores (``"lowest"``) are the score's other end.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.heads import Head
from tl_posheads.scoring.head_scores import HeadScores

"""Layer and head."""

CONTROLS = ("random", "layer_matched", "lowest", "norm_matched")

# A norm bin this small still leaves a choice, and its heads have about the same norm.
_BIN_HEADS = 10
_BINS = 20


def _checked(fractions: Sequence[float]) -> list[float]:
    # A plain 1 is a share here, and HeadScores.top would take it for a count.
    values = [float(fraction) for fraction in fractions]
    if not values or not all(0 < value <= 1 for value in values):
        raise PosheadsError(
            f"fractions={list(fractions)} was given; expected shares above 0 and at most 1"
        )
    if any(later <= earlier for earlier, later in pairwise(values)):
        raise PosheadsError(f"fractions={list(fractions)} was given; expected ascending shares")
    return values


def top_sets(scores: HeadScores, fractions: Sequence[float]) -> list[list[Head]]:
    """The best heads for each fraction of the scored heads, best first, in nested sets.

    Args:
        scores: only heads with a score take part.
        fractions: ascending shares in (0, 1], rounded to heads as :meth:`HeadScores.top` does.

    Raises:
        PosheadsError: no scored heads; fractions out of range or order, or so close that two of
            them give the same heads.

    Example:
        >>> import torch
        >>> from tl_posheads import HeadScores
        >>> rho = torch.tensor([[0.1, 0.9], [0.5, 0.3]])
        >>> scores = HeadScores(rho.expand(6, 1, 2, 2), ("text",), (None, None), {})
        >>> top_sets(scores, [0.25, 0.5])
        [[(0, 1)], [(0, 1), (1, 0)]]
    """
    values = _checked(fractions)
    sets = [scores.top(value) for value in values]
    if not sets[0]:
        raise PosheadsError("the scores hold no scored head; score the model's heads first")
    for i in range(1, len(sets)):
        if len(sets[i]) == len(sets[i - 1]):
            raise PosheadsError(
                f"the fractions {values[i - 1]} and {values[i]} both give {len(sets[i])} of "
                f"{len(scores.top(1.0))} scored heads; give one of them"
            )
    return sets


def _checked_norms(
    norms: Float[Tensor, "layer head"] | None, scores: HeadScores
) -> Float[Tensor, "layer head"]:
    if norms is None:
        raise PosheadsError("norms is missing; give the heads' output norms, [layer, head]")
    if norms.shape != scores.rho.shape:
        raise PosheadsError(
            f"norms of shape {tuple(norms.shape)} were given; expected "
            f"{tuple(scores.rho.shape)}, one for each head"
        )
    values = norms.detach().double().cpu()
    unknown = [head for head in scores.top(1.0) if not bool(values[head].isfinite())]
    if unknown:
        layer, index = min(unknown)
        raise PosheadsError(
            f"the norm of L{layer}H{index} is {float(values[layer, index])}; expected a finite "
            "norm for every scored head"
        )
    return values


def _norm_bins(heads: Sequence[Head], norms: Float[Tensor, "layer head"]) -> dict[Head, int]:
    """Bin of each head; bins hold nearly equal numbers of heads of neighbouring norms."""
    ordered = sorted(heads, key=lambda head: (float(norms[head]), head))
    size = max(_BIN_HEADS, round(len(ordered) / _BINS))
    n_bins = max(1, len(ordered) // size)
    return {head: i * n_bins // len(ordered) for i, head in enumerate(ordered)}


def control_sets(
    scores: HeadScores,
    fractions: Sequence[float],
    kind: str,
    *,
    n: int,
    seed: int,
    norms: Float[Tensor, "layer head"] | None = None,
) -> list[list[list[Head]]]:
    """Sets of heads to ablate for comparison with :func:`top_sets`, of the same sizes.

    Within a draw the sets are nested over the fractions: for every head that the top set gains,
    the draw gains another.

    - ``"random"``: any scored heads.
    - ``"layer_matched"``: as many from each layer as the top set has.
    - ``"norm_matched"``: as many from each bin of output norm as the top set has. The bins are
      quantiles of about 10 heads, or of a twentieth of the heads where that is more.
    - ``"lowest"``: the heads with the lowest scores. One draw, whatever ``n`` is.

    The first three draw from all scored heads, the top ones among them. Their null hypothesis is
    that the score says nothing (within a layer, within a norm bin): the top set is then one of the
    possible draws, as likely as any other, and its rank among the draws is an exact test. Draws
    without the top heads would make the test reject too often. It also means that a draw may share
    heads with the top set, and at fraction 1 equals it.

    Args:
        scores: only heads with a score take part.
        fractions: ascending shares in (0, 1].
        kind: one of ``CONTROLS``.
        n: draws.
        seed: at least 0. Draw ``i`` depends on seed, kind and ``i`` alone, not on ``n``.
        norms: output norm of each head, for ``"norm_matched"``.

    Returns:
        ``[draw][fraction]``, each a list of heads in order of layer and head.

    Raises:
        PosheadsError: unknown kind; ``n`` below 1 or a negative seed; fractions that
            :func:`top_sets` refuses; norms that are missing, of another shape or not finite at a
            scored head; so few scored heads that the lowest would be among the top ones.

    Example:
        >>> import torch
        >>> from tl_posheads import HeadScores
        >>> rho = torch.tensor([[0.1, 0.9], [0.5, 0.3]])
        >>> scores = HeadScores(rho.expand(6, 1, 2, 2), ("text",), (None, None), {})
        >>> control_sets(scores, [0.25, 0.5], "lowest", n=1, seed=0)
        [[[(0, 0)], [(0, 0), (1, 1)]]]
        >>> [len(heads) for heads in control_sets(scores, [0.25, 0.5], "random", n=1, seed=0)[0]]
        [1, 2]
    """
    if kind not in CONTROLS:
        raise PosheadsError(
            f"kind={kind!r} was given; expected one of {', '.join(map(repr, CONTROLS))}"
        )
    if n < 1:
        raise PosheadsError(f"n={n} draws were asked; expected at least 1")
    if seed < 0:
        raise PosheadsError(f"seed={seed} was given; expected at least 0")
    top = top_sets(scores, fractions)
    ranked = scores.top(1.0)

    if kind == "lowest":
        needed = len(top[-1])
        if 2 * needed > len(ranked):
            raise PosheadsError(
                f"the lowest {needed} of {len(ranked)} scored heads would be among the top "
                f"{needed}; give fractions of at most 0.5 or leave this control out"
            )
        return [[sorted(ranked[-len(heads) :]) for heads in top]]

    # Each kind is a stratified draw: the heads of a stratum are permuted among themselves.
    if kind == "random":
        stratum = dict.fromkeys(ranked, 0)
    elif kind == "layer_matched":
        stratum = {head: head[0] for head in ranked}
    else:
        stratum = _norm_bins(ranked, _checked_norms(norms, scores))
    members: dict[int, list[Head]] = {}
    for head in sorted(ranked):
        members.setdefault(stratum[head], []).append(head)

    draws = []
    for i in range(n):
        # The kind's name and not its place in CONTROLS: a new kind leaves the others' draws alone.
        spawn_key = (zlib.crc32(kind.encode()), i)
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=spawn_key))
        shuffled = {
            key: [heads[j] for j in generator.permutation(len(heads))]
            for key, heads in sorted(members.items())
        }
        # A head stands for the top head that has the same rank within the stratum; so the sets
        # are nested, and no stratum is ever short of heads.
        partner = {}
        for head in ranked:
            partner[head] = shuffled[stratum[head]].pop()
        draws.append([sorted(partner[head] for head in heads) for heads in top])
    return draws

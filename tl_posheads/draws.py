"""One text and layer measured: rank correlations over drawn query-key pairs, or over all.

RoPE is exact, and so is the counterfactual: the query and key of one pair, turned on to the
positions of another, are what the model would have had there. Of the complex product
``q_m conj(k_m)`` of a rotary pair the real part is its contribution; turning the product by
``theta_m`` times the change of distance moves the content.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.contributions import (
    PairVectors,
    Scale,
    check_scale,
    evenly,
    expand_keys,
    farthest,
    rows_of,
    scale_factor,
    split_pairs,
)
from tl_posheads.errors import PosheadsError
from tl_posheads.geometry import LayerGeometry
from tl_posheads.remapping import only_heads, pair_vectors
from tl_posheads.statistics import correlation, draws_for, midranks, spearman_by_distance

Weighting = Literal["pair", "distance"]

MEASURES = ("rho", "rotation", "content", "d_near", "d_far", "n_pairs")
_OCTAVE_DRAWS = 256  # pairs of the nearest and of the farthest octave, each
_CHUNK, _CHUNK_GPU = 1 << 18, 1 << 26  # contributions of drawn pairs at a time
_HELD = 1 << 25  # values of D that are ranked at a time


@dataclass(frozen=True)
class Settings:
    """What is measured, the same for every layer and document.

    Attributes:
        draws: query-key pairs drawn in every document; all of them where there are no more.
        exact: rank all pairs of every document for rho, whatever its length.
        weighting: ``"pair"``: every pair that attention sees weighs the same; ``"distance"``:
            every distance does.
        scale: of the contributions, as in ``dimension_contributions``.
        skip_first: positions at each text's start left out, as queries and as keys.
        seed: of the draws.
    """

    draws: int
    exact: bool = False
    weighting: Weighting = "pair"
    scale: Scale = "none"
    skip_first: int = 0
    seed: int = 0

    @classmethod
    def of(
        cls,
        pairs: object,
        n_documents: int,
        *,
        target_se: float = 0.005,
        weighting: Weighting = "pair",
        scale: Scale = "none",
        skip_first: int = 0,
        seed: int = 0,
    ) -> Settings:
        """From the arguments of ``score_heads``, checked.

        Raises:
            PosheadsError: another ``pairs``, ``weighting`` or ``scale``; a ``target_se`` that is
                no number between 0 and 1; a ``seed`` that is no whole number from 0 on.
        """
        check_scale(scale)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise PosheadsError(f"seed={seed!r} was given; expected a whole number from 0")
        if weighting not in ("pair", "distance"):
            raise PosheadsError(
                f"weighting={weighting!r} was given; expected 'pair' (every query-key pair weighs "
                "the same) or 'distance' (every distance does)"
            )
        known = isinstance(target_se, int | float) and not isinstance(target_se, bool)
        if not known or not 0 < target_se < 1:
            raise PosheadsError(
                f"target_se={target_se!r} was given; expected a standard error for drawing to "
                "stay under, like 0.005"
            )
        draws = max(3, -(-draws_for(target_se) // n_documents))
        if pairs not in ("auto", "all"):
            if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 3:
                raise PosheadsError(
                    f"pairs={pairs!r} was given; expected 'auto', 'all' or a number of pairs "
                    "(at least 3) to draw in every document"
                )
            draws = pairs
        return cls(draws, pairs == "all", weighting, scale, skip_first, seed)


class Pairs(NamedTuple):
    """Query-key pairs of a text, the same for all heads.

    Attributes:
        q_pos, k_pos: their positions.
        weights: of each; None is 1.
    """

    q_pos: Int[Tensor, "n"]
    k_pos: Int[Tensor, "n"]
    weights: Float[Tensor, "n"] | None = None


def draw_pairs(
    n_pos: int,
    nearest: int,
    longest: int,
    n: int,
    weighting: Weighting,
    generator: np.random.Generator,
) -> Pairs:
    """Pairs ``nearest`` to ``longest`` tokens apart, drawn with replacement; all if no more than n.

    Example:
        >>> import numpy as np
        >>> draw_pairs(3, 1, 2, 9, "pair", np.random.default_rng(0))
        Pairs(q_pos=tensor([1, 2, 2]), k_pos=tensor([0, 1, 0]), weights=None)
    """
    apart = np.arange(nearest, longest + 1)
    there = n_pos - apart  # pairs at each distance
    weights = None
    if there.sum() <= n:
        distance = np.repeat(apart, there)
        q_pos = distance + np.concatenate([np.arange(m) for m in there])
        if weighting == "distance":
            weights = torch.as_tensor(np.repeat(1 / there, there))
    else:
        share = np.cumsum(there if weighting == "pair" else np.ones_like(there))
        at = np.searchsorted(share, generator.random(n) * share[-1], side="right")
        distance = apart[np.minimum(at, len(apart) - 1)]
        q_pos = distance + (generator.random(n) * (n_pos - distance)).astype(np.int64)
    return Pairs(torch.as_tensor(q_pos), torch.as_tensor(q_pos - distance), weights)


@dataclass(frozen=True)
class Draw:
    """What is looked at in one document by all layers that see as far.

    Attributes:
        pairs: those that rho is taken over.
        given: for each of these contents the number of the pair at whose positions it is put.
        near, far: pairs 1 or 2 tokens apart, and in the farthest octave.
    """

    pairs: Pairs
    given: Int[Tensor, "n"]
    near: Pairs
    far: Pairs

    def to(self, device: torch.device) -> Draw:
        def moved(pairs: Pairs) -> Pairs:
            return Pairs(*(None if x is None else x.to(device) for x in pairs))  # type: ignore[arg-type]

        return Draw(moved(self.pairs), self.given.to(device), moved(self.near), moved(self.far))


class DocumentDraws:
    """The draws of one document: layers with the same reach share theirs.

    Args:
        document: its name; with the seed it decides what is drawn.
        n_pos: its positions, those skipped not counted.
    """

    def __init__(self, document: str, n_pos: int, settings: Settings) -> None:
        self.name, self.settings = document, settings
        self._n_pos = n_pos
        self._known: dict[tuple[int, torch.device], Draw] = {}

    def within(self, window: int | None, device: torch.device) -> Draw:
        """For layers with this sliding window."""
        longest = farthest(self._n_pos, window)
        key = (longest, device)
        if key not in self._known:
            self._known[key] = self._draw(longest).to(device)
        return self._known[key]

    def _draw(self, longest: int) -> Draw:
        settings, n_pos = self.settings, self._n_pos
        name = hashlib.sha256(self.name.encode()).digest()
        generator = np.random.default_rng([settings.seed, *name])
        pairs = draw_pairs(n_pos, 1, longest, settings.draws, settings.weighting, generator)
        given = torch.as_tensor(generator.permutation(len(pairs.q_pos)))
        near, far = (
            draw_pairs(n_pos, *octave, _OCTAVE_DRAWS, "pair", generator)
            for octave in ((1, min(2, longest)), ((longest + 1) // 2, longest))
        )
        return Draw(pairs, given, near, far)


def measure(
    rot_q: Float[Tensor, "pos head d_head"],
    rot_k: Float[Tensor, "pos kv_head d_head"],
    geometry: LayerGeometry,
    draws: DocumentDraws,
) -> Float[Tensor, "measure head"]:
    """A layer's :data:`MEASURES` of one text, without the positions that are skipped; float64.

    Memory: some 20 MB on a CPU, 2 GB on a GPU; with ``exact`` that of :func:`spearman_of_all`.
    """
    settings = draws.settings
    draw = draws.within(geometry.window, rot_q.device)
    pairs, n = draw.pairs, len(draw.pairs.q_pos)
    read = [pairs, draw.near, draw.far]
    q_pos, k_pos = (torch.cat([getattr(x, name) for x in read]) for name in ("q_pos", "k_pos"))
    given = Pairs(pairs.q_pos[draw.given], pairs.k_pos[draw.given])
    dominant, moved = [], []
    for chunk, product in _products(rot_q, rot_k, geometry, q_pos, k_pos, settings.scale):
        dominant.append(product.dominant())
        there = Pairs(given.q_pos[chunk], given.k_pos[chunk])
        moved.append(product.first(len(there.q_pos)).dominant(there))
    d, apart = torch.cat(dominant).T, pairs.q_pos - pairs.k_pos
    n_ranked, n_all = n, n_visible(rot_q.shape[0], geometry.window)
    if settings.exact and n < n_all:
        n_ranked = n_all
        rho = spearman_of_all(rot_q, rot_k, geometry, settings)
    else:
        rho = spearman_by_distance(apart, d[:, :n], pairs.weights)
    if geometry.is_rotation:
        weights = None if pairs.weights is None else pairs.weights * pairs.weights[draw.given]
        ranks = midranks(torch.cat(moved).T, weights)
        rotation, content = (
            correlation(ranks, midranks(distance, weights), weights)
            for distance in (given.q_pos - given.k_pos, apart)
        )
    else:
        rotation = content = torch.full_like(rho, float("nan"))
    near, far = d[:, n:].split([len(draw.near.q_pos), len(draw.far.q_pos)], 1)
    return torch.stack(
        [rho, rotation, content, near.mean(1), far.mean(1), torch.full_like(rho, n_ranked)]
    )


def n_visible(n_pos: int, window: int | None) -> int:
    """Query-key pairs of a text that attention sees, a token with itself left out."""
    longest = farthest(n_pos, window)
    return longest * n_pos - longest * (longest + 1) // 2


@dataclass(frozen=True)
class _Product:
    """``q_m conj(k_m)`` of some query-key pairs."""

    real: Float[Tensor, "n head pair"]
    imag: Float[Tensor, "n head pair"]
    pairs: Pairs
    geometry: LayerGeometry

    def first(self, n: int) -> _Product:
        pairs = Pairs(self.pairs.q_pos[:n], self.pairs.k_pos[:n])
        return _Product(self.real[:n], self.imag[:n], pairs, self.geometry)

    def dominant(self, at: Pairs | None = None) -> Float[Tensor, "n head"]:
        """D of the contents, at their own positions or put at others; float64."""
        contribution = self.real
        if at is not None or self.geometry.remapping is not None:
            contribution = self._turned(self.pairs if at is None else at)
        weight = (contribution - contribution.amax(-1, keepdim=True)).exp_()
        # float64 sums of float32 exponentials: a head that rests on one pair has D within 1e-13
        # of a whole number, and the order of those last digits is part of its score.
        weight = weight.double()
        index = torch.arange(weight.shape[-1], dtype=weight.dtype, device=weight.device)
        total, moment = (weight @ torch.stack([torch.ones_like(index), index], 1)).unbind(-1)
        return moment / total

    def _turned(self, at: Pairs) -> Float[Tensor, "n head pair"]:
        """The contributions that the contents would make at these positions."""
        distance = (at.q_pos - at.k_pos)[:, None, None].double()
        factor, remapping = None, self.geometry.remapping
        if remapping is not None:
            distance, factor = remapping.distances(at.q_pos, at.k_pos, self.geometry.n_heads)
        steps = distance - (self.pairs.q_pos - self.pairs.k_pos)[:, None, None]
        # In float64 up to here: thousands of turns leave float32 no digits.
        angle = torch.remainder(steps * self.geometry.inv_freq.to(steps.device), 2 * math.pi)
        angle = angle.to(self.real.dtype)
        turned = (self.real * angle.cos()).addcmul_(self.imag, angle.sin(), value=-1)
        return turned if factor is None else turned * factor.to(turned.dtype)


def _products(
    rot_q: Tensor,
    rot_k: Tensor,
    geometry: LayerGeometry,
    q_pos: Tensor,
    k_pos: Tensor,
    scale: Scale,
) -> Iterator[tuple[slice, _Product]]:
    step = max(
        1, (_CHUNK_GPU if rot_q.is_cuda else _CHUNK) // (geometry.n_heads * geometry.n_pairs)
    )
    precision = torch.promote_types(rot_q.dtype, torch.float32)
    factor = scale_factor(scale, geometry)
    for start in range(0, len(q_pos), step):
        chunk = slice(start, start + step)
        q, k = rot_q.index_select(0, q_pos[chunk]), rot_k.index_select(0, k_pos[chunk])
        k = expand_keys(k, q, geometry)
        (q1, q2), (k1, k2) = (split_pairs(x.to(precision), geometry) for x in (q, k))
        real = (q1 * k1).addcmul_(q2, k2)
        imag = (q2 * k1).addcmul_(q1, k2, value=-1)
        pairs = Pairs(q_pos[chunk], k_pos[chunk])
        yield chunk, _Product(real.mul_(factor), imag.mul_(factor), pairs, geometry)


def spearman_of_all(
    rot_q: Float[Tensor, "pos head d_head"],
    rot_k: Float[Tensor, "pos kv_head d_head"],
    geometry: LayerGeometry,
    settings: Settings,
) -> Float[Tensor, "head"]:
    """Spearman's rho over all pairs that attention sees, exactly, in bounded memory.

    As many heads at a time as 33 million values of D hold. A head that has more by itself (texts
    of more than 8,192 tokens) is read again for one range of D after the other.

    Memory: about 2 GB. Time: quadratic in the length up to 8,192 tokens, of fourth order beyond.
    """
    n_pos, n = rot_q.shape[0], n_visible(rot_q.shape[0], geometry.window)
    longest, device = farthest(n_pos, geometry.window), rot_q.device
    apart = torch.arange(1, longest + 1, device=device)
    weight = torch.ones(longest, dtype=torch.float64, device=device)
    if settings.weighting == "distance":
        weight = 1.0 / (n_pos - apart).double()
    share = weight * (n_pos - apart)
    rank = share.cumsum(0) - share / 2
    by_distance = torch.stack([weight, rank - (rank @ share) / share.sum()])
    rows, step = torch.arange(1, n_pos, device=device), max(1, _HELD // n)
    found = []
    for start in range(0, geometry.n_heads, step):
        heads = list(range(start, min(start + step, geometry.n_heads)))
        alone, keys = only_heads(geometry, rot_k, heads)
        vectors = pair_vectors(rot_q[:, heads], keys, alone, scale=settings.scale)
        splits = [-math.inf, *_splits(vectors, n_pos, geometry.window), math.inf]
        sums = torch.zeros(4, len(heads), dtype=torch.float64, device=device)
        for low, high in pairwise(splits):
            _add_range(sums, rows_of(vectors, rows, geometry.window), low, high, by_distance)
        total, first, second, product = sums
        spread = second / total - (first / total) ** 2
        over = (share * by_distance[1] ** 2).sum() / share.sum()
        rho = product / total / (spread * over).sqrt()
        found.append(rho.masked_fill(spread < 1e-13 * total**2, float("nan")))
    return torch.cat(found)


def _splits(vectors: PairVectors, n_pos: int, window: int | None) -> list[float]:
    """Values of D between which no more lie than are ranked at a time; of one head."""
    n = n_visible(n_pos, window)
    if n * vectors.n_heads <= _HELD:
        return []
    rows = evenly(n_pos, 16, vectors.q.device)
    some = torch.cat([d[:, valid].flatten() for d, _, valid, _ in rows_of(vectors, rows, window)])
    at = torch.linspace(0, 1, 2 + n // _HELD * 2, dtype=torch.float64)[1:-1]
    return sorted({float(some.sort().values[int(q * (len(some) - 1))]) for q in at})


def _add_range(
    sums: Float[Tensor, "four head"],
    bites: Iterator[tuple[Tensor, ...]],
    low: float,
    high: float,
    by_distance: Float[Tensor, "two distance"],
) -> None:
    """Add weight, rank, its square, and its product with distance's, of the D in [low, high).

    ``low`` itself, which may be many pairs' D, is counted without being kept. More than one head
    only where nothing is left out.
    """
    values, distances = [], []
    at_low = torch.zeros(2, dtype=torch.float64, device=sums.device)
    for dominant, distance, valid, _ in bites:
        d, apart = dominant[:, valid], distance[valid]
        if low > -math.inf or high < math.inf:
            weight, y = by_distance[:, apart[d[0] == low] - 1]
            at_low += torch.stack([weight.sum(), (weight * y).sum()])
            inside = (d[0] > low) & (d[0] < high)
            d, apart = d[:, inside], apart[inside]
        values.append(d)
        distances.append(apart)
    weight, y = by_distance[:, torch.cat(distances) - 1]
    middle = sums[0] + at_low[0] / 2
    rank = (sums[0] + at_low[0])[:, None] + midranks(torch.cat(values, 1), weight)
    sums[1] += middle * at_low[0] + rank @ weight
    sums[2] += middle**2 * at_low[0] + (rank * rank) @ weight
    sums[3] += middle * at_low[1] + rank @ (weight * y)
    sums[0] += at_low[0] + weight.sum()

"""Measures of one text and layer: rank correlations over sampled query-key pairs, or all.

RoPE makes the counterfactual exact: the query and key of one pair, rotated further to another
pair's positions, are what the model would have computed there. The real part of the complex
product ``q_m conj(k_m)`` of a rotary pair is its contribution; rotating the product by ``theta_m``
times the change in distance moves the content to the new distance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.rotary.contributions import (
    Scale,
    check_scale,
    expand_keys,
    farthest,
    scale_factor,
    split_pairs,
)
from tl_posheads.rotary.geometry import LayerGeometry, share_keys
from tl_posheads.scoring.all_pairs import Weighting, n_visible, spearman_of_all
from tl_posheads.statistics.ranks import correlation, draws_for, midranks

MEASURES = ("rho", "rotation", "content", "d_near", "d_far", "n_qk_pairs")
_OCTAVE_DRAWS = 256  # pairs of the nearest and of the farthest octave, each
_CHUNK, _CHUNK_GPU = 1 << 18, 1 << 26  # contributions of drawn pairs at a time


@dataclass(frozen=True)
class Settings:
    """Measurement settings, the same for every layer and document.

    Attributes:
        draws: query-key pairs drawn in every document; all if it has no more.
        exact: rank all pairs of every document for rho, whatever its length.
        weighting: ``"pair"``: every pair under causal attention has the same weight;
            ``"distance"``: every distance has the same weight.
        scale: of the contributions, as in ``dimension_contributions``.
        skip_first: positions to leave out at the start of each text, as queries and as keys.
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
        qk_pairs: object,
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
            PosheadsError: an invalid ``qk_pairs``, ``weighting`` or ``scale``; a ``target_se`` that
                isn't between 0 and 1; a ``seed`` that isn't a whole number from 0 on.
        """
        check_scale(scale)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise PosheadsError(f"seed={seed!r} was given; expected a whole number from 0")
        if weighting not in ("pair", "distance"):
            raise PosheadsError(
                f"weighting={weighting!r} was given; expected 'pair' (equal weight for every "
                "query-key pair) or 'distance' (equal weight for every distance)"
            )
        known = isinstance(target_se, int | float) and not isinstance(target_se, bool)
        if not known or not 0 < target_se < 1:
            raise PosheadsError(
                f"target_se={target_se!r} was given; expected the largest standard error that "
                "sampling may cause, like 0.005"
            )
        draws = max(3, -(-draws_for(target_se) // n_documents))
        if qk_pairs not in ("auto", "all"):
            if isinstance(qk_pairs, bool) or not isinstance(qk_pairs, int) or qk_pairs < 3:
                raise PosheadsError(
                    f"qk_pairs={qk_pairs!r} was given; expected 'auto', 'all' or a number of pairs "
                    "(at least 3) to draw in every document"
                )
            draws = qk_pairs
        return cls(draws, qk_pairs == "all", weighting, scale, skip_first, seed)


class QKPairs(NamedTuple):
    """Query-key pairs of a text, the same for all heads: query and key positions."""

    q_pos: Int[Tensor, " n"]
    k_pos: Int[Tensor, " n"]

    @property
    def distance(self) -> Int[Tensor, " n"]:
        return self.q_pos - self.k_pos


def draw_pairs(
    n_pos: int,
    nearest: int,
    longest: int,
    n: int,
    weighting: Weighting,
    generator: np.random.Generator,
) -> tuple[QKPairs, Float[Tensor, " n"] | None]:
    """Draw n pairs ``nearest`` to ``longest`` tokens apart, with replacement; all if no more.

    Distances are stratified, one from each of ``n`` equal shares of the pairs. So the trend of D
    over distance adds no sampling error; only the variation of D at a given distance does.

    Returns:
        The pairs and their weights; None means 1 each.

    Example:
        >>> import numpy as np
        >>> draw_pairs(3, 1, 2, 9, "pair", np.random.default_rng(0))
        (QKPairs(q_pos=tensor([1, 2, 2]), k_pos=tensor([0, 1, 0])), None)
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
        within = (np.arange(n) + generator.random(n)) / n
        at = np.searchsorted(share, within * share[-1], side="right")
        distance = apart[np.minimum(at, len(apart) - 1)]
        q_pos = distance + (generator.random(n) * (n_pos - distance)).astype(np.int64)
        order = np.argsort(q_pos)  # for memory locality
        q_pos, distance = q_pos[order], distance[order]
    return QKPairs(torch.as_tensor(q_pos), torch.as_tensor(q_pos - distance)), weights


@dataclass(frozen=True)
class Draw:
    """The pairs measured in one document, shared by layers with the same window.

    Attributes:
        qk_pairs: pairs for rho, followed by pairs 1 or 2 tokens apart and by pairs of the farthest
            octave.
        sizes: the number of each kind.
        given: the pair to whose positions each of the pairs for rho is moved.
        weights: of the pairs for rho; None means 1 each.
        moved_weights: of contents and new positions together.
        ranks: of the distance and, for moved contents, of their original and of their new
            distance.
    """

    qk_pairs: QKPairs
    sizes: tuple[int, int, int]
    given: QKPairs
    weights: Float[Tensor, " n"] | None
    moved_weights: Float[Tensor, " n"] | None
    ranks: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(
        cls,
        pairs: QKPairs,
        weights: Tensor | None,
        order: Int[Tensor, " n"],
        near: QKPairs,
        far: QKPairs,
        device: torch.device,
    ) -> Draw:
        """From pairs, the permutation of their positions, and the pairs of both octaves."""
        given = QKPairs(*(x[order] for x in pairs))
        moved = None if weights is None else weights * weights[order]
        ranks = [
            midranks(x.distance, w) for x, w in ((pairs, weights), (pairs, moved), (given, moved))
        ]
        read = QKPairs(*(torch.cat(x).to(device) for x in zip(pairs, near, far, strict=True)))
        sizes = (len(pairs.q_pos), len(near.q_pos), len(far.q_pos))
        weights, moved = (None if x is None else x.to(device) for x in (weights, moved))
        own, came, put = (x.to(device) for x in ranks)
        given = QKPairs(*(x.to(device) for x in given))
        return cls(read, sizes, given, weights, moved, (own, came, put))


class DocumentDraws:
    """The draws of one document, shared by layers with the same window.

    Args:
        document: its name; together with the seed it determines the draws.
        n_pos: number of its positions, without the skipped ones.
    """

    def __init__(self, document: str, n_pos: int, settings: Settings) -> None:
        self.name, self.settings = document, settings
        self._n_pos = n_pos
        self._known: dict[tuple[int, torch.device], Draw] = {}

    def within(self, window: int | None, device: torch.device) -> Draw:
        """The draws for layers with this sliding window."""
        longest = farthest(self._n_pos, window)
        key = (longest, device)
        if key not in self._known:
            self._known[key] = self._draw(longest, device)
        return self._known[key]

    def _draw(self, longest: int, device: torch.device) -> Draw:
        settings, n_pos = self.settings, self._n_pos
        name = hashlib.sha256(self.name.encode()).digest()
        generator = np.random.default_rng([settings.seed, *name])
        pairs, weights = draw_pairs(
            n_pos, 1, longest, settings.draws, settings.weighting, generator
        )
        order = torch.as_tensor(generator.permutation(len(pairs.q_pos)))
        near, far = (
            draw_pairs(n_pos, *octave, _OCTAVE_DRAWS, "pair", generator)[0]
            for octave in ((1, min(2, longest)), ((longest + 1) // 2, longest))
        )
        return Draw.of(pairs, weights, order, near, far, device)


def measure(
    rot_q: Float[Tensor, "pos head d_head"],
    rot_k: Float[Tensor, "pos kv_head d_head"],
    geometry: LayerGeometry,
    draws: DocumentDraws,
) -> Float[Tensor, "measure head"]:
    """A layer's :data:`MEASURES` of one text without its skipped positions; float64.

    Memory: about 20 MB on a CPU, 2 GB on a GPU; with ``exact`` that of :func:`spearman_of_all`.
    """
    settings = draws.settings
    draw = draws.within(geometry.window, rot_q.device)
    n, dominant, moved = draw.sizes[0], [], []
    for chunk, product in products(rot_q, rot_k, geometry, draw.qk_pairs, settings.scale):
        dominant.append(product.dominant())
        there = QKPairs(*(x[chunk] for x in draw.given))
        moved.append(product.first(len(there.q_pos)).dominant(there))
    at_own, near, far = torch.cat(dominant).T.split(draw.sizes, 1)
    own, came, put = draw.ranks
    n_ranked, n_all = n, n_visible(rot_q.shape[0], geometry.window)
    if settings.exact and n < n_all:
        n_ranked = n_all
        rho = spearman_of_all(
            rot_q, rot_k, geometry, scale=settings.scale, weighting=settings.weighting
        )
    else:
        rho = correlation(midranks(at_own, draw.weights), own, draw.weights)
    rotation = content = torch.full_like(rho, float("nan"))
    if geometry.is_rotation:
        ranks = midranks(torch.cat(moved).T, draw.moved_weights)
        rotation, content = (correlation(ranks, x, draw.moved_weights) for x in (put, came))
    return torch.stack(
        [rho, rotation, content, near.mean(1), far.mean(1), torch.full_like(rho, n_ranked)]
    )


@dataclass(frozen=True)
class Product:
    """``q_m conj(k_m)`` of query-key pairs, as rotated at their own positions."""

    real: Float[Tensor, "n head pair"]
    imag: Float[Tensor, "n head pair"]
    qk_pairs: QKPairs
    geometry: LayerGeometry

    def first(self, n: int) -> Product:
        pairs = QKPairs(self.qk_pairs.q_pos[:n], self.qk_pairs.k_pos[:n])
        return Product(self.real[:n], self.imag[:n], pairs, self.geometry)

    def dominant(self, at: QKPairs | None = None) -> Float[Tensor, "n head"]:
        """D of the contents, at their own positions or moved to others; float64."""
        contribution = self.contributions(at)
        weight = (contribution - contribution.amax(-1, keepdim=True)).exp_()
        # float64 sums of float32 exponentials: where one pair dominates, D is within 1e-13 of a
        # whole number, and the order of those last digits is part of the head's score.
        weight = weight.double()
        index = torch.arange(weight.shape[-1], dtype=weight.dtype, device=weight.device)
        total, moment = (weight @ torch.stack([torch.ones_like(index), index], 1)).unbind(-1)
        return moment / total

    def contributions(self, at: QKPairs | None = None) -> Float[Tensor, "n head pair"]:
        """Contributions of the contents at their own positions, or moved to others."""
        if at is None and self.geometry.remapping is None:
            return self.real
        distance, factor = distances_met(self.qk_pairs if at is None else at, self.geometry)
        return self.turned_to(distance, factor)

    def turned_to(
        self, distance: Float[Tensor, "n head pair"], factor: Float[Tensor, "n head pair"] | None
    ) -> Float[Tensor, "n head pair"]:
        """Contributions of the contents at another distance, times a factor (None means 1).

        All axes may have size 1.
        """
        steps = distance - self.qk_pairs.distance[:, None, None]
        # In float64 up to here: after thousands of turns float32 has no digits left.
        angle = torch.remainder(steps * self.geometry.inv_freq.to(steps.device), 2 * math.pi)
        angle = angle.to(self.real.dtype)
        turned = (self.real * angle.cos()).addcmul_(self.imag, angle.sin(), value=-1)
        return turned if factor is None else turned * factor.to(turned.dtype)


def distances_met(
    pairs: QKPairs, geometry: LayerGeometry
) -> tuple[Float[Tensor, "n head pair"], Float[Tensor, "n head pair"] | None]:
    """Distance of queries and keys after remapping, and the factor on their scores.

    The axes of head and pair may have size 1; a factor of None means 1.
    """
    if geometry.remapping is None:
        return pairs.distance[:, None, None].double(), None
    return geometry.remapping.distances(pairs.q_pos, pairs.k_pos, geometry.n_heads)


def products(
    rot_q: Float[Tensor, "pos head d_head"],
    rot_k: Float[Tensor, "pos kv_head d_head"],
    geometry: LayerGeometry,
    pairs: QKPairs,
    scale: Scale,
) -> Iterator[tuple[slice, Product]]:
    """Products of the pairs, in chunks, and which of the pairs each chunk holds.

    Memory: a few arrays of 1 MB on a CPU, 268 MB on a GPU.
    """
    at_once = _CHUNK_GPU if rot_q.is_cuda else _CHUNK
    step = max(1, at_once // (geometry.n_heads * geometry.n_pairs))
    precision = torch.promote_types(rot_q.dtype, torch.float32)
    factor = scale_factor(scale, geometry)
    # Where neighbouring heads share a key (always, except by hand), keys are not copied per head.
    neighbours = geometry.kv_head == share_keys(rot_q.shape[1], rot_k.shape[1])
    for start in range(0, len(pairs.q_pos), step):
        chunk = slice(start, start + step)
        some = QKPairs(*(x[chunk] for x in pairs))
        q, k = rot_q.index_select(0, some.q_pos), rot_k.index_select(0, some.k_pos)
        if neighbours:
            q, k = q.unflatten(1, (k.shape[1], -1)), k[:, :, None]
        else:
            q, k = q[:, :, None], expand_keys(k, q, geometry)[:, :, None]
        (q1, q2), (k1, k2) = (split_pairs(x.to(precision), geometry) for x in (q, k))
        real = (q1 * k1).addcmul_(q2, k2).flatten(1, 2)
        imag = (q2 * k1).addcmul_(q1, k2, value=-1).flatten(1, 2)
        if factor != 1:
            real, imag = real.mul_(factor), imag.mul_(factor)
        yield chunk, Product(real, imag, some, geometry)

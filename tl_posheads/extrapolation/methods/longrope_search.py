"""Search of LongRoPE's factors by the model's own loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import extended_layers, require_factor, require_whole
from tl_posheads.extrapolation.methods.longrope import LongRoPE
from tl_posheads.extrapolation.methods.ntk import NTK
from tl_posheads.extrapolation.methods.unchanged import Unchanged
from tl_posheads.extrapolation.methods.yarn import YaRN
from tl_posheads.hooks.changes import trained_of
from tl_posheads.hooks.inputs import documents_of
from tl_posheads.hooks.logprobs import mean_loss
from tl_posheads.hooks.model import LensModel, model_name
from tl_posheads.hooks.rotary_geometry import RotaryGeometry

_Factors = tuple[float, ...]
_HIGHEST = 1.25  # the paper's search space ends at this times the scaling factor
_MUTATED = 0.3  # share of pairs that a mutation changes


def search_longrope(
    model: LensModel,
    tokens: Tensor | Sequence[Tensor],
    *,
    factor: float,
    trained: int | None = None,
    population: int = 16,
    generations: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> LongRoPE:
    """Evolve one factor per pair to lower the model's loss on ``tokens``.

    A small form of the evolutionary search in section 3 of Ding et al. 2024, arXiv 2402.13753.
    It begins with linear interpolation, NTK, YaRN and mutations of these. The better half of each
    generation stays; mutations and crossovers of it fill the other. Factors lie between 1 and
    1.25 times ``factor`` in steps of 0.01 and don't fall from one pair to the next slower one,
    the paper's constraint (a child that breaks it is sorted, not thrown away). The paper's first
    tokens that are left uninterpolated (n-hat) are not searched for.

    Takes up to ``population * (generations + 2) / 2`` passes over the texts.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE, no method in force.
        tokens: texts longer than ``trained``, ``[doc, pos]`` or a list.
        factor: how much longer texts are to be than ``trained``, 1 or more.
        trained: positions that the model was trained on; its checkpoint's own by default.
        population: candidates in a generation, 4 or more.
        generations: rounds after the first.
        seed: of everything random.
        progress: show a bar with the best loss in nats per token.

    Returns:
        The best candidate: no worse on ``tokens`` than linear interpolation, NTK or YaRN factors.

    Raises:
        PosheadsError: an invalid setting, texts that aren't longer than ``trained``, or what
            entering a method raises.

    Example:
        >>> method = search_longrope(model, long_texts, factor=4)          # doctest: +SKIP
        >>> with method(model):                                            # doctest: +SKIP
        ...     scores = ph.score_heads(model, long_texts)
    """
    require_factor("search_longrope", factor)
    require_whole(
        "search_longrope", population=(population, 4), generations=(generations, 0), seed=(seed, 0)
    )
    known = trained_of(model, trained)
    with Unchanged()(model, trained=known):
        documents = documents_of(model, tokens, None, 0)
        geometry = RotaryGeometry.from_model(model)
    shortest = min(len(document) for document in documents)
    if shortest <= known:
        raise PosheadsError(
            f"search_longrope was given a text of {shortest} tokens for {model_name(model)}, "
            f"trained on {known}; give longer texts, or a smaller trained=..."
        )
    inv_freq = next(iter(extended_layers(geometry).values())).inv_freq

    def method(factors: _Factors) -> LongRoPE:
        return LongRoPE(factors, factor=factor, original_length=known)

    losses: dict[_Factors, float] = {}
    targets = [torch.arange(1, len(document)) for document in documents]

    def loss(factors: _Factors) -> float:
        if factors not in losses:
            with method(factors)(model, trained=known):
                mean = mean_loss(model, documents, targets)
            losses[factors] = mean if np.isfinite(mean) else float("inf")
        return losses[factors]

    def allowed(factors: Any) -> _Factors:
        kept = np.clip(np.round(np.asarray(factors, dtype=float), 2), 1.0, _HIGHEST * factor)
        return tuple(float(f) for f in np.sort(kept))

    random = np.random.default_rng(seed)

    def mutation(parent: _Factors) -> _Factors:
        where = random.random(len(parent)) < _MUTATED
        where[random.integers(len(parent))] = True
        change = np.exp(0.25 * np.log(_HIGHEST * factor) * random.standard_normal(len(parent)))
        return allowed(np.where(where, np.asarray(parent) * change, parent))

    def crossover(one: _Factors, other: _Factors) -> _Factors:
        return allowed(np.where(random.random(len(one)) < 0.5, one, other))

    first = [np.full(len(inv_freq), float(factor))]
    for start in (NTK(factor), YaRN(factor)) if len(inv_freq) > 1 else ():
        first.append((inv_freq / start.frequencies(inv_freq, known, shortest).inv_freq).numpy())
    alive = [allowed(factors) for factors in first]
    alive += [mutation(alive[i % len(first)]) for i in range(population - len(first))]
    with tqdm(total=generations, desc="LongRoPE", disable=not progress) as bar:
        for _ in range(generations):
            alive = sorted(alive, key=loss)[: population // 2]
            bar.set_postfix(loss=f"{loss(alive[0]):.4f}")
            while len(alive) < population:
                one, other = (alive[i] for i in random.integers(population // 2, size=2))
                alive.append(mutation(one) if len(alive) % 2 else crossover(one, other))
            bar.update()
    return method(min(alive, key=loss))

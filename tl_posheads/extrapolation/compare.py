"""Runs texts and tasks under several methods, one after the other, on one live model."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import Method, require_longer, require_positive
from tl_posheads.extrapolation.comparison import ExtrapolationComparison
from tl_posheads.extrapolation.methods.theta import Theta
from tl_posheads.extrapolation.methods.unchanged import Unchanged
from tl_posheads.extrapolation.observing import (
    Asked,
    TextUnder,
    observe_once,
    scored_layers,
    scores_of,
)
from tl_posheads.hooks.changes import any_length, changes_of, require_bare, trained_of
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.heads import Head, heads_of
from tl_posheads.hooks.inputs import by_content, digest_of, documents_of, layers_of
from tl_posheads.hooks.lengths import checkpoint_length
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.hooks.model import LensModel, require_clean, require_rotary
from tl_posheads.hooks.provenance import model_facts, versions
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.io.corpora import load_corpus
from tl_posheads.rotary.contributions import Scale
from tl_posheads.scoring.all_pairs import Weighting
from tl_posheads.scoring.draws import Settings
from tl_posheads.scoring.head_scores import HeadScores
from tl_posheads.scoring.score import empty_accumulator, geometry_by_length, sweep
from tl_posheads.tasks.base import Prompt, Task

Tokens = Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]]


def compare_extrapolations(
    model: LensModel,
    methods: Sequence[Method],
    tokens: Tokens,
    *,
    heads: Sequence[Head] | int | float = 0.05,
    trained: int | None = None,
    slower_than: float | Literal["trained"] = "trained",
    tasks: Sequence[Task] = (),
    layers: Sequence[int] | None = None,
    qk_pairs: Literal["auto", "all"] | int = "auto",
    weighting: Weighting = "pair",
    scale: Scale = "none",
    skip_first: int = 0,
    n_queries: int = 1024,
    n_scored: int = 4096,
    seed: int = 0,
    checkpoint: str | None = None,
    progress: bool = True,
) -> ExtrapolationComparison:
    """What methods do to dominant dimensions, scores, loss and tasks, within and past training.

    The third finding of Hong et al. 2024 (arXiv 2410.08703, section 4.3): methods that extend the
    context stretch the pattern of the dominant dimension, and "the high-dimensional attention
    allocation" with it; that of the unmodified model breaks.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE.
        methods: of :mod:`tl_posheads.extrapolation`; the unmodified model, ``Unchanged()``, is put
            first if it isn't among them.
        tokens: texts longer than the training length. ``load_corpus`` makes them inside
            ``with Unchanged()(model):``.
        heads: those whose curves are measured; a number is as in ``scores.top``, of the unmodified
            model's scores within the training length.
        trained: positions that the model was trained on; its checkpoint's own by default. A
            shorter one gives a warning, and a note in ``provenance`` and ``verdict()``.
        slower_than: rotary pairs (the paper's high dimensions) are slow if their wavelength in the
            unmodified model exceeds this many tokens. By default the training length: such pairs
            never completed a turn in training, so they meet new angles past it, and methods are
            designed to change them. The same pairs are used under every method.
        tasks: run under every method; give lengths on both sides of the training length.
        layers: those whose heads are scored; all by default.
        qk_pairs, weighting: of the scores, as in ``score_heads``.
        scale: of the contributions, for curves and scores, as in ``score_heads``.
        skip_first: positions at every text's start left out of curves and scores.
        n_queries: queries per text that a curve is computed from, evenly spaced.
        n_scored: tokens per text whose loss is measured, evenly spaced.
        seed: of everything drawn.
        checkpoint: folder that keeps every finished text; the same call resumes from it.
        progress: show a bar.

    Returns:
        :class:`ExtrapolationComparison`.

    Memory: one text and layer at a time through fused attention where the model allows it
    (methods that rescore, in blocks of queries); elsewhere the lens's eager
    ``[head, pos, pos]`` tensors. Logits of ``n_scored`` positions.

    Raises:
        PosheadsError: no RoPE, no methods, the same one twice, texts no longer than the training
            length or two that are the same, heads that don't exist, a method that refuses the
            model, another ``qk_pairs``, ``weighting`` or ``scale``, ``slower_than`` not above 0.

    Example:
        >>> from tl_posheads import extrapolation as ex
        >>> found = compare_extrapolations(                     # doctest: +SKIP
        ...     model, [ex.Linear(4), ex.YaRN(4)], tokens, trained=256)
        >>> found.verdict(); found.to_pandas(); found.plot()    # doctest: +SKIP
    """
    require_rotary(model)
    require_clean(model)
    require_bare(model)
    known = trained_of(model, trained)
    chosen, limit = _methods(methods), _limit(slower_than, known)
    wanted = layers_of(model, layers)
    with any_length(model):
        documents = documents_of(model, tokens, None, skip_first)
        prompts = [(task.name, task.prompts(model)) for task in tasks]
    _check_lengths(documents, known, skip_first)
    by_key = by_content(documents)
    settings = Settings.of(
        qk_pairs, len(by_key), weighting=weighting, scale=scale, skip_first=skip_first, seed=seed
    )
    for method in chosen:
        with method(model, trained=known):
            pass  # a method that refuses the model does so before the first pass
    curved = _heads(model, heads, [(unit, text[:known]) for unit, text in by_key], wanted, settings)
    slow = _slow_pairs(model, curved, known, limit)
    plan = Asked(tuple(curved), slow, tuple(wanted), known, settings, n_queries, n_scored)
    facts: dict[str, Any] = {
        **model_facts(model),
        "trained": known,
        **_note(model, known),
        "methods": [repr(method) for method in chosen],
        "qk_pairs": qk_pairs,
        **asdict(settings),
        "n_queries": n_queries,
        "n_scored": n_scored,
        "heads": [list(head) for head in curved],
        "slower_than": slower_than,
        "slow_pairs": [list(pairs) for pairs in slow],
        "layers": wanted,
        "tasks": [repr(task) for task in tasks],
        **_text_facts(by_key),
    }
    kept = Checkpoint(checkpoint, facts)
    total = len(chosen) * (len(by_key) + sum(len(p) for _, p in prompts))
    results, answers = [], []
    with tqdm(total=total, desc="methods", disable=not progress, dynamic_ncols=True) as bar:
        for number, method in enumerate(chosen):
            bar.set_description(method.name[:40])
            with method(model, trained=known):
                results.append(_texts(model, by_key, plan, kept, number, bar))
                for name, asked in prompts:
                    answers += _answers(model, method.name, name, asked, bar)
    return ExtrapolationComparison.of(
        methods=[method.name for method in chosen],
        settings=[_settings(method) for method in chosen],
        heads=list(curved),
        slow=slow,
        trained=known,
        texts=[texts for texts, _, _ in results],
        within=[within for _, within, _ in results],
        whole=[whole for _, _, whole in results],
        tasks=pd.DataFrame(
            answers, columns=["method", "task", "length", "prompt", "logprob", "exact"]
        ),
        provenance={**facts, "versions": versions()},
    )


def sweep_theta(
    model: LensModel,
    tokens: Tokens | None = None,
    *,
    bases: Sequence[float],
    trained: int | None = None,
    **options: Any,
) -> ExtrapolationComparison:
    """Curves, scores and loss against the base of the frequencies, the paper's open question.

    The unmodified model comes first, then the model with each base in place of its own; nothing is
    retrained.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE.
        tokens: texts longer than the training length; by default two of the corpus
            ``python-docs``, twice as long.
        bases: above 1.
        trained: as in :func:`compare_extrapolations`.
        options: other arguments of :func:`compare_extrapolations`.

    Returns:
        :class:`ExtrapolationComparison`, with a column ``base`` in ``to_pandas()``.

    Raises:
        PosheadsError: no bases, and what :func:`compare_extrapolations` refuses.

    Example:
        >>> sweep_theta(model, bases=[1e4, 1e5, 1e6]).to_pandas()   # doctest: +SKIP
    """
    require_rotary(model)
    if not len(bases):
        raise PosheadsError("bases=[] was given; expected numbers above 1, like [1e4, 1e5, 1e6]")
    methods = [Theta(float(base)) for base in bases]
    if tokens is None:
        length = 2 * trained_of(model, trained)
        with any_length(model):
            tokens = load_corpus("python-docs", model, n_docs=2, length=length)
    return compare_extrapolations(model, methods, tokens, trained=trained, **options)


def _methods(methods: Sequence[Method]) -> list[Method]:
    chosen = list(methods)
    wrong = [method for method in chosen if not isinstance(method, Method)]
    if wrong or not chosen:
        raise PosheadsError(
            f"methods={reprlib.repr(methods)} was given; expected methods of "
            "tl_posheads.extrapolation, like [Linear(4), YaRN(4)]"
        )
    names = [method.name for method in chosen]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PosheadsError(f"{twice} was given twice; name every method once")
    bare = [method for method in chosen if isinstance(method, Unchanged)]
    return [*(bare or [Unchanged()]), *(m for m in chosen if not isinstance(m, Unchanged))]


def _check_lengths(documents: Sequence[Tensor], trained: int, skip_first: int) -> None:
    require_longer(documents, trained)
    if trained - skip_first < 2:
        raise PosheadsError(
            f"skip_first={skip_first} was given for a model trained on {trained}; scores within "
            "that length need at least 2 positions beyond those skipped"
        )


def _heads(
    model: LensModel,
    heads: Sequence[Head] | int | float,
    near: Sequence[tuple[str, Tensor]],
    layers: list[int],
    settings: Settings,
) -> list[Head]:
    """The heads given; for a number, the unmodified model's best within the training length."""
    if not isinstance(heads, int | float):
        return heads_of(model, heads)
    bare = empty_accumulator(model, near, layers, settings)
    sweep(model, bare, near, Checkpoint(None, {}))
    return bare.scores().top(heads)


def _text_facts(by_key: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    return {
        "tokens_sha256": digest_of(by_key),
        "n_documents": len(by_key),
        "longest": max(len(document) for _, document in by_key),
    }


def _limit(slower_than: float | Literal["trained"], trained: int) -> float:
    """Wavelength, in tokens, above which a pair is slow."""
    if slower_than == "trained":
        return trained
    require_positive("compare_extrapolations", slower_than=slower_than or 0)
    return slower_than


def _slow_pairs(
    model: LensModel, heads: Sequence[Head], trained: int, limit: float
) -> tuple[tuple[int, ...], ...]:
    """Rotary pairs of each head with a wavelength above ``limit`` in the unmodified model."""
    layers = sorted({layer for layer, _ in heads})
    geometry = RotaryGeometry.from_model(model, length=trained, layers=layers)
    return tuple(
        tuple((geometry[layer].wavelengths > limit).nonzero().flatten().tolist())
        for layer, _ in heads
    )


def _note(model: LensModel, trained: int) -> dict[str, str]:
    """Warn if the given training length is shorter than the model's own context."""
    own = checkpoint_length(model)
    if own is None or trained >= own:
        return {}
    note = (
        f"trained={trained:,} is shorter than the model's own context of {own:,} tokens: it may "
        "have seen distances between the two in training, so results past that length may be about "
        "lengths that it knows"
    )
    warnings.warn(note, stacklevel=3)
    return {"note": note}


def _settings(method: Method) -> dict[str, Any]:
    """A method's settings as numbers and words, for table columns."""
    fields = asdict(method) if is_dataclass(method) else {}
    plain = {k: v for k, v in fields.items() if isinstance(v, int | float | str)}
    return {"name": type(method).__name__, **plain}


def _texts(
    model: LensModel,
    by_key: Sequence[tuple[str, Tensor]],
    plan: Asked,
    kept: Checkpoint,
    number: int,
    bar: Any,
) -> tuple[list[TextUnder], HeadScores, HeadScores]:
    """Measure every text under the method in force; also its scores within training and whole."""
    longest = max(len(document) for _, document in by_key)
    geometry = RotaryGeometry.from_model(model, length=longest)
    geometry_of = geometry_by_length(model, geometry, range(len(geometry)))
    here = replace(plan, layers=scored_layers(geometry, plan.layers))
    found = {}
    for i, (unit, document) in enumerate(by_key):
        own = geometry_of(len(document))
        found[unit] = observe_once(model, document, unit, own, here, kept, f"{number}-{i}")
        bar.update(1)
    facts = {"inside": [change.name for change in changes_of(model)]}
    within, whole = (
        scores_of(
            {unit: getattr(text, rows) for unit, text in found.items()}, geometry, here, facts
        )
        for rows in ("within_rows", "whole_rows")
    )
    return list(found.values()), within, whole


def _answers(
    model: LensModel, method: str, task: str, prompts: Sequence[Prompt], bar: Any
) -> list[dict[str, Any]]:
    rows = []
    with fused_attention(model):
        for i, prompt in enumerate(prompts):
            logprob, hit = target_logprobs(model, prompt.tokens, prompt.targets)
            rows.append(
                {
                    "method": method,
                    "task": task,
                    "length": len(prompt.tokens),
                    "prompt": i,
                    "logprob": float(np.mean(logprob.double().numpy())),
                    "exact": bool(hit.all()),
                }
            )
            bar.update(1)
    return rows

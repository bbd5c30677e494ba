"""Activation patching of head outputs: which heads carry what a long-context metric measures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import patching as lens_patching

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.heads import Head, Heads, heads_of
from tl_posheads.hooks.inputs import documents_of
from tl_posheads.hooks.lengths import own_frequencies
from tl_posheads.hooks.model import (
    LensModel,
    attention_of,
    input_device,
    instance_method,
    model_name,
    require_clean,
    require_lens,
)
from tl_posheads.hooks.provenance import model_facts, versions
from tl_posheads.io.result import Files, Result
from tl_posheads.rotary.precision import widened
from tl_posheads.scoring.head_scores import HeadScores
from tl_posheads.statistics.effects import spearman
from tl_posheads.statistics.ranks import spearman_of_few

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, ""] | float]


@dataclass(frozen=True)
class RankCorrelation:
    """How well the positional score's ranking of heads agrees with that of patching.

    Attributes:
        rho: Spearman's rho between the score and the share that patching a head restores.
        ci_low, ci_high: 95 % percentile interval, by bootstrap over heads.
        p: two-sided p-value, heads taken as independent; exact up to eight heads.
        n_heads: heads that have both numbers.
    """

    rho: float
    ci_low: float
    ci_high: float
    p: float
    n_heads: int


@dataclass(frozen=True, eq=False, repr=False)
class HeadPatching(Result):
    """What patching each head's output from the clean into the corrupted run does to a metric.

    Attributes:
        effects: one row per head, in the order asked for. ``layer``, ``head``; ``patched``, the
            metric with this head patched; ``effect``, patched - corrupted, in the metric's unit;
            ``recovered``, effect / (clean - corrupted): 0 changes nothing, 1 restores the clean
            value, negative leads away from it. Where scores were given also ``rho``, the head's
            positional score, and ``rank``, its place among all scored heads (1 = highest).
        clean, corrupted: the metric on the two runs, nothing patched.
        provenance: model (``heads`` is its layers and heads), input, metric, seed, versions.
    """

    effects: Annotated[
        pd.DataFrame,
        "layer:integer head:integer patched:floating effect:floating recovered:floating",
    ]
    clean: float
    corrupted: float
    provenance: dict[str, Any]

    _files = Files("patching", "patching results", "patch again")

    def _check(self) -> None:
        if self.effects.empty:
            raise ValueError("no heads")

    def _about(self) -> str:
        return (
            f"{self.provenance.get('model')}: {len(self.effects)} heads; metric {self.clean:.3g} "
            f"clean, {self.corrupted:.3g} corrupted"
        )

    def _finding(self) -> list[str]:
        known = self.effects.dropna(subset=["recovered"])
        if known.empty:
            return []
        best = known.loc[known["recovered"].idxmax()]
        return [
            f"restores most: L{best['layer']:.0f}H{best['head']:.0f}, {best['recovered']:.2f} of "
            "the difference"
        ]

    def to_pandas(self) -> pd.DataFrame:
        """A copy of ``effects``."""
        return self.effects.copy()

    def rank_correlation(
        self, scores: HeadScores | None = None, *, n_boot: int = 2000, seed: int | None = None
    ) -> RankCorrelation:
        """Spearman's rho between the heads' positional scores and what patching them restores.

        Effects are signed, towards the clean run: a positive rho means that heads with a higher
        score restore more.

        Args:
            scores: those given to :func:`patch_heads` by default.
            n_boot: resamples of the heads.
            seed: of the resamples; that of :func:`patch_heads` by default.

        Raises:
            PosheadsError: no scores, or another model's; fewer than three heads with a score; all
                scores or all effects equal.
        """
        if n_boot < 1:
            raise PosheadsError(f"n_boot={n_boot} was given; expected at least 1")
        table = self.effects
        if scores is not None:
            table = _with_scores(table, scores, tuple(self.provenance["heads"]))
        elif "rho" not in table:
            raise PosheadsError("there are no scores to compare; give what score_heads returns")
        both = table[["rho", "recovered"]].to_numpy(dtype=float)
        both = both[np.isfinite(both).all(axis=1)]
        if len(both) < 3:
            raise PosheadsError(
                f"{len(both)} of the patched heads have a positional score; expected at least 3"
            )
        if not np.ptp(both, axis=0).all():
            raise PosheadsError(
                f"all scores or all effects of the {len(both)} heads are equal, so they have no "
                "order; choose other heads or another metric"
            )
        rho, p = spearman_of_few(both[:, 0], both[:, 1])
        random = np.random.default_rng(self.provenance["seed"] if seed is None else seed)
        drawn = both[random.integers(len(both), size=(n_boot, len(both)))]
        # A resample of a few heads can hold one head alone; it has no order and is left out.
        low, high = np.nanpercentile(spearman(drawn[:, :, 0], drawn[:, :, 1]), [2.5, 97.5])
        return RankCorrelation(rho, float(low), float(high), p, len(both))


def patch_heads(
    model: LensModel,
    clean: Int[Tensor, "batch pos"] | Int[Tensor, " pos"] | Sequence[Int[Tensor, " pos"]],
    corrupted: Int[Tensor, "batch pos"] | Int[Tensor, " pos"] | Sequence[Int[Tensor, " pos"]],
    metric: Metric,
    heads: Heads | None = None,
    *,
    scores: HeadScores | None = None,
    seed: int = 0,
    progress: bool = True,
) -> HeadPatching:
    """Patch each head's output by itself from the clean run into the corrupted one.

    Activation patching (Meng et al. 2022, arXiv 2202.05262) of ``hook_z`` at all positions with
    :func:`transformer_lens.patching.generic_activation_patch`; for all heads its numbers are
    those of ``get_act_patch_attn_head_out_all_pos``. One forward pass per head and two more.

    Args:
        model: HookedTransformer or TransformerBridge in eval mode. Hooks inside a
            ``with model.hooks(...)`` stay in force in every run; the model is left as it was.
        clean: tokens of the run to copy from, for example a prompt with the needle; rows of equal
            length, without padding.
        corrupted: tokens of the run to copy into, of the same shape.
        metric: one number from the logits ``[batch, pos, d_vocab]``, a scalar tensor or a float:
            for example the log-probability of the answer. Called without gradient.
        heads: ``(layer, head)`` pairs, patched in this order; all of the model by default. With
            grouped queries these are query heads, each with its own output.
        scores: positional scores of the same model, reported beside the effects.
        seed: of the bootstrap in :meth:`HeadPatching.rank_correlation`; patching draws nothing.
        progress: show a bar.

    Memory: ``[batch, pos, head, d_head]`` for each layer asked for, and one forward pass.

    Raises:
        PosheadsError: heads that the model doesn't have, or one twice; tokens of unequal shapes,
            outside the vocabulary or longer than the context; clean and corrupted are the same;
            a metric that can't be called, gives no single finite number, or the same for both
            runs; scores of another model; forgotten hooks; a model in training mode or without
            head outputs.

    Example:
        >>> def log_prob(logits):                               # doctest: +SKIP
        ...     return logits[:, -1].log_softmax(-1)[:, answer].mean()
        >>> patching = patch_heads(model, clean, corrupted, log_prob,
        ...     scores.top(0.05), scores=scores)                # doctest: +SKIP
        >>> patching.rank_correlation().rho                     # doctest: +SKIP
    """
    require_lens(model)
    if heads is None:
        layers = [i for i in range(model.cfg.n_layers) if attention_of(model, i) is not None]
        heads = [(layer, head) for layer in layers for head in range(model.cfg.n_heads)]
    pairs = heads_of(model, heads)
    if not pairs:
        raise PosheadsError("heads is empty; name at least one, or leave it out for all")
    require_clean(model)
    inputs = _checked_tokens(model, clean, corrupted)
    if not callable(metric):
        raise PosheadsError(f"metric is a {type(metric).__name__}; expected a function of logits")
    if any(module.training for module in model.modules()):
        raise PosheadsError(
            f"{model_name(model)} is in training mode, where dropout acts; call model.eval() first"
        )
    shape, device = (int(model.cfg.n_layers), int(model.cfg.n_heads)), input_device(model)
    if scores is not None:
        _require_scores(scores, shape)
    _rehearse(metric, inputs[0].shape, model, seed)
    clean_tokens, corrupted_tokens = (tokens.to(device) for tokens in inputs)
    with torch.no_grad(), own_frequencies(model):
        names = [f"blocks.{layer}.attn.hook_z" for layer in sorted({layer for layer, _ in pairs})]
        logits, cache = model.run_with_cache(clean_tokens, names_filter=names)
        _require_head_outputs(model, cache, names)
        clean_value = _number(metric, logits, "clean run")
        del logits
        corrupted_value = _number(metric, model(corrupted_tokens), "corrupted run")
        if clean_value == corrupted_value:
            raise PosheadsError(
                f"the metric is {clean_value:.6g} on both runs, so there is nothing to restore; "
                "choose prompts or a metric that differ"
            )
        patched = _sweep(model, corrupted_tokens, cache, metric, pairs, progress)
    effects = pd.DataFrame(pairs, columns=["layer", "head"]).assign(patched=patched)
    effects["effect"] = effects["patched"] - corrupted_value
    effects["recovered"] = effects["effect"] / (clean_value - corrupted_value)
    if scores is not None:
        effects = _with_scores(effects, scores, shape)
    facts = {
        **model_facts(model),
        "n_heads": len(pairs),
        "heads": list(shape),
        "tokens": list(clean_tokens.shape),
        "tokens_sha256": [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in inputs],
        "metric": getattr(metric, "__name__", type(metric).__name__),
        "seed": seed,
        "versions": versions(),
    }
    return HeadPatching(effects, clean_value, corrupted_value, facts)


def _checked_tokens(model: LensModel, clean: Any, corrupted: Any) -> list[Int[Tensor, "batch pos"]]:
    both = [documents_of(model, tokens, None, 0) for tokens in (clean, corrupted)]
    lengths = [[len(row) for row in rows] for rows in both]
    if lengths[0] != lengths[1] or len(set(lengths[0])) > 1:
        raise PosheadsError(
            f"clean has rows of {lengths[0]} tokens and corrupted of {lengths[1]}; patching copies "
            "position by position, so give prompts of the same length"
        )
    stacked = [torch.stack(rows) for rows in both]
    if torch.equal(*stacked):
        raise PosheadsError("clean and corrupted are the same tokens; change the needle in one")
    return stacked


def _require_head_outputs(model: LensModel, cache: Any, names: Sequence[str]) -> None:
    for name in names:
        shape = tuple(cache[name].shape) if name in cache else ()
        if len(shape) != 4 or shape[2] != model.cfg.n_heads:
            raise PosheadsError(
                f"{name} of {model_name(model)} has the shape {shape}; patching needs head "
                f"outputs [batch, pos, {model.cfg.n_heads}, d_head], so leave the layer out"
            )


def _rehearse(metric: Metric, shape: Sequence[int], model: LensModel, seed: int) -> None:
    """Refuse a metric that gives no number, before any pass, by calling it on random logits."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, int(model.cfg.d_vocab), generator=random)
    with torch.no_grad():
        _number(metric, logits.to(input_device(model)), "rehearsal with random logits")


def _number(metric: Metric, logits: Tensor, run: str) -> float:
    """The metric as a Python float; NaN, infinity and anything but a number are refused."""
    # bfloat16 has two or three digits; a logarithm of a softmax would be rounded to them.
    got: Any = metric(widened(logits))
    array = got.detach().cpu() if isinstance(got, Tensor) else np.asarray(got)
    if array.ndim or not isinstance(value := array.item(), int | float):
        raise PosheadsError(
            f"the metric gave {type(got).__name__} {got!r:.80} on the {run}; expected one real "
            "number, so average over the batch and choose positions"
        )
    if not math.isfinite(value):
        raise PosheadsError(
            f"the metric is {value} on the {run}; expected a finite number, so look at the model's "
            "dtype (float32 or bfloat16) and at logarithms of zero"
        )
    return float(value)


def _sweep(
    model: LensModel,
    tokens: Tensor,
    cache: Any,
    metric: Metric,
    pairs: Sequence[Head],
    progress: bool,
) -> list[float]:
    values: list[float] = []

    def checked(logits: Tensor) -> Tensor:
        layer, head = pairs[len(values)]
        values.append(_number(metric, logits, f"run with layer {layer} head {head} patched"))
        return torch.tensor(values[-1])

    def setter(z: Tensor, index: Sequence[int], clean_z: Any) -> Tensor:
        # The lens writes into z, which may be a tensor that a user's hook returned and keeps.
        patched: Tensor = lens_patching.layer_head_vector_patch_setter(z.clone(), index, clean_z)
        return patched

    # The lens shows its own progress bar and has no argument to turn it off.
    bar = partial(tqdm, desc="patching", unit="head", disable=not progress, dynamic_ncols=True)
    with instance_method(lens_patching, "tqdm", bar):
        lens_patching.generic_activation_patch(
            cast(Any, model),
            tokens,
            cache,
            checked,
            setter,
            activation_name="z",
            index_df=pd.DataFrame(pairs, columns=["layer", "head"]),
        )
    return values  # what the lens returns is rounded to float32


def _require_scores(scores: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(scores, HeadScores) or tuple(scores.rho.shape) != shape:
        given = getattr(getattr(scores, "rho", None), "shape", type(scores).__name__)
        raise PosheadsError(
            f"scores of {given} were given for a model of {shape[0]} layers and {shape[1]} heads; "
            "expected what score_heads returns for it"
        )


def _with_scores(effects: pd.DataFrame, scores: HeadScores, shape: tuple[int, ...]) -> pd.DataFrame:
    _require_scores(scores, shape)
    ranks = {place: rank for rank, place in enumerate(scores._ranked(), start=1)}
    places = list(zip(effects["layer"], effects["head"], strict=True))
    return effects.assign(
        rho=[float(scores.rho[place]) for place in places],
        rank=pd.array([ranks.get(place) for place in places], dtype="Int64"),
    )

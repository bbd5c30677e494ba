"""``profile_heads``: the positional score and other measures of heads, on the same texts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import rotary_hook_points
from tl_posheads.hooks.inputs import by_content, documents_of
from tl_posheads.hooks.model import LensModel, require_clean, require_rotary
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.rotary.contributions import Scale, check_scale
from tl_posheads.scoring.head_scores import HeadScores
from tl_posheads.scoring.score import Units, facts_of, geometry_by_length, inputs_of, score_heads
from tl_posheads.studies.given_scores import facts_of_scores, require_scores_of
from tl_posheads.studies.profile.measure import Collected, measure_text
from tl_posheads.studies.profile.needles import needle_prompts, retrieval_scores
from tl_posheads.studies.profile.results import HeadProfile
from tl_posheads.studies.profile.settings import (
    POSITIONAL,
    ProfileSettings,
    columns_of,
    measures_of,
)
from tl_posheads.tasks.base import Prompt, Task
from tl_posheads.tasks.prompts import prompts_digest

N_NEEDLES = 6


def profile_heads(
    model: LensModel,
    tokens: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]],
    *,
    scores: HeadScores | None = None,
    needles: int | Task | Sequence[Prompt] = N_NEEDLES,
    measures: Sequence[str] | None = None,
    settings: ProfileSettings | None = None,
    scale: Scale = "none",
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> HeadProfile:
    """The positional score of every head beside other measures of what it does, on the same texts.

    ==================  ==========================================================================
    measure             columns
    ==================  ==========================================================================
    (always)            ``positional``: Hong et al.'s rho, the mean over the texts
    ``retrieval``       ``retrieval``: share of a needle's tokens that the head copies
    ``induction``       ``induction``: attention on tokens behind earlier copies of the query's
    ``previous_token``  ``previous_token``: attention on the token before
    ``sink``            ``sink``: attention on the first token
    ``distance``        ``distance``: mean distance of attention in tokens; ``distance_beyond_sink``
                        without the first token
    ``long_context``    ``long_context``: share of queries that need more than their neighbours,
                        predicted; ``long_context_oracle``: actual
    ``massive``         ``massive_q``, ``massive_k``: share of massive dimensions;
                        ``slow_norm_q``, ``slow_norm_k``: share of the norms in dimensions that
                        don't turn once in the text
    ``utility``         ``dimensions_used``: share of its dimensions that the head needs;
                        ``slow_utility``: share of these that don't turn once
    ==================  ==========================================================================

    Each is defined, with its paper, in the function of its own in ``tl_posheads.profile``. The
    value of a head is the mean over the texts of each text's value; retrieval is measured on the
    needles' prompts instead.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE; left as it was.
        tokens: as for ``score_heads``.
        scores: of this model; None scores the same texts. ``provenance["scores"]`` says which.
        needles: prompts for the retrieval score, as a number of ``tasks.Needle`` of 512 tokens, a
            task, or prompts. 0 leaves it out.
        measures: names from the left column; all by default.
        settings: thresholds and the like.
        scale: of the contributions, as ``score_heads`` has it; where ``scores`` are given, theirs
            counts.
        seed: of the needles and of ``score_heads``.
        checkpoint: folder that keeps every finished document and needle, the scores' too; the same
            call resumes from it.
        progress: show a bar.

    Returns:
        :class:`HeadProfile`. What the model can't give is NaN, and ``provenance["missing"]`` says
        why.

    Memory: the lens's eager attention of one layer of one text, and some ``[pos, pos]`` tensors
    in float64 of one head.

    Raises:
        PosheadsError: an unknown measure, scores of other heads, a bad number of needles; a
            checkpoint of another run; what ``score_heads`` refuses.

    Example:
        >>> profile = profile_heads(model, tokens, scores=scores)       # doctest: +SKIP
        >>> profile.correlation()["positional"]                         # doctest: +SKIP
    """
    require_rotary(model)
    wanted = measures_of(measures)
    check_scale(scale)
    settings = settings or ProfileSettings()
    require_clean(model)
    units = by_content(documents_of(model, tokens, None, 0))
    require_scores_of(model, scores)
    missing: dict[str, str] = {}
    prompts: list[Prompt] = []
    if "retrieval" in wanted:
        prompts, why = _prompts(model, needles, seed)
        if why:
            missing["retrieval"] = why
    window = settings.window_for(max(len(document) for _, document in units))
    settings = replace(settings, local_window=window)
    plan = {"measures": wanted, "settings": asdict(settings), "prompts": prompts_digest(prompts)}
    kept = Checkpoint(checkpoint, {**inputs_of(model, units), **plan})
    facts = facts_of(model, units)
    same = scores is None or scores.provenance.get("tokens_sha256") == facts["tokens_sha256"]
    if scores is None:
        documents = [document for _, document in units]
        own = None if checkpoint is None else Path(checkpoint) / "scores"
        scores = score_heads(
            model, documents, scale=scale, seed=seed, checkpoint=own, progress=progress
        )
    texts, retrieval, answered = _measured(model, units, prompts, wanted, settings, kept, progress)
    columns = {POSITIONAL: scores.rho.double().cpu()}
    for name in columns_of(wanted):
        found = [retrieval] if name == "retrieval" else [text.values[name] for text in texts]
        columns[name] = torch.stack(found).nanmean(0)
    if "reason" in answered:
        missing.setdefault("retrieval", answered["reason"])
    for text in texts:
        missing = {**text.reasons, **missing}
    for name, value in columns.items():
        if not bool(value.isfinite().all()):
            missing.setdefault(name, f"not defined for {int(value.isnan().sum())} heads")
        else:
            missing.pop(name, None)
    lost = [value for text in texts for value in text.lost.values()]
    provenance = {
        **facts,
        "seed": seed,
        "measures": wanted,
        "settings": asdict(settings),
        "scores": {"same_texts": same, **facts_of_scores(scores)},
        "needles": answered or None,
        "utility_lost": sum(lost) / len(lost) if lost else None,
        "missing": missing,
    }
    return HeadProfile(_table(columns), provenance)


def _measured(
    model: LensModel,
    units: Units,
    prompts: Sequence[Prompt],
    wanted: Sequence[str],
    settings: ProfileSettings,
    kept: Checkpoint,
    progress: bool,
) -> tuple[list[Collected], Tensor, dict[str, Any]]:
    """Measurements of each text, retrieval scores, and facts on these.

    What the checkpoint holds is read from it.
    """
    in_pass = [name for name in wanted if name != "retrieval"]
    n_layers = int(model.cfg.n_layers)
    total = len(prompts) + (len(units) * n_layers if in_pass else 0)
    texts, retrieval, answered = list[Collected](), torch.empty(0), dict[str, Any]()
    bar = tqdm(total=total, desc="profile", disable=not progress, dynamic_ncols=True)
    with bar, rotary_hook_points(model):
        longest = max(len(document) for _, document in units)
        window = settings.window_for(longest)
        geometry = RotaryGeometry.from_model(model, length=longest)
        geometry_of = geometry_by_length(model, geometry, range(n_layers))
        for unit, document in units if in_pass else []:
            if (found := kept.read(unit)) is not None:
                texts.append(Collected.of(found))
                bar.update(n_layers)
                continue
            own = geometry_of(len(document))
            texts.append(measure_text(model, document, own, in_pass, settings, window, bar.update))
            kept.write(unit, texts[-1].tensors())
        if "retrieval" in wanted:
            retrieval, answered = retrieval_scores(model, prompts, bar.update, kept)
    return texts, retrieval, answered


def _prompts(
    model: LensModel, needles: int | Task | Sequence[Prompt], seed: int
) -> tuple[list[Prompt], str]:
    """The prompts, or why there are none; bad prompts given by the caller are refused instead."""
    if not isinstance(needles, int):
        return needle_prompts(model, needles, seed), ""
    if needles < 0 or isinstance(needles, bool):
        needle_prompts(model, needles, seed)
    try:
        return needle_prompts(model, needles, seed), ""
    except PosheadsError as problem:
        return [], f"the default needles don't fit: {problem}"


def _table(columns: dict[str, Tensor]) -> pd.DataFrame:
    n_layers, n_heads = columns[POSITIONAL].shape
    at = torch.cartesian_prod(torch.arange(n_layers), torch.arange(n_heads))
    frame: dict[str, Any] = {"layer": at[:, 0].numpy(), "head": at[:, 1].numpy()}
    for name, value in columns.items():
        frame[name] = value.flatten().numpy()
    return pd.DataFrame(frame)

"""Scores of a whole corpus: on this machine, on a Ray cluster, or under torchrun."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.rotary.contributions import Scale
from tl_posheads.scoring.all_pairs import Weighting
from tl_posheads.scoring.distributed.job import Job
from tl_posheads.scoring.head_scores import HeadScores

Engine = Literal["local", "ray", "torchrun"]


def score_corpus(
    model: str,
    corpus: str | Sequence[Tensor] = "python-docs",
    *,
    engine: Engine = "local",
    n_docs: int = 16,
    length: int = 1024,
    layers: Sequence[int] | None = None,
    qk_pairs: Literal["auto", "all"] | int = "auto",
    weighting: Weighting = "pair",
    scale: Scale = "none",
    target_se: float = 0.005,
    skip_first: int = 0,
    seed: int = 0,
    workers: int = 2,
    ray_options: Mapping[str, Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    model_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> HeadScores:
    """Load a model by name and score its heads on a corpus, on one or many machines.

    Documents are measured independently and their results combined, so the scores equal those of
    :func:`~tl_posheads.score_heads`, bit for bit on machines of one kind.

    Args:
        model: as for :func:`~tl_posheads.load_model`.
        corpus: as for :func:`~tl_posheads.load_corpus`, or a list of documents' tokens.
        engine: ``"local"``; ``"ray"``: actors on a Ray cluster (extra ``[ray]``), where documents
            of lost workers are measured again; ``"torchrun"``: in a script that torchrun or SLURM
            starts in several processes, each of which returns the same result.
        n_docs, length: number of documents, and tokens per document.
        layers, qk_pairs, weighting, scale, target_se, skip_first, seed: as in ``score_heads``.
        workers: number of Ray actors, each with its own copy of the model.
        ray_options: options of each actor, like ``{"num_gpus": 1}``; one CPU each by default.
        checkpoint: folder for finished documents, on a disk that all workers can access.
        model_options: for ``load_model``: ``dtype``, ``cls``, ``device``, and for a model larger
            than one GPU ``n_devices`` or ``device_map``.
        progress: show a progress bar.

    Returns:
        :class:`~tl_posheads.HeadScores`; ``provenance["engine"]`` says how they were measured.

    Memory: every worker holds the model and needs what ``score_heads`` needs; the caller holds
    the scores.

    Raises:
        PosheadsError: an unknown engine, Ray not installed, not under torchrun; whatever
            ``load_model``, ``load_corpus`` and ``score_heads`` refuse.

    Example:
        >>> score_corpus("smollm2-135m", engine="ray", n_docs=100)      # doctest: +SKIP
    """
    if engine not in ("local", "ray", "torchrun"):
        raise PosheadsError(f"engine={engine!r} was given; expected 'local', 'ray' or 'torchrun'")
    if not isinstance(model, str):
        raise PosheadsError(
            f"a model of type {type(model).__name__} was given; expected its name, because every "
            "worker loads it; score_heads takes a loaded model"
        )
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise PosheadsError(f"workers={workers!r} was given; expected at least 1")
    job = Job(
        model,
        corpus,
        n_docs,
        length,
        layers,
        qk_pairs,
        weighting,
        scale,
        target_se,
        skip_first,
        seed,
        None if checkpoint is None else os.path.abspath(checkpoint),
        dict(model_options or {}),
    )
    if engine == "ray":
        from tl_posheads.scoring.distributed.ray import score_with_ray

        options = {"num_cpus": 1, **(ray_options or {})}
        return score_with_ray(job, workers=workers, ray_options=options, progress=progress)
    if engine == "torchrun":
        from tl_posheads.scoring.distributed.torchrun import score_with_torchrun

        return score_with_torchrun(job, progress=progress)
    begun = job.begin()
    return begun.scores(begun.measured(begun.units, progress=progress), "local")

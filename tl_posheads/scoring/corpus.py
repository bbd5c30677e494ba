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
    """Load a model by name, score its heads on a corpus, on as many machines as there are.

    Every document is measured by itself, wherever that happens, and its rows are put together: the
    scores are those of :func:`~tl_posheads.score_heads`, bit for bit on machines of one kind.

    Args:
        model: what :func:`~tl_posheads.load_model` takes.
        corpus: what :func:`~tl_posheads.load_corpus` takes, or a list of documents' tokens.
        engine: ``"local"``; ``"ray"``, actors of a Ray cluster (extra ``[ray]``), whose lost
            workers' documents are done again; ``"torchrun"``, in a script that torchrun or SLURM
            starts in several processes, in each of which it returns the same.
        n_docs, length: documents to take, and their tokens.
        layers, qk_pairs, weighting, scale, target_se, skip_first, seed: as in ``score_heads``.
        workers: actors of Ray, each with a model of its own.
        ray_options: of each actor, like ``{"num_gpus": 1}``; one CPU each by default.
        checkpoint: folder that keeps every finished document, on a disk that all workers reach.
        model_options: of ``load_model``: ``dtype``, ``cls``, ``device``, and for a model larger
            than one GPU ``n_devices`` or ``device_map``.
        progress: show a bar.

    Returns:
        :class:`~tl_posheads.HeadScores`; ``provenance["engine"]`` says how they were measured.

    Memory: every worker holds the model and what ``score_heads`` needs; the caller the scores.

    Raises:
        PosheadsError: an unknown engine, Ray not installed, no torchrun; what ``load_model``,
            ``load_corpus`` and ``score_heads`` refuse.

    Example:
        >>> score_corpus("smollm2-135m", engine="ray", n_docs=100)      # doctest: +SKIP
    """
    if engine not in ("local", "ray", "torchrun"):
        raise PosheadsError(f"engine={engine!r} was given; expected 'local', 'ray' or 'torchrun'")
    if not isinstance(model, str):
        raise PosheadsError(
            f"a model of type {type(model).__name__} was given; expected its name, since every "
            "worker loads it: score_heads takes a loaded model"
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

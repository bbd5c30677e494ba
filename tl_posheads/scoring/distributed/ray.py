"""Measure a corpus with Ray: Ray Data distributes, schedules and retries documents."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from tl_posheads.errors import PosheadsError
from tl_posheads.scoring.distributed.job import Begun, Job, Rows
from tl_posheads.scoring.head_scores import HeadScores

_BATCHES = 8  # of a worker


def score_with_ray(
    job: Job, *, workers: int, ray_options: Mapping[str, Any], progress: bool
) -> HeadScores:
    """Scores of a corpus, measured by ``workers`` actors that each hold the model.

    One task reads and checks the corpus. If an actor is lost, another measures its documents.

    Raises:
        PosheadsError: Ray isn't installed; what :meth:`Job.begin` refuses.
    """
    try:
        import ray
        import ray.data
    except ImportError as problem:
        raise PosheadsError(
            "engine='ray' needs Ray, which is not installed; pip install 'tl-posheads[ray]'"
        ) from problem
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    bars = context.enable_progress_bars
    context.enable_progress_bars = progress
    try:
        # In a separate process, so that its memory is freed before the actors load the model.
        task = ray.remote(max_calls=1, **ray_options)(_begin)
        begun = ray.get(task.remote(job))
        if isinstance(begun, PosheadsError):
            raise begun
        rows = _measured(begun, workers, ray_options)
        return begun.scores(rows, f"ray {ray.__version__}, {workers} workers")
    finally:
        context.enable_progress_bars = bars


def _begin(job: Job) -> Begun | PosheadsError:
    try:
        return job.begin().without_model()
    except PosheadsError as problem:
        return problem  # the caller raises it, without Ray's traceback


class _Worker:
    """An actor of Ray Data: holds the model, turns documents into rows."""

    def __init__(self, shared: list[Any]) -> None:
        import ray

        begun: Begun = ray.get(shared[0])
        # One document is enough to load the model; the shared state comes from the caller.
        alone = replace(begun.job, corpus=[begun.units[0][1]])
        self.begun = replace(begun, model=alone.begin().model)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
        units = [
            (str(unit), torch.frombuffer(bytearray(tokens), dtype=torch.int64))
            for unit, tokens in zip(batch["unit"], batch["tokens"], strict=True)
        ]
        rows = self.begun.measured(units)
        return {
            "unit": list(rows),
            "row": [
                save_tensors({str(layer): x.contiguous() for layer, x in row.items()})
                for row in rows.values()
            ],
        }


def _measured(begun: Begun, workers: int, ray_options: Mapping[str, Any]) -> Rows:
    import ray.data

    # When a worker is lost, only its last batch is measured again.
    size = max(1, len(begun.units) // (_BATCHES * workers))
    n_batches = -(-len(begun.units) // size)
    items = [{"unit": unit, "tokens": tokens.numpy().tobytes()} for unit, tokens in begun.units]
    # Referenced until everything is measured, so that an actor can be restarted.
    shared = ray.put(replace(begun, units=begun.units[:1]))
    found = ray.data.from_items(items, override_num_blocks=n_batches).map_batches(
        _Worker,
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=min(workers, n_batches)),
        fn_constructor_args=([shared],),
        **ray_options,
    )
    return {
        item["unit"]: {int(layer): row for layer, row in load_tensors(item["row"]).items()}
        for item in found.take_all()
    }

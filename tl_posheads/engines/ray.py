"""A corpus counted by Ray: Ray Data reads, schedules, retries and adds up."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tl_posheads.engines.job import Begun, Job, Units, from_bytes, merged, to_bytes
from tl_posheads.errors import PosheadsError
from tl_posheads.results import HeadScores
from tl_posheads.scoring import finer_bins
from tl_posheads.tables import LayerTable

_BATCHES = 8  # of a worker


def score_with_ray(
    job: Job, *, workers: int, ray_options: Mapping[str, Any], progress: bool
) -> HeadScores:
    """Scores of a corpus, counted by ``workers`` actors that each hold the model.

    The first document is counted by one task, which also reads the corpus; its D bins go to all
    actors. A lost actor's documents are done again by another.

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
        # A process of its own: its memory is free again before the actors load the model.
        task = ray.remote(max_calls=1, **ray_options)(_begin)
        answer = ray.get(task.remote(job))
        if isinstance(answer, PosheadsError):
            raise answer
        begun, first = answer
        accumulator = begun.accumulator
        for layer, content in first.items():
            accumulator.put(layer, from_bytes(content))
        _add(begun, begun.units[1:], accumulator.layers, "", workers, ray_options)
        for attempt in (1, 2):
            coarse = finer_bins(accumulator)
            _add(begun, begun.units, coarse, f"again{attempt}-", workers, ray_options)
        return accumulator.scores(
            {**begun.facts, "engine": f"ray {ray.__version__}, {workers} workers"}
        )
    finally:
        context.enable_progress_bars = bars


def _begin(job: Job) -> tuple[Begun, dict[int, bytes]] | PosheadsError:
    try:
        begun = job.begin()
        tables = begun.count(begun.units[:1], begun.accumulator.layers)
    except PosheadsError as problem:
        return problem  # the caller raises it, without Ray's story around it
    return begun.without_model(), {layer: to_bytes(table) for layer, table in tables.items()}


class _Worker:
    """An actor of Ray Data: holds the model, turns documents into tables."""

    def __init__(self, shared: list[Any], layers: list[int], name: str) -> None:
        import ray

        begun: Begun = ray.get(shared[0])
        # One document is enough to load the model; the shared state is the caller's.
        alone = replace(begun.job, corpus=[begun.units[0][1]])
        self.begun = replace(begun, model=alone.begin().model)
        self.layers, self.name = layers, name

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
        units: Units = [
            (str(unit), torch.frombuffer(bytearray(tokens), dtype=torch.int64))
            for unit, tokens in zip(batch["unit"], batch["tokens"], strict=True)
        ]
        tables = self.begun.count(units, self.layers, self.name)
        return {"layer": list(tables), "tables": [to_bytes(table) for table in tables.values()]}


def _add(
    begun: Begun,
    units: Units,
    layers: list[int],
    name: str,
    workers: int,
    ray_options: Mapping[str, Any],
) -> None:
    """Count documents in these layers and add them to the accumulator."""
    import ray.data
    from ray.data.aggregate import AggregateFn

    if not units or not layers:
        return
    # A worker adds up the documents of a batch before it sends them: tables are large. Its last
    # batch is what is done again when it is lost.
    size = max(1, len(units) // (_BATCHES * workers))
    n_batches = -(-len(units) // size)
    rows = [{"unit": unit, "tokens": tokens.numpy().tobytes()} for unit, tokens in units]
    # Held here until all is counted, so that an actor can be started anew.
    shared = ray.put(replace(begun, units=begun.units[:1], accumulator=begun.accumulator.like()))
    together = AggregateFn(
        init=lambda key: b"",
        accumulate_row=lambda sofar, row: _both(sofar, row["tables"]),
        merge=_both,
        name="tables",
    )
    counted = (
        ray.data.from_items(rows, override_num_blocks=n_batches)
        .map_batches(
            _Worker, batch_size=size, **ray_options,
            compute=ray.data.ActorPoolStrategy(size=min(workers, n_batches)),
            fn_constructor_args=([shared], list(layers), name),
        )
        .groupby("layer", num_partitions=min(len(layers), 4 * workers))
        .aggregate(together)
    )  # fmt: skip
    found: dict[int, LayerTable] = {
        int(row["layer"]): from_bytes(row["tables"]) for row in counted.take_all()
    }
    for layer in sorted(found):
        begun.accumulator.put(layer, found[layer])


def _both(a: bytes, b: bytes) -> bytes:
    return merged([a, b]) if a and b else a or b

"""A corpus counted by the processes that ``torchrun`` or SLURM started, one model in each."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from tl_posheads.engines.job import Begun, Job, from_bytes, merged, to_bytes
from tl_posheads.errors import PosheadsError
from tl_posheads.results import HeadScores
from tl_posheads.scoring import finer_bins


def score_with_torchrun(job: Job, *, progress: bool) -> HeadScores:
    """Scores of a corpus; every process of the group calls it and gets the same.

    Backend nccl where each process has a GPU, gloo elsewhere. Process 0 counts the first document,
    whose D bins go to all; counts are added in a tree.

    Raises:
        PosheadsError: no process group and no torchrun; what :meth:`Job.begin` refuses, on
            every process.
    """
    if not dist.is_initialized() and "RANK" not in os.environ:
        raise PosheadsError(
            "engine='torchrun' was asked for outside of torchrun; start the script with "
            "`torchrun --nproc-per-node N script.py`, or initialise torch.distributed before"
        )
    ours = not dist.is_initialized()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available() and local < torch.cuda.device_count()
    device = f"cuda:{local}" if cuda else None
    if ours:
        if cuda:
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        return _score(job, device, progress)
    finally:
        if ours:
            dist.destroy_process_group()


def _score(job: Job, device: str | None, progress: bool) -> HeadScores:
    rank, world = dist.get_rank(), dist.get_world_size()
    begun = job.begin(device)
    accumulator = begun.accumulator
    if rank == 0:
        for layer, table in begun.count(begun.units[:1], accumulator.layers).items():
            accumulator.put(layer, table)
    _share_bins(begun)
    _add(begun, 1, accumulator.layers, "", device, progress and rank == 0)
    for attempt in (1, 2):
        coarse = finer_bins(accumulator) if rank == 0 else []
        (coarse,) = _from_first([coarse])
        _share_bins(begun)
        _add(begun, 0, coarse, f"again{attempt}-", device, progress and rank == 0)
    scores: HeadScores | None = None
    if rank == 0:
        scores = accumulator.scores(
            {**begun.facts, "engine": f"torchrun, {dist.get_backend()}, {world} processes"}
        )
    (scores,) = _from_first([scores])
    assert scores is not None
    return scores


def _from_first(values: list[Any]) -> list[Any]:
    dist.broadcast_object_list(values, src=0)
    return values


def _share_bins(begun: Begun) -> None:
    (begun.accumulator.grids,) = _from_first([begun.accumulator.grids])


def _add(
    begun: Begun, first: int, layers: list[int], name: str, device: str | None, progress: bool
) -> None:
    """Every process counts its share; process 0's accumulator gets the sum."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tables = begun.count(begun.units[first:][rank::world], layers, name, progress=progress)
    for layer in layers:
        mine = [to_bytes(tables[layer])] if layer in tables else []
        step = 1
        while step < world:  # a binary tree over the processes
            if rank % (2 * step) == step:
                _send(mine[0] if mine else b"", rank - step, device)
                mine = []
            elif rank % (2 * step) == 0 and rank + step < world:
                got = _receive(rank + step, device)
                mine = [merged([*mine, got])] if got else mine
            step *= 2
        if rank == 0 and mine:
            begun.accumulator.put(layer, from_bytes(mine[0]))


def _send(content: bytes, to: int, device: str | None) -> None:
    dist.send(torch.tensor([len(content)], device=device), to)
    if content:
        dist.send(torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device or "cpu"), to)


def _receive(source: int, device: str | None) -> bytes:
    size = torch.zeros(1, dtype=torch.int64, device=device)
    dist.recv(size, source)
    if not int(size):
        return b""
    content = torch.zeros(int(size), dtype=torch.uint8, device=device)
    dist.recv(content, source)
    return content.cpu().numpy().tobytes()

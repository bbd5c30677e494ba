"""Measure a corpus in processes started by ``torchrun`` or SLURM, each with its own model."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from tl_posheads.errors import PosheadsError
from tl_posheads.scoring.distributed.job import Job, Rows
from tl_posheads.scoring.head_scores import HeadScores


def score_with_torchrun(job: Job, *, progress: bool) -> HeadScores:
    """Scores of a corpus; every process of the group calls it and gets the same result.

    Uses the backend nccl if each process has a GPU, else gloo.

    Raises:
        PosheadsError: no process group and no torchrun; what :meth:`Job.begin` refuses, on
            every process.
    """
    if not dist.is_initialized() and "RANK" not in os.environ:
        raise PosheadsError(
            "engine='torchrun' was given outside of torchrun; start the script with "
            "`torchrun --nproc-per-node N script.py`, or initialise torch.distributed before"
        )
    ours = not dist.is_initialized()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available() and local < torch.cuda.device_count()
    if ours:
        if cuda:
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        rank, world = dist.get_rank(), dist.get_world_size()
        begun = job.begin(f"cuda:{local}" if cuda else None)
        mine = begun.measured(begun.units[rank::world], progress=progress and rank == 0)
        everyones: list[Any] = [None] * world
        dist.all_gather_object(everyones, mine)
        rows: Rows = {name: row for some in everyones for name, row in some.items()}
        return begun.scores(rows, f"torchrun, {dist.get_backend()}, {world} processes")
    finally:
        if ours:
            dist.destroy_process_group()

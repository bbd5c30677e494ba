"""Checkpoints of a training run: by step on the hub, or as folders."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tl_posheads.errors import PosheadsError

# Pythia's revisions (Biderman et al. 2023): powers of two, then every thousandth step.
PYTHIA_STEPS = (0, *(2**i for i in range(10)), *range(1000, 143_001, 1000))
_STEP = re.compile(r"(?:.*[-_])?(?:checkpoint|step|global_step)[-_]?([0-9]+)")


def hub_checkpoints(
    name: str, steps: Sequence[int] = PYTHIA_STEPS, *, revision: str = "step{}", **options: Any
) -> dict[int, Callable[[], Any]]:
    """A hub model's checkpoints, each loaded when needed and released afterwards.

    Args:
        name: hub id, like ``"EleutherAI/pythia-160m"``.
        steps: those wanted; all 154 of Pythia by default.
        revision: how the hub names a step's revision.
        options: of :func:`tl_posheads.load_model`.

    Example:
        >>> sorted(hub_checkpoints("EleutherAI/pythia-70m", [0, 512, 143000]))
        [0, 512, 143000]
        >>> len(PYTHIA_STEPS)
        154
    """
    from tl_posheads.io.models import load_model

    return {
        int(step): partial(load_model, name, revision=revision.format(step), **options)
        for step in steps
    }


def folder_checkpoints(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Checkpoints in a folder by step: ``checkpoint-500``, ``step_500``, ``global_step500``.

    Raises:
        PosheadsError: the folder holds none that ``save_pretrained`` wrote.

    Example:
        >>> folder_checkpoints("/nowhere")
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: /nowhere is no folder; give one that holds checkpoints
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PosheadsError(f"{folder} is no folder; give one that holds checkpoints")
    found = {}
    for path in sorted(folder.iterdir()):
        step = _STEP.fullmatch(path.name)
        if step and (path / "config.json").is_file():
            found[int(step[1])] = path
    if not found:
        raise PosheadsError(
            f"{folder} holds no checkpoint; expected folders like checkpoint-500 or step-500, each "
            "with the config.json that save_pretrained writes"
        )
    return dict(sorted(found.items()))


def log_steps(last: int, per_octave: int = 2) -> list[int]:
    """Steps from 0 to ``last``, evenly spread over the logarithm.

    Example:
        >>> log_steps(8)
        [0, 1, 2, 3, 4, 6, 8]
    """
    if last < 1 or per_octave < 1:
        raise PosheadsError(
            f"last={last} and per_octave={per_octave} were given; expected at least 1"
        )
    steps, exponent = {0, last}, 0.0
    while (step := round(2**exponent)) < last:
        steps.add(step)
        exponent += 1 / per_octave
    return sorted(steps)

"""Loss on ordinary long texts, by position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pandas as pd
import torch

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.hooks.model import LensModel
from tl_posheads.tasks.base import (
    Prompt,
    Task,
    check_fields,
    check_length,
    check_short,
    plain,
    plain_window,
)
from tl_posheads.tasks.filler import CorpusTask, Filler


@dataclass(frozen=True)
class Perplexity(CorpusTask):
    """Ordinary long texts, with every token of the last part scored.

    A common measure of long-context use since Press et al., "Train short, test long", 2021, arXiv
    2108.12409. Plain text, no chat template. The short control is a window at the end of the long
    text, with its second half scored. Facts: ``first`` scored position and ``length``, in tokens.

    Attributes:
        length: tokens per prompt.
        last: share of tokens to score, from the end; 1 scores all but the first.
        n: number of prompts. seed: chooses passages of the corpus.
        corpus: as for :func:`~tl_posheads.load_corpus`.
        short_length: tokens per short control.

    Raises:
        PosheadsError: an invalid field.

    Example:
        >>> Perplexity(last=0)
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: last=0 was given; expected a share above 0 and at most 1
    """

    length: int = 1024
    last: float = 0.5
    n: int = 20
    seed: int = 0
    corpus: str = "python-docs"
    short_length: int = 128
    name: ClassVar[str] = "perplexity"

    def __post_init__(self) -> None:
        check_fields(self, n=1, length=3, short_length=2)
        check_short(self.short_length, self.length)
        if isinstance(self.last, bool) or not 0 < self.last <= 1:
            raise PosheadsError(
                f"last={self.last!r} was given; expected a share above 0 and at most 1"
            )

    def rungs(self) -> tuple[()]:
        """None: running text is neither at a ceiling nor at a floor."""
        return ()

    def _prompt(self, filler: Filler, i: int, frame: list[int]) -> Prompt:
        first = max(1, self.length - max(1, round(self.last * self.length)))
        tokens = frame + filler.stretch(i, self.length - len(frame))
        short = plain_window(tokens, frame, self.short_length)
        return plain(tokens, first, short, first=first)


def loss_by_position(
    model: LensModel, task: Task | Iterable[Prompt], *, edges: Sequence[int] | None = None
) -> pd.DataFrame:
    """Mean loss of the scored tokens by position in the prompt.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay active.
        task: a task or its prompts; short controls are left out.
        edges: ascending positions; bin k is ``edges[k]`` to ``edges[k + 1]``, exclusive. By default
            eight equal bins from the first to the last scored position.

    Returns:
        One row per bin: ``start``, ``end`` (exclusive), ``loss`` (nats, NaN in an empty bin) and
        ``n`` (tokens).

    Raises:
        PosheadsError: edges that don't ascend, or prompts too long for the model.

    Example:
        >>> loss_by_position(None, [], edges=[0, 512, 512])
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: edges=[0, 512, 512] was given; expected two or more
        ascending positions
    """
    if edges is not None and (len(edges) < 2 or any(b <= a for a, b in pairwise(edges))):
        raise PosheadsError(
            f"edges={list(edges)} was given; expected two or more ascending positions"
        )
    prompts = task.prompts(model) if isinstance(task, Task) else list(task)
    if not prompts:
        raise PosheadsError("no prompts were given; expected at least one")
    check_length(model, prompts)
    positions = torch.cat([prompt.targets for prompt in prompts])
    if edges is None:
        low, high = int(positions.min()), int(positions.max()) + 1
        edges = sorted({low + round(k * (high - low) / 8) for k in range(9)})
    logprobs = [target_logprobs(model, prompt.tokens, prompt.targets)[0] for prompt in prompts]
    loss = -torch.cat(logprobs).double()
    rows = []
    for start, end in pairwise(edges):
        inside = (positions >= start) & (positions < end)
        mean = float(loss[inside].mean())
        rows.append({"start": start, "end": end, "loss": mean, "n": int(inside.sum())})
    return pd.DataFrame(rows)

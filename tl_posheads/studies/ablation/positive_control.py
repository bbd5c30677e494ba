"""Heads whose ablation is known to do harm: a study that misses them could not find others.

Retrieval heads (Wu et al. 2024, arXiv 2404.15574) copy what a long text says. Without 87 of
OLMo-2's, recall falls from 1.00 to 0.00; without as many random heads it stays (arXiv 2606.21249).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tl_posheads.hooks.heads import Head
from tl_posheads.hooks.model import LensModel
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.studies.profile.needles import retrieval_scores
from tl_posheads.tasks.base import Prompt


def retrieval_heads(
    model: LensModel, needles: Sequence[Prompt], kept: Checkpoint | None = None
) -> tuple[list[Head], dict[str, Any]]:
    """Heads that copied something of a needle, those that copied most first, and how it was found.

    Returns:
        Heads, none where the model answered no needle, and the facts of
        :func:`~tl_posheads.studies.profile.needles.retrieval_scores`.
    """
    scores, facts = retrieval_scores(model, needles, kept=kept)
    found = [(int(layer), int(head)) for layer, head in torch.argwhere(scores > 0).tolist()]
    return sorted(found, key=lambda head: (-float(scores[head]), head)), facts

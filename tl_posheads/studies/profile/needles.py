"""Retrieval scores of a live model: it answers questions greedily, and its heads are watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.lengths import context_length
from tl_posheads.hooks.logprobs import greedy
from tl_posheads.hooks.model import LensModel, attention_of, model_name, read_pass
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.studies.profile.retrieval import copied_share, copies_of, recall
from tl_posheads.tasks.base import Prompt, Task, check_length
from tl_posheads.tasks.needle import Needle

_LENGTH = 512  # tokens of the default needles' prompts, at most
_DEPTHS = 3
_ANSWERED = 0.5  # recall that Wu et al. ask for


def needle_prompts(
    model: LensModel, needles: int | Task | Sequence[Prompt], seed: int
) -> list[Prompt]:
    """Prompts by number, from a task, or as they are.

    Raises:
        PosheadsError: a negative number, prompts that are too long, or what the task refuses.
    """
    if isinstance(needles, bool) or (isinstance(needles, int) and needles < 0):
        raise PosheadsError(
            f"needles={needles!r} was given; expected a number of prompts, a task like "
            "tasks.Needle(), or a list of prompts"
        )
    if isinstance(needles, int):
        if needles == 0:
            return []
        length = min(_LENGTH, context_length(model) or _LENGTH)
        short = max(2, length // 4)
        needles = Needle(
            lengths=(length,), depths=_DEPTHS, n=needles, seed=seed, short_length=short
        )
    prompts = needles.prompts(model) if isinstance(needles, Task) else list(needles)
    check_length(model, prompts)
    return prompts


def most_attended(
    model: LensModel, tokens: Int[Tensor, " pos"], rows: slice
) -> Int[Tensor, "layer head row"]:
    """The position that every head attends to most, for some queries; -1 where there is no head.

    One pass, a layer's pattern at a time; on leaving, the model's hooks are as they were.
    """
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    n_rows = len(range(*rows.indices(len(tokens))))
    out = torch.full((n_layers, n_heads, n_rows), -1, dtype=torch.long)

    def read(layer: int, pattern: Tensor) -> None:
        out[layer] = pattern[0, :, rows].argmax(-1).cpu()

    parts: dict[int, Any] = {layer: attention_of(model, layer) for layer in range(n_layers)}
    readers = [
        (attn.hook_pattern, partial(read, layer))
        for layer, attn in parts.items()
        if attn is not None
    ]
    read_pass(model, tokens[None], readers)
    return out


def retrieval_scores(
    model: LensModel,
    prompts: Sequence[Prompt],
    tick: Callable[[], Any] = lambda: None,
    kept: Checkpoint | None = None,
) -> tuple[Float[Tensor, "layer head"], dict[str, Any]]:
    """The retrieval score of every head, mean over the needles that the model answered.

    The model answers each prompt by greedy decoding, as many tokens as the answer has. Then one
    pass over prompt and answer shows where every head attended as each token was written: attention
    is causal, so that these are the rows that decoding saw. A prompt counts where more than half
    of the answer's tokens were written (Wu et al. 2024), and where its text holds the answer's
    tokens in a row.

    Args:
        model: HookedTransformer or TransformerBridge. prompts: with the answers as targets.
        tick: called after each prompt. kept: keeps what is known of each.

    Returns:
        ``[layer, head]`` in float64, NaN where no prompt counts, and facts: ``n_prompts``,
        ``n_answered``, ``n_without_copy`` (text without the answer), ``recall`` of each, and
        ``reason`` where the scores are NaN.

    Memory: the lens's eager attention of one layer.
    """
    total = torch.zeros(int(model.cfg.n_layers), int(model.cfg.n_heads), dtype=torch.float64)
    recalls: list[float] = []
    n_answered = n_without = 0
    for i, prompt in enumerate(prompts):
        found = None if kept is None else kept.read(f"needle-{i:05d}")
        if found is None:
            found = _answered(model, prompt)
            if kept is not None:
                kept.write(f"needle-{i:05d}", found)
        if "recall" in found:
            recalls.append(float(found["recall"]))
        n_without += "recall" not in found
        if "share" in found:
            n_answered += 1
            total += found["share"]
        tick()
    facts: dict[str, Any] = {
        "n_prompts": len(prompts),
        "n_answered": n_answered,
        "n_without_copy": n_without,
        "recall": recalls,
    }
    if n_answered == 0:
        facts["reason"] = (
            f"{model_name(model)} answered none of {len(prompts)} needles"
            if prompts
            else "no needles were asked for"
        )
        return torch.full_like(total, float("nan")), facts
    return total / n_answered, facts


def _answered(model: LensModel, prompt: Prompt) -> dict[str, Tensor]:
    """How much of the needle the model wrote, and where that counts what each head copied.

    Neither if the text lacks the answer.
    """
    first, last = int(prompt.targets[0]), int(prompt.targets[-1])
    asked, answer = prompt.tokens[:first].cpu(), prompt.tokens[first : last + 1].cpu()
    needle = copies_of(asked, answer)
    if len(needle) == 0:
        return {"without": torch.tensor(True)}
    written = greedy(model, asked, len(answer))
    found = {"recall": torch.tensor(recall(written, answer), dtype=torch.float64)}
    if found["recall"] > _ANSWERED:
        seen = torch.cat([asked, written[:-1]])
        looks = most_attended(model, seen, slice(first - 1, len(seen)))
        share = copied_share(looks.clamp(min=0), written, seen, needle)
        found["share"] = torch.where(looks[..., 0] < 0, float("nan"), share)
    return found

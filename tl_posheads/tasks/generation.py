"""Generated answers to prompts, in addition to log-probabilities."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.logprobs import greedy
from tl_posheads.hooks.model import LensModel
from tl_posheads.hooks.tokenizer import tokenizer_of
from tl_posheads.tasks.base import Prompt, check_length


def generate_answers(
    model: LensModel, prompts: Iterable[Prompt], *, max_new_tokens: int | None = None
) -> pd.DataFrame:
    """Greedy continuations of prompts that are cut before their answers.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay active. Its own
            ``generate`` runs until an end token of the checkpoint, with a KV cache if it uses one.
        prompts: of any task.
        max_new_tokens: most new tokens; by default as many as the answer has.

    Returns:
        One row per prompt: ``prompt`` (its index), ``answer`` (text of the scored tokens) and
        ``generated`` (text), both stripped, and ``exact``: whether the generated text
        begins with the answer and its last word ends there.

    Raises:
        PosheadsError: a count below 1, or a prompt too long for the model with its answer.

    Example:
        >>> generate_answers(None, [], max_new_tokens=0)
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: max_new_tokens=0 was given; expected 1 or more
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise PosheadsError(f"max_new_tokens={max_new_tokens} was given; expected 1 or more")
    tokenizer = tokenizer_of(model)
    asked = []
    for prompt in prompts:
        first, end = int(prompt.targets[0]), int(prompt.targets[-1]) + 1
        n_new = end - first if max_new_tokens is None else max_new_tokens
        check_length(model, first + n_new)
        asked.append((prompt.tokens, first, end, n_new))
    rows = []
    for index, (tokens, first, end, n_new) in enumerate(asked):
        answer, generated = (
            tokenizer.decode(ids, skip_special_tokens=True).strip()
            for ids in (tokens[first:end], greedy(model, tokens[:first], n_new))
        )
        exact = re.match(re.escape(answer) + r"(?!\w)", generated) is not None
        rows.append({"prompt": index, "answer": answer, "generated": generated, "exact": exact})
    return pd.DataFrame(rows, columns=["prompt", "answer", "generated", "exact"])

"""What a task is: prompts with scored tokens, and beside each the same question at short range."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.lengths import context_length
from tl_posheads.hooks.model import LensModel
from tl_posheads.io.corpora import _tokenise


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text that is run once, teacher-forced, and the tokens of it that are scored.

    Attributes:
        tokens: ``[pos]``, the answer included.
        targets: ``[target]``, ascending positions of the scored tokens, each at least 1: the
            logits at ``targets - 1`` are compared with ``tokens[targets]``.
        facts: what tells this prompt from the task's others (``depth``, ``distance``, ...).
        short: the short-context control: the same question with everything near, or plain short
            text. None where a task has none.
    """

    tokens: Int[Tensor, "pos"]
    targets: Int[Tensor, "target"]
    facts: Mapping[str, Any] = field(default_factory=dict)
    short: Prompt | None = None


@runtime_checkable
class Task(Protocol):
    """Anything with a name and prompts is a task; the classes of this package are ready ones."""

    @property
    def name(self) -> str: ...

    def prompts(self, model: LensModel) -> list[Prompt]:
        """The same prompts at every call with the same model."""
        ...


def check_length(model: LensModel, prompts: int | Iterable[Prompt]) -> None:
    """Refuse prompts that are longer than the model's context, before anything is run.

    Args:
        model: anything; one without ``cfg.n_ctx`` takes any length.
        prompts: prompts, with their short controls, or a number of tokens.

    Raises:
        PosheadsError: there is a longer one.

    Example:
        >>> from types import SimpleNamespace as Namespace
        >>> check_length(Namespace(cfg=Namespace(n_ctx=512)), 1024)
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: length=1024 was given, but the model reads at most 512
        tokens; lower length
    """
    if isinstance(prompts, int):
        longest = prompts
    else:
        both = [one for prompt in prompts for one in (prompt, prompt.short) if one is not None]
        longest = max((len(one.tokens) for one in both), default=0)
    n_ctx = context_length(model)
    if n_ctx and longest > n_ctx:
        raise PosheadsError(
            f"length={longest} was given, but the model reads at most {n_ctx} tokens; lower length"
        )


def check_fields(task: Any, **least: int) -> None:
    """Refuse a task's fields that aren't whole numbers of at least so much.

    Raises:
        PosheadsError: the first such field.
    """
    for name, smallest in least.items():
        value = getattr(task, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise PosheadsError(
                f"{name}={value!r} was given; expected a whole number of {smallest} or more"
            )


def check_short(short_length: int, length: int, *, least: int = 1) -> None:
    """Refuse a short control that isn't shorter than a prompt by ``least`` tokens.

    Raises:
        PosheadsError: it is longer.
    """
    if short_length > length - least:
        raise PosheadsError(
            f"short_length={short_length} was given for prompts of {length} tokens; expected at "
            f"most {length - least}; lower short_length or raise the length"
        )


def encode(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Tokens of a text that follows other text.

    Args:
        tokenizer: of the model. text: any.
        special: names of special tokens in the text stand for these tokens.
    """

    def ids(text: str) -> list[int]:
        if special:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return _tokenise(text, tokenizer)

    # Some tokenizers put a space before whatever they are given. Behind an anchor that can't
    # merge with the text, the text is tokenised as it would be in the middle of one.
    anchor = "a" if text[:1].isspace() else "\n"
    alone, whole = ids(anchor), ids(anchor + text)
    return whole[len(alone) :] if whole[: len(alone)] == alone else ids(text)


def plain(tokens: list[int], scored_from: int, short: Prompt | None = None, **facts: Any) -> Prompt:
    """A text whose tokens from ``scored_from`` on are all scored."""
    return Prompt(
        torch.tensor(tokens, dtype=torch.long),
        torch.arange(scored_from, len(tokens)),
        {"length": len(tokens), **facts},
        short,
    )


def plain_window(tokens: list[int], start: list[int], short_length: int) -> Prompt:
    """Short control of a plain text: its end alone, behind ``start``; the second half scored."""
    window = start + tokens[len(tokens) - (short_length - len(start)) :]
    return plain(window, short_length - short_length // 2)

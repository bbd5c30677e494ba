"""Definition of a task: prompts with scored tokens, each with a short-context control."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.lengths import context_length
from tl_posheads.hooks.model import LensModel
from tl_posheads.hooks.tokenizer import token_ids

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text that is run once, teacher-forced, and its scored tokens.

    Attributes:
        tokens: ``[pos]``, including the answer.
        targets: ``[target]``, ascending positions of the scored tokens, each at least 1: the
            logits at ``targets - 1`` predict ``tokens[targets]``.
        facts: this prompt's properties (``depth``, ``distance``, ...).
        short: the short-context control: the same question with everything near, or plain short
            text. None if the task has none.
    """

    tokens: Int[Tensor, " pos"] = field(repr=False)
    targets: Int[Tensor, " target"] = field(repr=False)
    facts: Mapping[str, Any] = field(default_factory=dict)
    short: Prompt | None = field(default=None, repr=False)


@runtime_checkable
class Task(Protocol):
    """Anything with a name and prompts is a task; this package has ready-made ones."""

    @property
    def name(self) -> str: ...

    def prompts(self, model: LensModel) -> list[Prompt]:
        """The task's prompts: the same at every call with the same model."""
        ...


@runtime_checkable
class Evaluated(Task, Protocol):
    """A task with its own metric, computed from the text that the model generates.

    A study then records the metric instead of the log-probability of the scored tokens, without a
    teacher-forced pass. :class:`~tl_posheads.tasks.LMEval` is an example.
    """

    def evaluate(self, model: LensModel, prompt: Prompt) -> float:
        """The metric for one of the task's prompts; hooks on the model stay active."""
        ...


@runtime_checkable
class Calibrated(Task, Protocol):
    """A task that :func:`~tl_posheads.tasks.calibrate` can make easier or harder.

    If it has rungs, it is a dataclass whose fields ``n`` and ``seed`` choose the prompts.
    """

    def rungs(self) -> Sequence[Task]:
        """Variants of the task from easy to hard; empty to use it as it is."""
        ...


AnyTask = TypeVar("AnyTask", bound="DataclassInstance")


def climb(task: AnyTask, **fields: Sequence[Any]) -> list[AnyTask]:
    """Variants of a dataclass, raising one field after the other from its first value."""
    rung = replace(task, **{name: values[0] for name, values in fields.items()})
    rungs = [rung]
    for name, values in fields.items():
        rungs += [rung := replace(rung, **{name: value}) for value in values[1:]]
    return rungs


def doubled(first: int, last: int) -> list[int]:
    """``first``, doubled repeatedly up to ``last``.

    Example:
        >>> doubled(2, 20)
        [2, 4, 8, 16]
    """
    return [first << k for k in range((last // first).bit_length())]


def halved(length: int, least: int) -> list[int]:
    """Lengths up to ``length``, each half of the next, none below ``least``.

    Example:
        >>> halved(1000, 129)
        [250, 500, 1000]
    """
    return [length >> k for k in reversed(range((length // least).bit_length()))]


def check_length(model: LensModel, prompts: int | Iterable[Prompt]) -> None:
    """Refuse prompts longer than the model's context, before anything is run.

    Args:
        model: any model; without ``cfg.n_ctx`` it takes any length.
        prompts: prompts with their short controls, or a number of tokens.

    Raises:
        PosheadsError: a prompt is longer.

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
    """Refuse a task's fields that aren't whole numbers of at least the given values.

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
    """Refuse a short control that isn't at least ``least`` tokens shorter than a prompt.

    Raises:
        PosheadsError: it is longer.
    """
    if short_length > length - least:
        raise PosheadsError(
            f"short_length={short_length}, for the short control, and prompts of {length} tokens "
            f"were given; raise the length to {short_length + least} or more, or lower short_length"
        )


def encode(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Tokens of a text that follows other text.

    Args:
        tokenizer: the model's. text: any text.
        special: whether names of special tokens in the text become these tokens.
    """

    def ids(text: str) -> list[int]:
        if special:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return token_ids(text, tokenizer)

    # Some tokenizers prepend a space to their input. After an anchor that can't merge with it,
    # the text is tokenised as in the middle of another text.
    anchor = "a" if text[:1].isspace() else "\n"
    alone, whole = ids(anchor), ids(anchor + text)
    return whole[len(alone) :] if whole[: len(alone)] == alone else ids(text)


def plain(tokens: list[int], scored_from: int, short: Prompt | None = None, **facts: Any) -> Prompt:
    """A prompt whose tokens are all scored from ``scored_from`` on."""
    return Prompt(
        torch.tensor(tokens, dtype=torch.long),
        torch.arange(scored_from, len(tokens)),
        {"length": len(tokens), **facts},
        short,
    )


def plain_window(tokens: list[int], start: list[int], short_length: int) -> Prompt:
    """Short control of a plain text: only its end, after ``start``; its second half is scored."""
    window = start + tokens[len(tokens) - (short_length - len(start)) :]
    return plain(window, short_length - short_length // 2)

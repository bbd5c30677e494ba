"""Questions about a haystack: prompts of an exact length, with short-context controls."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count
from typing import Any, ClassVar

import torch

from tl_posheads.errors import PosheadsError
from tl_posheads.tasks.base import Prompt, check_fields, check_short, encode, halved
from tl_posheads.tasks.filler import CorpusTask, Filler
from tl_posheads.tasks.framing import Frame


@dataclass(frozen=True)
class Question:
    """The text of one prompt.

    Attributes:
        intro: text before the haystack. gap: text between the two.
        needles: depth in the haystack, from 0 (start) to 1 (end), and text of each, in order.
        question: ends the user's message.
        prefix: begins the reply, directly before the answer. It keeps its leading white space
            after plain text but loses it at the start of an assistant's turn.
        answer: pieces of the answer, all scored except white space.
        asked: index of the needle from which the answer's distance is counted.
        facts: specific to this prompt.
    """

    intro: str
    needles: Sequence[tuple[float, str]]
    question: str
    prefix: str
    answer: Sequence[str]
    asked: int = 0
    gap: str = "\n"
    facts: dict[str, Any] = field(default_factory=dict)


def join(
    tokenizer: Any,
    body: Sequence[Sequence[int]],
    asked: int,
    closing: Sequence[int],
    answer: Sequence[str],
    facts: dict[str, Any],
) -> Prompt:
    """A prompt from its pieces; the distance counts from index ``asked`` in ``body``.

    White space that is a separate token isn't part of the answer.
    """
    tokens = [token for piece in body for token in piece]
    needle = sum(map(len, body[:asked]))
    tokens += closing
    targets = []
    for piece in answer:
        for token in encode(tokenizer, piece):
            if tokenizer.decode([token]).strip():
                targets.append(len(tokens))
            tokens.append(token)
    if not targets:
        raise PosheadsError(
            f"the tokenizer has no tokens for the answer {''.join(answer)!r}; set a tokenizer that "
            "has letters and digits"
        )
    facts = {**facts, "length": len(tokens), "needle": needle, "distance": targets[0] - needle}
    return Prompt(torch.tensor(tokens, dtype=torch.long), torch.tensor(targets), facts)


def too_short(length: int, needed: int) -> PosheadsError:
    return PosheadsError(
        f"length={length} was given, but the question alone has {needed - 1} tokens; raise length "
        f"to {needed} or more"
    )


def in_haystack(
    frame: Frame, filler: Filler, i: int, question: Question, length: int, *, exact: bool = True
) -> Prompt:
    """A prompt of ``length`` tokens, with needles at the sentence ends nearest to their depths.

    If it doesn't fit and the length needn't be ``exact``, it is as short as possible.

    Raises:
        PosheadsError: it doesn't fit and the length has to be exact.
    """
    tokenizer = frame.tokenizer
    opening = frame.opening(question.intro)
    closing = frame.closing(question.question, question.prefix)
    gap = encode(tokenizer, question.gap)
    needles = [encode(tokenizer, text) for _, text in question.needles]
    answer = [encode(tokenizer, piece) for piece in question.answer]
    fixed = len(opening) + len(closing) + sum(map(len, needles)) + sum(map(len, answer))
    room = length - fixed
    if room <= len(gap) and exact:
        raise too_short(length, fixed + len(gap) + 1)
    units = filler.sentences(i, room - len(gap))
    if units:
        units[0] = gap + units[0]
    ends = list(accumulate(map(len, units), initial=0))
    places = [
        min(range(len(ends)), key=lambda k: abs(ends[k] - depth * ends[-1]))
        for depth, _ in question.needles
    ]
    body, asked = [opening], 0
    for k in range(len(ends)):
        for j, place in enumerate(places):
            if place == k:
                asked = len(body) if j == question.asked else asked
                body.append(needles[j])
        body += units[k : k + 1]
    return join(tokenizer, body, asked, closing, question.answer, question.facts)


def depth_grid(depths: int) -> list[float]:
    """Depths from 0 to 1, ordered so that the first few are spread out too.

    Example:
        >>> depth_grid(5)
        [0.0, 1.0, 0.5, 0.25, 0.75]
    """
    if depths == 1:
        return [0.5]
    bits = (depths - 1).bit_length()
    order = sorted(range(depths), key=lambda k: int(f"{k:0{bits}b}"[::-1], 2))
    return [k / (depths - 1) for k in order]


def lookalikes(
    parts: Sequence[str], choices: Sequence[Sequence[str]], rng: random.Random, n: int
) -> list[tuple[str, ...]]:
    """Wrong answers whose parts come evenly from the right answer or from few alternatives.

    Among freely drawn answers the first token would determine all others.

    Args:
        parts: of the right answer. choices: possible values of each part, like the digits.
        n: number of answers, all different. There are no more alternatives than that needs.
    """
    few = next(k for k in count(2) if k ** len(parts) > n)
    rest = [[x for x in words if x != part] for part, words in zip(parts, choices)]
    own = [[part, *rng.sample(x, min(few - 1, len(x)))] for part, x in zip(parts, rest)]
    found = {tuple(parts): None}  # in the order drawn
    while len(found) <= n:
        found[tuple(rng.choice(alternatives) for alternatives in own)] = None
    return list(found)[1:]


_LEAST = {  # smallest values of fields that some tasks have
    "depths": 1,
    "distractors": 0,
    "n_keys": 2,
    "near_duplicates": 0,
    "hops": 1,
    "chains": 1,
}


class QuestionTask(CorpusTask):
    """A task of questions; a subclass is a dataclass with these fields and defines the question."""

    name: ClassVar[str]
    short_length: int
    instruct: bool | None

    def __post_init__(self) -> None:
        check_fields(self, n=1, short_length=2)
        if hasattr(self, "length"):
            check_fields(self, length=2)
        check_short(self.short_length, min(self._lengths()))
        check_fields(self, **{name: m for name, m in _LEAST.items() if hasattr(self, name)})

    def _shorter(self) -> list[int]:
        """Lengths of the easiest rungs: up to the task's own, all longer than the control."""
        return halved(self.length, self.short_length + 1)

    @abstractmethod
    def _question(self, i: int, rng: random.Random) -> Question:
        """The question of the i-th prompt."""

    def _frame(self, tokenizer: Any) -> Frame:
        return Frame(tokenizer, self.instruct)

    def _prompt(self, filler: Filler, i: int, frame: Frame) -> Prompt:
        question = self._question(i, random.Random(f"{self.seed} {self.name} {i}"))
        prompt, short = self._pair(frame, filler, i, question)
        return replace(prompt, short=short)

    def _pair(
        self, frame: Frame, filler: Filler, i: int, question: Question
    ) -> tuple[Prompt, Prompt]:
        lengths = self._lengths()
        return (
            in_haystack(frame, filler, i, question, lengths[i % len(lengths)]),
            in_haystack(frame, filler, i, question, self.short_length, exact=False),
        )

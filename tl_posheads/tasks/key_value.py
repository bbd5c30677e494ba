"""Retrieval from a JSON object of random pairs."""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

from tl_posheads.errors import PosheadsError
from tl_posheads.tasks.base import Prompt, climb, doubled, encode
from tl_posheads.tasks.filler import Filler
from tl_posheads.tasks.framing import Frame
from tl_posheads.tasks.questions import (
    Question,
    QuestionTask,
    depth_grid,
    join,
    lookalikes,
    too_short,
)

_INTRO = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
_DATA = "JSON data:\n"
_DIGITS = "0123456789abcdef"
_VERSION = (14, 19)  # places in a UUID
_MOST_NEAR = 30 * 15  # ways to change one of a UUID's digits that aren't its version


@dataclass(frozen=True)
class KeyValue(QuestionTask):
    """The value of one key in a JSON object whose keys and values are random UUIDs.

    Liu et al., "Lost in the middle: how language models use long contexts", 2023, arXiv
    2307.03172, their wording. As many pairs as fit; what is missing to the full length, less
    than a pair, is text of the corpus before the object. The pair asked for lies at each depth
    in turn. Facts: ``depth`` of the pair as asked for, ``pairs`` of the object, ``needle`` the
    pair's first position, ``distance`` from there to the answer and ``length``, in tokens.

    Attributes:
        length: tokens of a prompt, the answer included.
        depths: as many depths from 0 to 1, equally far apart, taken in turn.
        n: prompts. seed: chooses the UUIDs and stretches of the corpus.
        corpus: what :func:`~tl_posheads.load_corpus` takes.
        short_length: tokens of the short controls, which have at least two pairs.
        instruct: use the chat template (True), don't (False), or do where there is one (None).
        near_duplicates: so many of the other keys, or as many as fit, are the asked one but for
            one hexadecimal digit; each digit of their values is that of the asked one's value or
            one other.

    Raises:
        PosheadsError: a field that can't be.

    Example:
        >>> KeyValue(n=0)
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: n=0 was given; expected a whole number of 1 or more
    """

    length: int = 1024
    depths: int = 5
    n: int = 20
    seed: int = 0
    corpus: str = "python-docs"
    short_length: int = 128
    instruct: bool | None = None
    near_duplicates: int = 0
    name: ClassVar[str] = "key_value"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.near_duplicates > _MOST_NEAR:
            raise PosheadsError(
                f"near_duplicates={self.near_duplicates} was given; expected at most {_MOST_NEAR}"
            )

    def rungs(self) -> list[KeyValue]:
        """More pairs, in longer prompts; then near-duplicates of the asked key among them."""
        near_duplicates = sorted({0, *doubled(1, self.length // 128), self.near_duplicates})
        return climb(self, length=self._shorter(), near_duplicates=near_duplicates)

    def _question(self, i: int, rng: random.Random) -> Question:
        key, value = _uuid(rng), _uuid(rng)
        return Question(
            intro=_INTRO,
            needles=[(depth_grid(self.depths)[i % self.depths], f'"{key}": "{value}"')],
            question=f'\n\nKey: "{key}"',
            # The quotation mark is no part of the answer: whether to set it is a matter of taste.
            prefix='\nCorresponding value: "',
            answer=[value],
        )

    def _pair(
        self, frame: Frame, filler: Filler, i: int, question: Question
    ) -> tuple[Prompt, Prompt]:
        return (
            self._object(frame, filler, i, question, self.length, exact=True),
            self._object(frame, filler, i, question, self.short_length, exact=False),
        )

    def _object(
        self, frame: Frame, filler: Filler, i: int, question: Question, length: int, *, exact: bool
    ) -> Prompt:
        """Two pairs or as many as fit; filled up to ``length`` tokens if that has to be exact."""
        encoded = lru_cache(None)(partial(encode, frame.tokenizer))
        [(depth, asked)] = question.needles
        opening, closing = frame.opening(_INTRO), frame.closing(question.question, question.prefix)
        fixed = len(opening) + len(closing) + len(encoded(_DATA)) + len(encoded(question.answer[0]))
        rng = random.Random(f"{self.seed} {self.name} {i} others")
        near = []
        if self.near_duplicates:
            near = _near_duplicates(asked[1:37], question.answer[0], rng, self.near_duplicates)
        others: list[str] = []
        records: list[list[int]] = []
        room = length - fixed
        while True:
            key, value = near.pop() if near else (_uuid(rng), _uuid(rng))
            at = rng.randrange(len(others) + 1) if self.near_duplicates else len(others)
            others.insert(at, f'"{key}": "{value}"')
            place = round(depth * len(others))
            pairs = [*others[:place], asked, *others[place:]]
            more = [encoded(text) for text in _records(pairs)]
            left = length - fixed - sum(map(len, more))
            if left < 0 and (exact or records):
                break
            records, room, asked_at = more, left, place
            if left < 0:
                break
        if not records:
            raise too_short(length, length - left)
        # Only less than a pair is missing, so that this is a line or two.
        end = encoded("\n\n")[: room if exact else 0]
        filling = [*filler.sentences(i, room - len(end) if exact else 0), end]
        body = [opening, *filling, encoded(_DATA), *records]
        facts = {"depth": depth, "pairs": len(records)}
        at = len(body) - len(records) + asked_at
        return join(frame.tokenizer, body, at, closing, question.answer, facts)


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _near_duplicates(key: str, value: str, rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Pairs whose keys are one digit of ``key`` away, each another one."""
    places = [j for j, digit in enumerate(key) if digit != "-" and j not in _VERSION]
    changes = [(j, digit) for j in places for digit in _DIGITS if digit != key[j]]
    keys = [key[:j] + digit + key[j + 1 :] for j, digit in rng.sample(changes, n)]
    choices = [_DIGITS if j in places else value[j] for j in range(len(value))]
    return list(zip(keys, map("".join, lookalikes(value, choices, rng, n))))


def _records(pairs: list[str]) -> list[str]:
    """The text of a JSON object, a piece for each pair."""
    last = len(pairs) - 1
    return [
        ("{" if j == 0 else " ") + pair + ("}" if j == last else ",\n")
        for j, pair in enumerate(pairs)
    ]

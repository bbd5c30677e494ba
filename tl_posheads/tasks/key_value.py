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
_VERSION = (14, 19)  # indices in a UUID
_MOST_NEAR = 30 * 15  # ways to change one digit of a UUID other than its version


@dataclass(frozen=True)
class KeyValue(QuestionTask):
    """Retrieve the value of one key from a JSON object of random UUIDs.

    Liu et al., "Lost in the middle: how language models use long contexts", 2023, arXiv
    2307.03172, with their wording. The object has as many key-value pairs as fit; text of the
    corpus before it makes up the exact length. The queried pair cycles through the depths.
    Facts: ``depth`` of the queried pair as requested, ``pairs`` in the object, ``needle``, the
    pair's first position, ``distance`` from there to the answer and ``length``, in tokens.

    Attributes:
        length: tokens per prompt, including the answer.
        depths: number of evenly spaced depths from 0 to 1, cycled through.
        n: number of prompts. seed: chooses the UUIDs and passages of the corpus.
        corpus: as for :func:`~tl_posheads.load_corpus`.
        short_length: tokens per short control, which has at least two pairs.
        instruct: use the chat template (True), don't (False), or use it if there is one (None).
        near_duplicates: number of other keys (or as many as fit) that differ from the queried key
            in one hexadecimal digit; each digit of their values is that of the queried key's
            value or one alternative.

    Raises:
        PosheadsError: an invalid field.

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
        """More pairs in longer prompts, then near-duplicates of the queried key."""
        near_duplicates = sorted({0, *doubled(1, self.length // 128), self.near_duplicates})
        return climb(self, length=self._shorter(), near_duplicates=near_duplicates)

    def _question(self, i: int, rng: random.Random) -> Question:
        key, value = _uuid(rng), _uuid(rng)
        return Question(
            intro=_INTRO,
            needles=[(depth_grid(self.depths)[i % self.depths], f'"{key}": "{value}"')],
            question=f'\n\nKey: "{key}"',
            # The quotation mark isn't part of the answer: models may or may not write it.
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
        """As many pairs as fit, at least two; padded to ``length`` tokens if it must be exact."""
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
        # Less than a pair is missing, so this is a line or two.
        end = encoded("\n\n")[: room if exact else 0]
        filling = [*filler.sentences(i, room - len(end) if exact else 0), end]
        body = [opening, *filling, encoded(_DATA), *records]
        facts = {"depth": depth, "pairs": len(records)}
        at = len(body) - len(records) + asked_at
        return join(frame.tokenizer, body, at, closing, question.answer, facts)


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _near_duplicates(key: str, value: str, rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Pairs with different keys that each differ from ``key`` in one digit."""
    places = [j for j, digit in enumerate(key) if digit != "-" and j not in _VERSION]
    changes = [(j, digit) for j in places for digit in _DIGITS if digit != key[j]]
    keys = [key[:j] + digit + key[j + 1 :] for j, digit in rng.sample(changes, n)]
    choices = [_DIGITS if j in places else value[j] for j in range(len(value))]
    return list(zip(keys, map("".join, lookalikes(value, choices, rng, n))))


def _records(pairs: list[str]) -> list[str]:
    """The text of a JSON object, one piece per pair."""
    last = len(pairs) - 1
    return [
        ("{" if j == 0 else " ") + pair + ("}" if j == last else ",\n")
        for j, pair in enumerate(pairs)
    ]

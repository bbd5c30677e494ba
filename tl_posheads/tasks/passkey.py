"""Passkey retrieval."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from tl_posheads.tasks.questions import Question, QuestionTask, depth_grid

_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "them. I will quiz you about the important information there."
)


@dataclass(frozen=True)
class Passkey(QuestionTask):
    """A five-digit key hidden in a text and asked for at its end.

    Mohtashami and Jaggi, "Landmark attention: random-access infinite context length for
    transformers", 2023, arXiv 2305.16300. Their wording; the text around it is the corpus's.
    Facts: ``depth`` of the needle as asked for, ``needle`` its first position, ``distance`` from
    there to the answer and ``length``, in tokens.

    Attributes:
        length: tokens of a prompt, the answer included.
        depths: as many depths from 0 to 1, equally far apart, taken in turn.
        n: prompts. seed: chooses keys and stretches of the corpus.
        corpus: what :func:`~tl_posheads.load_corpus` takes.
        short_length: tokens of the short controls.
        instruct: use the chat template (True), don't (False), or do where there is one (None).

    Raises:
        PosheadsError: a field that can't be.

    Example:
        >>> Passkey(depths=0)
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: depths=0 was given; expected a whole number of 1 or more
    """

    length: int = 2048
    depths: int = 5
    n: int = 50
    seed: int = 0
    corpus: str = "python-docs"
    short_length: int = 128
    instruct: bool | None = None
    name: ClassVar[str] = "passkey"

    def _question(self, i: int, rng: random.Random) -> Question:
        key = rng.randint(10000, 99999)
        depth = depth_grid(self.depths)[i % self.depths]
        return Question(
            intro=_INTRO,
            needles=[(depth, f" The pass key is {key}. Remember it. {key} is the pass key.")],
            question="\nWhat is the pass key?",
            prefix=" The pass key is",
            answer=[f" {key}"],
            facts={"depth": depth},
        )

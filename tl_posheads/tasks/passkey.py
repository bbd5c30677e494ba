"""Passkey retrieval."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from tl_posheads.errors import PosheadsError
from tl_posheads.tasks.base import climb, doubled
from tl_posheads.tasks.questions import Question, QuestionTask, depth_grid, lookalikes

_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "them. I will quiz you about the important information there."
)
_COLOURS = (
    "red",
    "blue",
    "green",
    "yellow",
    "black",
    "white",
    "brown",
    "orange",
    "purple",
    "grey",
    "pink",
    "golden",
    "silver",
    "amber",
    "beige",
    "bronze",
    "coral",
    "crimson",
    "cyan",
    "indigo",
    "ivory",
    "jade",
    "lilac",
    "magenta",
    "maroon",
    "navy",
    "olive",
    "pearl",
    "ruby",
    "scarlet",
    "turquoise",
    "violet",
)


@dataclass(frozen=True)
class Passkey(QuestionTask):
    """Retrieve a five-digit key hidden in a text.

    Mohtashami and Jaggi, "Landmark attention: random-access infinite context length for
    transformers", 2023, arXiv 2305.16300, with their wording; the surrounding text is from the
    corpus. Facts: ``depth`` of the needle as requested, ``needle``, its first position,
    ``distance`` from there to the answer and ``length``, in tokens.

    Attributes:
        length: tokens per prompt, including the answer.
        depths: number of evenly spaced depths from 0 to 1, cycled through.
        n: number of prompts. seed: chooses keys and passages of the corpus.
        corpus: as for :func:`~tl_posheads.load_corpus`.
        short_length: tokens per short control.
        instruct: use the chat template (True), don't (False), or use it if there is one (None).
        distractors: number of other keys in the text; each digit is that of the queried key or one
            alternative. With distractors all keys have colours, and the question names one.

    Raises:
        PosheadsError: an invalid field.

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
    distractors: int = 0
    name: ClassVar[str] = "passkey"

    def __post_init__(self) -> None:
        super().__post_init__()
        most = len(_COLOURS) - 1
        if self.distractors > most:
            raise PosheadsError(
                f"distractors={self.distractors} was given; expected at most {most}"
            )

    def rungs(self) -> list[Passkey]:
        """Longer prompts, then more distractors."""
        fitting = min(self.length // 48, len(_COLOURS) - 1)
        distractors = sorted({0, *doubled(1, fitting), self.distractors})
        return climb(self, length=self._shorter(), distractors=distractors)

    def _question(self, i: int, rng: random.Random) -> Question:
        key = rng.randint(10000, 99999)
        depth = depth_grid(self.depths)[i % self.depths]
        stated = [(depth, "pass key", str(key))]
        if self.distractors:
            colours = rng.sample(_COLOURS, 1 + self.distractors)
            others = lookalikes(str(key), ["123456789"] * 5, rng, self.distractors)
            keys = [str(key), *map("".join, others)]
            depths = [depth, *(rng.random() for _ in colours[1:])]
            stated = [(d, f"{c} pass key", k) for d, c, k in zip(depths, colours, keys)]
        name = stated[0][1]
        # Listed first, the queried key would always precede others at the same place.
        order = rng.sample(range(len(stated)), len(stated)) if self.distractors else [0]
        return Question(
            intro=_INTRO,
            needles=[
                (at, f" The {name} is {key}. Remember it. {key} is the {name}.")
                for at, name, key in (stated[j] for j in order)
            ],
            question=f"\nWhat is the {name}?",
            prefix=f" The {name} is",
            answer=[f" {key}"],
            asked=order.index(0),
            facts={"depth": depth},
        )

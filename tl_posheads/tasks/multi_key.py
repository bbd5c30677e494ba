"""RULER's multi-key needle in a haystack."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from tl_posheads.errors import PosheadsError
from tl_posheads.tasks.base import climb, doubled
from tl_posheads.tasks.questions import Question, QuestionTask, depth_grid, lookalikes

_ADJECTIVES = (
    "ancient",
    "bitter",
    "brave",
    "brisk",
    "calm",
    "clever",
    "crimson",
    "curious",
    "dusty",
    "eager",
    "fancy",
    "fierce",
    "frosty",
    "gentle",
    "glossy",
    "grumpy",
    "hollow",
    "humble",
    "idle",
    "jolly",
    "keen",
    "lively",
    "lonely",
    "mellow",
    "narrow",
    "noisy",
    "odd",
    "pale",
    "patient",
    "proud",
    "quiet",
    "rapid",
    "rusty",
    "shy",
    "silent",
    "solid",
    "spicy",
    "steep",
    "sturdy",
    "tidy",
    "vivid",
    "wild",
)
_NOUNS = (
    "anchor",
    "apron",
    "badger",
    "barrel",
    "basket",
    "beetle",
    "bottle",
    "bridge",
    "button",
    "cabin",
    "candle",
    "canyon",
    "castle",
    "cherry",
    "cradle",
    "desert",
    "dolphin",
    "falcon",
    "feather",
    "fiddle",
    "garden",
    "glacier",
    "hammer",
    "harbor",
    "helmet",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "lantern",
    "meadow",
    "mirror",
    "needle",
    "orchard",
    "oyster",
    "paddle",
    "pebble",
    "pencil",
    "pillow",
    "pocket",
    "rabbit",
    "ribbon",
    "river",
    "saddle",
    "scarf",
    "shovel",
    "spider",
    "statue",
    "temple",
    "thunder",
    "ticket",
    "tunnel",
    "violin",
    "walnut",
    "window",
    "wizard",
)
_MOST_NEAR = len(_ADJECTIVES) + len(_NOUNS) - 2  # keys that share a word with another


@dataclass(frozen=True)
class MultiKey(QuestionTask):
    """Retrieve the number of one key from a text that gives other keys other numbers.

    Hsieh et al., "RULER: what's the real context size of your long-context language models?",
    2024, arXiv 2404.06654: needle in a haystack with multiple keys, with RULER's wording. The
    queried needle cycles through the depths; the others are anywhere. Facts: ``depth`` of the
    needle as requested, ``needle``, its first position, ``distance`` from there to the answer and
    ``length``, in tokens; ``n_keys``.

    Attributes:
        length: tokens per prompt, including the answer.
        depths: number of evenly spaced depths from 0 to 1, cycled through.
        n_keys: number of needles in each text.
        n: number of prompts. seed: chooses keys, numbers and passages of the corpus.
        corpus: as for :func:`~tl_posheads.load_corpus`.
        short_length: tokens per short control; as few as possible if the needles need more.
        instruct: use the chat template (True), don't (False), or use it if there is one (None).
        near_duplicates: number of other keys that differ from the queried key in one of its words;
            each digit of their numbers is that of the queried key's number or one alternative.

    Raises:
        PosheadsError: an invalid field.

    Example:
        >>> MultiKey(n_keys=1)
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: n_keys=1 was given; expected a whole number of 2 or more
    """

    length: int = 1024
    depths: int = 5
    n_keys: int = 4
    n: int = 20
    seed: int = 0
    corpus: str = "python-docs"
    short_length: int = 128
    instruct: bool | None = None
    near_duplicates: int = 0
    name: ClassVar[str] = "multi_key"

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 1 + (len(_ADJECTIVES) - 1) * (len(_NOUNS) - 1)  # with near-duplicates or without
        if self.n_keys > most:
            raise PosheadsError(f"n_keys={self.n_keys} was given; expected at most {most}")
        most = min(self.n_keys - 1, _MOST_NEAR)
        if self.near_duplicates > most:
            raise PosheadsError(
                f"near_duplicates={self.near_duplicates} was given; expected at most {most} of "
                f"{self.n_keys} keys"
            )

    def rungs(self) -> list[MultiKey]:
        """Longer prompts, then more keys, then near-duplicates among them."""
        n_keys = sorted({2, *doubled(2, min(2048, self.length // 40)), self.n_keys})
        most = min(n_keys[-1] - 1, _MOST_NEAR)
        near = sorted({0, *doubled(1, most), self.near_duplicates, most})
        return climb(self, length=self._shorter(), n_keys=n_keys, near_duplicates=near)

    def _question(self, i: int, rng: random.Random) -> Question:
        keys = rng.sample([f"{a}-{b}" for a in _ADJECTIVES for b in _NOUNS], self.n_keys)
        values = rng.sample(range(1_000_000, 10_000_000), self.n_keys)
        depth = depth_grid(self.depths)[i % self.depths]
        # Listed first, the queried needle would always precede others at the same place.
        asked = rng.randrange(self.n_keys)
        depths = [depth if j == asked else rng.random() for j in range(self.n_keys)]
        if self.near_duplicates:
            others = _one_word_apart(keys[asked], rng, self.n_keys - 1, self.near_duplicates)
            digits = ["123456789"] * 7
            numbers = lookalikes(str(values[asked]), digits, rng, self.near_duplicates)
            for j in range(self.n_keys):
                if j != asked:
                    keys[j] = others.pop(0)
                    values[j] = int("".join(numbers.pop(0))) if numbers else values[j]
        return Question(
            intro=(
                "A special magic number is hidden within the following text. Make sure to "
                "memorize it. I will quiz you about the number afterwards."
            ),
            needles=[
                (place, f" One of the special magic numbers for {key} is: {value}.")
                for place, key, value in zip(depths, keys, values)
            ],
            question=(
                f"\nWhat is the special magic number for {keys[asked]} mentioned in the provided "
                "text?"
            ),
            prefix=f" The special magic number for {keys[asked]} mentioned in the provided text is",
            answer=[f" {values[asked]}"],
            asked=asked,
            facts={"depth": depth, "n_keys": self.n_keys},
        )


def _one_word_apart(asked: str, rng: random.Random, n: int, near: int) -> list[str]:
    """Other keys: the first ``near`` share a word with ``asked``, the rest share none."""
    keys = [(a, b) for a in _ADJECTIVES for b in _NOUNS]
    shared = {key: sum(x == y for x, y in zip(key, asked.split("-"))) for key in keys}
    one, none = ([key for key in keys if shared[key] == k] for k in (1, 0))
    return ["-".join(key) for key in rng.sample(one, near) + rng.sample(none, n - near)]

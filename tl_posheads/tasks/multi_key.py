"""RULER's needle among needles."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from tl_posheads.errors import PosheadsError
from tl_posheads.tasks.questions import Question, QuestionTask, depth_grid

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


@dataclass(frozen=True)
class MultiKey(QuestionTask):
    """A number that was given to one key, in a text that gives others to other keys.

    Hsieh et al., "RULER: what's the real context size of your long-context language models?",
    2024, arXiv 2404.06654: needle in a haystack with multiple keys, RULER's wording. The needle
    asked for lies at each depth in turn, the others anywhere. Facts: ``depth`` of the needle as
    asked for, ``needle`` its first position, ``distance`` from there to the answer and ``length``,
    in tokens; ``n_keys``.

    Attributes:
        length: tokens of a prompt, the answer included.
        depths: as many depths from 0 to 1, equally far apart, taken in turn.
        n_keys: needles in each text.
        n: prompts. seed: chooses keys, numbers and stretches of the corpus.
        corpus: what :func:`~tl_posheads.load_corpus` takes.
        short_length: tokens of the short controls; where the needles need more, as few as go.
        instruct: use the chat template (True), don't (False), or do where there is one (None).

    Raises:
        PosheadsError: a field that can't be.

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
    name: ClassVar[str] = "multi_key"

    def __post_init__(self) -> None:
        super().__post_init__()
        most = len(_ADJECTIVES) * len(_NOUNS)
        if self.n_keys > most:
            raise PosheadsError(f"n_keys={self.n_keys} was given; expected at most {most}")

    def _question(self, i: int, rng: random.Random) -> Question:
        keys = rng.sample([f"{a}-{b}" for a in _ADJECTIVES for b in _NOUNS], self.n_keys)
        values = rng.sample(range(1_000_000, 10_000_000), self.n_keys)
        depth = depth_grid(self.depths)[i % self.depths]
        # The asked one first would always stand before others at its place.
        asked = rng.randrange(self.n_keys)
        depths = [depth if j == asked else rng.random() for j in range(self.n_keys)]
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

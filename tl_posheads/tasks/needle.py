"""A needle in a haystack, over depths and lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from tl_posheads.errors import PosheadsError
from tl_posheads.tasks.base import climb, doubled, halved
from tl_posheads.tasks.questions import Question, QuestionTask, depth_grid, lookalikes

_INTRO = (
    "You are a helpful AI bot that answers questions for a user. Keep your response short and "
    "direct."
)
_CITIES = (
    "Aberdeen",
    "Athens",
    "Bergen",
    "Bogota",
    "Boston",
    "Brisbane",
    "Bruges",
    "Budapest",
    "Cairo",
    "Chicago",
    "Copenhagen",
    "Dakar",
    "Denver",
    "Dublin",
    "Florence",
    "Geneva",
    "Glasgow",
    "Hamburg",
    "Havana",
    "Helsinki",
    "Istanbul",
    "Kyoto",
    "Lagos",
    "Lima",
    "Lisbon",
    "Madrid",
    "Manila",
    "Montreal",
    "Mumbai",
    "Nairobi",
    "Naples",
    "Oslo",
    "Ottawa",
    "Porto",
    "Prague",
    "Riga",
    "San Francisco",
    "Santiago",
    "Seattle",
    "Seoul",
    "Sydney",
    "Toronto",
    "Valencia",
    "Vienna",
    "Warsaw",
    "Zurich",
)
_DOING = (
    "eat a sandwich",
    "fly a red kite",
    "count the pigeons",
    "paint a blue door",
    "read an old atlas",
    "whistle a waltz",
    "feed the donkeys",
    "drink cold cider",
    "juggle three lemons",
    "sketch a bicycle",
    "play chess with a sailor",
    "mend a torn sail",
    "polish a brass bell",
    "plant a walnut tree",
    "knit a grey scarf",
    "bake rye bread",
    "ride a wooden tram",
    "collect green glass",
    "repair a broken clock",
    "sing to the geese",
)
_WHERE = (
    "beside the lighthouse",
    "under the stone bridge",
    "behind the bakery",
    "on the museum roof",
    "near the fish market",
    "in the botanical garden",
    "at the abandoned station",
    "above the harbour",
    "inside the clock tower",
    "by the second canal",
    "outside the library",
    "along the city wall",
    "next to the windmill",
    "across from the opera",
)
_WHEN = (
    "at dawn",
    "on a rainy Monday",
    "after midnight",
    "in late October",
    "before breakfast",
    "during the parade",
    "on the first snowy day",
    "once the bells have rung",
    "on a sunny day",
    "when the shops are closed",
)
_PARTS = (_DOING, _WHERE, _WHEN)


@dataclass(frozen=True)
class Needle(QuestionTask):
    """Needle in a haystack: a statement about a city in a long text, and a question at its end.

    Kamradt, "Needle in a haystack: pressure testing LLMs", 2023,
    github.com/gkamradt/LLMTest_NeedleInAHaystack. City and activity are drawn from thousands of
    combinations, so the answer can only come from the text. Prompts cycle through lengths, then
    depths. Facts: ``depth`` of the needle as requested, ``needle``, its first position,
    ``distance`` from there to the answer and ``length``, in tokens.

    Attributes:
        lengths: tokens of the prompts, including the answer.
        depths: number of evenly spaced depths from 0 to 1.
        n: number of prompts. seed: chooses answers and passages of the corpus.
        corpus: as for :func:`~tl_posheads.load_corpus`.
        short_length: tokens per short control.
        instruct: use the chat template (True), don't (False), or use it if there is one (None).
        distractors: number of statements about other cities, anywhere in the text. They combine as
            few phrases as are needed to make all different, so no phrase predicts the next.

    Raises:
        PosheadsError: an invalid field.

    Example:
        >>> Needle(lengths=())
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: lengths=() was given; expected whole numbers of 2 or
        more, like (512, 1024)
    """

    lengths: tuple[int, ...] = (512, 1024)
    depths: int = 5
    n: int = 20
    seed: int = 0
    corpus: str = "python-docs"
    short_length: int = 128
    instruct: bool | None = None
    distractors: int = 0
    name: ClassVar[str] = "needle"

    def __post_init__(self) -> None:
        lengths = self.lengths
        if not (
            isinstance(lengths, tuple | list)
            and lengths
            and all(isinstance(length, int) and length > 1 for length in lengths)
        ):
            raise PosheadsError(
                f"lengths={lengths!r} was given; expected whole numbers of 2 or more, like "
                "(512, 1024)"
            )
        super().__post_init__()
        most = len(_CITIES) - 1
        if self.distractors > most:
            raise PosheadsError(
                f"distractors={self.distractors} was given; expected at most {most}"
            )

    def rungs(self) -> list[Needle]:
        """Longer prompts, then more distractors."""
        shortest = min(self.lengths)
        # The shortest of them limits how often all can be halved.
        times = len(halved(shortest, self.short_length + 1))
        lengths = [tuple(x >> k for x in self.lengths) for k in reversed(range(times))]
        distractors = sorted({0, *doubled(1, min(32, shortest // 64)), self.distractors})
        return climb(self, lengths=lengths, distractors=distractors)

    def _lengths(self) -> tuple[int, ...]:
        return tuple(self.lengths)

    def _question(self, i: int, rng: random.Random) -> Question:
        city = rng.choice(_CITIES)
        parts = [rng.choice(words) for words in _PARTS]
        activity = " ".join(parts)
        depth = depth_grid(self.depths)[i // len(self.lengths) % self.depths]
        best, depths, cities = {city: activity}, {city: depth}, [city]
        if self.distractors:
            others = rng.sample([other for other in _CITIES if other != city], self.distractors)
            found = lookalikes(parts, _PARTS, rng, self.distractors)
            best |= zip(others, map(" ".join, found))
            depths |= {other: rng.random() for other in others}
            # Listed first, the queried needle would always precede others at the same place.
            cities = rng.sample([city, *others], 1 + self.distractors)
        return Question(
            intro=_INTRO,
            needles=[(depths[x], f" The best thing to do in {x} is {best[x]}.") for x in cities],
            question=(
                f"\nWhat is the best thing to do in {city}? Don't give information outside the "
                "document or repeat your findings."
            ),
            prefix=f" The best thing to do in {city} is",
            answer=[f" {activity}"],
            asked=cities.index(city),
            facts={"depth": depth},
        )

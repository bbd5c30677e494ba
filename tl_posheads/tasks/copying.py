"""Loss on a repeated segment as a function of the distance to its first occurrence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tl_posheads.errors import PosheadsError
from tl_posheads.tasks.base import Prompt, check_fields, climb, halved, plain
from tl_posheads.tasks.filler import CorpusTask, Filler


@dataclass(frozen=True)
class Copying(CorpusTask):
    """A segment of text is repeated at the end of the prompt, at a chosen distance.

    After the repeated text of Olsson et al., "In-context learning and induction heads", 2022, arXiv
    2209.11895. Plain text, no chat template. The short control is the same segment twice in a row.
    Facts, in tokens: ``distance`` between the first tokens of the two occurrences, ``needle``, the
    position of the first occurrence, and ``length``.

    Attributes:
        length: tokens per prompt.
        segment: tokens of the repeated text.
        distances: number of distances, spaced geometrically from twice the segment to
            ``length - segment - 1`` and cycled through; a single one is the longest.
        skip: first tokens of the second occurrence, not scored because nothing yet shows that
            the segment is repeated.
        n: number of prompts. seed: chooses passages of the corpus.
        corpus: as for :func:`~tl_posheads.load_corpus`.

    Raises:
        PosheadsError: an invalid field.

    Example:
        >>> Copying(length=1024, segment=64, distances=4).distance_grid()
        [959, 128, 250, 490]
        >>> Copying(length=128, segment=64)
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: length=128 was given, but a segment of 64 tokens twice,
        as much between and BOS have 193; raise length or lower segment
    """

    length: int = 1024
    segment: int = 64
    distances: int = 4
    skip: int = 4
    n: int = 20
    seed: int = 0
    corpus: str = "python-docs"
    name: ClassVar[str] = "copying"

    def __post_init__(self) -> None:
        check_fields(self, n=1, length=2, segment=2, distances=1, skip=0)
        if self.skip >= self.segment:
            raise PosheadsError(
                f"skip={self.skip} was given; expected fewer than the segment's {self.segment} "
                "tokens"
            )
        if self.length < 3 * self.segment + 1:
            raise PosheadsError(
                f"length={self.length} was given, but a segment of {self.segment} tokens twice, as "
                f"much between and BOS have {3 * self.segment + 1}; raise length or lower segment"
            )

    def rungs(self) -> list[Copying]:
        """Longer prompts, then shorter segments, whose repetition is harder to notice."""
        lengths = halved(self.length, 3 * self.segment + 1)
        segments = halved(self.segment, self.skip + 4)[::-1] or [self.segment]
        return climb(self, length=lengths, segment=segments)

    def distance_grid(self) -> list[int]:
        """The distances in the order of use, the longest first."""
        low, high = 2 * self.segment, self.length - self.segment - 1
        if self.distances == 1:
            return [high]
        steps = [k / (self.distances - 1) for k in range(self.distances)]
        grid = [round(low * (high / low) ** step) for step in steps]
        return [grid[-1], *grid[:-1]]

    def _prompt(self, filler: Filler, i: int, frame: list[int]) -> Prompt:
        distance = self.distance_grid()[i % self.distances]
        # One unbroken passage up to the second occurrence: the first is in its natural context.
        tokens = frame + filler.stretch(i, self.length - self.segment - len(frame))
        first = len(tokens) - distance
        segment = tokens[first : first + self.segment]
        short = self._scored(frame + segment + segment, self.segment)
        return self._scored(tokens + segment, distance, short)

    def _scored(self, tokens: list[int], distance: int, short: Prompt | None = None) -> Prompt:
        second = len(tokens) - self.segment
        return plain(tokens, second + self.skip, short, distance=distance, needle=second - distance)

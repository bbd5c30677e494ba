"""Passages of a corpus, spread so that the first few never overlap."""

from __future__ import annotations

import os
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.model import LensModel
from tl_posheads.hooks.tokenizer import begin, token_ids, tokenizer_of
from tl_posheads.io.corpora import _streamed, _text
from tl_posheads.tasks.base import Prompt, check_length, encode

T = TypeVar("T")

# Multiples of it, modulo 1, are well spread for any number of them, so passage i doesn't depend
# on how many there will be.
_GOLDEN = (5**0.5 - 1) / 2
_CHARACTERS = 8  # of text per requested token, at first; more where that isn't enough
# A hub data set has no end; this much is read, whatever the number of prompts.
_STREAMED = 4_000_000
# Where a text may be split: between sentences or paragraphs, else lines, else words.
_SENTENCES = r"""(?<=[^\W\d][.!?])(?=\s)|(?<=[)\]'"`][.!?])(?=\s)|(?<=[。！？])"""  # no "3."
_ENDS = (_SENTENCES + r"|(?<=\S)(?=\n\s*\n)", r"(?<=\S)(?=\n)", r"(?<=\S)(?=\s)")
_UNIT = 400  # characters; a longer sentence, like a table, is cut at line ends


class Filler:
    """Text of a corpus, as tokens.

    Args:
        corpus: what :func:`~tl_posheads.load_corpus` takes.
        tokenizer: the model's.
        seed: shifts all passages.

    Raises:
        PosheadsError: no such corpus, or an empty one.
    """

    def __init__(self, corpus: str | os.PathLike[str], tokenizer: Any, seed: int) -> None:
        self.name = os.fspath(corpus)
        text = _text(self.name)
        self.text = _streamed(self.name, _STREAMED) if text is None else text
        self.tokenizer = tokenizer
        self._offset = random.Random(seed).random()

    def stretch(self, i: int, n_tokens: int) -> list[int]:
        """The first ``n_tokens`` tokens of the i-th passage, unbroken.

        Raises:
            PosheadsError: the corpus is shorter.
        """
        ids = self._enough(i, n_tokens, lambda text: token_ids(text, self.tokenizer), len)
        return ids[:n_tokens]

    def sentences(self, i: int, n_tokens: int) -> list[list[int]]:
        """``n_tokens`` tokens of the i-th passage, one list per sentence, the last one complete.

        The first sentence lacks its beginning. A sentence includes the white space before it. Very
        long sentences are split into lines, and very long lines into words.

        Raises:
            PosheadsError: the corpus is shorter.
        """
        if n_tokens < 1:
            return []

        def cut(text: str) -> list[list[int]]:
            return [encode(self.tokenizer, unit) for unit in _units(text)]

        units, total = [], 0
        for unit in self._enough(i, n_tokens, cut, lambda units: sum(map(len, units))):
            units.append(unit)
            total += len(unit)
            if total >= n_tokens:
                break
        excess = total - n_tokens
        while excess >= len(units[0]):
            excess -= len(units.pop(0))
        return [units[0][excess:], *units[1:]]

    def _enough(
        self, i: int, n_tokens: int, cut: Callable[[str], T], count: Callable[[T], int]
    ) -> T:
        size = _CHARACTERS * n_tokens
        while True:
            share = (self._offset + i * _GOLDEN) % 1
            first = int(share * max(0, len(self.text) - size))
            # Begin after white space, so that no word is cut and tokenised as another.
            space = re.compile(r"\s").search(self.text, first - 1) if first else None
            first = space.end() if space else first
            found = cut(self.text[first : first + size])
            if count(found) >= n_tokens:
                return found
            if size >= len(self.text):
                raise PosheadsError(
                    f"{self.name} has {count(found)} tokens, but a prompt needs {n_tokens} of "
                    "them; lower length, or give more text"
                )
            size *= 2


def _units(text: str, ends: tuple[str, ...] = _ENDS) -> list[str]:
    if not ends:
        return [text]
    found: list[str] = []
    for unit in re.split(ends[0], text):
        found += _units(unit, ends[1:]) if len(unit) > _UNIT else [unit] if unit else []
    return found


class CorpusTask(ABC):
    """A task on texts of a corpus; a subclass is a dataclass with these fields."""

    length: int
    n: int
    seed: int
    corpus: str

    def _lengths(self) -> tuple[int, ...]:
        """Prompt lengths in tokens, cycled through."""
        return (self.length,)

    def _frame(self, tokenizer: Any) -> Any:
        """What surrounds every prompt: BOS, if there is one."""
        return begin(tokenizer)

    @abstractmethod
    def _prompt(self, filler: Filler, i: int, frame: Any) -> Prompt:
        """The i-th prompt with its short control."""

    def prompts(self, model: LensModel) -> list[Prompt]:
        """``n`` prompts, each with its short control; the i-th depends only on the seed and i.

        Args:
            model: anything with ``.tokenizer``, and ``.cfg.n_ctx`` if it has a limit.

        Raises:
            PosheadsError: no tokenizer, too long for the model, too short for the question, or
                a corpus that can't be read or is too small.
        """
        tokenizer = tokenizer_of(model)
        check_length(model, max(self._lengths()))
        frame = self._frame(tokenizer)
        filler = Filler(self.corpus, tokenizer, self.seed)
        return [self._prompt(filler, i, frame) for i in range(self.n)]

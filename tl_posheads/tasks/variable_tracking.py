"""RULER's chains of variable assignments."""

from __future__ import annotations

import random
from dataclasses import dataclass
from string import ascii_uppercase
from typing import ClassVar

from tl_posheads.tasks.base import climb, doubled
from tl_posheads.tasks.questions import Question, QuestionTask


@dataclass(frozen=True)
class VariableTracking(QuestionTask):
    """Find all variables with a given value, which most of them get from another variable.

    Hsieh et al., "RULER: what's the real context size of your long-context language models?",
    2024, arXiv 2404.06654: variable tracking, with RULER's wording but without its solved example.
    The assignments of each chain are anywhere in the text, in order. The answer is the names of one
    chain's variables in that order, with all their tokens scored. Facts: ``hops`` and ``chains``;
    ``depth`` of the queried chain's first assignment, ``needle``, its first position, ``distance``
    from there to the answer and ``length``, in tokens.

    Attributes:
        length: tokens per prompt, including the answer.
        hops: assignments of one variable to another in each chain. chains: number of chains.
        n: number of prompts. seed: chooses names, values and passages of the corpus.
        corpus: as for :func:`~tl_posheads.load_corpus`.
        short_length: tokens per short control; as few as possible if the assignments need more.
        instruct: use the chat template (True), don't (False), or use it if there is one (None).

    Raises:
        PosheadsError: an invalid field.

    Example:
        >>> VariableTracking(hops=0)
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: hops=0 was given; expected a whole number of 1 or more
    """

    length: int = 1024
    hops: int = 4
    chains: int = 1
    n: int = 20
    seed: int = 0
    corpus: str = "python-docs"
    short_length: int = 128
    instruct: bool | None = None
    name: ClassVar[str] = "variable_tracking"

    def rungs(self) -> list[VariableTracking]:
        """Longer prompts, then more hops, then more chains."""
        hops = sorted({1, 2, 3, 4, self.hops})
        chains = sorted({1, *doubled(1, self.length // (20 * (hops[-1] + 2))), self.chains})
        return climb(self, length=self._shorter(), hops=hops, chains=chains)

    def _question(self, i: int, rng: random.Random) -> Question:
        n_names = self.hops + 1
        names: dict[str, None] = {}  # in the order drawn
        while len(names) < n_names * self.chains:
            names["".join(rng.choices(ascii_uppercase, k=5))] = None
        drawn = list(names)
        values = rng.sample(range(10_000, 100_000), self.chains)
        needles = []
        for chain, value in enumerate(values):
            own = drawn[chain * n_names : (chain + 1) * n_names]
            right = [str(value), *(f"VAR {name}" for name in own)]
            depths = sorted(rng.random() for _ in own)
            needles += [
                (depth, f"\nVAR {name} = {what}") for depth, name, what in zip(depths, own, right)
            ]
        return Question(
            intro=(
                "Memorize and track the chain(s) of variable assignment hidden in the following "
                "text."
            ),
            needles=needles,
            question=(
                f"\nQuestion: Find all variables that are assigned the value {values[0]} in the "
                "text above."
            ),
            prefix=(
                " Answer: According to the chain(s) of variable assignment in the text above, "
                f"{n_names} variables are assigned the value {values[0]}, they are:"
            ),
            answer=[f" {name}" for name in drawn[:n_names]],
            gap="\n\n",
            facts={"depth": needles[0][0], "hops": self.hops, "chains": self.chains},
        )

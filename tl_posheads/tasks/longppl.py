"""Loss on the tokens that need a long context."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.hooks.model import LensModel
from tl_posheads.hooks.tokenizer import begin, tokenizer_of
from tl_posheads.tasks.base import (
    Prompt,
    check_fields,
    check_length,
    check_short,
    plain_window,
)
from tl_posheads.tasks.filler import Filler

_TRIES = 4  # passages tried per prompt


@dataclass(frozen=True)
class LongPPL:
    """Long texts scored only on key tokens, which distant context makes more likely.

    Fang et al., "What is wrong with perplexity for long-context language modeling?", 2024, arXiv
    2410.23771. A token is a key token if, under the model itself, the long context raises its
    log-probability by more than ``alpha`` over a short context (LSD, long-short difference) and to
    more than ``beta`` (LCL, long-context likelihood), in nats. As in the paper's code, short
    contexts come from windows that move by ``stride``, so they have ``short_length`` to
    ``short_length + stride - 1`` tokens; unlike there, each window begins with BOS if there is
    one. Passages without key tokens are skipped.

    Plain text, no chat template. The short control is a window at the end of the long text, and its
    second half is scored, key tokens or not. Facts: ``key_tokens``, ``stretch`` (the passage of the
    corpus) and ``length``.

    Attributes:
        length: tokens per prompt.
        alpha: threshold of LSD. beta: threshold of LCL.
        stride: of the windows; a smaller one needs more passes.
        n: number of prompts. seed: chooses passages of the corpus.
        corpus: as for :func:`~tl_posheads.load_corpus`.
        short_length: tokens of the short contexts and controls.
        evaluator: model that chooses the key tokens instead; needs the same vocabulary.

    Raises:
        PosheadsError: an invalid field.

    Example:
        >>> LongPPL(length=128)
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: short_length=128, for the short control, and prompts of
            128 tokens were given; raise the length to 130 or more, or lower short_length
    """

    length: int = 1024
    alpha: float = 2.0
    beta: float = -2.0
    stride: int = 64
    n: int = 20
    seed: int = 0
    corpus: str = "python-docs"
    short_length: int = 128
    evaluator: Any = field(default=None, repr=False, compare=False)
    name: ClassVar[str] = "longppl"

    def __post_init__(self) -> None:
        check_fields(self, n=1, length=4, short_length=2, stride=1)
        # One token more than in other tasks, because BOS isn't context.
        check_short(self.short_length, self.length, least=2)

    def rungs(self) -> tuple[()]:
        """None: running text is neither at a ceiling nor at a floor."""
        return ()

    def prompts(self, model: LensModel) -> list[Prompt]:
        """Up to ``n`` prompts, each with its short control; needs several passes for each.

        Key tokens are those of the model as it is: call this before heads are ablated.

        Args:
            model: a HookedTransformer or TransformerBridge.

        Raises:
            PosheadsError: no tokenizer, too long for a model, an evaluator with a different
                vocabulary, a corpus that can't be read or is too small, or no key tokens.
        """
        tokenizer = tokenizer_of(model)
        judge = model if self.evaluator is None else self.evaluator
        if tokenizer_of(judge).get_vocab() != tokenizer.get_vocab():
            raise PosheadsError(
                "the evaluator's tokenizer has a different vocabulary than the model's; give an "
                "evaluator of the same family"
            )
        check_length(model, self.length)
        check_length(judge, self.length)
        filler, start = Filler(self.corpus, tokenizer, self.seed), begin(tokenizer)
        found: list[Prompt] = []
        for i in range(_TRIES * self.n):
            tokens = start + filler.stretch(i, self.length - len(start))
            whole = torch.tensor(tokens, dtype=torch.long)
            with fused_attention(judge):
                targets = self.key_tokens(judge, whole)
            if len(targets):
                facts = {"length": self.length, "key_tokens": len(targets), "stretch": i}
                short = plain_window(tokens, start, self.short_length)
                found.append(Prompt(whole, targets, facts, short))
            if len(found) == self.n:
                return found
        if not found:
            raise PosheadsError(
                f"none of {_TRIES * self.n} passages of {self.corpus} has a token that the "
                f"longer context makes likely (alpha={self.alpha}, beta={self.beta}); lower alpha "
                "or beta, raise length, or give a text with longer-range references"
            )
        warnings.warn(
            f"only {len(found)} of {self.n} prompts have key tokens, of {_TRIES * self.n} tried",
            stacklevel=2,
        )
        return found

    def key_tokens(self, model: LensModel, tokens: Int[Tensor, " pos"]) -> Int[Tensor, " target"]:
        """Ascending positions of a text's key tokens under a model.

        Args:
            model: a HookedTransformer or TransformerBridge; hooks on it stay active.
            tokens: with BOS first if the checkpoint has one.
        """
        n_start = len(begin(tokenizer_of(model)))
        first = n_start + self.short_length
        targets = torch.arange(first, len(tokens))
        long, _ = target_logprobs(model, tokens, targets)
        short = self._short_logprobs(model, tokens, n_start)
        return targets[(long - short > self.alpha) & (long > self.beta)]

    def _short_logprobs(
        self, model: LensModel, tokens: Int[Tensor, " pos"], n_start: int
    ) -> Float[Tensor, " target"]:
        start, body = tokens[:n_start], tokens[n_start:]
        parts = []
        for left in range(0, len(body) - self.short_length, self.stride):
            window = torch.cat([start, body[left : left + self.short_length + self.stride]])
            scored = torch.arange(n_start + self.short_length, len(window))
            parts.append(target_logprobs(model, window, scored)[0])
        return torch.cat(parts)

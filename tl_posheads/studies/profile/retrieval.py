"""The retrieval score: how much of a needle a head copies as the model generates it."""

from __future__ import annotations

from collections import Counter

import torch
from jaxtyping import Int
from torch import Tensor

from tl_posheads.errors import PosheadsError


def copies_of(
    tokens: Int[Tensor, " pos"], answer: Int[Tensor, " answer"]
) -> Int[Tensor, "copy answer"]:
    """Positions of every place where the answer's tokens stand in a row.

    Example:
        >>> import torch
        >>> copies_of(torch.tensor([5, 1, 2, 7, 1, 2]), torch.tensor([1, 2]))
        tensor([[1, 2],
                [4, 5]])
    """
    n = len(answer)
    if n == 0 or len(tokens) < n:
        return torch.zeros(0, n, dtype=torch.long)
    first = torch.nonzero((tokens.unfold(0, n, 1) == answer).all(1)).flatten()
    return first[:, None] + torch.arange(n)


def copied_share(
    attended: Int[Tensor, "head step"],
    generated: Int[Tensor, " step"],
    tokens: Int[Tensor, " pos"],
    needle: Int[Tensor, "copy answer"],
) -> Tensor:
    """Share of the needle's tokens that each head copied: the retrieval score for one needle.

    Wu et al. 2024, "Retrieval head mechanistically explains long-context factuality",
    arXiv 2404.15574, section 2. As the model writes token ``w``, a head copies it where the
    position that the head attends to most lies in the needle and holds ``w``. The score is the
    share of the needle's tokens, ``|g & k| / |k|``; a token that is copied twice counts once.
    The needle is the part of the planted sentence that answers the question, as in the authors'
    code. Where the text holds the answer more than once, copying from either place counts.

    Args:
        attended: the position that the head attends to most, as each token is written.
        generated: the tokens that the model wrote.
        tokens: what the positions hold.
        needle: positions of the needle (:func:`copies_of`).

    Returns:
        ``[head]``, float64, from 0 to 1.

    Raises:
        PosheadsError: no needle, or not one step per token.

    Example:
        >>> import torch
        >>> text = torch.tensor([9, 4, 6, 9, 9])            # the needle is 4 6
        >>> looks = torch.tensor([[1, 2], [1, 1], [0, 3]])  # of three heads, as 4 6 is written
        >>> copied_share(looks, torch.tensor([4, 6]), text, torch.tensor([[1, 2]])).tolist()
        [1.0, 0.5, 0.0]
    """
    if needle.numel() == 0 or attended.shape[-1] != len(generated):
        raise PosheadsError(
            f"a needle of shape {tuple(needle.shape)} and attended positions of shape "
            f"{tuple(attended.shape)} were given for {len(generated)} generated tokens; expected "
            "the needle's positions [copy, answer] and [head, step]"
        )
    n = needle.shape[1]
    place = torch.full((len(tokens),), -1, dtype=torch.long)
    place[needle] = torch.arange(n).expand_as(needle)
    here = place[attended]
    copied = (here >= 0) & (tokens[attended] == generated)
    # A look that copies nothing marks one place too many, which is cut off again.
    marks = torch.zeros(*attended.shape[:-1], n + 1, dtype=torch.bool)
    marks.scatter_(-1, torch.where(copied, here, n), True)
    return marks[..., :n].double().mean(-1)


def recall(generated: Int[Tensor, " step"], answer: Int[Tensor, " answer"]) -> float:
    """Share of the answer's tokens that were written, in any order (ROUGE-1 recall, of tokens).

    Wu et al. count a needle only where it is above one half.

    Example:
        >>> import torch
        >>> recall(torch.tensor([7, 1, 1]), torch.tensor([1, 7, 2, 2]))
        0.5
    """
    common = Counter(generated.tolist()) & Counter(answer.tolist())
    return sum(common.values()) / len(answer)

"""What lm-eval asks of a model, answered by plain transformers one token at a time."""

from __future__ import annotations

import torch


def instances(kind, *arguments):
    """Requests as lm-eval makes them."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def plain_logprob(plain, context, wanted):
    """Of the tokens wanted after the context, one at a time, with nothing but transformers."""
    total, greedy, ids = 0.0, True, list(context)
    with torch.no_grad():
        for token in wanted:
            scores = plain(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            total += float(scores[token])
            greedy = greedy and int(scores.argmax()) == token
            ids.append(token)
    return total, greedy


def plain_ids(plain, context, n):
    ids = list(context)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


def plain_greedy(plain, tokenizer, context, n):
    ids = plain_ids(plain, context, n)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True)


def middle_cut(ids, room):
    """``room`` tokens of a text from its two ends, taken in turn, the last one first."""
    left, right, rest = [], [], list(ids)
    while rest and len(left) + len(right) < room:
        if len(right) <= len(left):
            right.insert(0, rest.pop())
        else:
            left.append(rest.pop(0))
    return left + right

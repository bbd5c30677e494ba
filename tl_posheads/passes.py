"""Forward passes that score chosen tokens and compute nothing that the score does not need.

Three savings, none of which changes a number beyond rounding: logits are computed at the scored
positions alone; attention runs through ``scaled_dot_product_attention`` while nobody watches
scores or pattern; and passes that differ from some layer on share what lies before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_posheads.fused import fused_attention
from tl_posheads.lens import instance_method, own_hooks

Hooks = Sequence[tuple[str, Callable[..., Any]]]


@contextmanager
def unembed_only(model: Any, positions: Tensor) -> Iterator[None]:
    """Inside, logits are computed at ``positions`` alone: the vocabulary is the widest layer."""

    def choose(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, positions.to(args[0].device)], *args[1:])

    handle = model.unembed.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def greedy(model: Any, prompt: Int[Tensor, "pos"], n_new: int) -> Int[Tensor, "step"]:
    """The tokens that the model writes after a prompt, at most ``n_new``, up to its end token.

    The lens's own ``generate``, with a cache of keys and values.
    """
    end = getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    with torch.no_grad():
        out = model.generate(
            prompt[None].to(next(model.parameters()).device),
            max_new_tokens=n_new, do_sample=False, use_past_kv_cache=True,
            stop_at_eos=end is not None, return_type="tokens", verbose=False,
        )  # fmt: skip
    written: Tensor = out[0, len(prompt) :].cpu()
    stop = torch.nonzero(written == end).flatten() if end is not None else written[:0]
    return written[: int(stop[0])] if len(stop) else written


def target_logits(
    model: Any, tokens: Int[Tensor, "pos"], targets: Int[Tensor, "target"]
) -> Float[Tensor, "target d_vocab"]:
    """Logits that predict the tokens at ``targets``, in float32; gradient as the caller has it."""
    device = next(model.parameters()).device
    with unembed_only(model, targets - 1):
        logits: Tensor = model(tokens[None].to(device), return_type="logits")[0].float()
        return logits


def _scored(
    logits: Tensor, tokens: Tensor, targets: Tensor
) -> tuple[Float[Tensor, "target"], Bool[Tensor, "target"]]:
    wanted = tokens[targets].to(logits.device)
    logprob = logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
    return logprob.cpu(), (logits.argmax(-1) == wanted).cpu()


def target_logprobs(
    model: Any, tokens: Int[Tensor, "pos"], targets: Int[Tensor, "target"]
) -> tuple[Float[Tensor, "target"], Bool[Tensor, "target"]]:
    """Log-probability of the tokens at ``targets``, and whether each was the likeliest.

    One forward pass without gradient; hooks on the model are in force. The logits of other
    positions are never computed.

    Returns:
        Natural logarithms in float32 and booleans, on the CPU.
    """
    with torch.no_grad():
        return _scored(target_logits(model, tokens, targets), tokens, targets)


def mean_loss(
    model: Any, documents: Sequence[Int[Tensor, "pos"]], targets: Sequence[Int[Tensor, "target"]]
) -> float:
    """Mean negative log-probability of the texts' tokens at ``targets``, in nats."""
    both = zip(documents, targets, strict=True)
    with fused_attention(model):
        found = [target_logprobs(model, document, at)[0].double() for document, at in both]
    return -float(torch.cat(found).mean())


@dataclass(frozen=True, eq=False)
class Trunk:
    """An unablated pass over a text, and what left some of its blocks.

    Attributes:
        logprob, hit: of the targets, as :func:`target_logprobs` gives them.
        outputs: for layer ``l``, what block ``l - 1`` returned, in the block's own form.
    """

    logprob: Float[Tensor, "target"]
    hit: Bool[Tensor, "target"]
    outputs: dict[int, Any]


def run_trunk(
    model: Any,
    tokens: Int[Tensor, "pos"],
    targets: Int[Tensor, "target"],
    layers: Sequence[int],
) -> Trunk:
    """Run a text once, keeping what enters each of ``layers``.

    Memory: ``len(layers) * pos * d_model`` numbers on the model's device.
    """
    outputs: dict[int, Any] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            outputs[layer] = output

        return hook

    with ExitStack() as stack:
        for layer in {layer for layer in layers if layer > 0}:
            block = model.blocks[layer - 1]
            stack.callback(block.register_forward_hook(keep(layer)).remove)
        logprob, hit = target_logprobs(model, tokens, targets)
    return Trunk(logprob, hit, outputs)


def run_branch(
    model: Any,
    tokens: Int[Tensor, "pos"],
    targets: Int[Tensor, "target"],
    trunk: Trunk,
    layer: int,
    hooks: Hooks,
) -> tuple[Float[Tensor, "target"], Bool[Tensor, "target"]]:
    """The same text under ``hooks``, none of which lies below ``layer``; blocks below don't run.

    Returns:
        As :func:`target_logprobs`.
    """
    points = model.hook_dict
    with ExitStack() as stack:
        if layer > 0:
            output = trunk.outputs[layer]
            for below in range(layer):
                # Each hands on what the last of them returned; their input decides nothing.
                stack.enter_context(
                    instance_method(model.blocks[below], "forward", lambda *a, **k: output)
                )
        stack.enter_context(own_hooks([(points[name], hook) for name, hook in hooks]))
        return target_logprobs(model, tokens, targets)

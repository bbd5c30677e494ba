"""Forward passes that score chosen tokens and skip everything that the score doesn't need.

Three savings, none of which changes a number beyond rounding: logits are computed only at the
scored positions; attention uses ``scaled_dot_product_attention`` where no hook is on scores or
pattern; and passes that differ only from some layer on share the layers below it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.changes import changes_of
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.lengths import own_border, own_frequencies
from tl_posheads.hooks.model import (
    LensModel,
    input_device,
    instance_method,
    model_name,
    others_hooks_suspended,
    own_hooks,
)
from tl_posheads.hooks.tokenizer import end_tokens

Hooks = Sequence[tuple[str, Callable[..., Any]]]

_TOKENS_CPU = 1024
_MOST_ROWS = 64


@contextmanager
def unembed_only(model: LensModel, positions: Tensor) -> Iterator[None]:
    """Inside, logits are computed only at ``positions``: the vocabulary is the widest layer."""

    def choose(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, positions.to(args[0].device)], *args[1:])

    handle = model.unembed.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def generate(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"],
    n_new: int,
    ends: Sequence[int],
    **options: Any,
) -> Int[Tensor, "batch pos_and_new"]:
    """TransformerLens's ``generate``: at most ``n_new`` new tokens, until one of ``ends``.

    Keys and values are cached where the model uses its cache. No token counts as padding: chat
    prompts often end with a pad token, which HookedTransformer would mask.

    Args:
        options: for the model's ``generate``.
    """
    with ExitStack() as stack:
        stack.enter_context(own_frequencies(model))
        cached = reads_cache(model)
        if not cached and model not in _WARNED:
            _WARNED.add(model)
            warnings.warn(
                f"{model_name(model)} reads no cache of keys and values with transformers "
                f"{version('transformers')} and transformer-lens {version('transformer-lens')}; "
                "text is generated without it, which is slower",
                stacklevel=2,
            )
        if not hasattr(model, "original_model"):
            kept, model.tokenizer = model.tokenizer, None
            stack.callback(setattr, model, "tokenizer", kept)
        stack.enter_context(torch.no_grad())
        for length in _whole_passes(model, tokens.shape[1], n_new):
            tokens = model.generate(
                tokens.to(input_device(model)),
                max_new_tokens=length - tokens.shape[1],
                use_past_kv_cache=cached,
                stop_at_eos=bool(ends),
                eos_token_id=list(ends) or None,
                return_type="tokens",
                verbose=False,
                **options,
            )
            if tokens.shape[1] < length:  # every row has ended
                break
    return tokens


def _whole_passes(model: LensModel, length: int, n_new: int) -> list[int]:
    """Lengths at which generation from ``length`` tokens restarts, and where it ends.

    Beyond LongRoPE's border every key is rotated differently, so the cache is invalid.
    """
    end = length + n_new
    borders = {own_border(model), *(change.border for change in changes_of(model))}
    return [*sorted(b + 1 for b in borders if b is not None and length <= b < end - 1), end]


# Whether a model uses its cache; tested once per model.
_CACHES: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_WARNED: WeakSet[Any] = WeakSet()


def reads_cache(model: LensModel) -> bool:
    """Whether cached generation matches uncached generation, tested on four tokens.

    transformers 5.24 renamed the cache argument, and the Bridge of 4.3 doesn't know the new name: a
    new token would attend only to itself. transformers' own attention, as in GPT-J, is fine.
    """
    if not hasattr(model, "original_model"):
        return True
    if model not in _CACHES:
        tokens = torch.arange(3)[None] * (int(model.cfg.d_vocab) // 4) + 1
        tokens = tokens.to(input_device(model))
        with torch.no_grad(), others_hooks_suspended(model), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old name of the cache is the test
            found = model.generate(
                tokens,
                max_new_tokens=2,
                do_sample=False,
                stop_at_eos=False,
                output_logits=True,
                use_past_kv_cache=True,
                return_type="tokens",
                verbose=False,
            )
            whole = found.sequences[:, :4]
            full, alone = (model(x, return_type="logits")[0, -1] for x in (whole, whole[:, 3:]))
        gap = (found.logits[1][0] - full).abs().max()
        _CACHES[model] = bool(gap <= 0.1 * (alone - full).abs().max())
    return _CACHES[model]


def settle_cache(model: LensModel) -> None:
    """Disable the cache of a Bridge whose ``generate`` wouldn't use it.

    Nothing is tested where transformers uses the name of the cache that all Bridges know.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    renamed = "past_key_values" not in CausalLMOutputWithPast.__dataclass_fields__
    rotary = getattr(model.cfg, "positional_embedding_type", None) == "rotary"
    if renamed and rotary:
        with suppress(Exception):  # a model that can't generate can still be scored
            cast(Any, model).adapter.supports_kv_cache = reads_cache(model)


def greedy(model: LensModel, prompt: Int[Tensor, " pos"], n_new: int) -> Int[Tensor, " step"]:
    """The model's greedy continuation of a prompt: at most ``n_new`` tokens, to an end token.

    End tokens are EOS and those in the checkpoint's ``generation_config``.
    """
    ends = end_tokens(model, getattr(model, "tokenizer", None))
    out = generate(model, prompt[None], n_new, ends, do_sample=False)
    written = out[0, len(prompt) :].cpu()
    stop = torch.nonzero(torch.isin(written, torch.tensor(ends, dtype=torch.long))).flatten()
    return written[: int(stop[0])] if len(stop) else written


def target_logits(
    model: LensModel, tokens: Int[Tensor, " pos"], targets: Int[Tensor, " target"], rows: int = 1
) -> Float[Tensor, "row target d_vocab"]:
    """Logits that predict the tokens at ``targets``, in float32; the caller decides on gradients.

    The text is repeated in ``rows`` rows, which hooks may treat differently.
    """
    with own_frequencies(model), unembed_only(model, targets - 1):
        inputs = tokens.to(input_device(model)).expand(rows, -1)
        logits: Tensor = model(inputs, return_type="logits").float()
        return logits


def _scored(
    logits: Tensor, tokens: Tensor, targets: Tensor
) -> tuple[Float[Tensor, "row target"], Bool[Tensor, "row target"]]:
    wanted = tokens[targets].to(logits.device).expand(logits.shape[:-1])
    logprob = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
    return logprob.cpu(), (logits.argmax(-1) == wanted).cpu()


def target_logprobs(
    model: LensModel, tokens: Int[Tensor, " pos"], targets: Int[Tensor, " target"]
) -> tuple[Float[Tensor, " target"], Bool[Tensor, " target"]]:
    """Log-probability of the tokens at ``targets``, and whether each was the most likely.

    One forward pass without gradient; hooks on the model stay active. Logits at other positions
    are never computed.

    Returns:
        Natural logarithms in float32 and booleans, on the CPU.
    """
    with torch.no_grad():
        logprob, hit = _scored(target_logits(model, tokens, targets), tokens, targets)
    return logprob[0], hit[0]


def require_finite_logprobs(model: LensModel, found: Iterable[Tensor]) -> None:
    """Refuse log-probabilities that are NaN or infinite.

    Raises:
        PosheadsError: one of them is.
    """
    if not all(bool(torch.isfinite(values).all()) for values in found):
        raise PosheadsError(
            f"{model_name(model)} gives NaN or infinite log-probabilities; load it with dtype "
            "float32 or bfloat16"
        )


def mean_loss(
    model: LensModel,
    documents: Sequence[Int[Tensor, " pos"]],
    targets: Sequence[Int[Tensor, " target"]],
) -> float:
    """Mean negative log-probability of the texts' tokens at ``targets``, in nats."""
    both = zip(documents, targets, strict=True)
    with fused_attention(model):
        found = [target_logprobs(model, document, at)[0].double() for document, at in both]
    return -float(torch.cat(found).mean())


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """An unablated pass over a text, with the outputs of some of its blocks.

    Attributes:
        logprob, hit: of the targets, as from :func:`target_logprobs`.
        outputs: for layer ``l``, the output of block ``l - 1``, in the block's own form.
    """

    logprob: Float[Tensor, " target"]
    hit: Bool[Tensor, " target"]
    outputs: dict[int, Any]


def cached_prefix(
    model: LensModel,
    tokens: Int[Tensor, " pos"],
    targets: Int[Tensor, " target"],
    layers: Sequence[int],
) -> CachedPrefix:
    """Run a text once and keep the input of each of ``layers``.

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
    return CachedPrefix(logprob, hit, outputs)


def run_from_layer(
    model: LensModel,
    tokens: Int[Tensor, " pos"],
    targets: Int[Tensor, " target"],
    prefix: CachedPrefix,
    layer: int,
    hooks: Hooks,
) -> tuple[Float[Tensor, " target"], Bool[Tensor, " target"]]:
    """Run the same text with ``hooks`` at ``layer`` or above; blocks below don't run.

    Returns:
        As :func:`target_logprobs`.
    """
    logprob, hit = run_rows_from_layer(model, tokens, targets, prefix, layer, hooks, 1)
    return logprob[0], hit[0]


def run_rows_from_layer(
    model: LensModel,
    tokens: Int[Tensor, " pos"],
    targets: Int[Tensor, " target"],
    prefix: CachedPrefix,
    layer: int,
    hooks: Hooks,
    rows: int,
) -> tuple[Float[Tensor, "row target"], Bool[Tensor, "row target"]]:
    """:func:`run_from_layer` on many rows of one text, which ``hooks`` may treat differently."""
    points = model.hook_dict
    with ExitStack() as stack:
        if layer > 0:
            output = _in_rows(prefix.outputs[layer], rows)
            for below in range(layer):
                # Each returns what the last skipped block returned; their input doesn't matter.
                stack.enter_context(
                    instance_method(model.blocks[below], "forward", lambda *a, **k: output)
                )
        stack.enter_context(own_hooks([(points[name], hook) for name, hook in hooks]))
        stack.enter_context(torch.no_grad())
        return _scored(target_logits(model, tokens, targets, rows), tokens, targets)


def _in_rows(output: Any, rows: int) -> Any:
    """A block's output for one row, expanded to many; must not be written to."""
    if isinstance(output, Tensor):
        return output.expand(rows, *output.shape[1:]) if rows > 1 else output
    if isinstance(output, tuple):
        return tuple(_in_rows(part, rows) for part in output)
    return output


def rows_at_once(model: LensModel, n_pos: int, n_targets: int) -> int:
    """Number of rows of ``n_pos`` tokens that fit into memory in one pass.

    On a CPU, more than a thousand tokens per pass gain nothing.
    """
    device = input_device(model)
    if device.type != "cuda":
        return max(1, _TOKENS_CPU // n_pos)
    config = model.cfg
    widest = 6 * int(config.d_model) + 4 * int(getattr(config, "d_mlp", None) or 4 * config.d_model)
    # Eager attention holds pattern and scores; fused kernels never form them.
    per_row = n_pos * (widest + 3 * n_pos * int(config.n_heads)) * 4
    per_row += 3 * n_targets * int(config.d_vocab) * 4
    # Memory that torch has reserved but doesn't use is free.
    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + spare
    return int(max(1, min(_MOST_ROWS, free // 2 // per_row)))

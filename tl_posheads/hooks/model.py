"""The live model: whether it is supported, which hooks it has, and hooks that clean up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.lengths import own_frequencies

POSITIONS = {
    "standard": "learned absolute positions",
    "shortformer": "learned absolute positions added to queries and keys",
    "alibi": "ALiBi biases",
    "relative_positional_bias": "relative position biases (T5)",
    "none": "no position embedding that TransformerLens knows of (a recurrent, convolutional or "
    "hybrid model)",
}


class LensModel(Protocol):
    """The part of HookedTransformer and TransformerBridge that this package uses."""

    cfg: Any
    tokenizer: Any
    blocks: Any
    unembed: Any

    @property
    def hook_dict(self) -> dict[str, Any]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]: ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...

    def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    def to_str_tokens(self, *args: Any, **kwargs: Any) -> Any: ...

    def eval(self) -> Any: ...

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def modules(self) -> Iterator[nn.Module]: ...


def model_name(model: LensModel) -> str:
    """The model's name in results, titles and errors."""
    return name_of(str(getattr(model.cfg, "model_name", None) or type(model).__name__))


def name_of(source: str) -> str:
    """A model's name, derived from its source: never a path.

    For a folder, its last part; for a snapshot in the Hub's cache, its hub id; else the source.

    Example:
        >>> name_of("EleutherAI/pythia-70m"), name_of("/runs/my-model")
        ('EleutherAI/pythia-70m', 'my-model')
        >>> name_of("/cache/models--EleutherAI--pythia-70m/snapshots/a39f36b1")
        'EleutherAI/pythia-70m'
    """
    if not (os.path.isabs(source) or os.path.isdir(source)):
        return source
    path = Path(os.path.abspath(source))
    if path.parent.name == "snapshots":
        return path.parts[-3].removeprefix("models--").replace("--", "/")
    return path.name


def require_lens(model: LensModel) -> None:
    """Refuse what isn't a TransformerLens model."""
    if getattr(model, "cfg", None) is None or not hasattr(model, "run_with_hooks"):
        raise PosheadsError(
            f"a {type(model).__name__} was given; expected a HookedTransformer or a "
            "TransformerBridge, as tl_posheads.load_model returns"
        )


def require_rotary(model: LensModel) -> None:
    """Refuse what isn't a TransformerLens model with RoPE, by name, before anything is run."""
    require_lens(model)
    kind = str(getattr(model.cfg, "positional_embedding_type", None) or "none")
    if kind != "rotary":
        used = POSITIONS.get(kind, f"positions of the kind {kind!r}")
        raise PosheadsError(
            f"{model_name(model)} uses {used}, not RoPE, so it has no rotary dimensions to score; "
            "choose a model with rotary position embedding, like Llama, Pythia or SmolLM2"
        )
    if not hasattr(model, "blocks"):
        raise PosheadsError(
            f"{model_name(model)} has no single stack of blocks in TransformerLens (encoder and "
            "decoder, or alternating stacks), so its layers can't be numbered; choose a "
            "decoder-only model"
        )
    if any(_hides_mrope(attention_of(model, layer)) for layer in range(int(model.cfg.n_layers))):
        raise PosheadsError(
            f"{model_name(model)} uses MRoPE (positions in time, height and width), not RoPE, in "
            "attention that TransformerLens leaves to transformers and whose rotated queries and "
            "keys it does not show; choose a model that reads text, like Llama, Qwen3 or SmolLM2"
        )


def attention_of(model: LensModel, layer: int) -> nn.Module | None:
    """The layer's attention component; None in layers that have none (hybrid models)."""
    block = model.blocks[layer]
    return block._modules.get("attn") if isinstance(block, nn.Module) else None


def is_native(attn: Any) -> bool:
    """Whether transformers' own attention runs, which TransformerLens only observes (GPT-J)."""
    return type(attn).__name__ == "AttentionBridge"


def _hides_mrope(attn: Any) -> bool:
    # Where TransformerLens shows it, as in Qwen3.5, a text token's three positions are equal and
    # the rotation is plain RoPE.
    config = getattr(getattr(attn, "original_component", None), "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return is_native(attn) and "mrope_section" in rope


@contextmanager
def instance_method(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Replace a method on one object only; the class and other objects keep theirs."""
    before = owner.__dict__.get(name)
    owner.__dict__[name] = wrapper
    try:
        yield
    finally:
        if before is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before


@contextmanager
def own_hooks(hooks: Sequence[tuple[Any, Callable[..., Any]]]) -> Iterator[list[Any]]:
    """Hooks on HookPoints that are removed on exit; all other hooks stay, in their order.

    ``run_with_hooks`` has two drawbacks: it may also clear hooks of a caller's level, and on the
    Bridge it looks up thousands of names at every call.
    """
    ours: list[tuple[Any, Any]] = []
    try:
        for point, hook in hooks:
            before = {id(handle) for handle in point.fwd_hooks}
            # "Permanent" keeps a reset_hooks() in the meantime from removing them.
            point.add_hook(hook, is_permanent=True)
            ours += [(point, h) for h in point.fwd_hooks if id(h) not in before]
        yield [handle for _, handle in ours]
    finally:
        for point, handle in ours:
            handle.hook.remove()
            point.fwd_hooks[:] = [h for h in point.fwd_hooks if h is not handle]


@contextmanager
def others_hooks_suspended(model: LensModel) -> Iterator[None]:
    """Inside, no hook is called; afterwards all are restored, in their order."""
    points = {id(point): point for point in model.hook_dict.values()}.values()
    kept = [(point, point.__dict__["_forward_hooks"]) for point in points]
    for point, hooks in kept:
        point.__dict__["_forward_hooks"] = type(hooks)()
    try:
        yield
    finally:
        for point, hooks in kept:
            point.__dict__["_forward_hooks"] = hooks


def require_clean(model: LensModel) -> None:
    """Refuse a model with forgotten hooks: the scores would be those of a modified model.

    Permanent hooks and those of an open ``with model.hooks(...)`` are intended and stay active.
    """
    dirty = [
        name
        for name, point in model.hook_dict.items()
        for handle in (*point.fwd_hooks, *point.bwd_hooks)
        if not handle.is_permanent and not handle.context_level
    ]
    if dirty:
        more = f" and {len(set(dirty)) - 1} other hook points" if len(set(dirty)) > 1 else ""
        raise PosheadsError(
            f"{model_name(model)} still carries hooks on {dirty[0]}{more}; call "
            "model.reset_hooks() first, or set those you mean inside `with model.hooks(...)`"
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch uses only the calling thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _offloading(module: nn.Module) -> list[Any]:
    """The hooks with which accelerate loads a module's weights for a pass and unloads them."""
    found = [getattr(module, "_hf_hook", None)]
    for hook in found:
        found += getattr(hook, "hooks", ())  # several, one after the other
    return [hook for hook in found if getattr(hook, "offload", False)]


def input_device(model: LensModel) -> torch.device:
    """The device for the model's tokens: that of its embedding during a pass.

    Weights offloaded by accelerate are on the device ``meta`` between passes.
    """
    embed = getattr(model, "embed", model)
    device: torch.device = next(embed.parameters()).device
    if device.type != "meta":
        return device
    hooks = [hook for module in embed.modules() for hook in _offloading(module)]
    if not hooks:
        raise PosheadsError(
            f"{model_name(model)} has no weights (they are on the device 'meta', and accelerate "
            "has no hook that loads them); load the model with its weights"
        )
    return torch.device(hooks[0].execution_device)


@contextmanager
def readable(module: nn.Module) -> Iterator[None]:
    """Inside, the module's weights are loaded if accelerate has offloaded them."""
    with ExitStack() as stack:
        for part in module.modules():
            for hook in _offloading(part):
                hook.pre_forward(part)
                stack.callback(hook.post_forward, part, None)
        yield


def require_own_biases(model: LensModel, layers: Iterable[int], what: str) -> None:
    """Refuse heads part of whose output was folded into the layer's output bias.

    ``fold_value_biases``, the default of ``enable_compatibility_mode()`` and
    ``HookedTransformer.from_pretrained``, adds ``b_V W_O`` of all heads to ``b_O`` and sets ``b_V``
    to zero, so each head's part is lost. A trained model doesn't look like that: its value biases
    are not all exactly zero.

    Raises:
        PosheadsError: one of the layers' value biases are all zero, and its output bias isn't.
    """
    for layer in layers:
        attn = attention_of(model, layer)
        if attn is None or "MLA" in type(attn).__name__:  # which has none
            continue
        with readable(attn):
            b_v, b_o = (getattr(attn, name, None) for name in ("b_V", "b_O"))
            if b_v is None or b_o is None or bool(b_v.any()) or not bool(b_o.any()):
                continue
        raise PosheadsError(
            f"{what} was requested for {model_name(model)}, but in layer {layer} the value biases "
            "are folded into the output bias, where they would stay. Load it without "
            "fold_value_biases (enable_compatibility_mode(fold_value_biases=False), "
            "from_pretrained_no_processing, or tl_posheads.load_model), or use mode 'mean'"
        )


class PassDone(Exception):
    """Ends a forward pass from inside its last hook: the rest isn't needed."""


def run_forward(model: LensModel, tokens: Tensor, attention_mask: Tensor | None = None) -> None:
    device = input_device(model)
    options = {} if attention_mask is None else {"attention_mask": attention_mask.to(device)}
    with torch.no_grad():
        model(tokens.to(device), return_type=None, **options)


def read_pass(
    model: LensModel, tokens: Tensor, readers: Sequence[tuple[Any, Callable[[Tensor], Any]]]
) -> None:
    """One pass that passes hook values to ``readers`` and ends when all have been called."""
    waiting = set(range(len(readers)))

    def hook_of(number: int, read: Callable[[Tensor], Any]) -> Callable[..., None]:
        def show(value: Tensor, hook: Any) -> None:
            read(value.detach())
            waiting.discard(number)
            if not waiting:
                raise PassDone

        return show

    hooks = [(point, hook_of(number, read)) for number, (point, read) in enumerate(readers)]
    with own_frequencies(model), own_hooks(hooks), suppress(PassDone):
        run_forward(model, tokens)

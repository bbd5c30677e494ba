"""The live model: is it one that we can read, who hooks it, and hooks that leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tl_posheads.errors import PosheadsError

POSITIONS = {
    "standard": "learned absolute positions",
    "shortformer": "learned absolute positions added to queries and keys",
    "alibi": "ALiBi biases",
    "relative_positional_bias": "relative position biases (T5)",
    "none": "no position embedding at all (a recurrent or convolutional model)",
}

MASKED = -6e4  # fp16's lowest number is -65504; the lens masks with -inf or the dtype's lowest


def model_name(model: Any) -> str:
    return str(getattr(model.cfg, "model_name", None) or type(model).__name__)


def require_lens(model: Any) -> None:
    """Refuse what isn't a TransformerLens model."""
    if getattr(model, "cfg", None) is None or not hasattr(model, "run_with_hooks"):
        raise PosheadsError(
            f"a {type(model).__name__} was given; expected a HookedTransformer or a "
            "TransformerBridge, as tl_posheads.load_model returns"
        )


def require_rotary(model: Any) -> None:
    """Refuse what isn't a TransformerLens model with RoPE, by name, before anything is run."""
    require_lens(model)
    kind = str(getattr(model.cfg, "positional_embedding_type", None) or "none")
    if kind != "rotary":
        used = POSITIONS.get(kind, f"positions of the kind {kind!r}")
        raise PosheadsError(
            f"{model_name(model)} uses {used}, not RoPE, so it has no rotary dimensions to score; "
            "choose a model with rotary position embedding, like Llama, Pythia or SmolLM2"
        )


def attention(model: Any, layer: int) -> nn.Module | None:
    """The layer's attention component; None in layers that have none (hybrid models)."""
    block = model.blocks[layer]
    return block._modules.get("attn") if isinstance(block, nn.Module) else None


def is_native(attn: Any) -> bool:
    """Whether the lens only looks on as transformers' own attention runs, as with GPT-J."""
    return type(attn).__name__ == "AttentionBridge"


@contextmanager
def instance_method(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Shadow a method on one object; the class, and other objects, keep theirs."""
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
    """Hooks on HookPoints that go when this leaves; everyone else's stay, in their order.

    ``run_with_hooks`` would do, but for two things: it may also clear hooks of a caller's level,
    and on the Bridge it looks up thousands of names at every call.
    """
    ours: list[tuple[Any, Any]] = []
    try:
        for point, hook in hooks:
            before = {id(handle) for handle in point.fwd_hooks}
            # "Permanent" keeps a reset_hooks() that runs meanwhile from cutting the pass short.
            point.add_hook(hook, is_permanent=True)
            ours += [(point, h) for h in point.fwd_hooks if id(h) not in before]
        yield [handle for _, handle in ours]
    finally:
        for point, handle in ours:
            handle.hook.remove()
            point.fwd_hooks[:] = [h for h in point.fwd_hooks if h is not handle]


@contextmanager
def others_hooks_suspended(model: Any) -> Iterator[None]:
    """Inside, no HookPoint calls anyone; afterwards all do again, in their order."""
    points = {id(point): point for point in model.hook_dict.values()}.values()
    kept = [(point, point.__dict__["_forward_hooks"]) for point in points]
    for point, hooks in kept:
        point.__dict__["_forward_hooks"] = type(hooks)()
    try:
        yield
    finally:
        for point, hooks in kept:
            point.__dict__["_forward_hooks"] = hooks


def require_clean(model: Any) -> None:
    """Refuse a model on which someone forgot hooks: scores would be those of another model.

    Permanent hooks and those of a ``with model.hooks(...)`` that is still open are meant, and
    stay in force.
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
    """Inside, torch works in the calling thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PassDone(Exception):
    """Ends a forward pass from inside its last hook: the rest of it would be thrown away."""


def run_forward(model: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> None:
    device = next(model.parameters()).device
    options = {} if attention_mask is None else {"attention_mask": attention_mask.to(device)}
    with torch.no_grad():
        model(tokens.to(device), return_type=None, **options)


def read_pass(
    model: Any, tokens: Tensor, readers: Sequence[tuple[Any, Callable[[Tensor], Any]]]
) -> None:
    """One pass whose hook points show their values to ``readers``; it ends when all have seen."""
    waiting = set(range(len(readers)))

    def hook_of(number: int, read: Callable[[Tensor], Any]) -> Callable[..., None]:
        def show(value: Tensor, hook: Any) -> None:
            read(value.detach())
            waiting.discard(number)
            if not waiting:
                raise PassDone

        return show

    hooks = [(point, hook_of(number, read)) for number, (point, read) in enumerate(readers)]
    with own_hooks(hooks), suppress(PassDone):
        run_forward(model, tokens)


@dataclass(frozen=True, eq=False)
class Change:
    """What a context of ours has changed in the rotary dimensions of a live model.

    Attributes:
        name: for provenance: the method or edit, with all its settings.
        kind: ``"extrapolation"`` or ``"edit"``.
        trained: positions that the model was trained on.
        geometry: a layer's geometry and a text's length to its geometry under the change.
        length_matters: whether ``geometry`` depends on the length.
        remapped: for a change of scores, the layers' changed geometry.
        handles: its hooks on scores, which attention without scores does the work of.
    """

    name: str
    kind: str
    trained: int
    geometry: Callable[[Any, int], Any]
    length_matters: bool = False
    remapped: dict[int, Any] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)


_CHANGES_ATTRIBUTE = "_tl_posheads_changes"


def changes_of(model: Any) -> tuple[Change, ...]:
    """Changes in force, the outermost first."""
    return tuple(model.__dict__.get(_CHANGES_ATTRIBUTE, ()))


@contextmanager
def changed(model: Any, change: Change) -> Iterator[None]:
    """Inside, ``change`` is known to everyone who reads the model's geometry."""
    before = changes_of(model)
    model.__dict__[_CHANGES_ATTRIBUTE] = (*before, change)
    try:
        yield
    finally:
        if before:
            model.__dict__[_CHANGES_ATTRIBUTE] = before
        else:
            del model.__dict__[_CHANGES_ATTRIBUTE]


def trained_length(model: Any) -> int:
    """Positions that the model was trained on, also inside a context that lets it read more."""
    changes = changes_of(model)
    return changes[0].trained if changes else int(model.cfg.n_ctx)

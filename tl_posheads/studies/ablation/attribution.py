"""Attribution patching of every head at once: what ablating it would do, to first order.

Nanda 2023, "Attribution patching"; Kramár et al. 2024, arXiv 2403.00745. The lens's own
``tools.analysis.attribution_patching`` does the same for pairs of texts on the Bridge of 4.x; here
the other activation is the ablation's value, and either line and class will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.logprobs import target_logits
from tl_posheads.hooks.model import LensModel, attention_of, own_hooks, require_own_biases
from tl_posheads.rotary.precision import widened


@dataclass(frozen=True, eq=False)
class Attribution:
    """Estimates for every head from one forward and one backward pass.

    Attributes:
        logprob: mean log-probability of the targets, natural logarithm.
        effects: estimated change of ``logprob`` if the head alone is ablated, ``[layer, head]``;
            that of a set is the sum.
    """

    logprob: float
    effects: Float[Tensor, "layer head"]


def attributed_effects(
    model: LensModel,
    tokens: Int[Tensor, " pos"],
    targets: Int[Tensor, " target"],
    replacement: Mapping[int, Tensor | None] | None = None,
) -> Attribution:
    """Estimate the effect of ablating each head: gradient times the change of ``hook_z``.

    Args:
        model: HookedTransformer or TransformerBridge; hooks on it are in force.
        tokens, targets: as in :class:`tl_posheads.tasks.Prompt`.
        replacement: what the ablation puts in place of z, ``[head, d_head]`` or
            ``[pos, head, d_head]`` by layer; None and layers left out are zero.

    Memory: that of a forward pass with gradient; with eager attention three
    ``[head, pos, pos]`` tensors for every layer.

    Raises:
        PosheadsError: the log-probability is not finite; heads are set to zero in a layer whose
            value biases the lens has folded into the output bias.

    Example:
        >>> attributed_effects(model, prompt.tokens, prompt.targets).effects   # doctest: +SKIP
    """
    layers = [i for i in range(model.cfg.n_layers) if attention_of(model, i) is not None]
    zeroed = [i for i in layers if replacement is None or replacement.get(i) is None]
    require_own_biases(model, zeroed, "the effect of setting heads to zero")
    seen: dict[int, Tensor] = {}

    def watch(layer: int) -> Callable[..., Tensor]:
        def hook(z: Float[Tensor, "1 pos head d_head"], hook: Any) -> Tensor:
            # The graph starts at the first z: nothing before it needs a gradient.
            seen[layer] = z if z.requires_grad else z.detach().requires_grad_()
            return seen[layer]

        return hook

    points = model.hook_dict
    hooks = [(points[f"blocks.{layer}.attn.hook_z"], watch(layer)) for layer in layers]
    with _frozen(model), torch.enable_grad(), own_hooks(hooks):
        logits = target_logits(model, tokens, targets)[0]
        wanted = tokens[targets].to(logits.device)
        logprob = logits.log_softmax(-1).gather(-1, wanted[:, None]).mean()
        value = float(logprob.detach())
        if not math.isfinite(value):
            raise PosheadsError(
                f"the log-probability of a prompt is {value}; load the model with dtype "
                "float32 or bfloat16"
            )
        gradients = torch.autograd.grad(logprob, [seen[layer] for layer in layers])
    effects = torch.full((model.cfg.n_layers, model.cfg.n_heads), float("nan"))
    with torch.no_grad():
        for layer, gradient in zip(layers, gradients, strict=True):
            z = seen[layer].detach()
            new = None if replacement is None else replacement.get(layer)
            change = -z if new is None else _fit(new, z) - z
            effects[layer] = einsum(
                widened(gradient), widened(change), "batch pos head d, batch pos head d -> head"
            ).cpu()
    return Attribution(value, effects)


def _fit(new: Tensor, z: Tensor) -> Tensor:
    if new.ndim == 3:
        return new[: z.shape[1]].to(z)
    return new.to(z)


@contextmanager
def _frozen(model: LensModel) -> Iterator[None]:
    """Inside, no weight requires a gradient, so that autograd keeps no inputs for weights."""
    asking = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in asking:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)

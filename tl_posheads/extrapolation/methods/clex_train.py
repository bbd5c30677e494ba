"""Training of CLEX's ODE on a live model with frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import (
    extended_layers,
    hooks_on_rotated,
    require_positive,
    require_whole,
)
from tl_posheads.extrapolation.methods.clex import CLEX
from tl_posheads.hooks.capture import rotary_hook_points
from tl_posheads.hooks.changes import changes_of, trained_of
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.inputs import documents_of
from tl_posheads.hooks.model import (
    LensModel,
    input_device,
    own_hooks,
    require_clean,
    require_rotary,
)
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.rotary.contributions import turn
from tl_posheads.rotary.geometry import LayerGeometry


def train_clex(
    model: LensModel,
    tokens: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]],
    *,
    max_factor: int,
    steps: int = 200,
    lr: float = 1e-3,
    trained: int | None = None,
    act: str = "silu",
    time_dt: float = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> CLEX:
    """Learn how the frequencies should follow the length, from texts within the training length.

    Each step takes a text, a factor ``t`` from 2 to ``max_factor``, and spreads the text's tokens
    over ``t`` times its length: positions are drawn and sorted, first and last are kept (Chen et
    al. 2024, arXiv 2310.16450, section 3.3). Only the ODE's weights are then trained on the
    model's loss. The authors also train the model; here it stays frozen, so that a model can be
    extended without their budget.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE; its weights are left bit for bit.
        tokens: texts of at most the training length, at least 8 tokens.
        max_factor: longest text length over the training length, 2 or more.
        steps: texts seen. lr: of Adam.
        trained: positions that the model was trained on; its checkpoint's own by default.
        act, time_dt: as in :class:`CLEX`; the solver's steps take most of the time of small models.
        seed: of weights, texts, factors and positions.
        progress: show a bar with the loss, nats per token.

    Returns:
        :class:`CLEX`.

    Memory: activations of one text for the gradient.

    Raises:
        PosheadsError: no RoPE, a method in force, texts that are too long or too short, a loss
            that isn't finite.

    Example:
        >>> method = train_clex(model, tokens, max_factor=4)         # doctest: +SKIP
        >>> with method(model):                                      # doctest: +SKIP
        ...     scores = ph.score_heads(model, long_tokens)
    """
    require_rotary(model)
    require_clean(model)
    require_whole("train_clex", max_factor=(max_factor, 2), steps=(steps, 1))
    require_positive("train_clex", lr=lr)
    known = trained_of(model, trained)
    documents = documents_of(model, tokens, None, 0)
    lengths = [len(document) for document in documents]
    if changes_of(model) or max(lengths) > known or min(lengths) < 8:
        raise PosheadsError(
            f"texts of {min(lengths)} to {max(lengths)} tokens were given for a model trained on "
            f"{known}; expected 8 tokens or more, none longer than that, and no method in force"
        )
    layers = extended_layers(RotaryGeometry.from_model(model))
    n_pairs = next(iter(layers.values())).n_pairs
    start = CLEX.untrained(n_pairs, max_factor, act=act, time_dt=time_dt, seed=seed)
    up, down = (weight.clone().requires_grad_(True) for weight in (start.up, start.down))
    method = replace(start, up=up, down=down)
    optimizer = torch.optim.Adam([up, down], lr=lr)
    random = torch.Generator().manual_seed(seed)
    device = input_device(model)
    with rotary_hook_points(model), _frozen(model), torch.enable_grad():
        bar = tqdm(range(steps), desc="CLEX", disable=not progress, dynamic_ncols=True)
        for _ in bar:
            text = documents[int(torch.randint(len(documents), (1,), generator=random))]
            # At 1 the frequencies are the model's own, and the ODE has nothing to learn.
            t = int(torch.randint(2, max_factor + 1, (1,), generator=random))
            positions = spread_positions(len(text), t, random)
            inv_freq = _solutions(method, layers, float(t))
            hooks = _hooks(model, layers, inv_freq, positions)
            with own_hooks(hooks), fused_attention(model):
                logits = model(text[None].to(device), return_type="logits")[0].float()
            loss = cross_entropy(logits[:-1], text[1:].to(device))
            if not loss.isfinite():
                raise PosheadsError(
                    f"train_clex(lr={lr}) diverged: the loss is {loss.item()}; give a smaller lr"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", t=t)
    return replace(start, up=up.detach(), down=down.detach())


def spread_positions(n: int, t: int, random: torch.Generator) -> Int[Tensor, " pos"]:
    """``n`` ascending positions within ``n * t``, the first and the last among them."""
    inner = torch.randperm(n * t - 2, generator=random)[: n - 2].sort().values + 1
    return torch.cat([torch.tensor([0]), inner, torch.tensor([n * t - 1])])


def _solutions(
    method: CLEX, layers: dict[int, LayerGeometry], t: float
) -> dict[int, Float[Tensor, " pair"]]:
    """Each layer's frequencies; layers that turn alike share a solution, which is slow to get."""
    solved: dict[Any, Tensor] = {}
    for layer in layers.values():
        key = tuple(layer.inv_freq.tolist())
        if key not in solved:
            solved[key] = method.at(layer.inv_freq, t)
    return {i: solved[tuple(layer.inv_freq.tolist())] for i, layer in layers.items()}


def _hooks(
    model: LensModel,
    layers: dict[int, LayerGeometry],
    inv_freq: dict[int, Float[Tensor, " pair"]],
    positions: Int[Tensor, " pos"],
) -> list[tuple[Any, Callable[..., Tensor]]]:
    def hook_of(layer: LayerGeometry) -> Callable[..., Tensor]:
        def hook(x: Float[Tensor, "batch pos head d_head"], hook: Any) -> Tensor:
            own = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * layer.inv_freq
            angle = (positions.double()[:, None] * inv_freq[layer.layer] - own)[None, :, None]
            return turn(x, angle.cos().to(x.device), angle.sin().to(x.device), layer)

        return hook

    return hooks_on_rotated(model, {i: hook_of(layer) for i, layer in layers.items()})


@contextmanager
def _frozen(model: LensModel) -> Iterator[None]:
    """Freeze the model's weights inside the block."""
    before = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        for weight, _ in before:
            weight.requires_grad_(False)
        yield
    finally:
        for weight, required in before:
            weight.requires_grad_(required)

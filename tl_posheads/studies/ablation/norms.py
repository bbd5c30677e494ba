"""How much every head writes: the length of what it adds to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.model import LensModel, attention_of, read_pass, readable
from tl_posheads.rotary.precision import widened
from tl_posheads.tasks.base import Prompt

_N_PROMPTS = 3  # of each task


def output_norms(model: LensModel, prompts: Sequence[Prompt]) -> Float[Tensor, "layer head"]:
    """Mean length of what each head writes, over the positions of each text and over the texts.

    NaN where a layer has no attention.
    """
    total = torch.full((int(model.cfg.n_layers), int(model.cfg.n_heads)), float("nan"))

    def add(layer: int, z: Float[Tensor, "1 pos head d_head"]) -> None:
        total[layer] = total[layer].nan_to_num() + _norms(z, attention_of(model, layer)).cpu()

    layers = [i for i in range(int(model.cfg.n_layers)) if attention_of(model, i) is not None]
    readers = [(model.hook_dict[f"blocks.{i}.attn.hook_z"], partial(add, i)) for i in layers]
    with fused_attention(model):
        for prompt in prompts:
            read_pass(model, prompt.tokens[None], readers)
    return total / len(prompts)


def norms_over(
    model: LensModel, prompts: Mapping[str, Sequence[Prompt]]
) -> Float[Tensor, "layer head"]:
    """:func:`output_norms` over the first prompts of each task."""
    return output_norms(model, [p for these in prompts.values() for p in these[:_N_PROMPTS]])


def _norms(z: Tensor, attn: Any) -> Float[Tensor, " head"]:
    """Length of ``z W_O`` without forming it, ``[pos, head, d_model]``: through ``W_O W_O^T``."""
    z = widened(z)
    with readable(attn):
        w_o = attn.W_O.detach().to(z)
    gram = einsum(w_o, w_o, "head d d_model, head e d_model -> head d e")
    half = einsum(z, gram, "batch pos head d, head d e -> batch pos head e")
    squares = (half * z).sum(-1)
    norms: Tensor = squares.clamp_min(0).sqrt().mean((0, 1))
    return norms

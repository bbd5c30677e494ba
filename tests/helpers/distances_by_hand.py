"""Methods that change distances, and the distances that their papers give, pair by pair."""

from __future__ import annotations

import numpy as np
import torch

from tl_posheads.extrapolation.methods.dpe import DPE
from tl_posheads.extrapolation.methods.dual_chunk import DualChunk
from tl_posheads.extrapolation.methods.rerope import ReRoPE
from tl_posheads.extrapolation.methods.self_extend import SelfExtend

N, TRAINED, WINDOW = 44, 24, 8
TOKENS = torch.randint(3, 90, (2, N), generator=torch.Generator().manual_seed(0))
SCALES, CHOSEN = (3, 1, 4, 2), ((0, 1), (1,), (), (0,))  # of pairs; of heads


def grouped(i, j, group):
    return i - j if i - j < WINDOW else (i // group + WINDOW - WINDOW // group) - j // group


def chunked(i, j, chunk=16, local=4):
    size = chunk - local
    if i // size == j // size:
        return i % size - j % size
    if i // size == j // size + 1:
        return min(i % size + size, chunk) - j % size
    return chunk - j % size


def by_pair(i, j, n):
    return np.array([grouped(i, j, scale) for scale in SCALES[:n]])


def by_head(i, j, n):
    scaled = by_pair(i, j, n)
    return np.stack([[scaled[m] if m in mine else i - j for m in range(n)] for mine in CHOSEN])


# The method for n pairs, and the distance that query i and key j have in its paper.
METHODS = {
    "SelfExtend": (lambda n: SelfExtend(4, WINDOW), lambda i, j, n: grouped(i, j, 4)),
    "ReRoPE": (lambda n: ReRoPE(WINDOW), lambda i, j, n: min(i - j, WINDOW)),
    "log n": (lambda n: ReRoPE(WINDOW, log_n=True), lambda i, j, n: min(i - j, WINDOW)),
    "leaky": (
        lambda n: ReRoPE(WINDOW, leak=3),
        lambda i, j, n: i - j if i - j < WINDOW else WINDOW + (i - j - WINDOW) / 3,
    ),
    "DualChunk": (lambda n: DualChunk(16, 4), lambda i, j, n: chunked(i, j)),
    "DPE": (lambda n: DPE(SCALES[:n], WINDOW), by_pair),
    "DPE by head": (lambda n: DPE(SCALES[:n], WINDOW, [CHOSEN, CHOSEN]), by_head),
}


def numbers(x, g):
    """Unrotated pairs as complex numbers, and what was never rotated: [batch, pos, head, pair]."""
    x, n = x.detach().double().numpy(), g.n_pairs
    pairs = x[..., :n] + 1j * x[..., n : 2 * n]
    if g.layout == "adjacent":
        pairs = x[..., 0 : 2 * n : 2] + 1j * x[..., 1 : 2 * n : 2]
    angle = np.arange(x.shape[1])[:, None, None] * g.inv_freq.numpy()
    return pairs * np.exp(-1j * angle), x[..., 2 * n :]


def off(got, expected):
    """Largest difference, in standard deviations: Cohere's logits are a hundredth of others'."""
    return float((got - expected).abs().max() / expected.std())

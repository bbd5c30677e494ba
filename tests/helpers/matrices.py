"""Generators with a seed, and random orthonormal matrices."""

from __future__ import annotations

import torch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def orthonormal(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=torch.float64)).Q

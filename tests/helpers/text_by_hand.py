"""Texts of one layer without a model, and what is measured there by loops in numpy."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from tl_posheads import LayerGeometry
from tl_posheads.rotary.contributions import rotate_by
from tl_posheads.scoring.draws import MEASURES, DocumentDraws, measure

NAME = "5eed" * 6
CPU = torch.device("cpu")
INV_FREQ = 40.0 ** (-torch.arange(5) / 4)
GEOMETRIES = {
    "half": LayerGeometry.from_inv_freq(INV_FREQ, 2),
    "adjacent": LayerGeometry.from_inv_freq(INV_FREQ, 2, layout="adjacent"),
    "partial": LayerGeometry.from_inv_freq(INV_FREQ, 2, d_head=16),
    "grouped": LayerGeometry.from_inv_freq(INV_FREQ, 4, n_kv_heads=2, attention_scale=0.7),
    "windowed": LayerGeometry.from_inv_freq(INV_FREQ, 2, window=9),
}


def text(geometry, n_pos, seed=0, mean=0.5):
    """Rotated queries and keys: random contents with a mean, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def contents(n_heads):
        shape = (n_heads, geometry.d_head)
        noise = torch.randn(n_pos, *shape, generator=generator, dtype=torch.float64)
        return noise + mean * torch.randn(*shape, generator=generator, dtype=torch.float64)

    steps = torch.arange(n_pos)
    return tuple(
        rotate_by(contents(n), steps, geometry) for n in (geometry.n_heads, geometry.n_kv_heads)
    )


def measured(q, k, geometry, settings, name=NAME):
    values = measure(q, k, geometry, DocumentDraws(name, len(q), settings))
    return dict(zip(MEASURES, values.numpy(), strict=True))


def as_complex(x, geometry):
    """The rotary pairs of one vector."""
    x, half = x.numpy(), geometry.n_pairs
    if geometry.layout == "adjacent":
        return x[0 : 2 * half : 2] + 1j * x[1 : 2 * half : 2]
    return x[:half] + 1j * x[half : 2 * half]


def dominant(contribution):
    weight = np.exp(contribution - contribution.max())
    return float(weight @ np.arange(len(weight)) / weight.sum())


def by_hand(q, k, geometry, head, content, place, factor=1.0):
    """D of the contents of one pair of positions, put at another, by turning back and on."""
    theta = geometry.inv_freq.numpy()
    there = [
        as_complex(x, geometry) * np.exp(1j * theta * (to - at))
        for x, at, to in zip(
            (q[content[0], head], k[content[1], geometry.kv_head[head]]), content, place
        )
    ]
    # The same contents as far apart are a tie, wherever they stand.
    return round(dominant(factor * (there[0] * there[1].conj()).real), 11)


def every_pair(n_pos, window=None):
    return [(i, j) for i in range(n_pos) for j in range(i) if window is None or i - j < window]


def all_by_hand(q, k, geometry, head, factor=1.0):
    seen = every_pair(len(q), geometry.window)
    d = [by_hand(q, k, geometry, head, pair, pair, factor) for pair in seen]
    return np.array([i - j for i, j in seen]), np.array(d)


def weighted_spearman(x, y, weights):
    def ranks(v):
        _, place = np.unique(v, return_inverse=True)
        tied = np.bincount(place, weights)
        return (np.cumsum(tied) - tied / 2)[place]

    c = np.cov(ranks(x), ranks(y), aweights=weights)
    return c[0, 1] / np.sqrt(c[0, 0] * c[1, 1])


def rising(n_pos, heads):
    """Half a turn of the first pair over the text and none of the others."""
    return LayerGeometry.from_inv_freq(torch.tensor([np.pi / n_pos, 0.0, 0.0]), heads)


def planted(geometry, n_pos, steady, noise, seed):
    """Contents that are the same at every position, and noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, n_pos, geometry.n_heads, geometry.d_head)
    contents = steady + noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    return [rotate_by(x, torch.arange(n_pos), geometry) for x in contents]


def positions(draw):
    """Of a draw the (query, key) positions of its pairs, those given to them, and both octaves'."""
    every, given = (
        list(zip(x.q_pos.tolist(), x.k_pos.tolist())) for x in (draw.qk_pairs, draw.given)
    )
    n, n_near, _ = draw.sizes
    return every[:n], given, every[n : n + n_near], every[n + n_near :]


def reference_rho(q, k, layout, rotary_dim, window):
    """Rho of one head in numpy and scipy alone, from the definition."""
    n, half = len(q), rotary_dim // 2
    a, b = (
        (slice(0, half), slice(half, rotary_dim))
        if layout == "half"
        else (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2))
    )
    distances, dominants = [], []
    for i in range(n):
        for j in range(i):
            if window is None or i - j < window:
                c = q[i, a] * k[j, a] + q[i, b] * k[j, b]
                w = np.exp(c - c.max())
                distances.append(i - j)
                dominants.append((np.arange(half) * w).sum() / w.sum())
    return stats.spearmanr(distances, dominants).statistic

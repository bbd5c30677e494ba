"""Drawn pairs beside all pairs, on one layer: time, standard error, and what the interval covers.

    .venv/bin/python benchmarks/sampling.py

Vectors of queries and keys are laid out beforehand. A standard error is its largest over the
heads; *covered* is the share of heads and draws whose 95 % interval holds the exact value. The
query and key of a head share a mean that differs between heads, so that scores differ.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from side_by_side import machine, seconds_of, table_of

from tl_posheads import LayerGeometry, kernel, spearman_by_distance
from tl_posheads.accumulator import distance_weights
from tl_posheads.contributions import rotate_by
from tl_posheads.counter import Counter
from tl_posheads.counting import Settings, _count_sample, count_document, count_rows
from tl_posheads.remapping import pair_vectors
from tl_posheads.statistics import (
    draws_for,
    sampled_standard_error,
    spearman_of_tables,
)

HEADS, PAIRS = 9, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=12_000, help="drawn for every head")
    parser.add_argument("--draws", type=int, default=300, help="repeated samples")
    args = parser.parse_args()
    kernel.WORTH_COMPILING = 1
    n, n_drawn = args.tokens, args.pairs
    torch.manual_seed(0)
    inv_freq = 10000.0 ** (-torch.arange(PAIRS) / PAIRS)
    geometry = LayerGeometry.from_inv_freq(inv_freq, n_heads=HEADS, n_kv_heads=HEADS)
    mean = torch.randn(HEADS, 2 * PAIRS)
    q, k = (
        rotate_by(torch.randn(n, HEADS, 2 * PAIRS) + mean, torch.arange(n), geometry) for _ in "qk"
    )
    _, grids = count_document(q, k, geometry, "a" * 16, Settings(pairs=3), None)
    vectors = pair_vectors(q, k, geometry)
    generator = np.random.default_rng(0)

    def counter() -> Counter:
        return Counter(grids.dominant, n - 1, [0, n], q.device)

    def all_pairs() -> Counter:
        table = counter()
        count_rows(vectors, table, torch.arange(1, n), None)
        return table

    def drawn() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return _count_sample(vectors, counter(), n_drawn, generator, n - 1)

    print(f"### Sampling: {n:,} tokens, {HEADS} heads, {PAIRS} pairs\n\n{machine()}\n")
    name = f"{n_drawn:,} pairs drawn"
    print(table_of(seconds_of({name: drawn, "all pairs": all_pairs}, 3), name))
    counts = all_pairs().counts.double().numpy()
    truth = spearman_of_tables(counts * distance_weights(counts, torch.tensor(n - 1)))
    errors, gaps = [], []
    for _ in range(args.draws):
        ((distance, dominant),) = drawn()
        for head in range(HEADS):
            rho = float(spearman_by_distance(distance[head], dominant[head][None])[0])
            gaps.append(rho - truth[head])
            errors.append(sampled_standard_error(distance[head].numpy(), dominant[head].numpy()))
    covered = np.mean(np.abs(gaps) < 1.96 * np.array(errors))
    chance = np.sqrt(0.95 * 0.05 / len(gaps))
    print(
        f"\nScores from {truth.min():.2f} to {truth.max():.2f}. Standard error at most "
        f"{max(errors):.4f} (under 0.01 for any head: {draws_for(0.01):,} pairs). Covered "
        f"{covered:.3f} of {len(gaps)} (0.95 ± {chance:.3f})."
    )


if __name__ == "__main__":
    main()

"""Every causal pair of a layer: the fused kernel beside bare exponentials and the full expression.

    .venv/bin/python benchmarks/kernel.py             # 2,048 tokens, 9 heads, 32 pairs
    .venv/bin/python benchmarks/kernel.py --tokens 32768 --heads 32 --pairs 64     # for a GPU

*bare exponentials* is ``torch.exp`` of as many numbers as there are contributions, in pieces that
stay in the cache. *written out in full* makes every contribution, softmax and dominant dimension
of a head with einsum, head by head, and counts them in the same cells.
"""

from __future__ import annotations

import argparse
import time

import torch
from side_by_side import machine, peak_growth, seconds_of, table_of

from tl_posheads import LayerGeometry, kernel
from tl_posheads.counter import Counter
from tl_posheads.counting import Settings, count_document, count_rows
from tl_posheads.remapping import pair_vectors
from tl_posheads.statistics import DominantGrid

PIECE = 1 << 19


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, heads, pairs = args.tokens, args.heads, args.pairs
    torch.manual_seed(0)
    q, k = (torch.randn(n, heads, 2 * pairs, device=device) for _ in "qk")
    inv_freq = 10000.0 ** (-torch.arange(pairs) / pairs)
    geometry = LayerGeometry.from_inv_freq(inv_freq, n_heads=heads, n_kv_heads=heads)
    vectors = pair_vectors(q, k, geometry)
    _, grids = count_document(q[:256], k[:256], geometry, "a" * 16, Settings(), None)
    grid = grids.dominant
    kernel.WORTH_COMPILING = 1

    def counted() -> Counter:
        counter = Counter(grid, n - 1, [0, n], q.device)
        count_rows(vectors, counter, torch.arange(1, n, device=device), None)
        return counter

    start = time.perf_counter()
    counted()
    first = time.perf_counter() - start
    memory = peak_growth(counted)
    n_pairs = heads * n * (n - 1) // 2
    piece, out = torch.randn(PIECE, device=device), torch.empty(PIECE, device=device)

    def exponentials() -> None:
        for _ in range(n_pairs * pairs // PIECE):
            torch.exp(piece, out=out)

    def eager() -> None:
        kernel.WORTH_COMPILING = 10**18
        counted()
        kernel.WORTH_COMPILING = 1

    base = "bare exponentials"
    ways = {
        base: exponentials,
        "fused kernel, accumulators included": counted,
        "eager bites": eager,
    }
    few = {base: exponentials}
    full = pairs * n * n * 4 < 2e9
    if full:
        few["written out in full"] = lambda: written_out(vectors, grid)
    print(f"### Kernel: {n:,} tokens, {heads} heads, {pairs} pairs\n\n{machine()}\n")
    seconds = seconds_of(ways, args.rounds)
    print(table_of(seconds, base))
    if full:
        seconds = seconds_of({**few, "fused kernel": counted}, 3)
        print("\n" + table_of(seconds, "fused kernel"))
    rate = n_pairs * pairs / min(seconds_of({"k": counted}, 3)["k"])
    print(
        f"\nFirst call, compiling included: {first:.1f} s. Memory beyond q and k: {memory:.0f} MB. "
        f"{rate:.3g} exponentials a second."
    )


def written_out(vectors, grid: DominantGrid) -> torch.Tensor:
    """What the definitions say, with nothing saved: a head's [q_pos, k_pos, pair] at once."""
    n = vectors.q.shape[-1]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    seen, counts = distance >= 1, []
    for head in range(vectors.n_heads):
        contribution = torch.einsum("cpi,cpj->ijp", vectors.q[:, :, head], vectors.k[:, :, head])
        pair = torch.arange(vectors.n_pairs, dtype=contribution.dtype)
        dominant = contribution.softmax(-1) @ pair
        d = torch.bucketize(dominant[seen].double(), grid.edges[head])
        counts.append(torch.bincount(d * n + distance[seen], minlength=grid.n_bins * n))
    return torch.stack(counts)


if __name__ == "__main__":
    main()

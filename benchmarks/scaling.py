"""How time and memory of one layer grow with the length of the text.

    .venv/bin/python benchmarks/scaling.py

Exponents are ``p`` of ``a + b * length**p``, least squares of relative errors, with their standard
errors: 2 is quadratic. What doesn't grow (``a``) is the start of threads, tables and draws.
Times are medians of rounds, lengths in turn. Memory is what a fresh process, which has counted a
short text before, grows by at its highest, beyond q and k.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import partial

import numpy as np
import torch
from scipy.optimize import curve_fit
from side_by_side import machine, peak_growth, seconds_of

from tl_posheads import LayerGeometry, kernel
from tl_posheads.counter import Counter
from tl_posheads.counting import Settings, count_document, count_rows
from tl_posheads.remapping import pair_vectors

LENGTHS = [512, 1024, 2048, 4096, 8192]
HEADS, PAIRS = 9, 32
INV_FREQ = 10000.0 ** (-torch.arange(PAIRS) / PAIRS)
GEOMETRY = LayerGeometry.from_inv_freq(INV_FREQ, n_heads=HEADS, n_kv_heads=HEADS)
NAME = "a" * 16


def main() -> None:
    if len(sys.argv) == 3:  # a process of its own, for memory
        short, call = ways(256)[sys.argv[1]], ways(int(sys.argv[2]))[sys.argv[1]]
        short()
        print(peak_growth(call))
        return
    calls = {n: ways(n) for n in LENGTHS}
    print(f"### Scaling: one layer of {HEADS} heads, {PAIRS} pairs\n\n{machine()}\n")
    print("| |" + "".join(f" {n:,} |" for n in LENGTHS) + " exponent |")
    print("|---|" + "---:|" * (len(LENGTHS) + 1))
    for way in calls[LENGTHS[0]]:
        seconds = seconds_of({str(n): calls[n][way] for n in LENGTHS}, 5)
        times = [statistics.median(seconds[str(n)]) for n in LENGTHS]
        memory = [in_own_process(way, n) for n in LENGTHS]
        print(f"| {way}, seconds |" + "".join(f" {t:.3g} |" for t in times) + f" {_slope(times)} |")
        print(f"| {way}, MB |" + "".join(f" {m:.0f} |" for m in memory) + f" {_slope(memory)} |")


def ways(n: int) -> dict[str, partial]:
    """What is measured, on a text of ``n`` tokens."""
    kernel.WORTH_COMPILING = 1
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, HEADS, 2 * PAIRS, generator=generator) for _ in "qk")
    _, grids = count_document(q[:256], k[:256], GEOMETRY, NAME, Settings(pairs=3), None)
    vectors = pair_vectors(q, k, GEOMETRY)

    def all_pairs() -> None:
        counter = Counter(grids.dominant, n - 1, [0, n], q.device)
        count_rows(vectors, counter, torch.arange(1, n), None)

    document = partial(count_document, q, k, GEOMETRY, NAME)
    return {
        "kernel, all pairs": partial(all_pairs),
        "all pairs, with nulls": partial(document, Settings(), grids),
        "20,000 pairs, with nulls": partial(document, Settings(pairs=20_000), grids),
    }


def in_own_process(way: str, n: int) -> float:
    run = subprocess.run(
        [sys.executable, __file__, way, str(n)], capture_output=True, text=True, check=True
    )
    return float(run.stdout)


def _slope(values: list[float]) -> str:
    length, measured = np.array(LENGTHS) / LENGTHS[-1], np.array(values) / values[-1]
    (_, _, power), covariance = curve_fit(
        lambda x, a, b, p: a + b * x**p, length, measured, p0=[0.01, 1, 1.5], sigma=measured,
        bounds=(0, [1, 2, 4]),
    )  # fmt: skip
    return f"{power:.2f} ± {covariance[2, 2] ** 0.5:.2f}"


if __name__ == "__main__":
    main()

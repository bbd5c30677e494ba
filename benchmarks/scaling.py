"""How time and memory of one layer's measures grow with the length of the text.

    .venv/bin/python benchmarks/scaling.py
    .venv/bin/python benchmarks/scaling.py --lengths 256 512 --rounds 1       # to try it

*5,000 pairs drawn* is what ``score_heads`` does to each of 16 documents by default, *all pairs* is
``qk_pairs="all"``. Times are medians of rounds, the two ways in turn at every length. Memory is
what a fresh process, which has measured a short text before, grows by at its highest, beyond q and
k.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from side_by_side import machine, peak_growth, seconds_of

from tl_posheads import LayerGeometry
from tl_posheads.scoring.draws import DocumentDraws, Settings, measure

HEADS, PAIRS = 9, 32
DRAWN, ALL = "5,000 pairs drawn", "all pairs"
SETTINGS = {DRAWN: Settings(5000), ALL: Settings(5000, exact=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [512, 1024, 2048, 4096, 8192, 16384]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--all-up-to", type=int, default=4096, help="longest for all pairs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=list(SETTINGS), help="print its memory, nothing else")
    args = parser.parse_args()
    if args.way:
        way(args.way, 256)()
        print(peak_growth(way(args.way, args.lengths[0])))
        return
    print(f"### Scaling: one layer of {HEADS} heads, {PAIRS} rotary pairs\n\n{machine()}\n")
    rows: dict[str, list[str]] = {f"{x}, {y}": [] for x in SETTINGS for y in ("seconds", "MB")}
    for n in args.lengths:
        names = [DRAWN, ALL] if n <= args.all_up_to else [DRAWN]
        seconds = seconds_of({name: way(name, n) for name in names}, args.rounds)
        for name in SETTINGS:
            known = name in names
            time = f"{statistics.median(seconds[name]):.3g}" if known else ""
            rows[f"{name}, seconds"].append(time)
            rows[f"{name}, MB"].append(f"{in_own_process(name, n):.0f}" if known else "")
    print("| |" + "".join(f" {n:,} |" for n in args.lengths))
    print("|---|" + "---:|" * len(args.lengths))
    for name, cells in rows.items():
        print(f"| {name} |" + "".join(f" {cell} |" for cell in cells))


def way(name: str, n: int) -> Callable[[], object]:
    """The layer's measures of a text of ``n`` tokens, laid out beforehand."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, HEADS, 2 * PAIRS, generator=generator) for _ in "qk")
    inv_freq = 10000.0 ** (-torch.arange(PAIRS) / PAIRS)
    geometry = LayerGeometry.from_inv_freq(inv_freq, n_heads=HEADS)

    def measured() -> object:
        return measure(q, k, geometry, DocumentDraws("a" * 16, n, SETTINGS[name]))

    return measured


def in_own_process(name: str, n: int) -> float:
    command = [sys.executable, __file__, "--way", name, "--lengths", str(n)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout)


if __name__ == "__main__":
    main()

"""What ``score_heads`` costs beside the forward passes that it needs anyway.

    .venv/bin/python benchmarks/scoring.py                                    # 16 x 1,024 tokens
    .venv/bin/python benchmarks/scoring.py time memory --documents 4 --length 8192
    .venv/bin/python benchmarks/scoring.py --documents 2 --length 128 --rounds 1      # to try it

All parts, or those named. *forward passes* reads the same texts with ``capture_rotary`` and
discards the result; *score_heads* is all that it does: geometry, passes, and every measure. Memory
is what a fresh process grows by at its highest, the loaded model not counted.
"""

from __future__ import annotations

import argparse
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from scipy import stats
from side_by_side import machine, peak_growth, seconds_of, table_of, time_of
from tqdm.auto import tqdm

import tl_posheads as ph
from tl_posheads.scoring import score as scoring

FORWARD, SCORES, ALL = "forward passes", "score_heads", 'score_heads, qk_pairs="all"'
ALL_DOCUMENTS, ALL_LENGTH = 4, 1024  # at most, for all pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=[FORWARD, SCORES, ALL], help="its seconds and memory only")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    model = ph.load_model(args.model, cls="bridge")
    tokens = ph.load_corpus("python-docs", model, n_docs=args.documents, length=args.length)
    if args.way:
        seconds: list[float] = []
        growth = peak_growth(lambda: seconds.append(time_of(ways(model, tokens)[args.way])))
        print(*seconds, growth)
        return
    size = f"{args.documents} x {args.length:,} tokens"
    print(f"### Scoring: {args.model}, {size}\n\n{machine()}")
    for part in args.parts or PARTS:
        print(f"\n#### {part}\n", flush=True)
        PARTS[part](args, model, tokens)


def ways(model: Any, tokens: torch.Tensor) -> dict[str, Callable[[], object]]:
    def forward() -> None:
        for document in tokens:
            ph.capture_rotary(model, document[None], lambda layer, q, k: None)

    return {
        FORWARD: forward,
        SCORES: lambda: ph.score_heads(model, tokens, progress=False),
        ALL: lambda: ph.score_heads(model, tokens, qk_pairs="all", progress=False),
    }


def beside_forward(args: argparse.Namespace, model: Any, tokens: torch.Tensor) -> None:
    for call in ways(model, tokens[:1, :256]).values():  # to warm up
        call()
    both = {name: call for name, call in ways(model, tokens).items() if name != ALL}
    print(table_of(seconds_of(both, args.rounds, warm_up=False), FORWARD))


def memory(args: argparse.Namespace, model: Any, tokens: torch.Tensor) -> None:
    peaks = {name: in_own_process(args, name, *tokens.shape)[1] for name in (FORWARD, SCORES)}
    print(
        f"Beyond the loaded model: forward passes alone {peaks[FORWARD]:.0f} MB, score_heads "
        f"{peaks[SCORES]:.0f} MB ({peaks[SCORES] - peaks[FORWARD]:+.0f} MB)."
    )


def all_pairs(args: argparse.Namespace, model: Any, tokens: torch.Tensor) -> None:
    n_docs, length = min(ALL_DOCUMENTS, args.documents), min(ALL_LENGTH, args.length)
    print(f"Of {n_docs} x {length:,} tokens, a process each:\n")
    print("| way | seconds | MB beyond the model |\n|---|---:|---:|")
    for name in (FORWARD, SCORES, ALL):
        seconds, peak = in_own_process(args, name, n_docs, length)
        print(f"| {name} | {seconds:.1f} | {peak:.0f} |", flush=True)


def in_own_process(args: argparse.Namespace, way: str, n_docs: int, length: int) -> list[float]:
    """Seconds, and MB of memory."""
    command = [sys.executable, __file__, "--model", args.model, "--way", way]
    sizes = ["--documents", str(n_docs), "--length", str(length)]
    run = subprocess.run([*command, *sizes], capture_output=True, text=True, check=True)
    return [float(x) for x in run.stdout.split()]


def bfloat16(args: argparse.Namespace, model: Any, tokens: torch.Tensor) -> None:
    found: dict[str, torch.Tensor] = {}

    def scored(name: str, a_model: Any) -> Callable[[], None]:
        def call() -> None:
            found[name] = ph.score_heads(a_model, tokens, progress=False).rho

        return call

    half = ph.load_model(args.model, cls="bridge", dtype=torch.bfloat16)
    models = {"float32": model, "bfloat16": half}
    for each in models.values():  # to warm up
        ph.score_heads(each, tokens[:1, :256], progress=False)
    calls = {name: scored(name, each) for name, each in models.items()}
    print(table_of(seconds_of(calls, args.rounds, warm_up=False), "float32"))
    whole, other = (found[name].flatten() for name in models)
    known = torch.isfinite(whole) & torch.isfinite(other)
    change = (other - whole)[known].abs()
    print(
        f"\nrho of {len(change)} heads changes by at most {change.max():.4f} (median "
        f"{change.median():.4f}); rank correlation "
        f"{stats.spearmanr(whole[known], other[known]).statistic:.4f}."
    )


def geometry(args: argparse.Namespace, model: Any, tokens: torch.Tensor) -> None:
    length = tokens.shape[1]
    calls = {"from_model": lambda: ph.RotaryGeometry.from_model(model, length=length)}
    seconds = sorted(seconds_of(calls, 5)["from_model"])
    print(
        f"RotaryGeometry.from_model: {statistics.median(seconds):.2f} s, median of 5 "
        f"({seconds[0]:.2f}–{seconds[-1]:.2f})."
    )


class Watched(tqdm):
    """A bar that nobody sees, which keeps what it says: share done, and seconds in all."""

    said: list[tuple[float, float]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})
        type(self).said = []

    def update(self, n: float = 1) -> bool | None:
        shown = super().update(n)
        now = self.format_dict
        rate = now["rate"] or now["n"] / now["elapsed"]
        in_all = now["elapsed"] + (now["total"] - now["n"]) / rate
        self.said.append((now["n"] / now["total"], in_all))
        return shown


def bar(args: argparse.Namespace, model: Any, tokens: torch.Tensor) -> None:
    plain, scoring.tqdm = scoring.tqdm, Watched
    try:
        start = time.perf_counter()
        ph.score_heads(model, tokens)
        took = time.perf_counter() - start
    finally:
        scoring.tqdm = plain
    first, half = (
        next(in_all for done, in_all in Watched.said if done >= share - 1e-9)
        for share in (1 / len(tokens), 0.5)
    )
    print(
        f"After the first of {len(tokens)} documents the bar promised {first:.1f} s in all, "
        f"halfway {half:.1f} s; the call took {took:.1f} s (the first promise is "
        f"{first / took - 1:+.0%} off)."
    )


PARTS = {
    "time": beside_forward,
    "memory": memory,
    "all": all_pairs,
    "bfloat16": bfloat16,
    "geometry": geometry,
    "bar": bar,
}

if __name__ == "__main__":
    main()

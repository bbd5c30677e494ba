"""What ``rotary_atlas`` costs beside the forward passes that it needs anyway.

    .venv/bin/python benchmarks/atlas.py                                     # 4 x 1,024 tokens
    .venv/bin/python benchmarks/atlas.py --documents 1 --length 8192 --rounds 1
    .venv/bin/python benchmarks/atlas.py --documents 2 --length 128 --rounds 1      # to try it

*forward passes* reads the same texts with ``capture_rotary`` and discards the result. Memory
is that of one layer of one text: what measuring it grows the process by, the model not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from side_by_side import machine, peak_growth, seconds_of, table_of

import tl_posheads as ph
from tl_posheads.scoring.draws import Settings
from tl_posheads.studies.atlas.measure import AtlasDraws, bin_edges, measure_layer

FORWARD = "forward passes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = ph.load_model(args.model, cls="bridge")
    tokens = ph.load_corpus("python-docs", model, n_docs=args.documents, length=args.length)
    size = f"{args.documents} x {args.length:,} tokens"
    print(f"### Rotary atlas: {args.model}, {size}\n\n{machine()}\n", flush=True)
    for call in ways(model, tokens[:1, :256]).values():  # to warm up
        call()
    print(table_of(seconds_of(ways(model, tokens), args.rounds, warm_up=False), FORWARD))
    print(
        f"\nMemory for one layer beyond its queries and keys: {of_one_layer(model, tokens):.0f} MB"
    )


def ways(model: Any, tokens: torch.Tensor) -> dict[str, Callable[[], object]]:
    def forward() -> None:
        for document in tokens:
            ph.capture_rotary(model, document[None], lambda layer, q, k: None)

    atlas = partial(ph.rotary_atlas, model, tokens, progress=False)
    return {FORWARD: forward, "rotary_atlas": atlas, "with needed": partial(atlas, needed=True)}


def of_one_layer(model: Any, tokens: torch.Tensor) -> float:
    """MB by which the process grows as a layer is measured."""
    length = tokens.shape[1]
    geometry = ph.RotaryGeometry.from_model(model, length=length, layers=[0])
    growth: list[float] = []

    def consumer(layer: int, rot_q: torch.Tensor, rot_k: torch.Tensor) -> None:
        draws = AtlasDraws("text", length, Settings(1000), bin_edges(length - 1))
        growth.append(
            peak_growth(lambda: measure_layer(rot_q[0], rot_k[0], geometry[layer], draws))
        )

    ph.capture_rotary(model, tokens[:1], consumer, layers=[0])
    return growth[0]


if __name__ == "__main__":
    main()

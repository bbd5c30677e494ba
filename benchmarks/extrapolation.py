"""The stretch of Positional Heads under length extrapolation, on two real models.

    .venv/bin/python benchmarks/extrapolation.py small --out DIR
    .venv/bin/python benchmarks/extrapolation.py smollm2 --out DIR

``small`` extends ``small_llama.py``'s model, trained on 256 tokens, to 2,048;
``smollm2`` extends SmolLM2 from 8,192 to 16,384 tokens. Both print the comparison's tables and
write it and its picture into DIR; stopped, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tl_posheads as ph
from tl_posheads import extrapolation as ex


def small(texts: int) -> tuple[Any, list[ex.Method], Any, list[Any], dict[str, Any]]:
    """Model, methods, texts, tasks and options of the model trained on 256 tokens."""
    from small_llama import HELD_OUT

    folder = Path(__file__).parent / "results" / "small-llama"
    model = ph.load_model(str(folder))
    with ex.Unchanged()(model):
        tokens = ph.load_corpus(str(folder / HELD_OUT), model, n_docs=texts, length=2048)
    methods = [
        ex.Linear(8),
        ex.NTK(8),
        ex.DynamicNTK(8),
        ex.YaRN(8),
        ex.Llama3(8),
        ex.Resonance(ex.YaRN(8)),
        ex.NoPE(slower_than="trained"),
        ex.SelfExtend(16, 128),
        ex.ReRoPE(128),
        ex.DualChunk(),
    ]
    tasks = [
        ph.tasks.Passkey(length=n, n=10, corpus=str(folder / HELD_OUT), short_length=100)
        for n in (192, 384, 768, 1536)
    ]
    return model, methods, tokens, tasks, dict(heads=4, trained=256)


def smollm2(texts: int) -> tuple[Any, list[ex.Method], Any, list[Any], dict[str, Any]]:
    """The same of SmolLM2, trained on 8,192 tokens."""
    model = ph.load_model("smollm2-135m")
    with ex.Unchanged()(model):
        tokens = ph.load_corpus("python-docs", model, n_docs=texts, length=16384)
    methods = [ex.NTK(2), ex.YaRN(2), ex.SelfExtend(4, 2048)]
    tasks = [ph.tasks.Passkey(length=n, n=1) for n in (4096, 12288)]
    return model, methods, tokens, tasks, dict(heads=14, n_queries=512, n_scored=2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["small", "smollm2"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--texts", type=int, help="texts to compare on (small 8, smollm2 1)")
    chosen = parser.parse_args()
    make, texts = {"small": (small, 8), "smollm2": (smollm2, 1)}[chosen.model]
    begun = time.perf_counter()
    model, methods, tokens, tasks, options = make(chosen.texts or texts)
    found = ph.compare_extrapolations(
        model, methods, tokens, tasks=tasks, checkpoint=chosen.out / "checkpoint", **options
    )
    found.save(chosen.out / "comparison")
    found.plot().savefig(chosen.out / "extrapolation.png", dpi=110)
    with pd.option_context("display.width", 200, "display.max_columns", None):
        print(found.to_pandas().round(3).to_string(index=False))
        print(found.losses().pivot(index="method", columns="end", values="loss").round(3))
        answers = found.answers()
        print(answers.pivot(index="method", columns="length", values="exact").round(2))
        print(found.achievement().round(3).to_string(index=False))
    print(*found.verdict().values(), found.break_point(), sep="\n")
    print(f"{time.perf_counter() - begun:.0f} s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()

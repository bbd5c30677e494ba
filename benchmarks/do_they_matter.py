"""Do SmolLM2's Positional Heads matter? Single heads, sets and the positive control (an hour).

    .venv/bin/python benchmarks/do_they_matter.py --out benchmarks/results/smollm2-ablation

Calibrated tasks, 24 prompts each: every head ablated by itself, then the top heads beside random
ones, ones of similar output norm, the lowest, and the retrieval heads. The same command resumes a
stopped run. The notebook ``07_do_they_matter`` reads what it writes.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tl_posheads as ph
from tl_posheads.tasks import MultiKey, Passkey, calibrate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=256, help="tokens a prompt")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("do_they_matter-checkpoint"))
    args = parser.parse_args()
    began = time.monotonic()
    model = ph.load_model(args.model)
    tokens = ph.load_corpus("python-docs", model)
    scores = ph.score_heads(model, tokens, checkpoint=args.work / "scores")
    scores.save(args.out / "scores")
    options = {"length": args.length, "n": args.prompts, "seed": 0}
    asked = [Passkey(**options), MultiKey(**options)]
    chosen = calibrate(model, asked)
    print(chosen, flush=True)
    effects = ph.head_effects(
        model, chosen.tasks, short=False, checkpoint=args.work / "single-heads"
    )
    effects.save(args.out / "single-heads")
    print(f"{effects}\n{ph.association(scores, effects).to_string()}", flush=True)
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    study = ph.ablation_study(
        model,
        scores,
        tasks=asked,
        fractions=[args.fraction],
        controls=["random", "norm_matched", "lowest"],
        n_control=19,
        checkpoint=args.work / "sets",
    )
    study.save(args.out / "sets")
    print(f"{study}\n{study.positive_control().T}")
    print("\n".join(study.verdict().values()))
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()

"""What does fine-tuning at twice the length change in the heads of a small Llama?

    .venv/bin/python benchmarks/finetuning.py --out DIR

Fine-tunes ``benchmarks/results/small-llama``, trained on 256 tokens, on 512: with linear
interpolation, with YaRN, and with nothing, and measures heads, curves and loss before, during and
after. If stopped, the same command computes the variants that are missing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import small_llama
import torch
from emergence import Twin
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tl_posheads as ph
from tl_posheads import emergence
from tl_posheads import extrapolation as ex

SMALL = Path(__file__).parent / "results" / "small-llama"
LENGTH, TEXTS, BEST = 512, 12, 4  # tokens of a sequence; held-out texts; heads compared
ROPE = {
    "bare": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=2.0),
    "yarn": dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=256),
}


def model_settings(variant: str) -> dict[str, Any]:
    rope = {"rope_theta": 10000.0, **ROPE[variant]}
    return {**small_llama.MODEL, "max_position_embeddings": LENGTH, "rope_parameters": rope}


def tuned(variant: str, folder: Path, steps: int, seed: int) -> emergence.Emergence:
    """Scores, curves and loss of a variant from its first step to its last."""
    tokenizer = AutoTokenizer.from_pretrained(SMALL)
    config = LlamaConfig(**model_settings(variant))
    start = LlamaForCausalLM.from_pretrained(SMALL, config=config, dtype=torch.float32)
    twin = Twin(tokenizer, model_settings(variant))
    tokens = texts_for(twin.model)
    tracker = emergence.EmergenceTracker(
        twin.like(start), tokens, every=emergence.log_steps(steps, 1), folder=folder
    )
    reading, _ = small_llama.texts()
    small_llama.fit(
        small_llama.Sequences(reading, tokenizer),
        steps,
        seed,
        False,
        lambda step, model: tracker.see(step, twin.like(model)),
        start=start,
        length=LENGTH,
        lr=small_llama.TRAINING["lr"] / 4,
    )
    tracker.close()
    return tracker.result()


def texts_for(model: Any) -> torch.Tensor:
    return ph.load_corpus(str(SMALL / small_llama.HELD_OUT), model, n_docs=TEXTS, length=LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    begun = time.perf_counter()
    chosen.out.mkdir(parents=True, exist_ok=True)
    model = ph.load_model(str(SMALL), cls="bridge")
    with ex.Unchanged()(model):
        before = emergence.track_emergence({0: model}, texts_for(model), progress=False)
    print("before: loss by octave", before.losses()["loss"].round(2).tolist())
    for variant in ROPE:
        place = chosen.out / variant
        if not (place / "emergence.json").exists():
            kept = chosen.out / f"looks-{variant}"
            tuned(variant, kept, chosen.steps, chosen.seed).save(place)
        found = emergence.Emergence.load(place)
        table = found.drift(before.rho[0], k=BEST)
        losses = found.losses().pivot(index="step", columns="start", values="loss")
        with pd.option_context("display.width", 200, "display.max_columns", None):
            print(f"\n{variant}: heads compared with those of the unmodified model before")
            print(table.round(3).to_string(index=False))
            print(losses.round(3))
            print("best heads after:", found.top(BEST), "before:", before.top(BEST))
    print(f"{time.perf_counter() - begun:.0f} s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()

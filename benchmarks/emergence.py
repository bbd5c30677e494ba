"""When do heads become positional, and do those that do carry retrieval? Three small Llamas.

    .venv/bin/python benchmarks/emergence.py --out DIR

Trains ``small_llama.py``'s model from three seeds and measures it on the way: scores, curves and
loss by position on held-out text. At the end every head is ablated by itself, to measure its effect
on passkeys. If stopped, the same command trains again without repeating measurements.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import small_llama
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tl_posheads as ph
from tl_posheads import emergence
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.statistics.ranks import spearman_of_few

TEXTS, PASSKEY, PROMPTS = 16, 240, 40  # held-out texts; tokens of a prompt, and prompts


class Twin:
    """A copy of the model in training for the lens: a Bridge takes its model apart."""

    def __init__(self, tokenizer: Any, settings: dict[str, Any] = small_llama.MODEL) -> None:
        config = LlamaConfig(**settings, architectures=["LlamaForCausalLM"])
        hf_model = LlamaForCausalLM(config)
        hf_model.set_attn_implementation("eager")
        self._weights = dict(hf_model.named_parameters())
        self.model = TransformerBridge.boot_transformers(
            "small-llama", hf_model=hf_model, tokenizer=tokenizer, device="cpu"
        )

    def like(self, hf_model: Any) -> Any:
        with torch.no_grad():
            for name, weight in hf_model.named_parameters():
                self._weights[name].copy_(weight)
        return self.model


def watched(folder: Path, seed: int, steps: int) -> tuple[emergence.Emergence, Path]:
    """One training run: what was seen on the way, and the folder of the trained model."""
    model_folder = folder / f"model-{seed}"
    reading, held_out = small_llama.texts()
    text = folder / "held-out.txt"
    text.write_text(held_out, encoding="utf-8")
    small_llama.make_tokenizer(reading).save_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    twin = Twin(tokenizer)
    tokens = ph.load_corpus(str(text), twin.model, n_docs=TEXTS, length=small_llama.LENGTH)
    every, kept = emergence.log_steps(steps, 3), folder / f"looks-{seed}"
    tracker = emergence.EmergenceTracker(twin.model, tokens, every=every, folder=kept)

    def on_step(step: int, hf_model: Any) -> None:
        tracker.see(step, twin.like(hf_model))

    hf_model = small_llama.fit(
        small_llama.Sequences(reading, tokenizer), steps, seed, False, on_step
    )
    tracker.close()
    hf_model.save_pretrained(model_folder)
    return tracker.result(), model_folder


def harm(model: Any, corpus: Path) -> pd.DataFrame:
    """Effect of ablating each head on passkeys: change in log-probability, nats per token."""
    task = ph.tasks.Passkey(length=PASSKEY, n=PROMPTS, corpus=str(corpus), short_length=100, seed=1)
    prompts = task.prompts(model)

    def logprob() -> float:
        found = [target_logprobs(model, p.tokens, p.targets)[0].mean() for p in prompts]
        return float(torch.stack(found).mean())

    bare, rows = logprob(), []
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            with ph.ablate(model, [(layer, head)]):
                rows.append({"layer": layer, "head": head, "harm": logprob() - bare})
    return pd.DataFrame(rows).assign(passkey=bare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--steps", type=int, default=small_llama.STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    begun = time.perf_counter()
    chosen.out.mkdir(parents=True, exist_ok=True)
    lags = []
    for seed in chosen.seeds:
        place = chosen.out / f"seed-{seed}"
        if not (place / "heads.parquet").exists():
            found, folder = watched(chosen.out, seed, chosen.steps)
            found.save(place)
            table = harm(ph.load_model(str(folder)), chosen.out / "held-out.txt")
            table.to_parquet(place / "heads.parquet", index=False)
        found, table = emergence.Emergence.load(place), pd.read_parquet(place / "heads.parquet")
        lag = found.lead_lag().merge(table, on=["layer", "head"])
        lags.append(lag)
        with pd.option_context("display.width", 200, "display.max_columns", None):
            print(f"seed {seed}, passkeys {table['passkey'][0]:.3f} nats a token")
            print(lag.round(2).to_string(index=False))
        rho, p = spearman_of_few(lag["rho"].to_numpy(), -lag["harm"].to_numpy())
        print(f"score and harm over {len(lag)} heads: rho {rho:.2f}, p {p:.3f}\n")
    for column in ("lag_loss", "lag_gain"):
        print(column, emergence.pooled_lag(lags, column).round(3).to_dict())
    everything = pd.concat(lags)
    known = everything[np.isfinite(everything["rho"])]
    rho, p = spearman_of_few(known["rho"].to_numpy(), -known["harm"].to_numpy())
    print(f"score and harm over all {len(known)} heads: rho {rho:.2f}, p {p:.4f}")
    print(f"{time.perf_counter() - begun:.0f} s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()

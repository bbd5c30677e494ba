"""What an ablated pass costs, and what running many of them as one batch saves.

    make bench      # or: .venv/bin/python benchmarks/ablation.py --length 1024

Every way is timed in turn, round by round, so that a slow minute of the machine slows all of them;
ratios are medians over the rounds, with the smallest and the largest. Then effects of heads in
bfloat16 beside those in float32: how much faster, and how far off.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from side_by_side import seconds_of

import tl_posheads as ph
from tl_posheads.hooks import logprobs
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.logprobs import cached_prefix, run_from_layer, target_logprobs
from tl_posheads.studies.ablation import trial
from tl_posheads.studies.ablation.trial import Trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = ph.load_model(args.model)
    prompt = ph.tasks.Passkey(length=args.length, n=1).prompts(model)[0]
    print(
        f"{args.model}, {args.length} tokens, {int(model.cfg.n_layers)} layers, {args.rounds} "
        f"rounds, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    single_passes(model, prompt, args.rounds)
    batches(model, prompt, args.rounds)
    half_precision(args.model, model, prompt)


def single_passes(model: Any, prompt: ph.tasks.Prompt, rounds: int) -> None:
    """What is saved in one ablated pass."""
    tokens, targets, n_layers = prompt.tokens, prompt.targets, int(model.cfg.n_layers)
    layers = [0, n_layers // 4, n_layers // 2, 3 * n_layers // 4]
    with fused_attention(model):
        prefix = cached_prefix(model, tokens, targets, layers)

    def whole() -> None:
        with torch.no_grad():
            model(tokens[None])

    def fused() -> None:
        with fused_attention(model):
            target_logprobs(model, tokens, targets)

    def shared(layer: int) -> None:
        with fused_attention(model):
            hooks = ph.ablation_hooks(model, [(layer, 0)])
            run_from_layer(model, tokens, targets, prefix, layer, hooks)

    ways = {
        "the lens's own pass": whole,
        "logits of the targets only": lambda: target_logprobs(model, tokens, targets),
        "and fused attention": fused,
        **{f"and shared below layer {x}": lambda x=x: shared(x) for x in layers},
    }
    print_ratios(seconds_of(ways, rounds, warm_up=False), "and fused attention")


def batches(model: Any, prompt: ph.tasks.Prompt, rounds: int) -> None:
    """Every head of two layers by itself, on the prompt and its short control."""
    n_heads, middle = int(model.cfg.n_heads), int(model.cfg.n_layers) // 2
    sets = [[(layer, head)] for layer in (0, middle) for head in range(n_heads)]
    own = Trial.of(model, "zero", None, False, "z", 0)
    own.prepare()
    chosen = logprobs.rows_at_once

    def run(rows: int | None) -> None:
        trial.rows_at_once = chosen if rows is None else lambda *shape: rows
        try:
            own.run(prompt, 0, sets, lambda n: None)
        finally:
            trial.rows_at_once = chosen

    ways = {f"{n} ablations a pass": lambda n=n: run(n) for n in (1, 2, 4, n_heads)}
    ways["as many as rows_at_once says"] = lambda: run(None)
    seconds = seconds_of(ways, rounds, warm_up=False)
    passes = 2 * (1 + len(sets))
    print(f"\n{passes} passes, half of them short:\n")
    for name, times in seconds.items():
        print(f"{name:32} {passes / sorted(times)[len(times) // 2]:6.2f} passes a second")
    print_ratios(seconds, "1 ablations a pass")


def half_precision(name: str, model: Any, prompt: ph.tasks.Prompt) -> None:
    """The same heads' effects in bfloat16."""
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    sets = [[(layer, head)] for layer in range(0, n_layers, 5) for head in range(n_heads)]
    found, seconds = [], []
    for one in (model, ph.load_model(name, dtype=torch.bfloat16)):
        own = Trial.of(one, "zero", None, False, "z", 0)
        own.prepare()
        own.run(prompt, 0, sets[:1], lambda n: None, short=False)  # caches fill
        start = time.perf_counter()
        table = own.run(prompt, 0, sets, lambda n: None, short=False)["long"]
        seconds.append(time.perf_counter() - start)
        found.append(table[0, 1:] - table[0, 0])
    apart = (found[0] - found[1]).abs()
    print(
        f"\nbfloat16: {seconds[1] / seconds[0]:.2f} times float32's time; effects of {len(sets)} "
        f"single heads, median size {found[0].abs().median():.4f}, change by a median of "
        f"{apart.median():.4f} and at most {apart.max():.4f} nats a token"
    )


def print_ratios(seconds: dict[str, list[float]], base: str) -> None:
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(seconds[base], times, strict=True))
        middle = ratios[len(ratios) // 2]
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"{name:32} {sorted(times)[len(times) // 2]:6.2f} s   {middle:5.2f}x ({spread})")
    print(f"x: speed relative to '{base}', median over rounds (smallest to largest)")


if __name__ == "__main__":
    main()

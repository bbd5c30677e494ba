"""What sharing the passes below the first ablated layer saves, and what fused attention does.

    make bench      # or: .venv/bin/python benchmarks/ablation.py --length 1024

Every way is timed in turn, round by round, so that a slow minute of the machine slows all of them;
ratios are medians over the rounds, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import time

import torch

import tl_posheads as ph
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.logprobs import cached_prefix, run_from_layer, target_logprobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = ph.load_model(args.model)
    prompt = ph.tasks.Passkey(length=args.length, n=1).prompts(model)[0]
    tokens, targets = prompt.tokens, prompt.targets
    n_layers = int(model.cfg.n_layers)
    layers = [0, n_layers // 4, n_layers // 2, 3 * n_layers // 4]
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call, *arguments) -> None:
        start = time.perf_counter()
        call(*arguments)
        seconds.setdefault(name, []).append(time.perf_counter() - start)

    with fused_attention(model):
        prefix = cached_prefix(model, tokens, targets, layers)
    for _ in range(args.rounds):
        with torch.no_grad():
            timed("the lens's own pass", model, tokens[None])
        timed("logits of the targets only", target_logprobs, model, tokens, targets)
        with fused_attention(model):
            timed("and fused attention", target_logprobs, model, tokens, targets)
            for layer in layers:
                hooks = ph.ablation_hooks(model, [(layer, 0)])
                name = f"and shared below layer {layer}"
                timed(name, run_from_layer, model, tokens, targets, prefix, layer, hooks)
    print(
        f"{args.model}, {args.length} tokens, {n_layers} layers, {args.rounds} rounds, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    whole = seconds["and fused attention"]
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(whole, times))
        middle = ratios[len(ratios) // 2]
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"{name:32} {sorted(times)[len(times) // 2]:6.2f} s   {middle:5.2f}x ({spread})")
    print("x: speed relative to the fused pass, median over rounds (smallest to largest)")


if __name__ == "__main__":
    main()

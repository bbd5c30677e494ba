"""What capturing rotated queries and keys costs beside transformers' own pass under SDPA.

    .venv/bin/python benchmarks/forward.py        # at 2,048 tokens

*transformers, SDPA, no head* is the unmodified model without its unembedding, the least that any
capture can cost. *the lens, eager* is what ``run_with_hooks`` of the lens does.
"""

from __future__ import annotations

import argparse

import torch
from side_by_side import machine, seconds_of, table_of

import tl_posheads as ph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = ph.load_model(args.model, cls="bridge")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (1, args.tokens), generator=generator)
    tokens = tokens.to(next(model.parameters()).device)
    print(f"### Forward pass: {args.model}, {args.tokens:,} tokens\n\n{machine()}\n")
    bare = _bare(args.model, model)

    def eager() -> None:
        with torch.no_grad():
            model.run_with_hooks(
                tokens,
                return_type=None,
                fwd_hooks=[(lambda name: name.endswith("hook_rot_q"), lambda value, hook: None)],
            )

    def plain() -> None:
        with torch.no_grad():
            bare(tokens, use_cache=False)

    base = "transformers, SDPA, no head"
    ways = {
        base: plain,
        "capture_rotary": lambda: ph.capture_rotary(model, tokens, lambda layer, q, k: None),
        "the lens, eager": eager,
    }
    print(table_of(seconds_of(ways, args.rounds), base))


def _bare(name: str, model) -> torch.nn.Module:
    """The same checkpoint in transformers, without its unembedding."""
    from transformers import AutoModel

    from tl_posheads.io.models import _resolve

    source, _ = _resolve(name)
    bare = AutoModel.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa")
    return bare.eval().to(next(model.parameters()).device)


if __name__ == "__main__":
    main()

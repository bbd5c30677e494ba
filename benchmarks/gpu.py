"""``score_heads`` on a CUDA device: does it agree with the CPU, and what does a long text cost?

    .venv/bin/python benchmarks/gpu.py                          # meant for under 5 minutes
    .venv/bin/python benchmarks/gpu.py --dtype float32
    .venv/bin/python benchmarks/gpu.py --cpu --tokens 512 --layers 1 --heads 4     # to try it

Nothing is downloaded: the model is a Llama with random weights, of Llama-2-7B's width. A direction
that all its tokens share makes the dominant dimension follow distance, as in a trained model, so
that scores differ. The CPU is compared in float32 on the first ``--agree`` tokens; the ratio to the
bare forward pass and the memory are those of one text of ``--tokens``. *forward pass* is
``capture_rotary``, discarding the result; like the passes of ``score_heads`` it ends before
the last layer's attention. Memory is what a call takes at its highest beyond the weights.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
from side_by_side import machine, peak_growth, seconds_of, table_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tl_posheads as ph
from tl_posheads.studies.ablation import trial
from tl_posheads.studies.ablation.trial import Trial

D_HEAD, N_VOCAB = 128, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--agree", type=int, default=1024, help="tokens read on the CPU, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="try the script without a CUDA device")
    args = parser.parse_args()
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device; --cpu tries the script without one.")
    device = "cpu" if args.cpu else "cuda"
    print(f"### GPU: random Llama, {args.layers} layers of {args.heads} heads, d_head {D_HEAD}\n")
    print(f"{machine()}\n", flush=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, N_VOCAB, (1, args.tokens), generator=generator)
    start = time.perf_counter()
    agreement(args, tokens[:, : args.agree], device)
    beside_forward(args, tokens, device)
    ablations(args, device)
    print(f"\n{time.perf_counter() - start:.0f} s in all.")


def agreement(args: argparse.Namespace, tokens: torch.Tensor, device: str) -> None:
    """Print how far apart the scores of the two devices are."""
    here, there = (
        ph.score_heads(random_llama(args, where, torch.float32), tokens, progress=False).rho
        for where in ("cpu", device)
    )
    gap = float((there - here).abs().max())
    print(
        f"{tokens.shape[1]:,} tokens in float32: largest difference of rho between CPU and "
        f"{device} {gap:.2g}, over {here.numel()} heads with rho from {here.min():.2f} to "
        f"{here.max():.2f}.\n",
        flush=True,
    )


def beside_forward(args: argparse.Namespace, tokens: torch.Tensor, device: str) -> None:
    """Print time and memory beside the bare forward pass."""
    model = random_llama(args, device, getattr(torch, args.dtype))
    base = "forward pass"
    ways = {
        base: lambda: ph.capture_rotary(model, tokens, lambda layer, q, k: None),
        "score_heads": lambda: ph.score_heads(model, tokens, progress=False),
        "of it RotaryGeometry": lambda: ph.RotaryGeometry.from_model(model, length=args.tokens),
    }
    print(f"{args.tokens:,} tokens in {args.dtype}:\n")
    print(table_of(seconds_of(ways, args.rounds), base))
    peaks = ", ".join(f"{name} {peak_growth(call) / 1e3:.2f} GB" for name, call in ways.items())
    print(f"\nMemory beyond the weights: {peaks}.")


def ablations(args: argparse.Namespace, device: str) -> None:
    """Print what running ablations of single heads as batches saves."""
    model = random_llama(args, device, getattr(torch, args.dtype))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, N_VOCAB, (args.agree,), generator=generator)
    prompt = ph.tasks.Prompt(tokens, torch.arange(args.agree - 8, args.agree))
    sets = [[(0, head)] for head in range(args.heads)]
    own, chosen = Trial.of(model, "zero", None, False, "z", 0), trial.rows_at_once
    own.prepare()

    def run(rows: int | None) -> None:
        trial.rows_at_once = chosen if rows is None else lambda *shape: rows
        own.run(prompt, 0, sets, lambda n: None)

    base = "one by one"
    ways = {base: lambda: run(1), "in batches": lambda: run(None)}
    print(f"\nEvery head of layer 0 ablated by itself, {args.agree:,} tokens in {args.dtype}:\n")
    print(table_of(seconds_of(ways, args.rounds), base))


def random_llama(args: argparse.Namespace, device: str, dtype: torch.dtype) -> Any:
    """The same weights on every call."""
    width = args.heads * D_HEAD
    config = LlamaConfig(
        vocab_size=N_VOCAB,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.tokens,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    hf_model = LlamaForCausalLM(config)
    with torch.no_grad():
        embedding = hf_model.model.embed_tokens.weight
        embedding.add_(config.initializer_range * torch.randn(width))
    hf_model.set_attn_implementation("eager")  # what the lens asks for
    return TransformerBridge.boot_transformers(
        "random-llama",
        hf_model=hf_model.eval().to(device, dtype),
        tokenizer=tokenizer(),
        device=device,
        dtype=dtype,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for every token: the lens wants a tokenizer, and texts are random ids here."""
    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, N_VOCAB))]
    inner = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="</s>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        name_or_path="random-llama",
        add_bos_token=True,
    )


if __name__ == "__main__":
    main()

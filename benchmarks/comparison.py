"""The same scores computed as in a typical notebook, and as published: time and memory.

    .venv/bin/python benchmarks/comparison.py
    .venv/bin/python benchmarks/comparison.py --tokens 128        # to try it

*notebook*: ``run_with_cache`` of the rotated queries and keys of all layers, then head by head
einsum, softmax and ``scipy.stats.spearmanr`` over all causal pairs. *published*: attention of
transformers rewritten to keep the dominant dimension of random pairs of tokens, ``100 * n`` of them
in a text of ``n`` (Hong et al. 2024, as in their script), here the same for all heads of a layer.
Contributions are unscaled everywhere. Each way runs in a process of its own, loading not counted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from scipy import stats
from side_by_side import machine, peak_memory

import tl_posheads as ph
from tl_posheads.hooks.capture import hook_names, rotary_hook_points
from tl_posheads.io.models import _resolve

MODEL = "smollm2-135m"
PER_TOKEN, CHUNK = 100, 4096  # pairs that the published script draws; that are looked at at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--way", choices=list(WAYS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.way:
        model = ph.load_model(MODEL, cls="bridge")
        tokens = ph.load_corpus("python-docs", model, n_docs=1, length=args.tokens)
        before = peak_memory()
        start = time.perf_counter()
        rho = WAYS[args.way](model, tokens)
        seconds = time.perf_counter() - start
        torch.save({"rho": rho, "s": seconds, "mb": peak_memory(), "before": before}, args.out)
        return
    print(f"### Comparison: {MODEL}, {args.tokens:,} tokens of documentation\n\n{machine()}\n")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            out = Path(folder) / "result.pt"
            command = [sys.executable, __file__, "--way", way, "--out", str(out)]
            run = [*command, "--tokens", str(args.tokens)]
            subprocess.run(run, check=True, capture_output=True)
            found[way] = torch.load(out)
    truth = found["notebook"]["rho"].flatten()
    best = set(truth.topk(14).indices.tolist())
    print("| way | seconds | peak, GB | rank correlation | of the notebook's best 14 |")
    print("|---|---:|---:|---:|---:|")
    for way, result in found.items():
        rho = result["rho"].flatten()
        same = len(best & set(rho.topk(14).indices.tolist()))
        agreement = stats.spearmanr(truth, rho)[0]
        print(
            f"| {way} | {result['s']:.1f} | {result['mb'] / 1e3:.2f} | {agreement:.4f} | {same} |"
        )
    print(f"\nThe loaded model and its libraries are {result['before'] / 1e3:.2f} GB of the peak.")


def notebook(model, tokens) -> torch.Tensor:
    layers = range(model.cfg.n_layers)
    with rotary_hook_points(model), torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=hook_names(layers))
    n = tokens.shape[1]
    row, column = torch.tril_indices(n, n, -1)
    rho = torch.zeros(len(layers), model.cfg.n_heads)
    for layer in layers:
        q = cache[f"blocks.{layer}.attn.hook_rot_q"][0]
        k = cache[f"blocks.{layer}.attn.hook_rot_k"][0]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        q, k = (x.unflatten(-1, (2, -1)) for x in (q, k))
        for head in range(q.shape[1]):
            pairs = torch.einsum("icm,jcm->ijm", q[:, head], k[:, head])
            dominant = pairs.softmax(-1) @ torch.arange(float(pairs.shape[-1]))
            rho[layer, head] = stats.spearmanr(row - column, dominant[row, column])[0]
    return rho


def published(model, tokens) -> torch.Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    n, rho = tokens.shape[1], torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    generator = torch.Generator().manual_seed(0)
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def rewritten(module, query, key, value, *rest, **options):
        # Any two tokens, the later one as the query.
        first = torch.randint(n, (PER_TOKEN * n,), generator=generator)
        second = (first + torch.randint(1, n, first.shape, generator=generator)) % n
        q_pos, k_pos = torch.maximum(first, second), torch.minimum(first, second)
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        dominant = []
        for i, j in zip(q_pos.split(CHUNK), k_pos.split(CHUNK)):
            pairs = (query[0, :, i] * keys[0, :, j]).unflatten(-1, (2, -1)).sum(-2)
            dominant.append(pairs.softmax(-1) @ torch.arange(float(pairs.shape[-1])))
        for head, values in enumerate(torch.cat(dominant, 1)):
            rho[module.layer_idx, head] = stats.spearmanr(q_pos - k_pos, values)[0]
        return plain(module, query, key, value, *rest, **options)

    ALL_ATTENTION_FUNCTIONS["rewritten"] = rewritten
    source, _ = _resolve(MODEL)
    hf_model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="rewritten")
    with torch.no_grad():
        hf_model(tokens)
    return rho


def drawn(model, tokens) -> torch.Tensor:
    return ph.score_heads(model, tokens, progress=False).rho


def all_pairs(model, tokens) -> torch.Tensor:
    return ph.score_heads(model, tokens, qk_pairs="all", progress=False).rho


WAYS = {
    "notebook": notebook,
    "published, 100 pairs a token": published,
    "score_heads": drawn,
    'score_heads, qk_pairs="all"': all_pairs,
}

if __name__ == "__main__":
    main()

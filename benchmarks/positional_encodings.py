"""Is the positional score about RoPE alone? Small decoders under seven encodings, trained alike.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/positional_encodings.py --out DIR

For every encoding and seed one decoder reads the texts, passkeys and repeats of
``small_llama.py``, on 256 tokens. Then: its loss by octave of position, the passkeys that it finds,
its heads' scores (``ph.encodings``), and the effect of ablating its two best heads, beside every
other two. The same command on the same folder computes what is missing. Some four minutes a
model.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import sys
import time
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save
from small_decoder import ENCODINGS, SmallDecoder, inv_freq
from small_llama import HELD_OUT, LENGTH, TRAINING, Sequences, _reproducible, make_tokenizer, texts
from torch import Tensor
from torch.nn.functional import cross_entropy

import tl_posheads as ph
from tl_posheads import encodings
from tl_posheads.io.files import table_bytes, write_bytes
from tl_posheads.io.gguf import quiet
from tl_posheads.tasks.base import Prompt

STEPS = 900
LONG = 512  # tokens of the texts that go on beyond training
N_TEXTS = 32  # held-out; every second one makes the bases, the others are scored
ABLATED = 2  # heads
SHUFFLES = 16  # random orders of a head's dimensions


def fit(encoding: str, sequences: Sequences, steps: int, seed: int) -> tuple[SmallDecoder, float]:
    """The trained decoder and the seconds that it took; the same data and budget for all."""
    rng = random.Random(seed)
    with _reproducible(seed):
        model = SmallDecoder(encoding)
        groups = [
            dict(
                params=[w for w in model.parameters() if w.ndim > 1],
                weight_decay=TRAINING["weight_decay"],
            ),
            dict(params=[w for w in model.parameters() if w.ndim == 1], weight_decay=0.0),
        ]
        optimizer = torch.optim.AdamW(groups, betas=TRAINING["betas"])
        warmup = max(1, round(TRAINING["warmup"] * steps))
        begun = time.perf_counter()
        for step in range(steps):
            done = max(0, step - warmup) / max(1, steps - warmup)
            rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = TRAINING["lr"] * rate
            begins = step < TRAINING["short_share"] * steps
            tokens, weights = sequences.batch(rng, TRAINING["short"] if begins else LENGTH)
            logits = model(tokens)[:, :-1]
            losses = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            weights = weights[:, 1:].flatten()
            loss = (losses * weights).sum() / weights.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 100 == 0 or step + 1 == steps:
                seconds = time.perf_counter() - begun
                print(
                    f"{encoding}, seed {seed}: step {step + 1} of {steps}, loss {loss:.3f} "
                    f"({seconds:.0f} s)",
                    file=sys.stderr,
                    flush=True,
                )
        return model.eval(), time.perf_counter() - begun


def prepared(out: Path) -> tuple[Any, str, str]:
    """Tokenizer, training text and held-out text; the last is kept in the folder as a corpus."""
    reading, held_out = texts()
    out.mkdir(parents=True, exist_ok=True)
    folder = out / "tokenizer"
    if not folder.is_dir():
        with quiet():
            make_tokenizer(reading).save_pretrained(folder)
    write_bytes(out / HELD_OUT, held_out.encode())
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), reading, held_out


def trained(out: Path, encoding: str, seed: int, steps: int, sequences: Sequences) -> SmallDecoder:
    """The decoder of the folder, trained first if it isn't there."""
    path = out / f"{encoding}-{seed}-{steps}.safetensors"
    if not path.exists():
        model, seconds = fit(encoding, sequences, steps, seed)
        facts = dict(encoding=encoding, seed=str(seed), steps=str(steps), seconds=f"{seconds:.1f}")
        write_bytes(path, save(model.state_dict(), metadata=facts))
    model = SmallDecoder(encoding)
    model.load_state_dict(load_file(path))
    return model.eval()


class HeldOut:
    """Held-out texts and passkeys, the same for every decoder."""

    def __init__(self, out: Path, tokenizer: Any) -> None:
        corpus = str(out / HELD_OUT)
        reader = SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=LONG))
        texts = ph.load_corpus(corpus, reader, n_docs=N_TEXTS, length=LENGTH, seed=0)
        self.for_bases, self.for_scores = texts[::2], texts[1::2]
        self.texts = ph.load_corpus(corpus, reader, n_docs=48, length=LENGTH, seed=1)
        self.long = ph.load_corpus(corpus, reader, n_docs=24, length=LONG, seed=2)
        task = ph.tasks.Passkey(length=192, n=100, corpus=corpus, short_length=100, seed=1)
        self.passkeys: list[Prompt] = task.prompts(reader)


def losses(model: SmallDecoder, texts: Tensor, **how: Any) -> Tensor:
    """Loss by position, mean over texts, in nats: ``[pos - 1]``, the first after one token."""
    with torch.no_grad():
        logits = model(texts, **how)[:, :-1]
    lost = cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten(), reduction="none")
    return lost.view(len(texts), -1).mean(0)


def by_octave(loss: Tensor, first: int, last: int) -> dict[str, float]:
    """Mean loss of tokens with 1, 2 to 3, 4 to 7 ... tokens before them."""
    lows = [2**i for i in range(first, last)]
    return {f"{low}-{2 * low - 1}": float(loss[low - 1 : 2 * low - 1].mean()) for low in lows}


def passkeys(model: SmallDecoder, prompts: list[Prompt], **how: Any) -> tuple[float, float]:
    """Share found, every digit the likeliest; mean log-probability of a digit, in nats."""
    tokens = torch.stack([prompt.tokens for prompt in prompts])
    with torch.no_grad():
        logprobs = model(tokens, **how).log_softmax(-1)
    found, digits = 0, []
    for row, prompt in zip(logprobs, prompts):
        seen, truth = row[prompt.targets - 1], prompt.tokens[prompt.targets]
        found += bool((seen.argmax(-1) == truth).all())
        digits.append(float(seen.gather(1, truth[:, None]).mean()))
    return found / len(prompts), float(np.mean(digits))


def queries_and_keys(model: SmallDecoder, texts: Tensor, offset: int = 0) -> list[Any]:
    """``(q, k)`` of each layer, ``[doc, pos, head, d_head]``."""
    found: list[Any] = []
    with torch.no_grad():
        model(texts, offset=offset, on_qk=lambda _, q, k: found.append((q, k)))
    return found


def own_bases(model: SmallDecoder, texts: Tensor) -> list[list[encodings.QKBasis]]:
    """Bases of every layer's heads by what orders the planes under the model's own encoding."""
    sizes = model.shape
    if model.rotary_dim:
        shifts = encodings.log_shifts(1 << 16)
        turn = ph.LayerGeometry.from_inv_freq(inv_freq(model.rotary_dim), d_head=sizes.d_head)
        basis = encodings.ordered_planes(encodings.rotation_operators(turn, shifts), shifts)
        return [[basis] * sizes.n_heads] * sizes.n_layers
    if model.encoding not in ("sinusoidal", "learned"):
        return data_bases(model, texts)
    cut = sizes.n_ctx // 2
    shifts = encodings.log_shifts(sizes.n_ctx - cut)
    here = queries_and_keys(model, texts[:, :cut])
    sums = [encodings.TransportSums(sizes.n_heads, sizes.d_head, len(shifts)) for _ in here]
    pooled = [torch.cat(both).flatten(0, 1) for both in here]
    for layer, x in enumerate(pooled):
        sums[layer].add(x)
    for i, shift in enumerate(shifts):
        moved = queries_and_keys(model, texts[:, :cut], offset=shift)
        for layer, both in enumerate(moved):
            sums[layer].add_moved(i, pooled[layer], torch.cat(both).flatten(0, 1))
    return [[encodings.ordered_planes(row, shifts) for row in layer.solve()] for layer in sums]


def data_bases(model: SmallDecoder, texts: Tensor) -> list[list[encodings.QKBasis]]:
    """Bases by mean products, which exist under any encoding: a second opinion where it moves q."""
    bias = model.bias(texts.shape[1])
    bases = []
    for q, k in queries_and_keys(model, texts):
        products = encodings.distance_products(q, k)
        heads = range(model.shape.n_heads)
        row = [
            encodings.planes_by_products(products, h, bias=None if bias is None else bias[h])
            for h in heads
        ]
        bases.append(row)
    return bases


def scored(
    model: SmallDecoder, texts: Tensor, bases: list[list[encodings.QKBasis]], shuffles: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rho ``[layer, head]``, mean over texts; each text's; and of random orders of dimensions."""
    bias = model.bias(texts.shape[1])
    # Contributions are of q . k, to which the scores' scale has yet to come.
    bias = None if bias is None else bias.detach() * model.shape.d_head**0.5
    rng = np.random.default_rng(0)
    rho, alone, shuffled = [], [], []
    for layer, (q, k) in enumerate(queries_and_keys(model, texts)):
        vectors = [encodings.PlaneVectors(a, b, bases[layer], bias) for a, b in zip(q, k)]
        alone.append([_rho(v) for v in vectors])
        rho.append(np.mean(alone[-1], axis=0))
        few, orders = vectors[:4], []
        true = few[0].index
        for _ in range(shuffles):
            order = rng.permutation(len(true.unique()))
            for v in few:
                v.index = torch.as_tensor(order, dtype=torch.float64)[true.long()]
            orders.append(np.mean([_rho(v) for v in few], axis=0))
        shuffled.append(orders)
    return np.array(rho), np.array(alone), np.array(shuffled)


def _rho(vectors: encodings.PlaneVectors) -> np.ndarray:
    return ph.spearman_by_distance(*encodings.dominant_by_distance(vectors)).numpy()


def ablations(model: SmallDecoder, held: HeldOut, rho: np.ndarray) -> list[dict[str, Any]]:
    """What ablating any two heads does; the best two by rho are marked."""
    sizes = model.shape
    heads = [(la, h) for la in range(sizes.n_layers) for h in range(sizes.n_heads)]
    best = sorted(heads, key=lambda place: -rho[place])[:ABLATED]
    texts, prompts = held.texts[:24], held.passkeys[:48]
    whole, (found, digit) = float(losses(model, texts).mean()), passkeys(model, prompts)
    rows = []
    for chosen in combinations(heads, ABLATED):
        without: dict[int, list[int]] = {}
        for layer, head in chosen:
            without.setdefault(layer, []).append(head)
        left, nats = passkeys(model, prompts, without=without)
        rows.append(
            {
                "heads": " ".join(f"L{la}H{h}" for la, h in chosen),
                "top": set(chosen) == set(best),
                "same_layers": sorted(la for la, _ in chosen) == sorted(la for la, _ in best),
                "loss": float(losses(model, texts, without=without).mean()) - whole,
                "found": left - found,
                "digit": nats - digit,
            }
        )
    return rows


def analysed(model: SmallDecoder, held: HeldOut, seed: int) -> dict[str, Any]:
    """Everything that's reported of one decoder."""
    own, data = own_bases(model, held.for_bases), data_bases(model, held.for_bases)
    rho, alone, shuffled = scored(model, held.for_scores, own, SHUFFLES)
    second, _, _ = scored(model, held.for_scores, data)
    heads = []
    for layer, head in np.ndindex(rho.shape):
        basis, other = own[layer][head], data[layer][head]
        speeds = basis.plane_speeds[basis.moves]
        heads.append(
            {
                "layer": layer,
                "head": head,
                "rho": rho[layer, head],
                "sd_texts": alone[layer, :, head].std(ddof=1),
                "rho_products": second[layer, head],
                "shuffled_mean": shuffled[layer, :, head].mean(),
                "shuffled_sd": shuffled[layer, :, head].std(ddof=1),
                "source": basis.source,
                "explained": basis.explained,
                "explained_change": basis.explained_change,
                "diagonal": basis.diagonal,
                "diagonal_products": other.diagonal,
                "n_dimensions": basis.n_dimensions,
                "bias_at": basis.bias_at,
                "bias_half_life": 1 / basis.bias_speed if basis.bias_speed else None,
                "shortest": float(1 / speeds[0]),
                "longest": float(1 / speeds[-1]),
            }
        )
    octaves = by_octave(losses(model, held.texts), 0, 8)
    if model.encoding != "learned":
        octaves |= by_octave(losses(model, held.long), 8, 9)
    found, digit = passkeys(model, held.passkeys)
    result = {
        "encoding": model.encoding,
        "seed": seed,
        "loss": octaves,
        "found": found,
        "digit": digit,
        "heads": heads,
        "ablations": ablations(model, held, rho),
    }
    # JSON knows no NaN.
    return json.loads(json.dumps(result, default=float).replace("NaN", "null"))


def tables(results: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    """All decoders' results as tables: a row per decoder, head, and two ablated heads."""
    rows = []
    for one in results:
        heads, pairs = pd.DataFrame(one["heads"]), pd.DataFrame(one["ablations"])
        top = pairs[pairs["top"]].iloc[0]
        rows.append(
            {
                "encoding": one["encoding"],
                "seed": one["seed"],
                **one["loss"],
                "found": one["found"],
                "digit": one["digit"],
                "rho_median": heads["rho"].median(),
                "rho_max": heads["rho"].max(),
                "rho_products_max": heads["rho_products"].max(),
                "agree": heads["rho"].corr(heads["rho_products"], method="spearman"),
                "explained_change": heads["explained_change"].median(),
                "top": top["heads"],
                **{f"top_{x}": top[x] for x in ("loss", "found", "digit")},
                **{
                    f"others_{x}": pairs.loc[~pairs["top"], x].median()
                    for x in ("loss", "found", "digit")
                },
                "rank_loss": int((pairs["loss"] >= top["loss"]).sum()),
                "rank_digit": int((pairs["digit"] <= top["digit"]).sum()),
                "n_head_pairs": len(pairs),
            }
        )
    found = {"models": pd.DataFrame(rows)}
    for key in ("heads", "ablations"):
        parts = [
            pd.DataFrame(one[key]).assign(encoding=one["encoding"], seed=one["seed"])
            for one in results
        ]
        found[key] = pd.concat(parts)
    return found


def figure(found: dict[str, pd.DataFrame]) -> bytes:
    """Scores of all heads by encoding, and the harm of the two best heads beside all other twos."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10, 7.5), layout="constrained")
    panels = picture.subplots(3, 1, sharex=True)
    names = [encoding for encoding in ENCODINGS if encoding in set(found["models"]["encoding"])]
    labels = (
        "score of each head\n(grey: dimensions shuffled)",
        "change of the loss,\nnats a token",
        "change of a passkey digit's\nlog-probability, nats",
    )
    for x, encoding in enumerate(names):
        heads, pairs = (
            found[key][found[key]["encoding"] == encoding] for key in ("heads", "ablations")
        )
        spread = np.linspace(-0.3, 0.3, len(heads))
        panels[0].errorbar(
            x + spread,
            heads["shuffled_mean"],
            heads["shuffled_sd"],
            fmt="none",
            ecolor="0.75",
            lw=3,
        )
        panels[0].plot(x + spread, heads["rho"], "o", color="C0", ms=5)
        for panel, key in ((panels[1], "loss"), (panels[2], "digit")):
            panel.plot(x + np.linspace(-0.3, 0.3, len(pairs)), pairs[key], ".", color="0.7")
            best = pairs[pairs["top"]]
            panel.plot(np.full(len(best), x), best[key], "D", color="C3", ms=7)
    for panel, label in zip(panels, labels):
        panel.axhline(0, color="0.4", lw=0.6)
        panel.set_ylabel(label)
    panels[2].set_xticks(range(len(names)), names)
    for panel in panels[1:]:
        panel.set_title("two heads ablated: any (grey), the highest scores (red)", fontsize=9)
    out = io.BytesIO()
    picture.savefig(out, format="png", dpi=110)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of models and results")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--encodings", nargs="+", choices=ENCODINGS, default=list(ENCODINGS))
    parser.add_argument("--train-only", action="store_true", help="leave the analysis to later")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, reading, _ = prepared(chosen.out)
    sequences, held, results = Sequences(reading, tokenizer), HeldOut(chosen.out, tokenizer), []
    for seed in chosen.seeds:
        for encoding in chosen.encodings:
            model = trained(chosen.out, encoding, seed, chosen.steps, sequences)
            if chosen.train_only:
                continue
            path = chosen.out / f"{encoding}-{seed}-{chosen.steps}.json"
            if not path.exists():
                found = {**analysed(model, held, seed), "steps": chosen.steps}
                write_bytes(path, json.dumps(found, indent=1).encode())
                print(f"{encoding}, seed {seed}: analysed", file=sys.stderr, flush=True)
            results.append(json.loads(path.read_text()))
    if results:
        found = tables(results)
        for name, table in found.items():
            write_bytes(chosen.out / f"{name}.parquet", table_bytes(table))
        write_bytes(chosen.out / "encodings.png", figure(found))
        print(found["models"].round(3).T.to_string())


if __name__ == "__main__":
    main()

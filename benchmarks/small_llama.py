"""A small Llama, trained from scratch on 256 tokens in minutes, to study what happens beyond them.

    .venv/bin/python benchmarks/small_llama.py --out DIR

It reads English and retrieves a passkey within 256 tokens, and it has never seen a larger
distance. Everything it learns from is on every machine with Python; nothing is downloaded. The
same seed gives the same weights on one machine; those in ``benchmarks/results/small-llama`` are of
seed 0.
"""

from __future__ import annotations

import argparse
import ast
import math
import os
import random
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import tl_posheads as ph
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.hooks.tokenizer import token_ids
from tl_posheads.io.corpora import PYTHON_DOCS, _text
from tl_posheads.io.gguf import quiet
from tl_posheads.tasks.base import encode

LENGTH = 256  # of the longest training sequences, at positions 0 to 255
STEPS = 1600
MODEL = dict(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=LENGTH,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
    initializer_range=0.06,
)
TRAINING = dict(
    lr=2e-3,
    warmup=0.05,
    betas=(0.9, 0.95),
    weight_decay=0.1,
    tokens=2048,
    short=64,
    short_share=0.4,
    passkeys=0.4,
    repeats=0.15,
    digit_weight=5.0,
)
HELD_OUT = "held-out.txt"  # in the model's folder: a corpus that the model hasn't read
_SPECIAL = ["<bos>", "<eos>", "<pad>"]
_STRETCH = 16_000  # characters of the Python documentation that are held out or not as one
_EVERY = 4  # stretch of the documentation is held out
# Other distributions of Python leave these out, or they are no reading matter.
_NOT_READ = {"test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data", "ensurepip"}


def texts() -> tuple[str, str]:
    """The training text and the held-out text, which share no paragraph."""
    paragraphs, stretch, kept, held = _text(PYTHON_DOCS).split("\n\n"), 0, [], []
    for paragraph in paragraphs:
        (kept if stretch // _STRETCH % _EVERY else held).append(paragraph)
        stretch += len(paragraph)
    # The documentation says some things in two places.
    known = {paragraph.strip() for paragraph in held}
    kept = [paragraph for paragraph in kept if paragraph.strip() not in known]
    for docstring in _docstrings():
        kept += [part for part in docstring.split("\n\n") if part.strip() not in known]
    return "\n\n".join(kept), "\n\n".join(held)


def _docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if _NOT_READ & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield ast.get_docstring(node) or ""


def make_tokenizer(text: str) -> Any:
    """Byte-level BPE in which every digit is a token, so that numbers can be copied."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    bos, eos, pad = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad
    )


class Sequences:
    """Training sequences: plain text, text with a passkey, and text that repeats a stretch."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        self.tokenizer, self.ids = tokenizer, token_ids(text, tokenizer)
        self.start = [tokenizer.bos_token_id]

    def batch(self, rng: random.Random, length: int) -> tuple[Tensor, Tensor]:
        """Tokens and the weight of each in the loss, ``[sequence, pos]``."""
        rows = []
        for _ in range(TRAINING["tokens"] // length):
            kind = rng.random()
            if kind < TRAINING["passkeys"]:
                pieces = self._passkey(rng, length - 1)
            elif kind < TRAINING["passkeys"] + TRAINING["repeats"]:
                pieces = self._repeat(rng, length - 1)
            else:
                pieces = [(self._stretch(rng, length - 1), 1.0)]
            pieces = [(self.start, 1.0), *pieces]
            rows.append([(token, weight) for piece, weight in pieces for token in piece])
        both = torch.tensor(rows, dtype=torch.float64)
        return both[..., 0].long(), both[..., 1].float()

    def _stretch(self, rng: random.Random, n: int) -> list[int]:
        first = rng.randrange(len(self.ids) - n)
        return self.ids[first : first + n]

    def _passkey(self, rng: random.Random, n: int) -> list[tuple[list[int], float]]:
        question = ph.tasks.Passkey()._question(0, rng)
        told = n > LENGTH // 2 and rng.random() < 0.5
        pieces = [
            (question.intro + question.gap) * told,
            question.needles[0][1],
            question.question + question.prefix,
            question.answer[0],
        ]
        intro, needle, asked, answer = (encode(self.tokenizer, piece) for piece in pieces)
        room = n - len(intro) - len(needle) - len(asked) - len(answer)
        # Half of the questions stand at the end, as in the task, the others anywhere.
        end = room - rng.choice([0, rng.randint(0, room)])
        text = self._stretch(rng, room)
        first = rng.randint(0, end)
        return [
            (intro, 1.0),
            (text[:first], 1.0),
            *self._needle(needle),
            (text[first:end], 1.0),
            (asked, 1.0),
            (answer, TRAINING["digit_weight"]),
            (text[end:], 1.0),
        ]

    def _needle(self, needle: list[int]) -> list[tuple[list[int], float]]:
        """The key stands in it twice: the second time it can be copied from near by."""
        digits = [i for i, token in enumerate(needle) if self.tokenizer.decode([token]).isdigit()]
        first, last = digits[len(digits) // 2], digits[-1] + 1
        key = (needle[first:last], TRAINING["digit_weight"])
        return [(needle[:first], 1.0), key, (needle[last:], 1.0)]

    def _repeat(self, rng: random.Random, room: int) -> list[tuple[list[int], float]]:
        """A stretch that comes twice: the second time it can be copied."""
        n = rng.randint(min(16, room // 4), room * 2 // 5)
        room -= 2 * n
        before = rng.randint(0, room)
        middle = rng.randint(before, room)
        text, twice = self._stretch(rng, room), self._stretch(rng, n)
        return [
            (text[:before], 1.0),
            (twice, 1.0),
            (text[before:middle], 1.0),
            (twice[:1], 0.0),
            (twice[1:], 1.0),
            (text[middle:], 1.0),
        ]


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """One thread and a seed of its own inside; the caller's afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def fit(
    sequences: Sequences,
    steps: int,
    seed: int,
    progress: bool,
    on_step: Callable[[int, Any], None] = lambda step, model: None,
    *,
    start: Any = None,
    length: int = LENGTH,
    lr: float = TRAINING["lr"],
) -> Any:
    """The trained model, in eval mode; ``on_step`` gets every step's number and the model.

    Training begins with ``start`` where it is given: fine-tuning, all of it on long sequences.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    rng = random.Random(seed)
    with _reproducible(seed):
        model = LlamaForCausalLM(LlamaConfig(**MODEL)) if start is None else start.train()
        if start is None:
            with torch.no_grad():
                # A direction that all tokens share: heads find "the token before" sooner with it.
                embedding = model.model.embed_tokens.weight
                embedding.add_(MODEL["initializer_range"] * torch.randn(MODEL["hidden_size"]))
        matrices = [weight for weight in model.parameters() if weight.ndim > 1]
        vectors = [weight for weight in model.parameters() if weight.ndim == 1]
        groups = [
            dict(params=matrices, weight_decay=TRAINING["weight_decay"]),
            dict(params=vectors, weight_decay=0.0),
        ]
        optimizer = torch.optim.AdamW(groups, betas=TRAINING["betas"])
        warmup = max(1, round(TRAINING["warmup"] * steps))
        begun = time.perf_counter()
        for step in range(steps):
            on_step(step, model)
            done = max(0, step - warmup) / max(1, steps - warmup)
            rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            # Copying is learned sooner where there is less to look through.
            begins = start is None and step < TRAINING["short_share"] * steps
            tokens, weights = sequences.batch(rng, TRAINING["short"] if begins else length)
            logits = model(tokens, use_cache=False).logits[:, :-1]
            losses = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            weights = weights[:, 1:].flatten()
            loss = (losses * weights).sum() / weights.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if progress and ((step + 1) % 200 == 0 or step + 1 == steps):
                seconds = time.perf_counter() - begun
                print(
                    f"step {step + 1} of {steps}: loss {loss:.3f} ({seconds:.0f} s)",
                    file=sys.stderr,
                    flush=True,
                )
        on_step(steps, model)
    return model.eval()


def train(folder: Path, *, steps: int = STEPS, seed: int = 0, progress: bool = True) -> Path:
    """Train a model and write it, its tokenizer and the held-out text: whole or not at all."""
    if folder.exists():
        raise SystemExit(f"{folder} exists; give another folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    reading, held_out = texts()
    tokenizer = make_tokenizer(reading)
    model = fit(Sequences(reading, tokenizer), steps, seed, progress)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with quiet():
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        (part / HELD_OUT).write_text(held_out, encoding="utf-8")
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def report(folder: Path) -> None:
    """Loss by position on held-out text, and passkeys found within the training length."""
    from tl_posheads import extrapolation as ex

    model, held_out = ph.load_model(str(folder)), str(folder / HELD_OUT)
    with ex.Unchanged()(model):
        task = ph.tasks.Perplexity(length=1024, last=1.0, n=16, corpus=held_out)
        edges = [1, 64, 128, 256, 512, 1024]
        print(ph.tasks.loss_by_position(model, task, edges=edges).round(3).to_string(index=False))
    for length in (128, 256):
        prompts = ph.tasks.Passkey(
            length=length, n=100, corpus=held_out, short_length=100, seed=1
        ).prompts(model)
        hits = [bool(target_logprobs(model, p.tokens, p.targets)[1].all()) for p in prompts]
        print(f"passkeys found in {length} tokens: {sum(hits)} of {len(hits)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, a new one")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    begun = time.perf_counter()
    report(train(chosen.out, steps=chosen.steps, seed=chosen.seed))
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()

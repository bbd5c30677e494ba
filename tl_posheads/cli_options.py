"""Types of command line options, and what a local model's name stands for."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path


def whole(least: int) -> Callable[[str], int]:
    """A whole number of at least ``least``."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return parse


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A comma-separated list of some of ``known``, each once.

    >>> names(("passkey", "copying"))("copying, passkey")
    ['copying', 'passkey']
    """

    def parse(text: str) -> list[str]:
        parts = [part.strip() for part in text.split(",")]
        wrong = [part for part in parts if part not in known]
        if wrong or len(set(parts)) < len(parts):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no list of some of {', '.join(known)}, each once"
            )
        return parts

    return parse


def shares(text: str) -> list[float]:
    """Ascending shares, ``"0.02,0.05"``.

    >>> shares("0.02,.05")
    [0.02, 0.05]
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    fits = values and all(0 < value <= 1 for value in values)
    if not fits or any(b <= a for a, b in pairwise(values)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of ascending shares above 0 and at most 1, like 0.02,0.05"
        )
    return values


def pairs(text: str) -> str | int:
    if text in ("all", "per_distance", "auto"):
        return text
    if re.fullmatch(r"[0-9]{1,18}", text) and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(
        f"{text!r} is none of: all, per_distance, auto, a number above 0"
    )


def layers(text: str) -> list[int]:
    """Turn ``"0,3,5-7"`` into a sorted list of layers.

    >>> layers("5-7,0,6")
    [0, 5, 6, 7]

    Raises:
        argparse.ArgumentTypeError: the text is no list of layers and ranges.
    """
    found_layers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,4})(?:\s*-\s*([0-9]{1,4}))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise argparse.ArgumentTypeError(
                f"{text!r} names no layers; write them like 0-9 or 0,3,5-7, counted from 0"
            )
        found_layers.update(range(first, last + 1))
    return sorted(found_layers)


def add_model_options(add: Callable[..., object]) -> None:
    """Seed, and how the model is loaded."""
    add("--seed", metavar="N", type=whole(0), default=0, help="for everything drawn (0)")
    add("--device", help="cpu, cuda, cuda:1, mps (the best there is)")
    add("--dtype", help="float32, bfloat16 or float16 (the loader's choice)")
    add("--cls", choices=("hooked", "bridge"),
        help="HookedTransformer or TransformerBridge (the first where it exists)")  # fmt: skip


def local_files(name: str) -> str | None:
    """Fingerprint of a local model: a path alone would call retrained weights the same model."""
    path = Path(name)
    if not path.exists():
        return None
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode("utf-8", "backslashreplace")).hexdigest()


@contextmanager
def resumable(out: Path, overwrite: bool) -> Iterator[None]:
    """Says to whoever stops a run with Ctrl-C how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        hint = " without --overwrite" if overwrite else ""
        raise KeyboardInterrupt(
            f"stopped; what was done is in {out}, and the same command{hint} goes on from there"
        ) from None

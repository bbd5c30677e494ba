"""Command line options: their types, those that several commands have, and local models."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

_MODEL = "a name like smollm2-135m, a hub id, a folder, a GGUF file"


def whole(least: int) -> Callable[[str], int]:
    """A whole number of at least ``least``."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
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
                f"{text!r} is not a list of some of {', '.join(known)}, each once"
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
            f"{text!r} is not a list of ascending shares above 0 and at most 1, like 0.02,0.05"
        )
    return values


def qk_pairs(text: str) -> str | int:
    """``"auto"``, ``"all"`` or a number of query-key pairs, of which a rank needs three."""
    if text in ("auto", "all"):
        return text
    if re.fullmatch(r"[0-9]{1,18}", text) and int(text) >= 3:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of: auto, all, a number of at least 3")


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


def ranges(numbers: Sequence[int]) -> str:
    """Turn ascending numbers into text that :func:`layers` reads.

    >>> ranges([0, 5, 6, 7])
    '0,5-7'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def add_texts(
    add: Callable[..., object], docs: int, length: int = 0, least: int = 2, model: str = _MODEL
) -> None:
    """Options for the model and its texts, with defaults; no ``--length`` without one."""
    add("model", metavar="MODEL", help=model)
    text = "a name, a text file, a folder of them, or a hub data set's id (python-docs)"
    add("--corpus", metavar="NAME-OR-PATH", default="python-docs", help=text)
    if length:
        text = f"tokens per document ({length})"
        add("--length", metavar="N", type=whole(least), default=length, help=text)
    text = f"number of documents; means and intervals are over documents ({docs})"
    add("--docs", metavar="N", type=whole(1), default=docs, help=text)


def add_model_options(add: Callable[..., object], *, cls: bool = True) -> None:
    """Seed, and how the model is loaded."""
    add("--seed", metavar="N", type=whole(0), default=0, help="seed of all random draws (0)")
    add("--device", help="cpu, cuda, cuda:1, mps (the best there is)")
    add("--dtype", help="float32, bfloat16 or float16 (the loader's choice)")
    if cls:
        text = "HookedTransformer or TransformerBridge (the first where it exists)"
        add("--cls", choices=("hooked", "bridge"), help=text)


def add_scale(add: Callable[..., object]) -> None:
    """``--scale``, as the library's ``scale=``."""
    add(
        "--scale",
        choices=("none", "attention"),
        default="none",
        help="contributions unscaled, or times the model's attention scale (none)",
    )


def add_skip_first(add: Callable[..., object]) -> None:
    """``--skip-first``, as the library's ``skip_first=``."""
    text = "leave out the first N positions, for example the attention sink (0)"
    add("--skip-first", metavar="N", type=whole(0), default=0, help=text)


def add_top(add: Callable[..., object], text: str = "heads to print") -> None:
    """``--top``, rows of what is printed."""
    add("--top", metavar="N", type=whole(1), default=20, help=f"{text} (20)")


def add_qk_pairs(add: Callable[..., object]) -> None:
    """Options for the query-key pairs that a score is computed over, and their weights."""
    add(
        "--qk-pairs",
        metavar="auto|all|N",
        type=qk_pairs,
        default="auto",
        help="query-key pairs per document that rho is computed over: N drawn at random, all, or enough that drawing adds at most 0.005 to a mean rho's standard error (auto)",
    )
    add(
        "--weighting",
        choices=("pair", "distance"),
        default="pair",
        help="equal weight for every query-key pair, or for every distance (pair)",
    )
    add_scale(add)


def local_files(name: str) -> str | None:
    """Fingerprint of a local model: a path alone would call retrained weights the same model."""
    path = Path(name)
    if not path.exists():
        return None
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode("utf-8", "backslashreplace")).hexdigest()

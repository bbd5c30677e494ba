"""Texts by what a person types: a name, a file, a folder, a hub data set; cut into documents."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_posheads.errors import PosheadsError

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

PYTHON_DOCS = "python-docs"
_SUFFIXES = (".txt", ".md", ".rst")
_HUB_CHARACTERS = 20_000_000  # read of a hub data set at most


def load_corpus(
    name_or_path: str | os.PathLike[str],
    model: Any,
    *,
    n_docs: int = 4,
    length: int = 1024,
    prepend_bos: bool = True,
    seed: int = 0,
) -> Int[Tensor, "doc pos"]:
    """Documents of equal length, from stretches of a corpus that don't overlap.

    Args:
        name_or_path: ``"python-docs"`` (the language reference that every Python carries,
            about 113,000 tokens), a text file, a folder of ``.txt``, ``.md`` and ``.rst`` files,
            or the id of a hub data set with a column ``text`` (needs ``tl-posheads[datasets]``).
        model: whose tokenizer is used.
        n_docs, length: how many documents, of how many tokens.
        prepend_bos: begin every document with the tokenizer's BOS token, where it has one.
        seed: moves the stretches inside their equal shares of the corpus.

    Raises:
        PosheadsError: no text there, a file that isn't UTF-8, or too little of it.

    Example:
        >>> tokens = load_corpus("python-docs", model, n_docs=2, length=512)   # doctest: +SKIP
    """
    import numpy as np
    import torch

    if n_docs < 1 or length < 2:
        raise PosheadsError(
            f"n_docs={n_docs} and length={length} were given; expected at least 1 and 2"
        )
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise PosheadsError(
            "the model has no tokenizer; give it one (model.set_tokenizer) or pass token ids to "
            "score_heads yourself"
        )
    ids = _token_ids(tokenizer, read_text(name_or_path))
    bos = tokenizer.bos_token_id if prepend_bos else None
    piece = length - (bos is not None)
    share = len(ids) // n_docs
    if share < piece:
        raise PosheadsError(
            f"{name_or_path} holds {len(ids):,} tokens, too few for {n_docs} documents of "
            f"{length}; lower the length, the number of documents, or give more text"
        )
    generator = np.random.default_rng(seed)
    starts = [i * share + int(generator.integers(share - piece + 1)) for i in range(n_docs)]
    rows = torch.tensor([ids[start : start + piece] for start in starts], dtype=torch.long)
    if bos is None:
        return rows
    return torch.cat([torch.full((n_docs, 1), bos, dtype=torch.long), rows], dim=1)


def corpus_provenance(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """``{"name", "sha256"}`` of a corpus; the hash is of its text, None for a hub data set.

    Raises:
        PosheadsError: as :func:`load_corpus`.
    """
    name = os.fspath(name_or_path)
    if name != PYTHON_DOCS and not Path(name).exists():
        _refuse_missing_file(name)
        return {"name": name, "sha256": None}
    digest = hashlib.sha256(read_text(name).encode("utf-8", "surrogatepass")).hexdigest()
    return {"name": name, "sha256": digest}


def read_text(name_or_path: str | os.PathLike[str]) -> str:
    """The whole text of a corpus."""
    name = os.fspath(name_or_path)
    path = Path(name)
    if name == PYTHON_DOCS:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        text = "\n\n".join(_read_file(file) for file in files)
        if not text.strip():
            raise PosheadsError(
                f"the folder {name} holds no text; expected files ending in {', '.join(_SUFFIXES)}"
            )
        return text
    if path.exists():
        text = _read_file(path)
        if not text.strip():
            raise PosheadsError(f"the file {name} is empty; give a file with text")
        return text
    _refuse_missing_file(name)
    return _read_hub(name)


def _refuse_missing_file(name: str) -> None:
    """A path that isn't there should not send anyone to the hub."""
    looks_like_path = Path(name).suffix or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path or not name.strip():
        raise PosheadsError(
            f"there is no file or folder {name!r}; expected {PYTHON_DOCS}, a text file, a folder "
            "of them, or a hub data set's id"
        )


def _read_file(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as problem:
        raise PosheadsError(
            f"the file {path} is not UTF-8 (byte {problem.start}); save it as UTF-8"
        ) from problem


def _read_hub(name: str) -> str:
    try:
        import datasets
    except ImportError as problem:
        raise PosheadsError(
            f"there is no file or folder {name!r}, and to look for a hub data set of that name "
            "the package datasets is needed: pip install 'tl-posheads[datasets]'"
        ) from problem
    texts, size = [], 0
    try:
        for row in datasets.load_dataset(name, split="train", streaming=True):
            texts.append(str(row["text"]))
            size += len(texts[-1])
            if size > _HUB_CHARACTERS:
                break
    except Exception as problem:
        reason = " ".join(str(problem).split())[:200]
        raise PosheadsError(
            f"{name!r} is no file or folder, and as a hub data set it can't be read "
            f"[{type(problem).__name__}: {reason}]"
        ) from problem
    return "\n\n".join(texts)


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    # Markers like <|im_start|> that a text merely mentions stay text.
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    try:
        return list(tokenizer(text, split_special_tokens=True, **options)["input_ids"])
    except (TypeError, NotImplementedError):
        return list(tokenizer(text, **options)["input_ids"])

"""Corpora by name: the Python documentation, text files, or a hub data set, cut into documents."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.lengths import context_length
from tl_posheads.hooks.tokenizer import begin, token_ids, tokenizer_of

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from tl_posheads.hooks.model import LensModel

PYTHON_DOCS = "python-docs"
SUFFIXES = (".txt", ".md", ".rst")
_BETWEEN = "\n\n"
# ASCII control characters except tabs, line and page ends. They mark binary files that happen to be
# valid UTF-8, UTF-16 without a byte order mark, and encodings with escape sequences.
_CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f]")
# A text with more characters than this per requested token is sampled before it is tokenised;
# gigabytes would take minutes, and nearly all tokens would be thrown away.
_ENOUGH_CHARACTERS = 64
_LONGEST_NAME = 1024


def corpus_provenance(name_or_path: str | os.PathLike[str]) -> dict[str, str | None]:
    """Name and SHA-256 of a corpus; reads its files, so bad ones are refused here.

    The hash is of the UTF-8 text, with files joined by an empty line; None for a hub data set,
    which is streamed.

    Raises:
        PosheadsError: as :func:`load_corpus` does for the corpus itself.

    Example:
        >>> corpus_provenance("python-docs")["name"]
        'python-docs'
    """
    name = os.fspath(name_or_path)
    text = _text(name)
    if text is None:
        _require_datasets(name)
        return {"name": name, "sha256": None}
    return {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def load_corpus(
    name_or_path: str | os.PathLike[str] | Sequence[str],
    model: LensModel,
    *,
    n_docs: int = 16,
    length: int = 1024,
    prepend_bos: bool = True,
    seed: int = 0,
) -> Int[Tensor, "doc pos"]:
    """Documents of equal length, cut from non-overlapping parts spread evenly over a corpus.

    Args:
        name_or_path: ``python-docs`` (documentation that ships with every Python), a text file, a
            folder of them (``.txt``, ``.md``, ``.rst``, with subfolders, without hidden files;
            links to folders are skipped with a warning), or a hub data set, ``id`` or
            ``id:configuration``, whose ``text`` column is streamed through ``datasets``. Or a list
            of texts.
        model: anything with ``.tokenizer``; names of special tokens in the text stay text.
        n_docs: rows of the result. length: tokens per row, BOS included.
        prepend_bos: put the checkpoint's BOS token first, if it has one.
        seed: shifts each document within its n_docs-th part of the corpus.

    Returns:
        LongTensor [doc, pos] on the CPU.

    Raises:
        PosheadsError: no such corpus, an empty one, a file or folder in it that can't be read, a
            file that isn't plain text in UTF-8, too little text.

    Example:
        >>> load_corpus("python-docs", None, length=0)
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: length=0 was given; expected 2 or more tokens
    """
    if n_docs < 1:
        raise PosheadsError(f"n_docs={n_docs} was given; expected 1 or more documents")
    if length < 2:
        raise PosheadsError(f"length={length} was given; expected 2 or more tokens")
    tokenizer = tokenizer_of(model)
    _check_context(model, length)
    import torch

    start = begin(tokenizer) if prepend_bos else []
    body = length - len(start)
    text: str | None
    if isinstance(name_or_path, str | os.PathLike):
        name = os.fspath(name_or_path)
        _require_name(name)
        text = _text(name)
    else:
        name, text = "the list of texts", "\n\n".join(name_or_path)
    if text is None:
        text = _streamed(name, _ENOUGH_CHARACTERS // 2 * n_docs * body)
    rng = random.Random(seed)
    rows = _sampled(text, tokenizer, n_docs, body, rng)
    if rows is None:
        ids = token_ids(text, tokenizer)
        part = len(ids) // n_docs
        if part < body:
            raise PosheadsError(
                f"{name} has {len(ids)} tokens, but {n_docs} documents of {length} need "
                f"{n_docs * body}; {_what_to_lower(len(ids), n_docs, len(start))}"
            )
        firsts = [part * doc + rng.randint(0, part - body) for doc in range(n_docs)]
        rows = [ids[first : first + body] for first in firsts]
    return torch.tensor([start + row for row in rows], dtype=torch.long)


def _require_name(name: str) -> None:
    if len(name) > _LONGEST_NAME or "\n" in name:
        raise PosheadsError(
            f"a text of {len(name):,} characters was given as the name of a corpus; give texts "
            "in a list, [text]"
        )


def _what_to_lower(n_tokens: int, n_docs: int, n_start: int) -> str:
    longest = n_tokens // n_docs + n_start
    if longest < 2:
        return "give more text"
    return f"lower length to {longest} or n_docs, or give more text"


def _check_context(model: LensModel, length: int) -> None:
    n_ctx = context_length(model)
    if not n_ctx or length <= n_ctx:
        return
    # HookedTransformer keeps a table of n_ctx rotations; the Bridge's models take longer texts.
    if type(model).__name__ == "HookedTransformer":
        raise PosheadsError(
            f"length={length} was given, but the model reads at most {n_ctx} tokens; lower length"
        )
    warnings.warn(f"length={length} is beyond the {n_ctx} tokens of the model", stacklevel=3)


def _sampled(
    text: str, tokenizer: Any, n_docs: int, body: int, rng: random.Random
) -> list[list[int]] | None:
    """Rows from a piece of each part of a long text; None if a piece has too few tokens."""
    part, stretch = len(text) // n_docs, _ENOUGH_CHARACTERS // 2 * body
    if part < 2 * stretch:
        return None
    # A separate random stream, so that falling back to the whole text gives the same result
    # as never having tried.
    rng = random.Random(rng.getstate()[1][1])
    rows = []
    for doc in range(n_docs):
        first = part * doc + rng.randint(0, part - stretch)
        # Start after white space, so that no word is cut and tokenised as another.
        while first > 0 and first < part * doc + part - 1 and not text[first - 1].isspace():
            first += 1
        ids = token_ids(text[first : min(first + stretch, part * (doc + 1))], tokenizer)
        if len(ids) < body:
            return None
        rows.append(ids[:body])
    return rows


def _text(name: str) -> str | None:
    """The whole text of a local corpus; None for what can only be a hub data set's id."""
    if name == PYTHON_DOCS:
        from pydoc_data.topics import topics

        return _BETWEEN.join(topics[key] for key in sorted(topics))
    if not name.strip():
        raise PosheadsError(
            f"there is no file {name!r}; give {PYTHON_DOCS}, a text file or a folder"
        )
    path = Path(os.path.expanduser(name))
    try:
        if path.is_dir():
            return _folder(path)
        if path.exists():
            text = _file(path)
            if not text.strip():
                raise PosheadsError(f"{path} is empty; expected a file with text")
            return text
    except OSError as error:
        what = error.filename or path
        raise PosheadsError(f"{what} can't be read ({error.strerror}); check it") from None
    id_, _, _ = name.partition(":")
    if name.startswith((".", "/", "~")) or id_.count("/") > 1 or "\\" in name:
        raise PosheadsError(f"there is no file or folder {name!r}; check the path")
    if path.suffix in SUFFIXES:
        raise PosheadsError(f"there is no file {name!r}; check the path")
    return None


def _folder(path: Path) -> str:
    found = []
    for place, folders, files in os.walk(path, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in filter(os.path.islink, (os.path.join(place, name) for name in folders)):
            warnings.warn(f"{link} is a link to a folder, so its texts are left out", stacklevel=4)
        found += [Path(place, name) for name in files if not name.startswith(".")]
    chosen = sorted(file for file in found if file.suffix.lower() in SUFFIXES)
    texts = [text for text in map(_file, chosen) if text.strip()]
    if not texts:
        raise PosheadsError(
            f"the folder {path} has no text; expected files ending in {', '.join(SUFFIXES)}"
        )
    return _BETWEEN.join(texts)


def _refuse(error: OSError) -> NoReturn:
    raise error


def _file(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise PosheadsError(f"{path} is no ordinary file; expected a file with text")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PosheadsError(
            f"{path} isn't UTF-8 (byte 0x{data[error.start]:02x} at position {error.start}); "
            "convert it to UTF-8"
        ) from None
    if control := _CONTROL.search(text):
        raise PosheadsError(
            f"{path} holds the control character 0x{ord(control[0]):02x} at character "
            f"{control.start()}, so it is a binary file or in another encoding; leave it out, or "
            "convert it to plain text in UTF-8"
        )
    # A byte order mark and system-specific line ends are not part of the text.
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _require_datasets(name: str) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise PosheadsError(
            f"{name!r} is neither a built-in corpus ({PYTHON_DOCS}) nor a path; to look it up as a "
            "hub data set, pip install 'tl-posheads[datasets]'"
        )


def _streamed(name: str, n_characters: int) -> str:
    """As many of a hub data set's first texts as are needed."""
    _require_datasets(name)
    texts, n = [], 0
    try:
        for text in _column(name):
            texts.append(text)
            n += len(text)
            if n >= n_characters:
                break
    except PosheadsError:
        raise
    # offline, no such data set, gated, script-based, broken shards: each has its own class
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PosheadsError(
            f"{name!r} is neither a built-in corpus ({PYTHON_DOCS}) nor a path, and the hub didn't "
            f"give it as a data set ({line[:120]}); check the name and the connection"
        ) from None
    if not n:
        raise PosheadsError(f"the data set {name!r} has no text; choose another")
    return _BETWEEN.join(texts)


def _column(name: str) -> Iterator[str]:
    from datasets import load_dataset

    id_, _, configuration = name.partition(":")
    rows = load_dataset(id_, configuration or None, split="train", streaming=True)
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise PosheadsError(
                f"the data set {name!r} has no column 'text' (it has {', '.join(row)}); choose "
                "another, or save its text to a file"
            )
        yield row["text"]

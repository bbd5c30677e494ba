"""Reading files, and writing them atomically, alone or as a folder with a label."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_posheads.errors import PosheadsError

if TYPE_CHECKING:
    import pandas as pd


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file completely or not at all; if killed, it leaves a ``.NAME.part`` behind."""
    # Processes on two machines may have the same process id.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` atomically: a reader finds either the old file or the new one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(Path(folder) / "a.txt", "whole")
    ...     print((Path(folder) / "a.txt").read_text())
    whole
    """
    # A path from the command line may hold bytes that aren't text; they are escaped.
    write_bytes(Path(path), text.encode("utf-8", "backslashreplace"))


def is_leftover(path: Path) -> bool:
    """Whether a killed :func:`write_bytes` left this file."""
    return path.name.startswith(".") and path.name.endswith(".part")


def read_bytes(path: Path, largest: float = float("inf")) -> bytes:
    """Content of a regular file; reading a pipe could block, and a device may never end.

    Raises:
        ValueError: not a regular file, or larger than ``largest`` bytes.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > largest:
        raise ValueError(f"{path.name} is no file, or too large")
    return path.read_bytes()


def facts_sha256(facts: Mapping[str, Any]) -> str:
    """Checksum of a label's facts, the same before writing and after reading."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def table_bytes(table: pd.DataFrame) -> bytes:
    """A table as Parquet bytes, without its index."""
    out = io.BytesIO()
    table.to_parquet(out, index=False)
    return out.getvalue()


def write_labelled(
    folder: str | os.PathLike[str], label: str, parts: Mapping[str, bytes], facts: Mapping[str, Any]
) -> Path:
    """Write parts into a folder and then ``label``, a JSON file with facts and all checksums.

    Raises:
        PosheadsError: ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise PosheadsError(f"{folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in parts.items():
        write_bytes(folder / name, data)
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    sha256[label] = facts_sha256(facts)
    text = json.dumps({**facts, "sha256": sha256}, indent=2) + "\n"
    write_bytes(folder / label, text.encode())
    return folder

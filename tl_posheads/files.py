"""Files that are written whole or not at all, alone or as a folder with a label."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_posheads.errors import PosheadsError

if TYPE_CHECKING:
    import pandas as pd


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def table_bytes(table: pd.DataFrame) -> bytes:
    """A table as the content of a Parquet file, without its index."""
    out = io.BytesIO()
    table.to_parquet(out, index=False)
    return out.getvalue()


def write_labelled(
    folder: str | os.PathLike[str], label: str, parts: Mapping[str, bytes], facts: Mapping[str, Any]
) -> Path:
    """Write parts into a folder and then ``label``, a JSON file with their checksums and facts.

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
    text = json.dumps({**facts, "sha256": sha256}, indent=2) + "\n"
    write_bytes(folder / label, text.encode())
    return folder

"""Files that are written whole or not at all, alone or as a folder with a label."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

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


def table_of(data: bytes) -> pd.DataFrame:
    """The inverse of :func:`table_bytes`."""
    import pandas as pd  # the command's help need not wait for it

    return pd.read_parquet(io.BytesIO(data))


@contextmanager
def damage_named(found: str, again: str) -> Iterator[None]:
    """Inside, what parts hold that can't be understood is an error like "the scores in X are".

    Raises:
        PosheadsError: ``found`` damaged, with the cause; ``again`` is what to do.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
        raise PosheadsError(f"{found} damaged ({problem}); {again}") from problem


def write_labelled(
    folder: str | os.PathLike[str], label: str, parts: Mapping[str, bytes], facts: Mapping[str, Any]
) -> Path:
    """Write parts into a folder and then ``label``, a JSON file with their checksums and facts.

    A folder that a crash left between two of them is refused by :func:`read_labelled`.

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
    text = json.dumps({**facts, "sha256": sha256}, indent=2, allow_nan=False) + "\n"
    write_bytes(folder / label, text.encode())
    return folder


def read_labelled(
    folder: str | os.PathLike[str],
    label: str,
    *,
    made_by: str,
    what: str,
    again: str,
    version: int = 1,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What :func:`write_labelled` wrote: the label and the parts, bit for bit.

    Args:
        made_by: class whose ``save`` writes such folders; the label's format is its name.
        what: for messages, like "scores". again: what to do about damage, like "score again".
        version: of the format; others are refused.

    Raises:
        PosheadsError: no such folder, another program's files, another version's or damaged ones.
    """
    folder = Path(folder)
    try:
        found = json.loads((folder / label).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != f"tl_posheads.{made_by}":
            raise PosheadsError(
                f"{folder / label} was not written by {made_by}.save; give a folder of {what}"
            )
        if found.get("version") != version:
            old = isinstance(found.get("version"), int) and found["version"] < version
            raise PosheadsError(
                f"{folder} holds {what} of format version {found.get('version')}, but this version "
                f"of tl_posheads reads {version}; "
                + (f"they were measured otherwise: {again}" if old else "install a newer one")
            )
        parts = {name: (folder / name).read_bytes() for name in found["sha256"]}
        for name, digest in found["sha256"].items():
            if hashlib.sha256(parts[name]).hexdigest() != digest:
                raise PosheadsError(f"{folder / name} is damaged (its checksum differs); {again}")
    except PosheadsError:
        raise
    except (FileNotFoundError, NotADirectoryError) as problem:
        raise PosheadsError(
            f"{folder} holds no {what} ({problem.filename} is missing); give a folder that "
            f"{made_by}.save or tl-posheads wrote"
        ) from problem
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise PosheadsError(f"the {what} in {folder} are damaged ({problem}); {again}") from problem
    return found, parts

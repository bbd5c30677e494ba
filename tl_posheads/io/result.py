"""Base class of results, which are saved in a folder and checked when loaded."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import AbstractArray, Shaped, jaxtyped
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, contiguous_format

from tl_posheads.errors import PosheadsError
from tl_posheads.io.files import facts_sha256, read_bytes, table_bytes, write_labelled

if TYPE_CHECKING:
    from typing_extensions import Self


_SHOWN_ROWS = 8  # of a table, in a notebook


@dataclass(frozen=True)
class Files:
    """Names of a result's files, and words for messages about them."""

    stem: str  # of the label, STEM.json, and of the tensors, STEM.safetensors
    what: str  # for messages, in the plural
    again: str  # what to do if they are damaged
    version: int = 1  # of file format and measurement; others are refused
    export: str | None = None  # Parquet file of to_pandas(), for other programs

    def of(self, name: str) -> str:
        """File name of a table."""
        return f"{self.stem if name == 'table' else name}.parquet"


class Result:
    """Base of frozen dataclasses that are saved in a folder.

    Type hints decide where fields are stored and what they may hold. Tensors go into a safetensors
    file. Tables go into Parquet files; ``Annotated`` lists their columns (of non-empty tables) with
    their kinds, as named by :func:`pandas.api.types.infer_dtype`. All else goes into the label as
    JSON: lists are ``Annotated`` with the dimension that gives their length, and whole numbers are
    counts or indices, so never negative. Nested dataclasses are treated the same way.
    """

    _files: ClassVar[Files]

    def _check(self) -> None:
        """Raise ValueError for invalid values that type hints can't catch."""

    def _about(self) -> str:
        """Model and size of the result: the first line in a notebook."""
        raise NotImplementedError

    def _finding(self) -> list[str]:
        """The main finding, in at most two lines."""
        return []

    def to_pandas(self) -> pd.DataFrame:
        """The result as a table."""
        raise NotImplementedError

    def plot(self) -> Any:
        """The result as a matplotlib figure; None where the table is enough."""
        return None

    def __repr__(self) -> str:
        try:
            found = self._finding()
        except PosheadsError:  # nothing to report, but the class has a name
            found = []
        return "\n".join([f"{type(self).__name__}({self._about()})", *found])

    def _repr_html_(self) -> str:
        """Its repr, the first rows of its table, and its figure."""
        shown = f"<pre>{html.escape(repr(self))}</pre>"
        rows = self.to_pandas().head(_SHOWN_ROWS)
        shown += str(rows.to_html(index=False, float_format="{:.3g}".format))
        figure = self.plot()
        if figure is not None:
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=80, bbox_inches="tight")
            data = base64.b64encode(image.getvalue()).decode()
            shown += f'<img src="data:image/png;base64,{data}" alt="{type(self).__name__}">'
        # A token may be half a character, which HTML can't hold.
        return shown.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write tensors, tables and finally a label with their checksums into a folder.

        Each file is written completely or not at all; :meth:`load` refuses what a crash leaves.

        Raises:
            PosheadsError: ``folder`` is a file.
        """
        own, parts, tensors = self._files, dict[str, Any](), {}
        facts = {"format": f"tl_posheads.{type(self).__name__}", "version": own.version}
        facts |= _apart(self, "", parts)
        files = {} if own.export is None else {own.export: table_bytes(self.to_pandas())}
        for name, part in parts.items():
            if isinstance(part, Tensor):  # may share memory, which safetensors won't write twice
                tensors[name] = part.detach().cpu().clone(memory_format=contiguous_format)
            else:
                files[own.of(name)] = table_bytes(part)
        if tensors:
            files[f"{own.stem}.safetensors"] = save_tensors(tensors)
        return write_labelled(folder, f"{own.stem}.json", files, facts)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read a saved result, bit for bit.

        Raises:
            PosheadsError: no such folder, files of another program, of an earlier version that
                measured differently, or damaged files.
        """
        own, name, folder = cls._files, cls.__name__, Path(folder)
        label = folder / f"{own.stem}.json"
        try:
            facts = json.loads(read_bytes(label, largest=2**26))
            if not isinstance(facts, dict) or facts.get("format") != f"tl_posheads.{name}":
                raise PosheadsError(f"{label} was not written by {name}.save; give {own.what}")
            sha256 = facts.pop("sha256", None)
            own_sha256 = facts_sha256(facts)
            del facts["format"]
            if (version := facts.pop("version", None)) != own.version:
                old = isinstance(version, int) and version < own.version
                advice = f"they were measured otherwise: {own.again}"
                raise PosheadsError(
                    f"{folder} holds {own.what} of format version {_short(version)}, but this "
                    f"tl_posheads reads {own.version}; {advice if old else 'install a newer one'}"
                )
            if not isinstance(sha256, dict):
                raise ValueError("its label has no checksums")
            if sha256.pop(label.name, None) != own_sha256:
                raise ValueError(f"the checksum of {label.name} differs")
            parts = cls._read(folder, sha256)
            found: Self = _together(cls, facts, "", parts)
            if parts:
                raise ValueError(f"{_short(sorted(parts))} were not asked for")
            return found
        except PosheadsError:
            raise
        except (FileNotFoundError, NotADirectoryError) as problem:
            raise PosheadsError(
                f"{folder} holds no {own.what} ({problem.filename} is missing); give a folder that "
                f"{name}.save or tl-posheads wrote"
            ) from problem
        except Exception as problem:  # readers of Parquet raise all kinds of errors
            raise PosheadsError(
                f"the {own.what} in {folder} are damaged ({_short(problem)}); {own.again}"
            ) from problem

    @classmethod
    def _read(cls, folder: Path, sha256: dict[str, Any]) -> dict[str, Any]:
        """Tensors and tables by field name."""
        own, parts = cls._files, dict[str, Any]()
        tables = {own.of(x): x for x, hint in _hints(cls).items() if _kind(hint) is pd.DataFrame}
        known = {f"{own.stem}.safetensors", *tables, own.export}
        if not sha256.keys() <= known:
            raise ValueError("its label has checksums of other files")
        for file, digest in sha256.items():
            data = read_bytes(folder / file)
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"the checksum of {file} differs")
            if file in tables:
                parts[tables[file]] = pd.read_parquet(io.BytesIO(data))
            elif file != own.export:
                parts |= load_tensors(data)
        return parts


def _short(value: object) -> str:
    return " ".join(str(value).split())[:200]


def _hints(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in fields(kind)}


def _kind(hint: Any) -> Any:
    """A type hint without None and without a table's columns."""
    args = [x for x in typing.get_args(hint) if x is not type(None)]
    bare = typing.get_origin(hint) in (typing.Union, types.UnionType, typing.Annotated)
    return args[0] if bare else hint


def _in_file(hint: Any) -> bool:
    plain = typing.get_origin(kind := _kind(hint)) is None and isinstance(kind, type)
    return plain and issubclass(kind, AbstractArray | pd.DataFrame)


def _apart(value: Any, at: str, parts: dict[str, Any]) -> Any:
    """A value as JSON; the tensors and tables in it go into ``parts``."""
    if is_dataclass(value):
        hints = _hints(type(value))
        whole = {x: _apart(getattr(value, x), f"{at}.{x}", parts) for x in hints}
        return {x: part for x, part in whole.items() if not _in_file(hints[x])}
    if isinstance(value, tuple | list):
        return [_apart(x, f"{at}.{i}", parts) for i, x in enumerate(value)]
    if isinstance(value, Tensor | pd.DataFrame):
        parts[at[1:]] = value
    return value


def _together(hint: Any, value: Any, at: str, parts: dict[str, Any]) -> Any:
    """The inverse of :func:`_apart`; removes the used entries from ``parts``."""
    kind, name = _kind(hint), at[1:] or "the label"
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    value = parts.pop(name, None) if _in_file(hint) else value
    if kind is Any or (value is None and type(None) in typing.get_args(hint)):
        return value
    if is_dataclass(kind):
        hints = _hints(kind)
        expected = {x for x in hints if not _in_file(hints[x])}
        if not isinstance(value, dict) or value.keys() != expected:
            raise ValueError(f"{name} has other keys than {sorted(expected)}")
        with jaxtyped("context"):  # isinstance compares dimensions of the same name
            pairs = [(x, _together(hints[x], value.get(x), f"{at}.{x}", parts)) for x in hints]
        whole: Any = typing.cast(Any, kind)(**dict(pairs))
        if isinstance(whole, Result):
            whole._check()
        return whole
    note = getattr(hint, "__metadata__", [""])[0]
    if origin in (tuple, list) and isinstance(value, list):
        length: Any = Shaped[np.ndarray, note or "_"]
        if not isinstance(np.empty(len(value)), length):
            raise ValueError(f"{name} are {len(value)}, not one a {note}")
        kinds = args if origin is tuple and args[-1] is not ... else args[:1] * len(value)
        items = enumerate(zip(kinds, value, strict=True))
        return origin(_together(x, y, f"{at}.{i}", parts) for i, (x, y) in items)
    if kind is float and type(value) is int:
        return float(value)
    fits = value in args if origin is typing.Literal else isinstance(value, origin or kind)
    if not fits or (kind is int and (isinstance(value, bool) or not 0 <= value < 2**63)):
        shown = f"{value.dtype} {[*value.shape]}" if isinstance(value, Tensor) else _short(value)
        raise ValueError(f"{name} is {shown}, not {getattr(kind, '__name__', kind)}")
    if kind is pd.DataFrame and len(value):
        for column, _, expected in (word.partition(":") for word in note.split()):
            if column not in value:
                raise ValueError(f"{name} has no column {column}")
            found = pd.api.types.infer_dtype(value[column], skipna=False)
            if expected and found != expected:
                raise ValueError(f"{column} of {name} is {found}, not {expected}")
    return value

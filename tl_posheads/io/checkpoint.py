"""Finished parts of a long run, saved in a folder so that they aren't computed twice."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.io.files import is_leftover, read_bytes, write_bytes

_PLAN = "plan.json"


class Checkpoint:
    """A folder of finished units, each a safetensors file with a checksum of it and the plan.

    Args:
        folder: created if missing; None saves nothing.
        plan: everything that determines the numbers. A folder with another plan is refused.

    Raises:
        PosheadsError: the folder belongs to a run with another plan.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, plan: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise PosheadsError(f"the checkpoint {folder} is a file; give a folder")
        self._plan = json.dumps(plan, sort_keys=True).encode()
        label = self.folder / _PLAN
        if label.exists():
            self._require_own(label)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not all(map(is_leftover, self.folder.iterdir())):
            raise PosheadsError(f"{folder} is not empty and holds no checkpoint; give another one")
        write_bytes(label, self._plan)

    def _require_own(self, label: Path) -> None:
        try:
            own = read_bytes(label) == self._plan
        except (OSError, ValueError) as problem:
            raise PosheadsError(
                f"the checkpoint's {label} can't be read ({problem}); remove {label.parent}"
            ) from problem
        if not own:
            raise PosheadsError(
                f"the checkpoint in {label.parent} belongs to another run (model, texts or options "
                "differ); remove it or give another folder"
            )

    def read(self, unit: str) -> dict[str, Tensor] | None:
        """A finished unit's tensors; None if it isn't finished.

        Also None, with a warning, if its file can't be read, is damaged or belongs to another
        plan: the unit then has to be computed again.
        """
        if self.folder is None:
            return None
        try:
            data = read_bytes(self.folder / f"{unit}.safetensors")
            tensors: dict[str, Tensor] = load_tensors(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            if header["__metadata__"]["sha256"] != self._digest(unit, tensors):
                raise ValueError("its checksum differs")
        except FileNotFoundError:
            return None
        except Exception as problem:  # readers of damaged files raise all kinds of errors
            warnings.warn(
                f"{unit} in the checkpoint {self.folder} is damaged ({problem}); it is done again",
                stacklevel=2,
            )
            return None
        return tensors

    def write(self, unit: str, tensors: Mapping[str, Tensor]) -> None:
        """Save a unit completely or, if interrupted, not at all."""
        if self.folder is not None:
            whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            metadata = {"sha256": self._digest(unit, whole)}
            write_bytes(self.folder / f"{unit}.safetensors", save_tensors(whole, metadata))

    def _digest(self, unit: str, tensors: Mapping[str, Tensor]) -> str:
        """Includes the plan, so that two runs that start at once in one folder don't mix."""
        parts = (self._plan, unit.encode(), save_tensors(dict(tensors)))
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

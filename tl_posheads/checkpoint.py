"""What a long run has finished, kept in a folder so that it need not be done twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.files import write_bytes

_PLAN = "plan.json"


class Checkpoint:
    """A folder of finished units, each a safetensors file.

    Args:
        folder: made if missing; None keeps nothing.
        plan: what decides the numbers. Another run's folder is refused.

    Raises:
        PosheadsError: the folder belongs to a run with another plan.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, plan: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise PosheadsError(f"the checkpoint {folder} is a file; give a folder")
        text = json.dumps(plan, sort_keys=True)
        label = self.folder / _PLAN
        if label.exists():
            if label.read_text(encoding="utf-8") != text:
                raise PosheadsError(
                    f"the checkpoint in {folder} belongs to another run (model, texts or options "
                    "differ); remove it or give another folder"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise PosheadsError(f"{folder} is not empty and holds no checkpoint; give another one")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(label, text.encode())

    def read(self, unit: str) -> dict[str, Tensor] | None:
        """A finished unit's tensors; None where it isn't, or its file can't be read."""
        if self.folder is None:
            return None
        try:
            tensors: dict[str, Tensor] = load_tensors(
                (self.folder / f"{unit}.safetensors").read_bytes()
            )
        except (OSError, SafetensorError):
            return None
        return tensors

    def write(self, unit: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a unit: the whole of it or, if stopped in between, nothing."""
        if self.folder is not None:
            whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            write_bytes(self.folder / f"{unit}.safetensors", save_tensors(whole))

"""CLEX: frequencies that follow the context's length along a learned curve."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import (
    Frequencies,
    FrequencyMethod,
    require_positive,
    require_whole,
)
from tl_posheads.io.files import write_labelled

_ACTS: dict[str, Any] = {"tanh": torch.tanh, "silu": torch.nn.functional.silu}
_KEYS = ("ode_up_proj", "ode_down_proj")
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_CHECKPOINTS = (_WEIGHTS, "pytorch_model.bin")  # each may come in shards, with an index
_FORMAT = "tl_posheads.CLEX"


@dataclass(frozen=True, eq=False, repr=False)
class CLEX(FrequencyMethod):
    """The logarithms of the frequencies move along a neural ODE as the text grows.

    With ``x(1)`` the logarithms of the model's own frequencies and ``t`` the text's length over the
    training length, rounded up and at most ``max_factor``::

        dx/dt = act((x + log ntk(t)) @ up) @ down + d/dt log ntk(t)

    where ``ntk(t)`` are NTK-aware frequencies of the factor ``2 t - 1``. Without training (``down``
    zero) only the last term is left. Chen et al., "CLEX: continuous length extrapolation for large
    language models", ICLR 2024, arXiv 2310.16450, section 3; equations, fourth-order Runge-Kutta
    and names of the weights are those of the authors' code. The ODE is solved by ``torchdiffeq``
    (``pip install 'tl-posheads[clex]'``). :func:`~tl_posheads.extrapolation.train_clex` learns it.
    With a KV cache, a Bridge's cached keys keep the frequencies of the pass that cached them.

    Attributes:
        up: ``[pair, hidden]``. down: ``[hidden, pair]``.
        max_factor: longest text length over the training length, a whole number.
        act: ``"silu"`` or ``"tanh"``.
        base: of ``ntk``; the authors use 10,000 for every model.
        time_dt: step of the solver.
        log_scale: scores times ``log(length) / log(trained)``, as some of the authors' models have
            it, shorter texts included; of the rotated coordinates alone.

    Example:
        >>> CLEX.untrained(n_pairs=4, max_factor=8)
        CLEX(max_factor=8, act='silu', pairs=4, weights=b7d3a6ea623a)
    """

    up: Float[Tensor, "pair hidden"]
    down: Float[Tensor, "hidden pair"]
    max_factor: int
    act: str = "silu"
    base: float = 10000.0
    time_dt: float = 0.01
    log_scale: bool = False
    length_matters: ClassVar[bool] = True
    # Solving takes up to seconds, and every hook of every layer asks for a solution.
    _solved: dict[Any, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        require_whole("CLEX", max_factor=(self.max_factor, 1))
        require_positive("CLEX", base=self.base, time_dt=self.time_dt)
        fits = self.up.ndim == self.down.ndim == 2 and self.up.shape == self.down.shape[::-1]
        if not fits or self.act not in _ACTS:
            raise PosheadsError(
                f"CLEX(act={self.act!r}) was given weights of shape {tuple(self.up.shape)} and "
                f"{tuple(self.down.shape)}; expected act 'silu' or 'tanh' and [pair, hidden] and "
                "[hidden, pair]"
            )

    def __repr__(self) -> str:
        content = b"".join(
            weight.detach().float().cpu().contiguous().numpy().tobytes()
            for weight in (self.up, self.down)
        )
        unusual = [
            f"{name}={getattr(self, name)!r}, "
            for name in ("base", "time_dt", "log_scale")
            if getattr(self, name) != getattr(CLEX, name)
        ]
        return (
            f"CLEX(max_factor={self.max_factor}, act={self.act!r}, {''.join(unusual)}"
            f"pairs={self.up.shape[0]}, weights={hashlib.sha256(content).hexdigest()[:12]})"
        )

    @property
    def name(self) -> str:
        return repr(self)

    @classmethod
    def untrained(
        cls, n_pairs: int, max_factor: int, *, hidden: int | None = None, seed: int = 0, **more: Any
    ) -> CLEX:
        """Initial weights for training: ``up`` uniform, as in the authors' code, ``down`` zero."""
        require_whole("CLEX", n_pairs=(n_pairs, 1))
        width = hidden or 2 * n_pairs
        bound = math.sqrt(1 / width)
        uniform = torch.rand(n_pairs, width, generator=torch.Generator().manual_seed(seed))
        return cls((2 * uniform - 1) * bound, torch.zeros(width, n_pairs), max_factor, **more)

    def frequencies(self, inv_freq: Tensor, trained: int, length: int) -> Frequencies:
        self._require_pairs(len(inv_freq))
        t = min(self.max_factor, max(1, math.ceil(length / trained)))
        scale = 1.0
        if self.log_scale:
            # On queries and keys both, so the square root of what scores are multiplied by.
            scale = math.sqrt(math.log(max(1, length)) / math.log(trained))
        if t == 1:
            return Frequencies(inv_freq, scale)
        if self.up.requires_grad or self.down.requires_grad:
            return Frequencies(self.at(inv_freq, float(t)), scale)
        key = (t, str(inv_freq.device), tuple(inv_freq.tolist()))
        if key not in self._solved:
            self._solved[key] = self.at(inv_freq, float(t))
        return Frequencies(self._solved[key], scale)

    def at(self, inv_freq: Float[Tensor, " pair"], t: float) -> Float[Tensor, " pair"]:
        """Frequencies at the factor ``t``, above 1; differentiable in the weights."""
        self._require_pairs(len(inv_freq))
        start = inv_freq.double().log()
        times = torch.tensor([1.0, t], dtype=torch.float64, device=inv_freq.device)
        solved = _odeint()(
            self._slope, start, times, method="rk4", options={"step_size": self.time_dt}
        )
        solution: Tensor = solved[-1].exp()
        return solution

    def _slope(self, t: Tensor, x: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        n = len(x)
        pair = torch.arange(n, dtype=x.dtype, device=x.device)
        alpha = (2 * t - 1).clamp_min(1.0)
        ntk = -pair / n * math.log(self.base) - pair / max(1, n - 1) * alpha.log()
        up, down = self.up.to(x), self.down.to(x)
        learned = _ACTS[self.act]((x + ntk) @ up) @ down
        change: Tensor = learned - 2 * pair / (max(1, n - 1) * alpha)
        return change

    def _require_pairs(self, n_pairs: int) -> None:
        if self.up.shape[0] != n_pairs:
            raise PosheadsError(
                f"{self!r} was put on a model whose heads have {n_pairs} rotary pairs; expected "
                "the model that it was trained for"
            )

    @classmethod
    def from_published(
        cls, weights: Mapping[str, Tensor] | str | os.PathLike[str], config: Any = None
    ) -> CLEX:
        """Load weights in the authors' published form.

        Only the ODE's weights are read from a checkpoint. Use it on the model in that checkpoint,
        with ``trained=`` the config's ``max_position_embeddings``.

        Args:
            weights: a state dict with ``...proj_func.ode_up_proj`` and ``...ode_down_proj``, one
                such pair for the whole model; a safetensors or torch file; or a folder of a
                checkpoint, in shards or not, and ``config.json``.
            config: a transformers config or dict with ``rope_scaling`` (``max_factor``, ``act``,
                ``time_dt``) and ``log_scale``; a folder brings its own.

        Raises:
            PosheadsError: weights or settings that are missing, or more than one ODE.
        """
        if not isinstance(weights, Mapping):
            path = Path(weights)
            try:
                if path.is_dir() and config is None:
                    config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
                weights = _read_ode(path)
            except (OSError, ValueError, SafetensorError, pickle.UnpicklingError) as problem:
                raise PosheadsError(
                    f"{path} can't be read ({problem}); give a safetensors or torch file, or a "
                    f"folder with {_WEIGHTS} and {_CONFIG}"
                ) from problem
        found = [[t for name, t in weights.items() if name.endswith(key)] for key in _KEYS]
        if [len(one) for one in found] != [1, 1]:
            raise PosheadsError(
                f"{len(found[0])} ode_up_proj and {len(found[1])} ode_down_proj were given; "
                "expected one of each, as CLEX's checkpoints hold"
            )
        whole = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
        # transformers 5 renames the one into the other.
        rope = whole.get("rope_scaling") or whole.get("rope_parameters") or whole
        if "max_factor" not in rope:
            raise PosheadsError(
                "the config holds no max_factor; give CLEX's config.json, or its rope_scaling"
            )
        return cls(
            found[0][0].float(),
            found[1][0].float(),
            int(rope["max_factor"]),
            # The first of the authors' releases knew no other act and step.
            act=rope.get("act", "silu"),
            time_dt=float(rope.get("time_dt", 0.01)),
            base=float(rope.get("base", 10000.0)),
            log_scale=bool(whole.get("log_scale", False)),
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the published form: :meth:`from_published` reads it back.

        Raises:
            PosheadsError: the folder holds another model's files, or is a file.
        """
        path = Path(folder)
        if (path / _CONFIG).exists() and _FORMAT not in (path / _CONFIG).read_text("utf-8"):
            raise PosheadsError(f"{path} holds a model, which would be overwritten; give another")
        weights = {
            f"model.clex_layer.proj_func.{key}": weight.detach().float().cpu().contiguous()
            for key, weight in zip(_KEYS, (self.up, self.down), strict=True)
        }
        rope = {
            "type": "clex",
            "max_factor": self.max_factor,
            "act": self.act,
            "param_factor": self.up.shape[1] // (2 * self.up.shape[0]),
            "time_dt": self.time_dt,
            "base": self.base,
        }
        facts = {"format": _FORMAT, "rope_scaling": rope, "log_scale": self.log_scale}
        return write_labelled(path, _CONFIG, {_WEIGHTS: save_tensors(weights)}, facts)


def _read_ode(path: Path) -> dict[str, Tensor]:
    """The ODE's weights alone: the checkpoint around them may be larger than memory."""
    if not path.is_dir():
        return _of_file(path)
    for name in _CHECKPOINTS:
        index = path / f"{name}.index.json"
        if index.exists():
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {file for key, file in where.items() if key.endswith(_KEYS)}
            parts = [_of_file(path / file) for file in sorted(files)]
            return {key: weight for part in parts for key, weight in part.items()}
        if (path / name).exists():
            return _of_file(path / name)
    return _of_file(path / _WEIGHTS)


def _of_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {key: file.get_tensor(key) for key in names if key.endswith(_KEYS)}
    whole = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {key: weight for key, weight in whole.items() if key.endswith(_KEYS)}


def _odeint() -> Any:
    try:
        from torchdiffeq import odeint
    except ImportError as problem:
        raise PosheadsError(
            "CLEX solves its ODE with torchdiffeq, which isn't installed; "
            "pip install 'tl-posheads[clex]'"
        ) from problem
    return odeint

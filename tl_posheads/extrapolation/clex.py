"""CLEX: frequencies that follow the context's length along a learned curve."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import (
    Frequencies,
    FrequencyMethod,
    require_positive,
    require_whole,
)
from tl_posheads.files import write_bytes

_ACTS: dict[str, Any] = {"tanh": torch.tanh, "silu": torch.nn.functional.silu}
_KEYS = ("ode_up_proj", "ode_down_proj")
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True, eq=False, repr=False)
class CLEX(FrequencyMethod):
    """The logarithms of the frequencies move along a neural ODE as the text grows.

    With ``x(1)`` the logarithms of the model's own frequencies and ``t`` the text's length over the
    training length, rounded up and at most ``max_factor``::

        dx/dt = act((x + log ntk(t)) @ up) @ down + d/dt log ntk(t)

    where ``ntk(t)`` are NTK-aware frequencies of the factor ``2 t - 1``. Without training (``down``
    zero) that is what is left. Chen et al., "CLEX: continuous length extrapolation for large
    language models", ICLR 2024, arXiv 2310.16450, section 3; equations, fourth-order Runge-Kutta
    and names of the weights are those of the authors' code. The ODE is solved by ``torchdiffeq``
    (``pip install 'tl-posheads[clex]'``). :func:`~tl_posheads.extrapolation.train_clex` learns it.
    With a KV cache, a Bridge's cached keys keep the frequencies of the pass that cached them.

    Attributes:
        up: ``[pair, hidden]``. down: ``[hidden, pair]``.
        max_factor: the longest texts over the training length, a whole number.
        act: ``"silu"`` or ``"tanh"``.
        base: of ``ntk``; the authors keep 10,000 whatever the model's is.
        time_dt: step of the solver.

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
    length_matters: ClassVar[bool] = True

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
        return (
            f"CLEX(max_factor={self.max_factor}, act={self.act!r}, pairs={self.up.shape[0]}, "
            f"weights={hashlib.sha256(content).hexdigest()[:12]})"
        )

    @property
    def name(self) -> str:
        return repr(self)

    @classmethod
    def untrained(
        cls, n_pairs: int, max_factor: int, *, hidden: int | None = None, seed: int = 0, **more: Any
    ) -> CLEX:
        """Where training begins: ``up`` uniform as the authors have it, ``down`` zero."""
        require_whole("CLEX", n_pairs=(n_pairs, 1))
        width = hidden or 2 * n_pairs
        bound = math.sqrt(1 / width)
        uniform = torch.rand(n_pairs, width, generator=torch.Generator().manual_seed(seed))
        return cls((2 * uniform - 1) * bound, torch.zeros(width, n_pairs), max_factor, **more)

    def frequencies(self, inv_freq: Tensor, trained: int, length: int) -> Frequencies:
        self._require_pairs(len(inv_freq))
        t = min(self.max_factor, max(1, math.ceil(length / trained)))
        return Frequencies(inv_freq if t == 1 else self.at(inv_freq, float(t)))

    def at(self, inv_freq: Float[Tensor, "pair"], t: float) -> Float[Tensor, "pair"]:
        """Frequencies at the factor ``t``, above 1; differentiable in the weights."""
        self._require_pairs(len(inv_freq))
        start = inv_freq.double().log()
        times = torch.tensor([1.0, t], dtype=torch.float64, device=inv_freq.device)
        solved = _odeint()(
            self._slope, start, times, method="rk4", options={"step_size": self.time_dt}
        )
        solution: Tensor = solved[-1].exp()
        return solution

    def _slope(self, t: Tensor, x: Float[Tensor, "pair"]) -> Float[Tensor, "pair"]:
        n = len(x)
        pair = torch.arange(n, dtype=x.dtype, device=x.device)
        alpha = (2 * t - 1).clamp_min(1.0)
        ntk = -pair / n * math.log(self.base) - pair / max(1, n - 1) * alpha.log()
        up, down = self.up.to(x), self.down.to(x)
        learned = _ACTS[self.act]((x + ntk) @ up) @ down
        return learned - 2 * pair / (max(1, n - 1) * alpha)

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
        """The authors' published form.

        Args:
            weights: a state dict with ``...proj_func.ode_up_proj`` and ``...ode_down_proj``, one
                such pair for the whole model; a safetensors file; or a folder of
                ``model.safetensors`` and ``config.json``.
            config: a transformers config or dict with ``rope_scaling`` (``max_factor``, ``act``,
                ``time_dt``); a folder brings its own.

        Raises:
            PosheadsError: weights or settings that are missing, or more than one ODE.
        """
        if not isinstance(weights, Mapping):
            path = Path(weights)
            try:
                if path.is_dir():
                    config = config or json.loads((path / _CONFIG).read_text(encoding="utf-8"))
                    path = path / _WEIGHTS
                weights = load_tensors(path.read_bytes())
            except (OSError, ValueError) as problem:
                raise PosheadsError(
                    f"{weights} can't be read ({problem}); give a safetensors file, or a folder "
                    f"with {_WEIGHTS} and {_CONFIG}"
                ) from problem
        found = [[t for name, t in weights.items() if name.endswith(key)] for key in _KEYS]
        if [len(one) for one in found] != [1, 1]:
            raise PosheadsError(
                f"{len(found[0])} ode_up_proj and {len(found[1])} ode_down_proj were given; "
                "expected one of each, as CLEX's checkpoints hold"
            )
        rope = config if isinstance(config, Mapping) else vars(config or object) or {}
        rope = rope.get("rope_scaling") or rope
        if "max_factor" not in rope:
            raise PosheadsError(
                "the config holds no max_factor; give CLEX's config.json, or its rope_scaling"
            )
        return cls(
            found[0][0].float(), found[1][0].float(), int(rope["max_factor"]),
            act=rope.get("act", "silu"), time_dt=float(rope.get("time_dt", 0.01)),
        )  # fmt: skip

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the published form: :meth:`from_published` reads it back. Whole or not at all."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        weights = {
            f"model.clex_layer.proj_func.{key}": weight.detach().float().cpu().contiguous()
            for key, weight in zip(_KEYS, (self.up, self.down), strict=True)
        }
        rope = {
            "type": "clex", "max_factor": self.max_factor, "act": self.act,
            "param_factor": self.up.shape[1] // (2 * self.up.shape[0]), "time_dt": self.time_dt,
        }  # fmt: skip
        write_bytes(path / _WEIGHTS, save_tensors(weights))
        write_bytes(path / _CONFIG, json.dumps({"rope_scaling": rope}, indent=2).encode())
        return path


def _odeint() -> Any:
    try:
        from torchdiffeq import odeint
    except ImportError as problem:
        raise PosheadsError(
            "CLEX solves its ODE with torchdiffeq, which isn't installed; "
            "pip install 'tl-posheads[clex]'"
        ) from problem
    return odeint

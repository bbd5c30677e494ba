"""Positional metadata of a GGUF file, written into a transformers configuration and checked.

transformers reads the base and drops the rest: scaling, frequency factors, windows. Keys are those
of the GGUF specification, with llama.cpp's meanings (``llama-model.cpp``, ``ggml_rope_ext``).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from tl_posheads.errors import PosheadsError

if TYPE_CHECKING:
    from gguf import GGUFReader

# scale_linear is scaling.factor in old files. For text tokens, all sections rotate alike.
_KEYS = re.compile(
    r"rope\.(dimension_(count|sections)|freq_base(_swa)?|scale_linear|scaling\.(type|factor|"
    r"original_context_length|attn_factor|finetuned|yarn_(ext_factor|attn_factor|beta_fast|"
    r"beta_slow|log_multiplier)))"
)
# The first is the default where the file has none.
_UNDERSTOOD = {
    "rope.scaling.type": ("linear", "none", "yarn", "longrope"),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "attention.causal": (True,),
}
_BETAS = (("fast", 32.0), ("slow", 1.0))
_BOTH, _SHORT, _LONG = _TENSORS = (
    "rope_freqs.weight",
    "rope_factors_short.weight",
    "rope_factors_long.weight",
)
_LOCAL_THETA = {"gemma3": 10000.0}  # of layers with a window, where the file has none
_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the model with a different score scale
_WINDOWED = {"gemma2", "gemma3", "gpt-oss", "phi3"}  # with windows in transformers' config


@dataclass(frozen=True, eq=False)
class FileRope:
    """RoPE as described in the file.

    Attributes:
        name: the file's name.
        rotary_dim, d_head: number of rotated coordinates, and of all coordinates.
        theta, local_theta: base of the frequencies, and that of layers with a window; None if the
            same.
        context, original: context length now, and before scaling, in tokens.
        yarn: factor and both betas; None without YaRN.
        short, long: divisors of the frequencies, up to ``original`` tokens and beyond,
            ``[rotary_dim / 2]``; they include the linear factor.
        scale: factor of the rotation on a vector's length.
        window: tokens that windowed layers attend to, None without; ``windowed``: which layers,
            None where the architecture decides.
        attention: scale and softcaps of scores, by the names in transformers' config.
    """

    name: str
    rotary_dim: int
    d_head: int
    theta: float
    local_theta: float | None
    context: int
    original: int
    yarn: tuple[float, float, float] | None
    short: Float[np.ndarray, " pair"]
    long: Float[np.ndarray, " pair"]
    scale: float
    window: int | None
    windowed: list[bool] | None
    attention: dict[str, float]

    @property
    def inv_freq(self) -> Float[np.ndarray, " pair"]:
        """Radians per token of each pair, in texts of up to ``original`` tokens."""
        own = _frequencies(self.theta, self.rotary_dim)
        if self.yarn is None:
            return np.asarray(own / self.short)
        factor, fast, slow = self.yarn

        def pair(turns: float) -> float:  # pair that makes so many turns in the original context
            wave = math.log(self.original / (turns * 2 * math.pi))
            return self.rotary_dim * wave / (2 * math.log(self.theta))

        low = max(math.floor(pair(fast)), 0)
        high = min(math.ceil(pair(slow)), self.rotary_dim - 1)
        ramp = np.clip((np.arange(len(own)) - low) / max(high - low, 1e-3), 0, 1)
        return own * (1 - ramp) + own / factor * ramp

    def parameters(self) -> dict[str, Any]:
        """As transformers' ``rope_parameters`` of layers without a window."""
        base: dict[str, Any] = {"rope_theta": self.theta, "rope_type": "default"}
        if self.rotary_dim != self.d_head:
            base["partial_rotary_factor"] = self.rotary_dim / self.d_head
        if self.yarn is not None:
            factor, fast, slow = self.yarn
            return base | dict(
                rope_type="yarn",
                factor=factor,
                beta_fast=fast,
                beta_slow=slow,
                attention_factor=self.scale,
                original_max_position_embeddings=self.original,
            )
        factors = np.unique(np.concatenate((self.short, self.long)))
        if len(factors) == 1 and self.scale == 1:
            linear = float(factors[0])
            return base if linear == 1 else base | dict(rope_type="linear", factor=linear)
        return base | dict(
            rope_type="longrope",
            short_factor=self.short.tolist(),
            long_factor=self.long.tolist(),
            attention_factor=self.scale,
            factor=max(self.context / self.original, 1.0),
            original_max_position_embeddings=self.original,
        )

    def write(self, config: Any) -> None:
        """Write it into a transformers configuration, in place."""
        old = getattr(config, "rope_parameters", None)
        if not old:
            return
        if getattr(config, "head_dim", self.d_head) != self.d_head:
            config.head_dim = self.d_head
        if "full_attention" in old:
            config.rope_parameters = old | {"full_attention": self.parameters()}
            if self.local_theta is not None:
                config.rope_parameters["sliding_attention"] = {
                    "rope_theta": self.local_theta,
                    "rope_type": "default",
                }
        else:
            kept = {key: value for key, value in old.items() if key.startswith("mrope_")}
            config.rope_parameters = kept | self.parameters()
            if "partial_rotary_factor" in old:
                config.rope_parameters["partial_rotary_factor"] = self.rotary_dim / self.d_head
        if hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = self.original
        for name, value in self.attention.items():
            setattr(config, name, value)
        if self.window is not None:
            config.sliding_window = self.window
        if self.windowed is not None:
            config.layer_types = [
                "sliding_attention" if windowed else "full_attention" for windowed in self.windowed
            ]

    def check(self, model: Any) -> None:
        """Compare with the frequencies that the transformers model computes with.

        Raises:
            PosheadsError: transformers' code for the family doesn't match the file.
        """
        found = False
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not name.endswith("inv_freq"):
                    continue
                found = True
                kind = name.removesuffix("inv_freq").removesuffix("original_")
                local = kind == "sliding_attention_" and self.local_theta is not None
                right, scale = self.inv_freq, self.scale
                if local:
                    right, scale = _frequencies(self.local_theta or 0.0, self.rotary_dim), 1.0
                ours = buffer.double().numpy()
                if (
                    ours.shape != right.shape
                    or not np.allclose(ours, right, rtol=1e-4, atol=0)
                    or not math.isclose(
                        getattr(module, f"{kind}attention_scaling", 1.0), scale, rel_tol=1e-4
                    )
                ):
                    raise PosheadsError(
                        f"{self.name} says {_few(right)} radians per token, scaled by {scale:.4g}, "
                        f"but transformers' {type(model).__name__} turns by {_few(ours)}; give a "
                        "folder or hub id of the same model"
                    )
        if not found and getattr(model.config, "rope_parameters", None):
            raise PosheadsError(
                f"transformers' {type(model).__name__} doesn't show how it rotates queries and "
                f"keys, so it can't be compared with {self.name}; give a folder or hub id of the "
                "same model"
            )


def file_rope(reader: GGUFReader, name: str) -> FileRope:
    """Read the positional metadata of a file.

    Raises:
        PosheadsError: an unsupported key or tensor, or two that contradict each other.
    """
    said = _Said(reader, name)
    _require_understood(said)
    heads = said.get("attention.head_count", 1)
    heads = max(heads) if isinstance(heads, list) else heads
    d_head = said.get("attention.key_length") or said.get("embedding_length", 0) // heads
    rotary_dim = said.get("rope.dimension_count") or d_head
    context = said.get("context_length", 0)
    factor = said.get("rope.scaling.factor") or said.get("rope.scale_linear") or 1.0
    kind = said.get("rope.scaling.type", "linear")
    yarn, scale = None, said.get("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        yarn = (factor, *(said.get(f"rope.scaling.yarn_beta_{x}", y) for x, y in _BETAS))
        scale *= said.get("rope.scaling.yarn_attn_factor", 1.0)
        scale *= 0.1 * math.log(max(factor, 1.0)) + 1
    short, long = _divisors(said, kind, factor, rotary_dim // 2)
    scales = yarn is not None or _SHORT in said.tensors
    return FileRope(
        name=name,
        rotary_dim=rotary_dim,
        d_head=d_head,
        theta=said.get("rope.freq_base", 10000.0),
        local_theta=said.get("rope.freq_base_swa", _LOCAL_THETA.get(said.architecture)),
        context=context,
        original=(scales and said.get("rope.scaling.original_context_length")) or context,
        yarn=yarn,
        short=short,
        long=long,
        scale=scale,
        window=said.get("attention.sliding_window") or None,
        windowed=_windowed(said),
        attention=_attention(said, d_head, heads),
    )


class _Said:
    """A file's metadata by llama.cpp's keys, without the architecture's prefix."""

    def __init__(self, reader: GGUFReader, name: str) -> None:
        self.reader, self.name = reader, name
        self.architecture = str(reader.fields["general.architecture"].contents())
        self.tensors = {x.name: x for x in reader.tensors if "rope" in x.name}

    @property
    def keys(self) -> list[str]:
        prefix = f"{self.architecture}."
        return [key.removeprefix(prefix) for key in self.reader.fields if key.startswith(prefix)]

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.get_field(f"{self.architecture}.{key}")
        return default if field is None else field.contents()

    def refused(self, *keys: str, of: str = "") -> PosheadsError:
        said = of or ", ".join(f"{self.architecture}.{key}={self.get(key)!r}" for key in keys)
        return PosheadsError(
            f"{self.name} says {said}, which isn't supported; give a folder or hub id of the same "
            "model"
        )


def _require_understood(said: _Said) -> None:
    for key in said.keys:
        if (
            (key.startswith("rope.") and not _KEYS.fullmatch(key))
            or (key == "rope.freq_base_swa" and said.architecture not in _LOCAL_THETA)
            or re.match(r"attention\..*(_swa$|temperature)", key)
        ):
            raise said.refused(key)
    for key, understood in _UNDERSTOOD.items():
        if said.get(key, understood[0]) not in understood:
            raise said.refused(key)
    if said.get("attention.sliding_window") and said.architecture not in _WINDOWED:
        raise said.refused("attention.sliding_window")
    if unknown := set(said.tensors).difference(_TENSORS):
        raise said.refused(of=f"how to rotate in the tensor {min(unknown)}")


def _divisors(
    said: _Said, kind: str, factor: float, n_pairs: int
) -> tuple[Float[np.ndarray, " pair"], Float[np.ndarray, " pair"]]:
    """Divisors of the frequencies, within the original context and beyond."""
    from gguf.quants import dequantize

    factors = {}
    for name, tensor in said.tensors.items():
        values = dequantize(tensor.data, tensor.tensor_type).reshape(-1).astype(np.float64)
        if len(values) != n_pairs or not (values > 0).all():
            raise said.refused(of=f"{len(values)} factors in {name} for {n_pairs} pairs")
        factors[name] = values
    if kind == "none":
        factor = 1.0
    if set(factors) == {_SHORT, _LONG} and kind != "yarn" and factor == 1:
        return factors[_SHORT], factors[_LONG]
    if not set(factors) <= {_BOTH} or kind == "longrope" or (factors and kind == "yarn"):
        raise said.refused(
            of=f"rope.scaling.type={kind!r} and factor {factor:g} beside {sorted(factors)}"
        )
    both = factors.get(_BOTH, np.ones(n_pairs))
    if kind != "yarn":
        both = both * factor
    return both, both


def _windowed(said: _Said) -> list[bool] | None:
    pattern = said.get("attention.sliding_window_pattern")
    if pattern is None or isinstance(pattern, list):
        return pattern
    # Every pattern-th layer has global attention; 0 means none of them.
    layers = range(said.get("block_count"))
    return [not pattern or i % pattern < pattern - 1 for i in layers]


def _attention(said: _Said, d_head: int, heads: int) -> dict[str, float]:
    softcaps = ("attn_logit_softcapping", "final_logit_softcapping")
    found = {key: said.get(key) for key in softcaps if said.get(key) is not None}
    scale = said.get("attention.scale")
    if said.architecture in _LARGEST:
        # Rarely in the file: llama.cpp recognises the largest model by its number of layers.
        largest = said.get("block_count") == _LARGEST[said.architecture]
        own = said.get("embedding_length") / heads if largest else d_head
        found["query_pre_attn_scalar"] = d_head = round(scale**-2 if scale else own)
    if scale and not math.isclose(scale, d_head**-0.5, rel_tol=1e-4):
        raise said.refused("attention.scale")
    return found


def _frequencies(theta: float, rotary_dim: int) -> Float[np.ndarray, " pair"]:
    return np.asarray(theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim))


def _few(values: Float[np.ndarray, " pair"]) -> str:
    shown = ", ".join(f"{x:.3g}" for x in (*values[:2], *values[-1:]))
    return f"{len(values)} pairs ({shown})"

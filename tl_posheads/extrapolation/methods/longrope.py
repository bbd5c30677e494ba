"""LongRoPE: a factor for every pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import (
    Frequencies,
    FrequencyMethod,
    require_factor,
    require_positive,
    require_whole,
)


@dataclass(frozen=True)
class LongRoPE(FrequencyMethod):
    """Slow every pair by its own factor, found by search; other factors within training.

    Ding et al., "LongRoPE: extending LLM context window beyond 2 million tokens", ICML 2024,
    arXiv 2402.13753; ``rope_type="longrope"`` in transformers.
    :func:`~tl_posheads.extrapolation.search_longrope` finds factors. The paper's first tokens that
    stay uninterpolated are left out, as in transformers. With a KV cache, a Bridge's cached keys
    keep the factors of the pass that cached them; generation of this package begins anew there.

    Attributes:
        long_factor: of each pair, for texts longer than ``original_length``.
        short_factor: of each pair in the others; None keeps the model's own.
        factor: how much longer the texts are than those of training; sets the attention factor.
        attention_factor: factor on queries and keys both; None is
            ``sqrt(1 + ln(factor) / ln(original_length))``, and 1 without a ``factor``.
        original_length: tokens of the texts before the extension; None is the training length.
        short_mscale, long_mscale: attention factors of texts up to ``original_length`` and of
            longer ones, as in Phi-3.5-MoE; None is ``attention_factor``.

    Example:
        >>> import torch
        >>> own = torch.tensor([1.0, 0.01])
        >>> LongRoPE((1.0, 4.0), factor=4).frequencies(own, trained=256, length=1024)
        Frequencies(inv_freq=tensor([1.0000, 0.0025], dtype=torch.float64), scale=1.118...)
    """

    long_factor: tuple[float, ...]
    short_factor: tuple[float, ...] | None = None
    factor: float = 1.0
    attention_factor: float | None = None
    original_length: int | None = None
    short_mscale: float | None = None
    long_mscale: float | None = None
    length_matters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_factor("LongRoPE", self.factor)
        require_positive(
            "LongRoPE",
            attention_factor=self.attention_factor,
            short_mscale=self.short_mscale,
            long_mscale=self.long_mscale,
        )
        if self.original_length is not None:
            require_whole("LongRoPE", original_length=(self.original_length, 2))
        for name in ("long_factor", "short_factor"):
            given = getattr(self, name)
            if given is None and name == "short_factor":
                continue
            listed = isinstance(given, Sequence) and not isinstance(given, str)
            known = listed and all(isinstance(value, int | float) for value in given)
            values = tuple(float(value) for value in given) if known else ()
            if not values or not all(0 < value < float("inf") for value in values):
                raise PosheadsError(
                    f"LongRoPE({name}={given!r}) was given; expected a number above 0 for each "
                    "rotary pair"
                )
            object.__setattr__(self, name, values)

    @classmethod
    def from_config(cls, config: Any) -> LongRoPE:
        """All settings that transformers reads in a config, or in that of a Bridge's model.

        Args:
            config: the config, as an object or as ``config.json`` has it, or its
                ``rope_parameters`` alone, with ``original_max_position_embeddings`` and ``factor``
                or ``attention_factor`` among them.

        Raises:
            PosheadsError: it has no factors, or doesn't say at which length they begin to apply.
        """
        config = getattr(getattr(config, "original_model", config), "config", config)
        is_plain = isinstance(config, Mapping)
        read: Any = config.get if is_plain else lambda name: getattr(config, name, None)
        rope = read("rope_parameters") or read("rope_scaling") or (config if is_plain else {})
        if "long_factor" not in rope:
            raise PosheadsError(
                f"{type(config).__name__} holds no long_factor; expected the config of a model "
                "with rope_type 'longrope', or its rope_parameters"
            )
        # As in transformers: values beside the rope parameters take precedence here.
        longest, name = read("max_position_embeddings"), "original_max_position_embeddings"
        original = read(name) or rope.get(name) or longest
        given = {
            name: rope[name] if rope.get(name) is not None else read(name)
            for name in ("factor", "attention_factor", "short_mscale", "long_mscale")
        }
        factor = given.pop("factor")
        if factor is None and original and longest:
            factor = longest / original
        scaled = given["attention_factor"] or (given["short_mscale"] and given["long_mscale"])
        if not original or not (factor or scaled):
            raise PosheadsError(
                "rope parameters without original_max_position_embeddings, or without factor and "
                "attention_factor, were given; give the whole config, which has "
                "max_position_embeddings"
            )
        short = rope.get("short_factor")
        return cls(
            long_factor=tuple(rope["long_factor"]),
            short_factor=None if short is None else tuple(short),
            factor=max(1.0, float(factor or 1.0)),
            original_length=int(original),
            **given,
        )

    def border(self, trained: int) -> int:
        return self.original_length or trained

    def frequencies(self, inv_freq: Tensor, trained: int, length: int) -> Frequencies:
        border = self.border(trained)
        is_long = length > border
        factors = self.long_factor if is_long else self.short_factor
        for given in (self.long_factor, self.short_factor):
            if given is not None and len(given) != len(inv_freq):
                raise PosheadsError(
                    f"LongRoPE was given {len(given)} factors, but the model's heads have "
                    f"{len(inv_freq)} rotary pairs; give one for each"
                )
        own = inv_freq.double()
        if factors is not None:
            own = own / torch.tensor(factors, dtype=torch.float64, device=own.device)
        scale = self.long_mscale if is_long else self.short_mscale
        if scale is None:
            scale = self.attention_factor
        if scale is None:
            scale = math.sqrt(1 + math.log(self.factor) / math.log(border))
        return Frequencies(own, scale)

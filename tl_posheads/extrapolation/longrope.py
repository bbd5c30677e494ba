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
)


@dataclass(frozen=True)
class LongRoPE(FrequencyMethod):
    """Every pair slower by a factor of its own, found by search; others within training.

    Ding et al., "LongRoPE: extending LLM context window beyond 2 million tokens", ICML 2024,
    arXiv 2402.13753; ``rope_type="longrope"`` in transformers.
    :func:`~tl_posheads.extrapolation.search_longrope` finds factors. The paper's first tokens that
    stay uninterpolated are left out, as in transformers. With a KV cache, a Bridge's cached keys
    keep the factors of the pass that cached them.

    Attributes:
        long_factor: of each pair, for texts longer than the training length.
        short_factor: of each pair within it; None keeps the model's own.
        factor: how much longer the texts are than those of training; sets the attention factor.
        attention_factor: factor on queries and keys both; None is
            ``sqrt(1 + ln(factor) / ln(trained))``, and 1 without a ``factor``.

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
    length_matters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_factor("LongRoPE", self.factor)
        require_positive("LongRoPE", attention_factor=self.attention_factor)
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
        """The factors of a transformers config, of its ``rope_parameters``, or of a Bridge's model.

        Raises:
            PosheadsError: it has none.
        """
        config = getattr(getattr(config, "original_model", config), "config", config)
        found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        rope: Any = config if isinstance(config, Mapping) else found or {}
        if "long_factor" not in rope:
            raise PosheadsError(
                f"{type(config).__name__} holds no long_factor; expected the config of a model "
                "with rope_type 'longrope', or its rope_parameters"
            )
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        longest, factor = getattr(config, "max_position_embeddings", None), rope.get("factor")
        if factor is None and original and longest:
            factor = longest / original
        short = rope.get("short_factor")
        return cls(
            long_factor=tuple(rope["long_factor"]),
            short_factor=None if short is None else tuple(short),
            factor=max(1.0, float(factor or 1.0)),
            attention_factor=rope.get("attention_factor"),
        )

    def frequencies(self, inv_freq: Tensor, trained: int, length: int) -> Frequencies:
        factors = self.long_factor if length > trained else self.short_factor
        for given in (self.long_factor, self.short_factor):
            if given is not None and len(given) != len(inv_freq):
                raise PosheadsError(
                    f"LongRoPE was given {len(given)} factors, but the model's heads have "
                    f"{len(inv_freq)} rotary pairs; give one for each"
                )
        own = inv_freq.double()
        if factors is not None:
            own = own / torch.tensor(factors, dtype=torch.float64, device=own.device)
        scale = self.attention_factor
        if scale is None:
            scale = math.sqrt(1 + math.log(self.factor) / math.log(trained))
        return Frequencies(own, scale)

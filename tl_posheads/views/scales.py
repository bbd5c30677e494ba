"""Dominant dimensions scaled to a head's own range, and their colour bar."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_OUTER = 0.02  # of the values, left out at either end
_TICKS = 5


def own_range(values: Float[Tensor, "..."]) -> tuple[float, float]:
    """Range of the middle 96 % of a head's dominant dimensions; NaN is ignored.

    Many heads use a small part of the whole scale, 0 to the slowest pair, so that all their values
    would share one colour on it.

    Example:
        >>> import torch
        >>> low, high = own_range(torch.linspace(18, 20, 101))
        >>> round(low, 2), round(high, 2)
        (18.04, 19.96)
    """
    known = values[values.isfinite()].double()
    if not len(known):
        return 0.0, 1.0
    low, high = torch.quantile(known, known.new_tensor([_OUTER, 1 - _OUTER])).tolist()
    return low, high


def shades(values: Float[Tensor, "..."], low: float, high: float) -> Float[Tensor, "..."]:
    """Values from ``low`` to ``high`` as 0 to 1, those beyond clipped; NaN is 0."""
    return ((values - low) / max(high - low, 1e-9)).clamp(0, 1).nan_to_num(0.0)


def pair_bar(
    name: str, low: float, high: float, wavelengths: Float[Tensor, " pair"]
) -> dict[str, Any]:
    """A colour bar's name and ticks: pair numbers, and wavelengths in tokens.

    Between two pairs, the wavelength is interpolated along its logarithm.

    Example:
        >>> import torch
        >>> bar = pair_bar("L0H1", 1.0, 2.0, torch.tensor([10.0, 100.0, 1000.0]))
        >>> bar["ticks"][0], bar["ticks"][2]
        ('pair 1.00: 100 tokens', 'pair 1.50: 316 tokens')
    """
    at = torch.linspace(low, high, _TICKS, dtype=torch.float64)
    below = at.long().clamp(0, max(len(wavelengths) - 2, 0))
    log = wavelengths.double().log()
    part = at - below
    # A pair that stands still has no wavelength, and weighs nothing where it isn't reached.
    above = (below + 1).clamp(max=len(wavelengths) - 1)
    far = torch.where(part > 0, part * log[above], torch.zeros_like(part))
    near = torch.where(part < 1, (1 - part) * log[below], torch.zeros_like(part))
    ticks = [
        f"pair {pair:.2f}: {_tokens(wave)}"
        for pair, wave in zip(at.tolist(), (near + far).exp().tolist(), strict=True)
    ]
    return {"name": name, "ticks": ticks}


def _tokens(wavelength: float) -> str:
    return "no turn" if wavelength == float("inf") else f"{wavelength:,.0f} tokens"

"""No method: the bare model on longer texts."""

from __future__ import annotations

from dataclasses import dataclass

from tl_posheads.extrapolation.base import Method


@dataclass(frozen=True)
class Unchanged(Method):
    """The bare model, allowed to read past its training length: what methods are compared with.

    Example:
        >>> Unchanged()
        Unchanged()
    """

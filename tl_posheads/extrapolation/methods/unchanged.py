"""No method: the unmodified model on longer texts."""

from __future__ import annotations

from dataclasses import dataclass

from tl_posheads.extrapolation.base import Method


@dataclass(frozen=True)
class Unchanged(Method):
    """The unmodified model, allowed to read past its training length: the baseline of all methods.

    Example:
        >>> Unchanged()
        Unchanged()
    """

"""What a result says of the programs that made it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Versions of this package and of those that decide the numbers.

    Example:
        >>> sorted(versions())
        ['tl-posheads', 'torch', 'transformer-lens', 'transformers']
    """
    out = {}
    for package in ("tl-posheads", "transformer-lens", "torch", "transformers"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "not installed"
    return out

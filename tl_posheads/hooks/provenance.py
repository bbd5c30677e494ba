"""Provenance of results: the model and the software versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from tl_posheads.hooks.model import LensModel, model_name


def model_facts(model: LensModel) -> dict[str, str]:
    """Name, class and dtype of a model."""
    return {
        "model": model_name(model),
        "model_class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def versions() -> dict[str, str]:
    """Versions of this package and of those that affect the numbers.

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

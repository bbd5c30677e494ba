"""Positional scores given to a study, to report beside its own numbers."""

from __future__ import annotations

from typing import Any

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.model import LensModel, model_name
from tl_posheads.scoring.head_scores import HeadScores

_FACTS = (
    "model",
    "tokens_sha256",
    "qk_pairs",
    "weighting",
    "scale",
    "skip_first",
    "n_documents",
    "n_tokens",
    "longest",
)


def require_scores_of(model: LensModel, scores: HeadScores | None) -> None:
    """Refuse scores of other layers and heads than the model has.

    Raises:
        PosheadsError: they are.
    """
    expected = (int(model.cfg.n_layers), int(model.cfg.n_heads))
    if scores is not None and tuple(scores.rho.shape) != expected:
        raise PosheadsError(
            f"scores of {tuple(scores.rho.shape)} layers and heads were given, but "
            f"{model_name(model)} has {expected}; give this model's scores, or none"
        )


def facts_of_scores(scores: HeadScores) -> dict[str, Any]:
    """Identification of the scores, for provenance."""
    return {name: scores.provenance.get(name) for name in _FACTS}

"""Positional Heads: attention heads whose dominant RoPE dimension grows with token distance.

Hong et al., "On the token distance modeling ability of higher RoPE attention dimension",
Findings of EMNLP 2024, arXiv 2410.08703.

>>> import tl_posheads as ph                                    # doctest: +SKIP
>>> model = ph.load_model("smollm2-135m")                       # doctest: +SKIP
>>> tokens = ph.load_corpus("python-docs", model)               # doctest: +SKIP
>>> ph.score_heads(model, tokens).top(0.05)                     # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tl_posheads import extrapolation, tasks, views
    from tl_posheads.errors import PosheadsError
    from tl_posheads.extrapolation.allocation import AllocationStretch, allocation_stretch
    from tl_posheads.extrapolation.break_point import BreakPoint, break_point
    from tl_posheads.extrapolation.compare import compare_extrapolations, sweep_theta
    from tl_posheads.extrapolation.comparison import ExtrapolationComparison
    from tl_posheads.extrapolation.stretch import Stretch, stretch
    from tl_posheads.hooks.capture import capture_rotary, hook_names, rotary_hook_points
    from tl_posheads.hooks.rotary_geometry import RotaryGeometry
    from tl_posheads.interventions.ablation import ablate, ablation_hooks
    from tl_posheads.interventions.patching import HeadPatching, patch_heads
    from tl_posheads.interventions.rotary_edits import edit_rotary
    from tl_posheads.io.corpora import load_corpus
    from tl_posheads.io.models import load_model
    from tl_posheads.rotary.contributions import (
        dimension_contributions,
        dominant_dimension,
        unrotated_contribution,
    )
    from tl_posheads.rotary.geometry import LayerGeometry
    from tl_posheads.scoring.accumulator import ScoreAccumulator
    from tl_posheads.scoring.cached import dominant_from_cache
    from tl_posheads.scoring.corpus import score_corpus
    from tl_posheads.scoring.curves import dominant_dimension_curve
    from tl_posheads.scoring.head_scores import HeadScores
    from tl_posheads.scoring.maps import HeadMaps, dominant_map, head_maps
    from tl_posheads.scoring.score import score_heads
    from tl_posheads.statistics.ranks import spearman_by_distance
    from tl_posheads.studies import atlas, emergence, encodings, profile, unseen
    from tl_posheads.studies.ablation.association import association
    from tl_posheads.studies.ablation.controls import control_sets
    from tl_posheads.studies.ablation.dose import dose_response
    from tl_posheads.studies.ablation.dose_results import DoseResponse
    from tl_posheads.studies.ablation.head_effects import head_effects
    from tl_posheads.studies.ablation.head_effects_results import HeadEffects
    from tl_posheads.studies.ablation.results import AblationStudy
    from tl_posheads.studies.ablation.run import ablation_study
    from tl_posheads.studies.atlas.results import RotaryAtlas
    from tl_posheads.studies.atlas.run import rotary_atlas
    from tl_posheads.studies.emergence.results import Emergence
    from tl_posheads.studies.emergence.tracker import EmergenceTracker, track_emergence
    from tl_posheads.studies.encodings.results import EncodingScores
    from tl_posheads.studies.encodings.scoring import score_encoding
    from tl_posheads.studies.profile.results import HeadProfile
    from tl_posheads.studies.profile.run import profile_heads
    from tl_posheads.studies.unseen.measure import unseen_angles
    from tl_posheads.studies.unseen.results import UnseenAngles

# Loaded when first asked for: `tl-posheads --help` need not wait for torch and the lens.
_HOME = {
    "ablate": "interventions.ablation",
    "ablation_hooks": "interventions.ablation",
    "ScoreAccumulator": "scoring.accumulator",
    "capture_rotary": "hooks.capture",
    "hook_names": "hooks.capture",
    "rotary_hook_points": "hooks.capture",
    "dimension_contributions": "rotary.contributions",
    "dominant_dimension": "rotary.contributions",
    "unrotated_contribution": "rotary.contributions",
    "control_sets": "studies.ablation.controls",
    "load_corpus": "io.corpora",
    "dominant_dimension_curve": "scoring.curves",
    "dominant_from_cache": "scoring.cached",
    "dominant_map": "scoring.maps",
    "Emergence": "studies.emergence.results",
    "EmergenceTracker": "studies.emergence.tracker",
    "track_emergence": "studies.emergence.tracker",
    "PosheadsError": "errors",
    "compare_extrapolations": "extrapolation.compare",
    "sweep_theta": "extrapolation.compare",
    "ExtrapolationComparison": "extrapolation.comparison",
    "AllocationStretch": "extrapolation.allocation",
    "allocation_stretch": "extrapolation.allocation",
    "BreakPoint": "extrapolation.break_point",
    "Stretch": "extrapolation.stretch",
    "break_point": "extrapolation.break_point",
    "stretch": "extrapolation.stretch",
    "LayerGeometry": "rotary.geometry",
    "RotaryGeometry": "hooks.rotary_geometry",
    "HeadMaps": "scoring.maps",
    "head_maps": "scoring.maps",
    "edit_rotary": "interventions.rotary_edits",
    "load_model": "io.models",
    "HeadPatching": "interventions.patching",
    "patch_heads": "interventions.patching",
    "RotaryAtlas": "studies.atlas.results",
    "rotary_atlas": "studies.atlas.run",
    "HeadProfile": "studies.profile.results",
    "profile_heads": "studies.profile.run",
    "HeadScores": "scoring.head_scores",
    "score_heads": "scoring.score",
    "score_corpus": "scoring.corpus",
    "spearman_by_distance": "statistics.ranks",
    "ablation_study": "studies.ablation.run",
    "AblationStudy": "studies.ablation.results",
    "dose_response": "studies.ablation.dose",
    "DoseResponse": "studies.ablation.dose_results",
    "association": "studies.ablation.association",
    "head_effects": "studies.ablation.head_effects",
    "HeadEffects": "studies.ablation.head_effects_results",
    "EncodingScores": "studies.encodings.results",
    "score_encoding": "studies.encodings.scoring",
    "UnseenAngles": "studies.unseen.results",
    "unseen_angles": "studies.unseen.measure",
}

_PACKAGES = {
    "atlas": "studies.atlas",
    "encodings": "studies.encodings",
    "emergence": "studies.emergence",
    "extrapolation": "extrapolation",
    "profile": "studies.profile",
    "tasks": "tasks",
    "unseen": "studies.unseen",
    "views": "views",
}

__all__ = [*_HOME, *_PACKAGES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"tl_posheads.{_PACKAGES[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'tl_posheads' has no attribute {name!r}")
    value = getattr(import_module(f"tl_posheads.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

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
    from tl_posheads import extrapolation as extrapolation
    from tl_posheads import tasks as tasks
    from tl_posheads import views as views
    from tl_posheads.errors import PosheadsError as PosheadsError
    from tl_posheads.extrapolation.break_point import BreakPoint as BreakPoint
    from tl_posheads.extrapolation.break_point import break_point as break_point
    from tl_posheads.extrapolation.compare import compare_extrapolations as compare_extrapolations
    from tl_posheads.extrapolation.compare import sweep_theta as sweep_theta
    from tl_posheads.extrapolation.comparison import (
        ExtrapolationComparison as ExtrapolationComparison,
    )
    from tl_posheads.extrapolation.stretch import Stretch as Stretch
    from tl_posheads.extrapolation.stretch import stretch as stretch
    from tl_posheads.hooks.capture import capture_rotary as capture_rotary
    from tl_posheads.hooks.capture import hook_names as hook_names
    from tl_posheads.hooks.capture import rotary_hook_points as rotary_hook_points
    from tl_posheads.hooks.rotary_geometry import RotaryGeometry as RotaryGeometry
    from tl_posheads.interventions.ablation import ablate as ablate
    from tl_posheads.interventions.ablation import ablation_hooks as ablation_hooks
    from tl_posheads.interventions.patching import HeadPatching as HeadPatching
    from tl_posheads.interventions.patching import patch_heads as patch_heads
    from tl_posheads.interventions.rotary_edits import edit_rotary as edit_rotary
    from tl_posheads.io.corpora import load_corpus as load_corpus
    from tl_posheads.io.models import load_model as load_model
    from tl_posheads.rotary.contributions import dimension_contributions as dimension_contributions
    from tl_posheads.rotary.contributions import dominant_dimension as dominant_dimension
    from tl_posheads.rotary.contributions import unrotated_contribution as unrotated_contribution
    from tl_posheads.rotary.geometry import LayerGeometry as LayerGeometry
    from tl_posheads.scoring.accumulator import ScoreAccumulator as ScoreAccumulator
    from tl_posheads.scoring.cached import dominant_from_cache as dominant_from_cache
    from tl_posheads.scoring.corpus import score_corpus as score_corpus
    from tl_posheads.scoring.curves import dominant_dimension_curve as dominant_dimension_curve
    from tl_posheads.scoring.head_scores import HeadScores as HeadScores
    from tl_posheads.scoring.maps import HeadMaps as HeadMaps
    from tl_posheads.scoring.maps import dominant_map as dominant_map
    from tl_posheads.scoring.maps import head_maps as head_maps
    from tl_posheads.scoring.score import score_heads as score_heads
    from tl_posheads.statistics.ranks import spearman_by_distance as spearman_by_distance
    from tl_posheads.studies import atlas as atlas
    from tl_posheads.studies import emergence as emergence
    from tl_posheads.studies import encodings as encodings
    from tl_posheads.studies import profile as profile
    from tl_posheads.studies.ablation.association import association as association
    from tl_posheads.studies.ablation.controls import control_sets as control_sets
    from tl_posheads.studies.ablation.dose import dose_response as dose_response
    from tl_posheads.studies.ablation.dose_results import DoseResponse as DoseResponse
    from tl_posheads.studies.ablation.head_effects import head_effects as head_effects
    from tl_posheads.studies.ablation.head_effects_results import HeadEffects as HeadEffects
    from tl_posheads.studies.ablation.results import AblationStudy as AblationStudy
    from tl_posheads.studies.ablation.run import ablation_study as ablation_study
    from tl_posheads.studies.atlas.results import RotaryAtlas as RotaryAtlas
    from tl_posheads.studies.atlas.run import rotary_atlas as rotary_atlas
    from tl_posheads.studies.emergence.results import Emergence as Emergence
    from tl_posheads.studies.emergence.tracker import EmergenceTracker as EmergenceTracker
    from tl_posheads.studies.emergence.tracker import track_emergence as track_emergence
    from tl_posheads.studies.encodings.results import EncodingScores as EncodingScores
    from tl_posheads.studies.encodings.scoring import score_encoding as score_encoding
    from tl_posheads.studies.ood_angles.measure import ood_angles as ood_angles
    from tl_posheads.studies.ood_angles.results import OODAngles as OODAngles
    from tl_posheads.studies.profile.results import HeadProfile as HeadProfile
    from tl_posheads.studies.profile.run import profile_heads as profile_heads


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
    "OODAngles": "studies.ood_angles.results",
    "ood_angles": "studies.ood_angles.measure",
}

_PACKAGES = {
    "atlas": "studies.atlas",
    "encodings": "studies.encodings",
    "emergence": "studies.emergence",
    "extrapolation": "extrapolation",
    "profile": "studies.profile",
    "tasks": "tasks",
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

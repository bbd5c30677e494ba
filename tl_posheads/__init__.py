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

if TYPE_CHECKING:
    from tl_posheads import codes, emergence, extrapolation, profile, tasks, unseen, views
    from tl_posheads.ablation import ablate, ablation_hooks
    from tl_posheads.accumulator import ScoreAccumulator
    from tl_posheads.capture import capture_rotary, hook_names, rotary_hook_points
    from tl_posheads.codes.results import CodeScores
    from tl_posheads.codes.scoring import score_any_code
    from tl_posheads.contributions import (
        dimension_contributions,
        dominant_dimension,
        unrotated_contribution,
    )
    from tl_posheads.corpora import load_corpus
    from tl_posheads.corpus_scoring import score_corpus
    from tl_posheads.curves import dominant_dimension_curve
    from tl_posheads.emergence.results import Emergence
    from tl_posheads.emergence.tracker import EmergenceTracker, track_emergence
    from tl_posheads.errors import PosheadsError
    from tl_posheads.extrapolation.break_point import BreakPoint, break_point
    from tl_posheads.extrapolation.compare import compare_extrapolations, sweep_theta
    from tl_posheads.extrapolation.comparison import ExtrapolationComparison
    from tl_posheads.extrapolation.stretch import Stretch, stretch
    from tl_posheads.geometry import LayerGeometry, RotaryGeometry
    from tl_posheads.interventions import edit_rotary
    from tl_posheads.maps import HeadMaps, head_maps
    from tl_posheads.models import load_model
    from tl_posheads.patching import HeadPatching, patch_heads
    from tl_posheads.profile.driver import profile_heads
    from tl_posheads.profile.results import HeadProfile
    from tl_posheads.results import HeadScores
    from tl_posheads.scoring import score_heads
    from tl_posheads.statistics import spearman_by_distance
    from tl_posheads.study.controls import control_sets
    from tl_posheads.study.dose import dose_response
    from tl_posheads.study.dose_results import DoseResponse
    from tl_posheads.study.results import AblationStudy
    from tl_posheads.study.run import ablation_study
    from tl_posheads.study.screen import head_effects
    from tl_posheads.unseen.measure import unseen_angles
    from tl_posheads.unseen.results import UnseenAngles

# Loaded when first asked for: `tl-posheads --help` need not wait for torch and the lens.
_HOME = {
    "ablate": "ablation",
    "ablation_hooks": "ablation",
    "ScoreAccumulator": "accumulator",
    "capture_rotary": "capture",
    "hook_names": "capture",
    "rotary_hook_points": "capture",
    "dimension_contributions": "contributions",
    "dominant_dimension": "contributions",
    "unrotated_contribution": "contributions",
    "control_sets": "study.controls",
    "load_corpus": "corpora",
    "dominant_dimension_curve": "curves",
    "Emergence": "emergence.results",
    "EmergenceTracker": "emergence.tracker",
    "track_emergence": "emergence.tracker",
    "PosheadsError": "errors",
    "compare_extrapolations": "extrapolation.compare",
    "sweep_theta": "extrapolation.compare",
    "ExtrapolationComparison": "extrapolation.comparison",
    "BreakPoint": "extrapolation.break_point",
    "Stretch": "extrapolation.stretch",
    "break_point": "extrapolation.break_point",
    "stretch": "extrapolation.stretch",
    "LayerGeometry": "geometry",
    "RotaryGeometry": "geometry",
    "HeadMaps": "maps",
    "head_maps": "maps",
    "edit_rotary": "interventions",
    "load_model": "models",
    "HeadPatching": "patching",
    "patch_heads": "patching",
    "HeadProfile": "profile.results",
    "profile_heads": "profile.driver",
    "HeadScores": "results",
    "score_heads": "scoring",
    "score_corpus": "corpus_scoring",
    "spearman_by_distance": "statistics",
    "ablation_study": "study.run",
    "AblationStudy": "study.results",
    "dose_response": "study.dose",
    "DoseResponse": "study.dose_results",
    "head_effects": "study.screen",
    "CodeScores": "codes.results",
    "score_any_code": "codes.scoring",
    "UnseenAngles": "unseen.results",
    "unseen_angles": "unseen.measure",
}

_PACKAGES = ("codes", "emergence", "extrapolation", "profile", "tasks", "unseen", "views")

__all__ = [*_HOME, *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"tl_posheads.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'tl_posheads' has no attribute {name!r}")
    value = getattr(import_module(f"tl_posheads.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_PACKAGES])

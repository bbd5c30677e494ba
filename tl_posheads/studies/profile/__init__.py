"""Other measures of heads beside the positional score, on the same texts; one file each."""

from tl_posheads.studies.atlas.vectors import (
    before_rotation,
    slow_dimensions,
    slow_share,
)
from tl_posheads.studies.profile.detection import detected_share, detection_patterns
from tl_posheads.studies.profile.distance_and_sink import mean_distance, sink_mass
from tl_posheads.studies.profile.long_context import long_context_share
from tl_posheads.studies.profile.massive import massive_share
from tl_posheads.studies.profile.needles import retrieval_scores
from tl_posheads.studies.profile.results import HeadProfile
from tl_posheads.studies.profile.retrieval import copied_share, copies_of, recall
from tl_posheads.studies.profile.run import profile_heads
from tl_posheads.studies.profile.settings import MEASURES, ProfileSettings
from tl_posheads.studies.profile.utility import dimension_utility

__all__ = [
    "MEASURES",
    "HeadProfile",
    "ProfileSettings",
    "before_rotation",
    "copied_share",
    "copies_of",
    "detected_share",
    "detection_patterns",
    "dimension_utility",
    "long_context_share",
    "massive_share",
    "mean_distance",
    "profile_heads",
    "recall",
    "retrieval_scores",
    "sink_mass",
    "slow_dimensions",
    "slow_share",
]

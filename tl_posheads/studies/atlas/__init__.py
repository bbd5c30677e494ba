"""How every head uses every rotary frequency."""

from tl_posheads.studies.atlas.needed import needed_order
from tl_posheads.studies.atlas.results import RotaryAtlas
from tl_posheads.studies.atlas.run import rotary_atlas
from tl_posheads.studies.atlas.vectors import (
    VectorMeans,
    before_rotation,
    separation,
    slow_dimensions,
    slow_share,
)

__all__ = [
    "RotaryAtlas",
    "VectorMeans",
    "before_rotation",
    "needed_order",
    "rotary_atlas",
    "separation",
    "slow_dimensions",
    "slow_share",
]

"""Scores, curves and loss over training: when does a head become positional?"""

from tl_posheads.studies.emergence.lead_lag import crossing, pooled_lag
from tl_posheads.studies.emergence.results import Emergence
from tl_posheads.studies.emergence.sources import folder_checkpoints, hub_checkpoints, log_steps
from tl_posheads.studies.emergence.tracker import EmergenceTracker, track_emergence

__all__ = [
    "Emergence",
    "EmergenceTracker",
    "crossing",
    "folder_checkpoints",
    "hub_checkpoints",
    "log_steps",
    "pooled_lag",
    "track_emergence",
]

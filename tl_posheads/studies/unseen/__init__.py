"""Why dominant dimensions change beyond the training length: rotary angles that training never saw.

A pair whose wavelength is longer than the training length has not turned once in training. Past it
the pair meets angles that are new to the model. Here each pair's relative angle is held at the last
one seen, pair by pair and together, and what becomes of the change is measured.
"""

from tl_posheads.studies.unseen.clamped_model import clamp_rotary
from tl_posheads.studies.unseen.clamping import clamped_dominant, unseen_pairs
from tl_posheads.studies.unseen.measure import unseen_angles
from tl_posheads.studies.unseen.results import UnseenAngles

__all__ = ["UnseenAngles", "clamp_rotary", "clamped_dominant", "unseen_angles", "unseen_pairs"]

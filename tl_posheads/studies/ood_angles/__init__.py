"""Why dominant dimensions change beyond the training length: out-of-distribution rotation angles.

A rotary pair whose wavelength is longer than the training length never completed a turn in
training. Past that length it meets angles that are new to the model: an out-of-distribution pair
(the term of LongRoPE, Ding et al. 2024, arXiv 2402.13753, and others). Here the relative angle of
pairs is clamped to the last one of training, one pair at a time and together, to measure how much
of the change remains.
"""

from tl_posheads.studies.ood_angles.clamped_model import clamp_rotary
from tl_posheads.studies.ood_angles.clamping import clamped_dominant, ood_pairs
from tl_posheads.studies.ood_angles.measure import ood_angles
from tl_posheads.studies.ood_angles.results import OODAngles

__all__ = ["OODAngles", "clamp_rotary", "clamped_dominant", "ood_angles", "ood_pairs"]

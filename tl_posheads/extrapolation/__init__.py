"""Length extrapolation: a file for each method, a small dataclass that is put on a live model.

>>> from tl_posheads import extrapolation as ex
>>> with ex.Linear(factor=4.0)(model):                          # doctest: +SKIP
...     scores = ph.score_heads(model, long_tokens)
"""

from tl_posheads.extrapolation.base import DistanceMethod, Frequencies, FrequencyMethod, Method
from tl_posheads.extrapolation.linear import Linear
from tl_posheads.extrapolation.none import None_
from tl_posheads.extrapolation.self_extend import SelfExtend

__all__ = [
    "DistanceMethod",
    "Frequencies",
    "FrequencyMethod",
    "Linear",
    "Method",
    "None_",
    "SelfExtend",
]

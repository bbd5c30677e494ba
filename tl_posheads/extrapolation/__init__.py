"""Length extrapolation: a file for each method, a small dataclass that is put on a live model.

>>> from tl_posheads import extrapolation as ex
>>> with ex.YaRN(factor=4.0)(model):                            # doctest: +SKIP
...     scores = ph.score_heads(model, long_tokens)
"""

from tl_posheads.extrapolation.base import DistanceMethod, Frequencies, FrequencyMethod, Method
from tl_posheads.extrapolation.clex import CLEX
from tl_posheads.extrapolation.clex_train import train_clex
from tl_posheads.extrapolation.dpe import DPE
from tl_posheads.extrapolation.dpe_detect import (
    EffectiveLengths,
    detect_effective_lengths,
    fit_dpe,
    key_pairs,
)
from tl_posheads.extrapolation.dual_chunk import DualChunk
from tl_posheads.extrapolation.fope import FoPE
from tl_posheads.extrapolation.linear import Linear
from tl_posheads.extrapolation.llama3 import Llama3
from tl_posheads.extrapolation.longrope import LongRoPE
from tl_posheads.extrapolation.longrope_search import search_longrope
from tl_posheads.extrapolation.none import None_
from tl_posheads.extrapolation.nope import NoPE
from tl_posheads.extrapolation.ntk import NTK, DynamicNTK
from tl_posheads.extrapolation.rerope import ReRoPE
from tl_posheads.extrapolation.resonance import Resonance
from tl_posheads.extrapolation.self_extend import SelfExtend
from tl_posheads.extrapolation.theta import Theta
from tl_posheads.extrapolation.yarn import YaRN

__all__ = [
    "CLEX",
    "DPE",
    "DistanceMethod",
    "DualChunk",
    "DynamicNTK",
    "EffectiveLengths",
    "FoPE",
    "Frequencies",
    "FrequencyMethod",
    "Linear",
    "Llama3",
    "LongRoPE",
    "Method",
    "NTK",
    "NoPE",
    "None_",
    "ReRoPE",
    "Resonance",
    "SelfExtend",
    "Theta",
    "YaRN",
    "detect_effective_lengths",
    "fit_dpe",
    "key_pairs",
    "search_longrope",
    "train_clex",
]

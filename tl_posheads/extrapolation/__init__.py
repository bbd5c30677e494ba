"""Length extrapolation: a file for each method, a small dataclass that is put on a live model.

>>> from tl_posheads import extrapolation as ex
>>> with ex.YaRN(factor=4.0)(model):                            # doctest: +SKIP
...     scores = ph.score_heads(model, long_tokens)
"""

from tl_posheads.extrapolation.base import DistanceMethod, Frequencies, FrequencyMethod, Method
from tl_posheads.extrapolation.methods.clex import CLEX
from tl_posheads.extrapolation.methods.clex_train import train_clex
from tl_posheads.extrapolation.methods.dpe import DPE
from tl_posheads.extrapolation.methods.dpe_detect import (
    EffectiveLengths,
    detect_effective_lengths,
    fit_dpe,
    key_pairs,
)
from tl_posheads.extrapolation.methods.dual_chunk import DualChunk
from tl_posheads.extrapolation.methods.fope import FoPE
from tl_posheads.extrapolation.methods.linear import Linear
from tl_posheads.extrapolation.methods.llama3 import Llama3
from tl_posheads.extrapolation.methods.longrope import LongRoPE
from tl_posheads.extrapolation.methods.longrope_search import search_longrope
from tl_posheads.extrapolation.methods.nope import NoPE
from tl_posheads.extrapolation.methods.ntk import NTK, DynamicNTK
from tl_posheads.extrapolation.methods.rerope import ReRoPE
from tl_posheads.extrapolation.methods.resonance import Resonance
from tl_posheads.extrapolation.methods.self_extend import SelfExtend
from tl_posheads.extrapolation.methods.theta import Theta
from tl_posheads.extrapolation.methods.unchanged import Unchanged
from tl_posheads.extrapolation.methods.yarn import YaRN

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
    "Unchanged",
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

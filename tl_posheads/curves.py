"""Dominant dimension and softmax weight of every pair, by token distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from tl_posheads.capture import (
    capture_rotary,
    model_name,
    require_clean,
    require_rotary,
    rotary_hook_points,
)
from tl_posheads.contributions import PairVectors
from tl_posheads.errors import PosheadsError
from tl_posheads.geometry import LayerGeometry, RotaryGeometry
from tl_posheads.scoring import _by_key, _documents, _length_matters
from tl_posheads.tables import rows_of

_BINS_PER_DIMENSION = 16  # of the histogram that quantiles are read from

"""A small Llama, warmed up, with its geometry."""

from __future__ import annotations

import pytest

from helpers import small_models
from helpers.traces import warm
from tl_posheads.hooks.rotary_geometry import RotaryGeometry


@pytest.fixture(scope="module")
def llama():
    model = warm(small_models.rotary_model("Llama"))
    model.geometry = RotaryGeometry.from_model(model)
    return model

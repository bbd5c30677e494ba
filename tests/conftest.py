"""Models that several test files share, loaded once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tl_posheads.models import has_hooked_transformer, load_model

CLASSES = ["hooked", "bridge"] if has_hooked_transformer() else ["bridge"]


@pytest.fixture(scope="session", params=CLASSES)
def smollm2(request):
    """SmolLM2-135M in every class that the installed TransformerLens has."""
    return load_model("smollm2-135m", cls=request.param)


@pytest.fixture(scope="session")
def smollm2_bridge():
    return load_model("smollm2-135m", cls="bridge")

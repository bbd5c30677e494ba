"""Fixtures: SmolLM2 in every class that the installed transformer-lens has, and small models."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most models are so small that waiting for threads takes longer than the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from helpers.lens import CLASSES
from tl_posheads.errors import PosheadsError
from tl_posheads.io import models

# With --doctest-modules pytest would import the rooms' conftest.py as test files of one name.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]


def pytest_report_header() -> str:
    missing = "" if "hooked" in CLASSES else " (it has no HookedTransformer)"
    return f"transformer-lens {models._lens_version()}: testing {', '.join(CLASSES)}{missing}"


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2 converted to a folder, in the user's cache so that it is converted once."""
    try:
        return Path(models._resolve("smollm2-135m")[0])
    except PosheadsError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=CLASSES)
def smollm2(request: pytest.FixtureRequest, smollm2_folder: Path):
    """SmolLM2-135M on the CPU in float32, once as each class."""
    return models.load_model("smollm2-135m", cls=request.param, device="cpu")


@pytest.fixture(scope="session")
def smollm2_bridge(smollm2_folder: Path):
    return models.load_model("smollm2-135m", cls="bridge", device="cpu")


@pytest.fixture(scope="session")
def tokenizer(smollm2_folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="session")
def small_folder(tokenizer, tmp_path_factory: pytest.TempPathFactory):
    """Makes folders of tiny random models with SmolLM2's tokenizer: small_folder("Llama", ...)."""
    import torch
    import transformers

    def make(family: str, **overrides) -> Path:
        options = dict(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
        config = getattr(transformers, f"{family}Config")(**{**options, **overrides})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 2:
                    weight.mul_(5)  # so that attention isn't flat
        folder = tmp_path_factory.mktemp("models") / f"tiny-{family.lower()}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make

"""The training length is the checkpoint's own, whatever the lens makes of it."""

from __future__ import annotations

import pytest
import torch

import tl_posheads as ph
from tl_posheads import extrapolation as ex
from tl_posheads.hooks.changes import trained_length
from tl_posheads.hooks.lengths import context_length
from tl_posheads.io import models

pytestmark = pytest.mark.lens


def tokens_of(length, seed):
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [8192, 256])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Qwen2", {}),
        ("GPTNeoX", {"num_key_value_heads": 4}),
        pytest.param("Llama", {}, marks=pytest.mark.slow),
        pytest.param("Qwen3", {"head_dim": 8}, marks=pytest.mark.slow),
        pytest.param("Gemma2", {"head_dim": 8}, marks=pytest.mark.slow),
        pytest.param("Mistral", {"sliding_window": None}, marks=pytest.mark.slow),
        pytest.param("Phi3", {}, marks=pytest.mark.slow),
    ],
)
def test_the_length_is_the_checkpoints_own(small_folder, family, options, length):
    folder = small_folder(family, **options, max_position_embeddings=length)
    for cls in ("hooked", "bridge") if models.hooked_available() else ("bridge",):
        try:
            model = models.load_model(folder, cls=cls, device="cpu")
        except ph.PosheadsError:
            continue  # HookedTransformer can't hold it
        assert context_length(model) == model.cfg.n_ctx == length
        with ex.YaRN(4)(model):
            assert trained_length(model) == length
        if length == 256:
            with pytest.raises(ph.PosheadsError, match="at most 256"):
                ph.score_heads(model, tokens_of(257, 1)[None], progress=False)


@pytest.mark.skipif(not models.hooked_available(), reason="no HookedTransformer")
def test_a_cap_of_the_lens_is_not_the_checkpoints_length(small_folder):
    folder = small_folder("Qwen2", max_position_embeddings=4096)
    model = models.load_model(folder, cls="hooked", device="cpu")
    model.cfg.n_ctx = 2048  # as HookedTransformer.from_pretrained leaves it
    assert trained_length(model) == 4096
    with ex.YaRN(4)(model, trained=4096):
        wanted = ph.RotaryGeometry.from_model(model)[0].inv_freq
    with ex.YaRN(4)(model):
        found = ph.RotaryGeometry.from_model(model)[0].inv_freq
    assert torch.equal(found, wanted)
    with pytest.raises(ph.PosheadsError, match="at most 2048"):  # where its tables end
        ph.score_heads(model, tokens_of(2049, 1)[None], progress=False)
    model.cfg.n_ctx = 512  # set by hand
    assert trained_length(model) == 512
    other = small_folder("Qwen2", max_position_embeddings=4096, hidden_size=64)
    model.cfg.n_ctx, model.cfg.tokenizer_name = 2048, str(other)
    assert trained_length(model) == 2048  # another model's configuration

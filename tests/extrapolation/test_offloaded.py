"""Models whose weights accelerate keeps elsewhere between passes."""

from __future__ import annotations

import accelerate
import pytest
import torch

import tl_posheads as ph
from helpers import architectures, small_models
from tl_posheads import extrapolation as ex
from tl_posheads.hooks.logprobs import greedy, target_logprobs
from tl_posheads.hooks.model import input_device
from tl_posheads.io.models import hooked_available
from tl_posheads.studies.ablation.attribution import attributed_effects
from tl_posheads.studies.ablation.norms import output_norms
from tl_posheads.tasks import Prompt

pytestmark = pytest.mark.lens

TOKENS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
HEADS = [(0, 1), (1, 2)]


def cpu(name, folder):
    family, config = architectures.ROTARY[name]
    hf = small_models.build(family, config)
    accelerate.cpu_offload(hf, execution_device="cpu")
    return small_models.bridge(hf)


def disk(name, folder):
    family, config = architectures.ROTARY[name]
    hf = small_models.build(family, config)
    accelerate.disk_offload(hf, folder, execution_device="cpu")
    return small_models.bridge(hf)


def afterwards(name, folder):
    model = small_models.rotary_model(name)
    accelerate.cpu_offload(model.original_model, execution_device="cpu")
    return model


def log_prob(logits):
    return logits[0, -1].log_softmax(-1)[5]


def everything(model):
    """What the library does to a model, in numbers."""
    at = torch.tensor([7, 30])
    out = {
        "rho": ph.score_heads(model, TOKENS, progress=False).rho,
        "logprobs": target_logprobs(model, TOKENS[0], at)[0],
        "written": greedy(model, TOKENS[0, :8], 4),
    }
    out["effects"] = attributed_effects(model, TOKENS[0], at).effects
    out["norms"] = output_norms(model, [Prompt(TOKENS[0], at)])
    for mode in ("zero", "mean"):
        reference = None if mode == "zero" else TOKENS
        with ph.ablate(model, HEADS, mode, reference=reference):
            out[mode] = target_logprobs(model, TOKENS[0], at)[0]
    with ex.SelfExtend(4, 8)(model, trained=24):
        out["SelfExtend"] = target_logprobs(model, TOKENS[0], at)[0]
    patched = ph.patch_heads(model, TOKENS[0], TOKENS[1], log_prob, HEADS, progress=False)
    out["patched"] = torch.tensor(patched.effects["patched"])
    return out


@pytest.mark.parametrize(
    "name",
    [
        "Llama",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("Qwen2", "GPT-NeoX, Pythia", "Phi", "Gemma 2", "StableLM")
        ),
    ],
)
@pytest.mark.parametrize("offloaded", [cpu, disk, afterwards])
def test_offloaded_models_give_the_numbers_of_the_whole_one(name, offloaded, tmp_path):
    if hooked_available() and offloaded is not afterwards:
        pytest.skip("this line's Bridge has biases of its own, which accelerate doesn't bring")
    if (name, offloaded) == ("GPT-NeoX, Pythia", afterwards):
        pytest.skip("accelerate can't offload a Bridge's joint projections, which share weights")
    right = everything(small_models.rotary_model(name))
    model = offloaded(name, str(tmp_path))
    assert next(model.parameters()).is_meta
    assert input_device(model) == torch.device("cpu")
    found = everything(model)
    assert next(model.parameters()).is_meta  # and it is offloaded still
    for what, numbers in right.items():
        torch.testing.assert_close(
            found[what], numbers, atol=1e-5, rtol=1e-4, equal_nan=True, msg=what
        )


def test_a_model_without_weights_is_refused_in_words():
    model = small_models.rotary_model("Llama").to("meta")
    with pytest.raises(ph.PosheadsError, match="no weights.*load the model with its weights"):
        ph.score_heads(model, TOKENS, progress=False)

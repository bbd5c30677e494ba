"""Small randomly initialised models, booted as TransformerBridge, offline.

Weights are scaled up so that scores differ by more than rounding.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

from helpers import architectures
from tl_posheads.hooks.logprobs import settle_cache
from tl_posheads.io import models


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word ``w3`` .. ``w96``; 0 pads, 1 begins, 2 ends."""
    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, architectures.N_VOCAB))]
    inner = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="</s>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        # What the lens asks for before it makes a tokenizer of its own, from the hub.
        name_or_path="tiny",
        add_bos_token=True,
    )


def random_texts(n_docs: int, length: int, seed: int) -> torch.Tensor:
    """Token ids ``[doc, pos]``, BOS first."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 40, (n_docs, length), generator=generator)
    tokens[:, 0] = 1
    return tokens


def build(family: str, config: dict[str, Any], *, seed: int = 0, boost: float = 6.0) -> Any:
    """The transformers model, random weights times ``boost`` in the projections."""
    torch.manual_seed(seed)
    options = {key: value for key, value in config.items() if value is not None}
    whole = "text_config" in config or family == "T5"  # with pictures or sound, or an encoder
    head = {"GPT2": "LMHeadModel"}.get(
        family, "ForConditionalGeneration" if whole else "ForCausalLM"
    )
    cls = getattr(transformers, f"{family}Config")
    cls = cls if whole else getattr(transformers, f"{family}TextConfig", cls)
    hf_model = getattr(transformers, f"{family}{head}")(cls(**options))
    with torch.no_grad():
        for name, weight in hf_model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(boost)
            elif weight.ndim == 1 and "norm" in name.lower():
                weight.add_(0.1 * torch.randn_like(weight))
    # The hub's Phi-3.5-MoE is spelt otherwise than its class in transformers.
    hf_model.config.architectures = [type(hf_model).__name__.replace("Phimoe", "PhiMoE")]
    if family not in ("Mamba", "T5"):
        # The Bridge of 3.9 doesn't ask for it, and transformers' default shows no scores.
        hf_model.set_attn_implementation("eager")
    return hf_model.eval()


def bridge(hf_model: Any, name: str = "tiny") -> TransformerBridge:
    # For models of pictures the lens would have pip install torchvision, then and there, or refuses
    # them without it; it reads pictures, of which there are none.
    with (
        mock.patch("subprocess.check_call", side_effect=OSError("nothing is installed here")),
        mock.patch.object(
            ArchitectureAdapter, "_check_required_libraries", return_value=None, create=True
        ),
    ):
        model = TransformerBridge.boot_transformers(
            name, hf_model=hf_model, tokenizer=tiny_tokenizer(), device="cpu"
        )
    settle_cache(model)
    return model


def rotary_hf(name: str) -> Any:
    family, config = (architectures.ROTARY | architectures.MORE)[name][:2]
    return build(family, config)


def rotary_model(name: str) -> TransformerBridge:
    return bridge(rotary_hf(name), f"tiny-{(architectures.ROTARY | architectures.MORE)[name][0]}")


def refused_model(name: str) -> TransformerBridge | None:
    """None where the installed lens doesn't know it."""
    family, config, _ = architectures.REFUSED[name]
    hf_model = build(family, config)
    known = hf_model.config.architectures[0] in SUPPORTED_ARCHITECTURES
    return bridge(hf_model, f"tiny-{family}") if known else None


def other_model(name: str) -> TransformerBridge:
    family, config, _ = architectures.OTHER[name]
    return bridge(build(family, config), f"tiny-{family}")


def small_hooked(**options: Any) -> Any:
    """A HookedTransformer with other options than these, where there are some."""
    if not models.hooked_available():
        pytest.skip("this transformer-lens has no HookedTransformer")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    defaults = dict(
        n_layers=2,
        d_model=32,
        d_head=8,
        n_heads=4,
        n_key_value_heads=2,
        n_ctx=256,
        d_vocab=97,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=8,
        seed=0,
        initializer_range=0.4,
        device="cpu",
    )
    return HookedTransformer(HookedTransformerConfig(**{**defaults, **options})).eval()

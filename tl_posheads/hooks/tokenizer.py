"""How a checkpoint begins and ends texts, even if TransformerLens changed its tokenizer."""

from __future__ import annotations

from typing import Any

from tl_posheads.errors import PosheadsError


def tokenizer_of(model: Any) -> Any:
    """The model's tokenizer.

    Raises:
        PosheadsError: it has none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise PosheadsError("the model has no tokenizer, but texts need one; set model.tokenizer")
    return tokenizer


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """Tokens of plain text, nothing added; names of special tokens in it stay text."""
    # verbose=False: a corpus is longer than any context, so the warning is no news.
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, truncation=False, verbose=False
    )
    return list(encoded["input_ids"])


def begin(tokenizer: Any) -> list[int]:
    """The tokens that begin a plain text: BOS, or none if the checkpoint has no BOS.

    TransformerLens sets BOS to EOS in tokenizers that have none, like Qwen's. A real BOS comes from
    the tokenizer's own files or class.
    """
    bos, made_with = tokenizer.bos_token_id, getattr(tokenizer, "init_kwargs", None)
    if bos is None:
        return []
    made_up = made_with is not None and made_with.get("bos_token") is None
    return [] if made_up and bos == tokenizer.eos_token_id else [bos]


def generation_config(model: Any) -> Any:
    """The checkpoint's generation settings: transformers' GenerationConfig.

    From the model inside a TransformerBridge or, on a HookedTransformer, as stored by
    ``load_model``; otherwise from the tokenizer's folder, or empty if there is none.
    """
    from transformers import AutoConfig, GenerationConfig

    found = getattr(getattr(model, "original_model", model), "generation_config", None)
    if found is not None:
        return found
    name = getattr(getattr(model, "tokenizer", None), "name_or_path", None)
    if not name:
        return GenerationConfig()
    try:
        return GenerationConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        pass
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
        return GenerationConfig.from_model_config(config)
    except (OSError, ValueError):
        return GenerationConfig()


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a text: EOS and those in ``generation_config``, which chat models need.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokenizer: the model's or another one; None without any.
    """
    eos = getattr(tokenizer, "eos_token_id", None)
    listed = generation_config(model).eos_token_id
    listed = [listed] if isinstance(listed, int) else list(listed or [])
    return list(dict.fromkeys([*([] if eos is None else [int(eos)]), *listed]))

"""How a checkpoint begins and ends its texts, whatever the lens has made of its tokenizer."""

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
        raise PosheadsError("the model has no tokenizer, which texts need; set model.tokenizer")
    return tokenizer


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """Plain text's tokens, nothing added; names of special tokens in it are text."""
    # verbose=False: a whole corpus is longer than any context, which is no news here.
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, truncation=False, verbose=False
    )
    return list(encoded["input_ids"])


def begin(tokenizer: Any) -> list[int]:
    """What plain text begins with: BOS, or nothing where the checkpoint has none.

    The lens makes EOS the BOS of tokenizers that have none, like Qwen's. It isn't among what the
    tokenizer was made with, by its files or its class.
    """
    bos, made_with = tokenizer.bos_token_id, getattr(tokenizer, "init_kwargs", None)
    if bos is None:
        return []
    made_up = made_with is not None and made_with.get("bos_token") is None
    return [] if made_up and bos == tokenizer.eos_token_id else [bos]


def generation_config(model: Any) -> Any:
    """What the checkpoint says of generation: transformers' GenerationConfig.

    That of the model inside a TransformerBridge or, on a HookedTransformer, the one that
    ``load_model`` left there; otherwise the one beside the tokenizer's files, empty if there is
    none.
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
    """Ids any of which ends a text: EOS, and what ``generation_config`` lists, as chats need.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokenizer: the model's, None where it has none, or another.
    """
    eos = getattr(tokenizer, "eos_token_id", None)
    listed = generation_config(model).eos_token_id
    listed = [listed] if isinstance(listed, int) else list(listed or [])
    return list(dict.fromkeys([*([] if eos is None else [int(eos)]), *listed]))

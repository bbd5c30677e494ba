"""A GGUF file's tokenizer: it splits text as in training, or the file is refused.

A GGUF file only names the pre-tokenizer (``tokenizer.ggml.pre``); its regular expression is in
llama.cpp. transformers uses GPT-2's for every name that it doesn't know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tl_posheads.errors import PosheadsError

if TYPE_CHECKING:
    from gguf import GGUFReader


@dataclass(frozen=True)
class _Cut:
    """Pre-tokenization before BPE.

    Attributes:
        splits: regular expressions that split the text, applied one after the other.
        gpt2: whether GPT-2's own expression is applied last.
        nfc: whether text is normalised to Unicode NFC first.
        whole_words: whether a piece that is a token stays whole, regardless of the merges.
    """

    splits: tuple[str, ...] = ()
    gpt2: bool = False
    nfc: bool = False
    whole_words: bool = False


_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_QWEN35 = (
    _SUFFIX + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_LOWER}|{_UPPER}|\p{{N}}{_SLASHED}"
_GPT4O = rf"{_LOWER}{_SUFFIX}?|{_UPPER}{_SUFFIX}?|\p{{N}}{{1,3}}{_SLASHED}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DIGITS = _Cut((r"\p{N}",), gpt2=True)

# Those for which llama.cpp and the authors' own tokenizers are both known and agree.
_CUTS = {
    "gpt-2": _Cut(gpt2=True),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _DIGITS),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "lfm2"), _Cut((_LLAMA3,), whole_words=True)
    ),
    "smaug-bpe": _Cut((_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _Cut((_QWEN2,), nfc=True)),
    "qwen35": _Cut((_QWEN35,), nfc=True),
    "tekken": _Cut((_TEKKEN,), whole_words=True),
    **dict.fromkeys(("gpt-4o", "minimax-m2"), _Cut((_GPT4O,))),
    "deepseek-coder": _Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "deepseek-v3": _Cut(_DEEPSEEK3),
}


def require_known_tokenizer(reader: GGUFReader, name: str) -> None:
    """Refuse, before conversion, a file whose text would be split differently than in training."""
    kind = _field(reader, "model")
    if kind in ("llama", "gemma4"):  # SentencePiece, which has no pre-tokenizer
        return
    if kind != "gpt2":
        raise PosheadsError(
            f"the tokenizer of {name} is of the kind {kind!r}; expected BPE ('gpt2') or "
            "SentencePiece ('llama'): give a folder or hub id of the same model"
        )
    pre = _field(reader, "pre")
    if pre not in _CUTS:
        raise PosheadsError(
            f"{name} says that its text is cut by {pre!r} (tokenizer.ggml.pre), which isn't "
            f"supported; expected one of {', '.join(sorted(_CUTS))}. Give a folder or hub id of "
            "the same model"
        )


def as_trained(tokenizer: Any, reader: GGUFReader, name: str) -> Any:
    """transformers' tokenizer of the file, corrected to split text as the file says."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    inner = tokenizer.backend_tokenizer
    if _field(reader, "model") == "gpt2":
        cut = _CUTS[_field(reader, "pre")]
        inner.normalizer = normalizers.NFC() if cut.nfc else None
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(split), "isolated") for split in cut.splits),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.gpt2),
            ]
        )
        inner.model.ignore_merges = cut.whole_words
    else:
        stated = _field(reader, "add_space_prefix")
        begins = inner.encode("a", add_special_tokens=False).tokens[0].startswith("▁")
        if stated is not None and stated != begins:
            raise PosheadsError(
                f"{name} says add_space_prefix={stated} of its tokenizer, but transformers doesn't "
                "read that; give a folder or hub id of the same model"
            )
    return _with_own_tokens(tokenizer, reader, name)


def _with_own_tokens(tokenizer: Any, reader: GGUFReader, name: str) -> Any:
    """The tokenizer with exactly the file's tokens, and special tokens at the file's ids.

    transformers adds GPT-2's ``<|endoftext|>`` to a BPE file without an unknown token, and respells
    names with letters outside the byte alphabet (DeepSeek's), which makes BOS a new token without
    an embedding.
    """
    from tokenizers import Tokenizer

    tokens = _field(reader, "tokens")
    special = {
        ours: at
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (at := _field(reader, f"{theirs}_token_id")) is not None
    }
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole["added_tokens"] = [x for x in whole["added_tokens"] if x["id"] < len(tokens)]
    known = {x["id"] for x in whole["added_tokens"]}
    if whole["model"]["type"] == "BPE":
        spelt = {at: token for token, at in whole["model"]["vocab"].items()}
        spelt |= {at: tokens[at] for at in special.values()}
        whole["model"]["vocab"] = {token: at for at, token in spelt.items()}
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        whole["added_tokens"] += [
            {"id": at, "content": tokens[at], "special": True, **plain}
            for at in sorted(set(special.values()) - known)
        ]
    # There is no public way to remove or rename a token.
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.update_post_processor()
    wrong = [
        f"{ours} is {getattr(tokenizer, f'{ours}_token_id')}, not {at}"
        for ours, at in special.items()
        if getattr(tokenizer, f"{ours}_token_id") != at
    ]
    if wrong:
        raise PosheadsError(
            f"transformers gives the tokenizer of {name} other tokens than the file "
            f"({'; '.join(wrong)}); give a folder or hub id of the same model"
        )
    return tokenizer


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(f"tokenizer.ggml.{key}")
    return None if field is None else field.contents()

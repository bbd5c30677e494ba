"""Text around the user's message: the chat template of instruction-tuned models."""

from __future__ import annotations

from typing import Any

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.tokenizer import begin
from tl_posheads.tasks.base import encode

_MESSAGE = "THE-USERS-MESSAGE"


class Frame:
    """Text around the user's message: a chat template, or only BOS.

    Args:
        tokenizer: the model's.
        instruct: use the tokenizer's chat template (True), don't (False), or use it if there
            is one (None).

    Raises:
        PosheadsError: a template was requested but there is none, or it can't be used.
    """

    def __init__(self, tokenizer: Any, instruct: bool | None) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if instruct and not has_template:
            raise PosheadsError(
                "instruct=True was given, but the tokenizer has no chat template; give "
                "instruct=False, or set tokenizer.chat_template"
            )
        self.tokenizer = tokenizer
        self.chat = has_template and instruct is not False
        self._before, self._between = _template(tokenizer) if self.chat else ("", "")

    def opening(self, intro: str) -> list[int]:
        """Tokens up to the haystack, BOS first where the checkpoint has one."""
        ids = encode(self.tokenizer, self._before + intro, special=True)
        start = begin(self.tokenizer)
        return ids if start and ids[:1] == start else start + ids

    def closing(self, question: str, prefix: str) -> list[int]:
        """Tokens from the haystack to the answer."""
        reply = prefix.lstrip() if self.chat else prefix
        return encode(self.tokenizer, question + self._between + reply, special=True)


def _template(tokenizer: Any) -> tuple[str, str]:
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MESSAGE}],
            tokenize=False,
            add_generation_prompt=True,
            date_string="26 Jul 2024",  # Llama 3's template would put today's date in
            **({} if begin(tokenizer) else {"bos_token": ""}),
        )
    # Templates are programs and can raise anything.
    except Exception as error:
        raise PosheadsError(
            f"the tokenizer's chat template failed ({error}); give instruct=False for plain text"
        ) from None
    parts = rendered.split(_MESSAGE)
    if len(parts) != 2:
        raise PosheadsError(
            f"the tokenizer's chat template contains the user's message {len(parts) - 1} times; "
            "expected it once; give instruct=False for plain text"
        )
    return parts[0], parts[1]

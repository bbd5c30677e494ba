"""The tasks with lengths that take no time, and a stand-in for a model that only has a tokenizer."""

from __future__ import annotations

from types import SimpleNamespace

from tl_posheads.tasks import (
    Copying,
    KeyValue,
    MultiKey,
    Needle,
    Passkey,
    Perplexity,
    Task,
    VariableTracking,
)

QUESTIONS = {
    "passkey": (Passkey, {"length": 512}),
    "needle": (Needle, {"lengths": (300, 512)}),
    "key-value": (KeyValue, {"length": 700}),
    "multi-key": (MultiKey, {"length": 512}),
    "variable-tracking": (VariableTracking, {"length": 512, "hops": 2, "chains": 2}),
}
TOKENS_ONLY = {
    **QUESTIONS,
    "copying": (Copying, {"length": 512}),
    "perplexity": (Perplexity, {"length": 512}),
}


def namespace(tokenizer, n_ctx: int = 8192):
    return SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=n_ctx))


def make(name: str, **overrides) -> Task:
    cls, fields = TOKENS_ONLY[name]
    return cls(**{**fields, "n": 4, **overrides})

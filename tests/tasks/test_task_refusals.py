"""What tasks refuse: settings, texts, templates and models that cannot serve."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest

from helpers.task_prompts import QUESTIONS, TOKENS_ONLY, make, namespace
from tl_posheads.errors import PosheadsError
from tl_posheads.tasks import (
    TASKS,
    Copying,
    KeyValue,
    LongPPL,
    MultiKey,
    Needle,
    Passkey,
    Perplexity,
    VariableTracking,
    check_length,
    loss_by_position,
)

BAD_FIELDS = [
    (Passkey, {"n": 0}, r"n=0 was given; expected a whole number of 1 or more"),
    (Passkey, {"n": 2.5}, r"n=2.5 was given; expected a whole number"),
    (Passkey, {"n": True}, r"n=True was given; expected a whole number"),
    (Passkey, {"depths": 0}, r"depths=0 was given"),
    (Passkey, {"length": "long"}, r"length='long' was given"),
    (
        Passkey,
        {"length": 128},
        r"short_length=128, .* prompts of 128 tokens were given; raise the length to 129 or more",
    ),
    (Passkey, {"short_length": 1}, r"short_length=1 was given"),
    (Needle, {"lengths": ()}, r"lengths=\(\) was given; expected whole numbers"),
    (Needle, {"lengths": 512}, r"lengths=512 was given; expected whole numbers"),
    (Needle, {"lengths": (512, 1)}, r"lengths=\(512, 1\) was given"),
    (
        Needle,
        {"lengths": (512, 100)},
        r"prompts of 100 tokens were given; raise the length to 129 or more",
    ),
    (Needle, {"depths": -1}, r"depths=-1 was given"),
    (KeyValue, {"depths": 0}, r"depths=0 was given"),
    (MultiKey, {"n_keys": 1}, r"n_keys=1 was given; expected a whole number of 2"),
    (MultiKey, {"n_keys": 10**6}, r"n_keys=1000000 was given; expected at most"),
    (MultiKey, {"depths": 0}, r"depths=0 was given"),
    (Passkey, {"distractors": -1}, r"distractors=-1 was given; expected a whole number of 0"),
    (Passkey, {"distractors": 32}, r"distractors=32 was given; expected at most 31"),
    (Needle, {"distractors": 46}, r"distractors=46 was given; expected at most 45"),
    (KeyValue, {"near_duplicates": 451}, r"near_duplicates=451 was given; expected at most 450"),
    (MultiKey, {"near_duplicates": 4}, r"near_duplicates=4 was given; expected at most 3 of 4"),
    (
        MultiKey,
        {"n_keys": 500, "near_duplicates": 97},
        r"near_duplicates=97 was given; expected at most 96 of 500 keys",
    ),
    (VariableTracking, {"hops": 0}, r"hops=0 was given"),
    (VariableTracking, {"chains": 0}, r"chains=0 was given"),
    (Copying, {"skip": 64}, r"skip=64 was given; expected fewer than the segment's 64"),
    (Copying, {"length": 192}, r"length=192 was given, .* have 193; raise length or lower segment"),
    (Copying, {"distances": 0}, r"distances=0 was given"),
    (Perplexity, {"last": 1.5}, r"last=1.5 was given; expected a share above 0 and at most 1"),
    (Perplexity, {"length": 100}, r"prompts of 100 tokens"),
    (LongPPL, {"stride": 0}, r"stride=0 was given"),
    (LongPPL, {"length": 129}, r"prompts of 129 tokens were given; raise"),
]


@pytest.mark.parametrize(
    ("cls", "fields", "message"), BAD_FIELDS, ids=lambda v: getattr(v, "name", None)
)
def test_bad_fields(cls, fields, message):
    with pytest.raises(PosheadsError, match=message):
        cls(**fields)


@pytest.mark.parametrize("name", TASKS)
def test_refused_before_any_pass(tokenizer, name):
    # neither of these models has a forward pass
    with pytest.raises(PosheadsError, match=r"was given, but the model reads at most 200 tokens"):
        TASKS[name](n=1).prompts(namespace(tokenizer, n_ctx=200))
    with pytest.raises(PosheadsError, match="no tokenizer"):
        TASKS[name](n=1).prompts(namespace(None))
    with pytest.raises(PosheadsError, match=r"no file .*nowhere\.txt"):
        TASKS[name](n=1, corpus="nowhere.txt").prompts(namespace(tokenizer))


@pytest.mark.parametrize("name", QUESTIONS)
def test_too_short_for_the_question(model, name):
    field = "lengths" if name == "needle" else "length"
    length = 60
    with pytest.raises(
        PosheadsError, match=r"length=60 was given, .* raise length to (\d+)"
    ) as error:
        make(name, short_length=10, **{field: (length,) if name == "needle" else length}).prompts(
            model
        )
    enough = int(re.search(r"raise length to (\d+)", str(error.value)).group(1))
    options = {"short_length": 10, "n": 1}
    [prompt] = make(name, **options, **{field: (enough,) if name == "needle" else enough}).prompts(
        model
    )
    assert len(prompt.tokens) == enough


def test_too_little_text(model, tmp_path):
    (tmp_path / "a.txt").write_text("A short text. It has two sentences.")
    for name in TOKENS_ONLY:
        if name != "key-value":  # it is filled with pairs
            with pytest.raises(
                PosheadsError, match=r"a\.txt has \d+ tokens, but a prompt needs \d+"
            ):
                make(name, corpus=str(tmp_path / "a.txt")).prompts(model)


def test_templates_that_cannot_be_used(model, plain):
    with pytest.raises(PosheadsError, match=r"instruct=True was given, but .* no chat template"):
        Passkey(length=256, instruct=True).prompts(plain)
    tokenizer = copy.deepcopy(model.tokenizer)
    for template, message in [
        ("{{ raise_exception('a system message is needed') }}", "failed .*a system message"),
        ("silence", "contains the user's message 0 times; expected it once; give instruct=False"),
        ("{{ messages[0].content }} {{ messages[0].content }}", "2 times"),
    ]:
        tokenizer.chat_template = template
        with pytest.raises(PosheadsError, match=message):
            Passkey(length=256, n=1).prompts(namespace(tokenizer))
        assert len(Passkey(length=256, n=1, instruct=False).prompts(namespace(tokenizer))) == 1


def test_check_length(model):
    prompts = make("passkey", n=1).prompts(model)
    assert check_length(SimpleNamespace(), prompts) is None
    assert check_length(namespace(None, n_ctx=512), prompts) is None
    with pytest.raises(
        PosheadsError, match="length=512 was given, but the model reads at most 511"
    ):
        check_length(namespace(None, n_ctx=511), prompts)
    with pytest.raises(PosheadsError, match=r"edges=\[3\] was given"):
        loss_by_position(namespace(None), prompts, edges=[3])
    with pytest.raises(PosheadsError, match="no prompts were given"):
        loss_by_position(namespace(None), [])
    with pytest.raises(PosheadsError, match="reads at most 100"):
        loss_by_position(namespace(None, n_ctx=100), prompts)

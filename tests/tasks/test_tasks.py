"""Prompts of the tasks, read anew: what they ask, hide and hold, and how they are made to fit."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helpers.task_prompts import QUESTIONS, TOKENS_ONLY, make, namespace
from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.io.corpora import _text
from tl_posheads.tasks import (
    TASKS,
    Copying,
    KeyValue,
    MultiKey,
    Needle,
    Passkey,
    Prompt,
    Task,
    generate_answers,
)
from tl_posheads.tasks.base import encode


def needle_of(name: str, text: str) -> tuple[str, str, str]:
    """What a prompt's text asks, the needle that tells and the answer it tells, read anew."""
    if name == "passkey":
        [key] = re.findall(r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.", text)
        assert text.count("What is the pass key?") == 1
        return "", f" The pass key is {key}. Remember it. {key} is the pass key.", key
    if name == "needle":
        [(city, activity)] = re.findall(r"The best thing to do in ([^.?]+) is ([^.?]+)\.", text)
        assert f"What is the best thing to do in {city}? Don't give" in text
        return city, f" The best thing to do in {city} is {activity}.", activity
    if name == "key-value":
        pairs = json.loads(text.split("JSON data:\n")[1].split("\n\nKey: ")[0])
        [key] = re.findall(r'Key: "(.+?)"', text)
        return key, f'"{key}": "{pairs[key]}"', pairs[key]
    if name == "multi-key":
        stated = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", text)
        assert len(dict(stated)) == len(stated) == 4
        [key] = re.findall(r"What is the special magic number for (\S+) mentioned", text)
        value = dict(stated)[key]
        return key, f" One of the special magic numbers for {key} is: {value}.", value
    [query] = re.findall(r"assigned the value (\d{5}) in the text above\.", text)
    values: dict[str, str] = {}
    for left, _, right in re.findall(r"VAR ([A-Z]{5}) = (VAR )?([A-Z]{5}|\d{5})", text):
        values[left] = values.get(right, right)  # in reading order, so each is known in time
    assert len(values) == 6
    assert sorted(Counter(values.values()).values()) == [3, 3]
    names = [name for name, value in values.items() if value == query]
    assert f"3 variables are assigned the value {query}, they are:" in text
    return query, f"\nVAR {names[0]} = {query}", " ".join(names)


@pytest.mark.parametrize("instruct", [None, False], ids=["chat", "plain"])
@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_against_their_text(model, name, instruct):
    task = make(name, instruct=instruct)
    tokenizer = model.tokenizer
    for i, prompt in enumerate(task.prompts(model)):
        wanted = task.lengths[i % 2] if name == "needle" else task.length
        assert len(prompt.tokens) == wanted == prompt.facts["length"]
        asked = []
        for one in (prompt, prompt.short):
            query, needle, answer = needle_of(name, tokenizer.decode(one.tokens))
            asked.append((query, needle, answer))
            assert tokenizer.decode(one.tokens[one.targets]).strip() == answer
            # the answer is the end, and nothing of it is left out
            assert int(one.targets[-1]) == len(one.tokens) - 1
            before = tokenizer.decode(one.tokens[: one.targets[0]])
            assert answer.split()[0] not in before[-20:]
            # the needle starts where the facts say
            at = one.facts["needle"]
            there = tokenizer.decode(one.tokens[at:])
            assert there.lstrip(" {").startswith(needle.lstrip(" "))
            assert one.facts["distance"] == int(one.targets[0]) - at
        assert asked[0] == asked[1]
        assert len(prompt.short.tokens) < len(prompt.tokens)
        assert prompt.short.facts["distance"] <= prompt.facts["distance"]


def test_passkey_by_defaults_and_keywords(model):
    task = Passkey(length=2048, depths=5, n=50, seed=0)
    assert task == Passkey()
    prompts = task.prompts(model)
    assert {len(prompt.tokens) for prompt in prompts} == {2048}
    assert {len(prompt.short.tokens) for prompt in prompts} == {128}
    assert len({tuple(prompt.tokens[prompt.targets].tolist()) for prompt in prompts}) == 50
    for prompt in prompts:
        room = (prompts[0].facts["needle"], prompts[1].facts["needle"])
        actual = (prompt.facts["needle"] - room[0]) / (room[1] - room[0])
        assert actual == pytest.approx(prompt.facts["depth"], abs=0.03)


def test_needles_lie_between_sentences(model, numbered):
    for prompt in Passkey(length=512, n=5, corpus=numbered).prompts(model):
        text = model.tokenizer.decode(prompt.tokens)
        haystack = text.split("important information there.\n")[-1].split("\nWhat is")[0]
        rest, found = re.subn(
            r" The pass key is \d+\. Remember it\. \d+ is the pass key\.", "", haystack
        )
        if prompt.facts["depth"] == 0:
            assert "important information there. The pass key is" in text
        else:
            assert found == 1
            assert "little. The pass key is" in text
        numbers = [int(number) for number in re.findall(r"Sentence (\d{5}) says little\.", rest)]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert rest.endswith("says little.")


@pytest.mark.parametrize("name", TOKENS_ONLY)
def test_seeds_and_prefixes(model, name):
    def lists(**overrides):
        return [
            (p.tokens.tolist(), p.targets.tolist(), p.facts, p.short.tokens.tolist())
            for p in make(name, **overrides).prompts(model)
        ]

    base = lists()
    assert lists() == base
    assert lists(n=7)[:4] == base
    other = lists(seed=1)
    assert all(one[0] != two[0] for one, two in zip(base, other))
    assert len({tuple(one[0]) for one in base}) == 4


@pytest.mark.parametrize(
    ("task", "fact", "values"),
    [
        (Passkey(length=256, n=12), "depth", 5),
        (KeyValue(length=600, n=12, depths=3), "depth", 3),
        (MultiKey(length=300, n=12, depths=4), "depth", 4),
        (Needle(lengths=(200, 256, 300), n=12, depths=2), "length", 3),
        (Copying(length=512, n=12), "distance", 4),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_every_prefix_is_balanced(model, task, fact, values):
    seen = [prompt.facts[fact] for prompt in task.prompts(model)]
    assert len(set(seen)) == values
    for k in range(1, 13):
        counts = Counter(dict.fromkeys(seen, 0))
        counts.update(seen[:k])
        assert max(counts.values()) - min(counts.values()) <= 1


def test_needle_fills_its_grid(model):
    prompts = Needle(lengths=(200, 256), depths=3, n=12).prompts(model)
    cells = Counter((p.facts["length"], p.facts["depth"]) for p in prompts)
    assert cells == {(length, depth): 2 for length in (200, 256) for depth in (0.0, 0.5, 1.0)}


def test_chat_template_is_applied_once(model):
    tokenizer = model.tokenizer
    [prompt] = Passkey(length=400, n=1).prompts(model)
    text = tokenizer.decode(prompt.tokens)
    message = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    assert message.startswith("There is an important info")
    assert message.endswith("What is the pass key?")
    key = tokenizer.decode(prompt.tokens[prompt.targets])
    frame = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    assert text == f"{frame}The pass key is {key}"
    # as special tokens, not as their names; BOS is the template's own first token
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert prompt.tokens[0] == special == tokenizer.bos_token_id
    assert (prompt.tokens == special).sum() == frame.count("<|im_start|>") == 3


def test_plain_text(model, plain):
    [asked_for] = Passkey(length=400, n=1, instruct=False).prompts(model)
    [without] = Passkey(length=400, n=1).prompts(plain)
    assert torch.equal(asked_for.tokens, without.tokens)
    text = model.tokenizer.decode(asked_for.tokens[1:])
    assert text.startswith("There is an important info")
    key = model.tokenizer.decode(asked_for.tokens[asked_for.targets])
    assert text.endswith(f"\nWhat is the pass key? The pass key is {key}")
    assert asked_for.tokens[0] == model.tokenizer.bos_token_id
    assert (asked_for.tokens == model.tokenizer.bos_token_id).sum() == 1


def test_pieces_are_joined_as_one_text_would_be(model):
    for name in QUESTIONS:
        prompt = make(name, n=1).prompts(model)[0]
        tail = prompt.tokens[prompt.targets[0] - 25 :]
        again = model.tokenizer(model.tokenizer.decode(tail), add_special_tokens=False)["input_ids"]
        assert again[5:] == tail.tolist()[-len(again) + 5 :], name


def test_without_bos(plain):
    tokenizer = copy.deepcopy(plain.tokenizer)
    tokenizer.bos_token = None
    for name in TOKENS_ONLY:
        with_bos = make(name, n=1).prompts(plain)[0]
        without = make(name, n=1).prompts(namespace(tokenizer))[0]
        assert with_bos.tokens[0] == plain.tokenizer.bos_token_id
        assert without.tokens[0] != plain.tokenizer.bos_token_id
        assert len(with_bos.tokens) == len(without.tokens)


def test_no_space_that_a_tokenizer_adds_on_its_own():
    vocabulary = [("<unk>", 0.0), ("▁", -1.0), ("\n", -1.0), *((c, -1.0) for c in "0123456789ab")]
    inner = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    names = tokenizer.convert_ids_to_tokens
    assert names(tokenizer("12", add_special_tokens=False)["input_ids"]) == ["▁", "1", "2"]
    assert names(encode(tokenizer, "12")) == ["1", "2"]
    assert names(encode(tokenizer, " 12")) == ["▁", "1", "2"]
    assert names(encode(tokenizer, "\n12", special=True)) == ["\n", "1", "2"]


def test_short_controls_as_long_as_they_have_to_be(model):
    for prompt in MultiKey(length=512, n=3, short_length=64).prompts(model):
        text = model.tokenizer.decode(prompt.short.tokens)
        message = text.split("quiz you about the number afterwards.")[1].split("\nWhat is")[0]
        assert re.fullmatch(r"( One of the special magic numbers for \S+ is: \d+\.){4}", message)
    for prompt in KeyValue(length=1024, n=3, short_length=64).prompts(model):
        assert prompt.short.facts["pairs"] == 2
        assert prompt.facts["pairs"] > 8
    for prompt in KeyValue(length=1024, n=3, short_length=500).prompts(model):
        assert prompt.short.facts["pairs"] > 2
        assert 500 - 100 < len(prompt.short.tokens) <= 500  # another pair has 80 or so


@pytest.mark.parametrize("length", [600, 601, 602, 603, 640])
def test_key_value_is_filled_exactly(model, length):
    for prompt in KeyValue(length=length, n=4).prompts(model):
        assert len(prompt.tokens) == length
        text = model.tokenizer.decode(prompt.tokens)
        assert (
            len(json.loads(text.split("JSON data:\n")[1].split("\n\nKey: ")[0]))
            == prompt.facts["pairs"]
        )


def test_copying(model):
    task = Copying(length=512, segment=32, distances=4, skip=3, n=8)
    corpus = _text("python-docs")
    prompts = task.prompts(model)
    grid = [prompt.facts["distance"] for prompt in prompts]
    assert grid[:4] == grid[4:] == task.distance_grid() == [479, 64, 125, 245]
    for prompt in prompts:
        second = len(prompt.tokens) - 32
        first = second - prompt.facts["distance"]
        assert first == prompt.facts["needle"] >= 1
        assert torch.equal(prompt.tokens[first : first + 32], prompt.tokens[second:])
        assert prompt.targets.tolist() == list(range(second + 3, 512))
        assert model.tokenizer.decode(prompt.tokens[1:second]) in corpus
        short = prompt.short
        assert short.tokens[1:].tolist() == 2 * prompt.tokens[second:].tolist()
        assert torch.equal(short.tokens[short.targets], prompt.tokens[prompt.targets])
        assert short.facts["distance"] == 32
    assert Copying(length=512, segment=32, distances=1).distance_grid() == [479]


@pytest.mark.lens
def test_generate_answers_equals_a_slow_loop(tiny, reference):
    drawn = torch.randint(3, 97, (14,), generator=torch.Generator().manual_seed(3))
    said = torch.cat([torch.tensor([1]), drawn])
    for _ in range(4):
        with torch.no_grad():
            best = reference(said[None]).logits[0, -1].argmax()
        said = torch.cat([said, best[None]])
    assert len(set(said[15:].tolist())) == 4
    words = [f"w{i}" for i in said[15:].tolist()]
    wrong = said.clone()
    wrong[17] += 1
    right, wrong = (Prompt(tokens, torch.arange(15, 19)) for tokens in (said, wrong))
    table = generate_answers(tiny, [right, wrong])
    assert list(table.columns) == ["prompt", "answer", "generated", "exact"]
    assert table.prompt.tolist() == [0, 1]
    assert table.generated.tolist() == 2 * [" ".join(words)]
    assert table.answer[0] == " ".join(words)
    assert table.answer[1].split() == [*words[:2], f"w{int(said[17]) + 1}", words[3]]
    assert table.exact.tolist() == [True, False]
    # an answer that the model goes on after
    begun = Prompt(said[:17], torch.tensor([15, 16]))
    longer = generate_answers(tiny, [begun], max_new_tokens=4)
    assert (longer.answer[0], longer.generated[0]) == (" ".join(words[:2]), " ".join(words))
    assert longer.exact[0]
    with pytest.raises(PosheadsError, match="reads at most"):
        generate_answers(tiny, [right], max_new_tokens=5000)


@pytest.mark.lens
def test_passkey_with_a_real_model(smollm2):
    prompts = Passkey(length=256, depths=1, n=1).prompts(smollm2)
    [prompt] = prompts
    at, key = prompt.facts["needle"], smollm2.tokenizer.decode(prompt.tokens[prompt.targets])
    text = f" The pass key is {key}. Remember it. {key} is the pass key."
    needle = encode(smollm2.tokenizer, text)
    assert prompt.tokens[at : at + len(needle)].tolist() == needle
    removed = torch.cat([prompt.tokens[:at], prompt.tokens[at + len(needle) :]])
    told, top = target_logprobs(smollm2, prompt.tokens, prompt.targets)
    guessed, _ = target_logprobs(smollm2, removed, prompt.targets - len(needle))
    assert told.mean() > guessed.mean() + 1
    assert top.all()
    table = generate_answers(smollm2, prompts)
    assert table.generated.tolist() == table.answer.tolist() == [key]
    assert table.exact.all()


def test_names():
    assert list(TASKS) == [
        "passkey",
        "needle",
        "key-value",
        "multi-key",
        "variable-tracking",
        "copying",
        "perplexity",
        "longppl",
    ]
    for name, cls in TASKS.items():
        assert isinstance(cls(), Task)
        assert cls().name == name.replace("-", "_")

"""Rungs of difficulty: each is harder than the last, none longer than the task, no answer is told."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from itertools import pairwise

import pytest

from helpers.task_prompts import QUESTIONS, make
from tl_posheads.tasks import (
    Calibrated,
    Copying,
    KeyValue,
    LongPPL,
    MultiKey,
    Needle,
    Passkey,
    Perplexity,
    VariableTracking,
)

CLIMBING = [
    *(make(name) for name in QUESTIONS),
    Copying(length=512, segment=32),
    Passkey(length=4096, distractors=5, seed=3),
    Needle(lengths=(600, 4000), distractors=45),
    KeyValue(length=2048, near_duplicates=3),
    MultiKey(length=131_072, n_keys=2256, near_duplicates=96),
    MultiKey(length=200_000),
    VariableTracking(length=1024, hops=6, chains=5),
]


@pytest.mark.parametrize("task", CLIMBING, ids=lambda task: task.name)
def test_each_rung_is_harder_in_one_thing(task):
    rungs = task.rungs()
    assert isinstance(task, Calibrated)
    assert len(rungs) > 2
    for easy, hard in pairwise(rungs):
        [field] = [f.name for f in fields(task) if getattr(easy, f.name) != getattr(hard, f.name)]
        before, after = getattr(easy, field), getattr(hard, field)
        assert after < before if field == "segment" else after > before
    told = {"length", "lengths", "distractors", "near_duplicates", "n_keys", "hops", "chains"}
    for field in (f.name for f in fields(task)):
        values = [getattr(rung, field) for rung in rungs]
        assert getattr(task, field) in values
        assert field in {*told, "segment"} or {*values} == {getattr(task, field)}
    longest = [max(getattr(rung, "lengths", None) or [rung.length]) for rung in rungs]
    assert max(longest) == longest[-1] == max(getattr(task, "lengths", None) or [task.length])
    assert longest[0] <= longest[-1] // 2 or task.short_length >= longest[-1] // 4


def test_running_text_has_none():
    assert [*Perplexity().rungs(), *LongPPL().rungs()] == []


def texts(model, task):
    """Of each prompt and its short control: the text, and the answer."""
    for prompt in task.prompts(model):
        for one in (prompt, prompt.short):
            answer = model.tokenizer.decode(one.tokens[one.targets]).strip()
            yield model.tokenizer.decode(one.tokens), answer, one
        assert len(prompt.tokens) == task._lengths()[0]


@pytest.mark.parametrize("distractors", [1, 8])
def test_passkeys_of_other_colours(model, distractors):
    tested = Passkey(length=700, n=4, distractors=distractors)
    for text, answer, prompt in texts(model, tested):
        stated = re.findall(r" The (\w+) pass key is (\d{5})\. Remember it\. \2 is the \1 p", text)
        keys = dict(stated)
        assert len(keys) == len(set(keys.values())) == len(stated) == 1 + distractors
        [colour] = re.findall(r"What is the (\w+) pass key\?", text)
        assert keys[colour] == answer
        assert text.count(answer) == 3  # stated twice, and the answer itself
        assert all(len(set(digits)) <= 2 for digits in zip(*keys.values()))
        there = model.tokenizer.decode(prompt.tokens[prompt.facts["needle"] :])
        assert there.startswith(f" The {colour} pass key is {answer}.")
    places = [
        [m.start() for m in re.finditer(answer, text)] for text, answer, _ in texts(model, tested)
    ]
    assert len({tuple(place) for place in places}) > 4


@pytest.mark.parametrize(("distractors", "phrases"), [(1, 2), (7, 2), (8, 3)])
def test_best_things_of_other_cities(model, distractors, phrases):
    tested = Needle(lengths=(512,), n=4, distractors=distractors)
    for text, answer, prompt in texts(model, tested):
        stated = re.findall(r"The best thing to do in ([^.?]+) is ([^.?]+)\.", text)
        assert len(dict(stated)) == len(stated) == 1 + distractors
        assert len({activity for _, activity in stated}) == 1 + distractors
        [city] = re.findall(r"What is the best thing to do in ([^.?]+)\?", text)
        assert dict(stated)[city] == answer
        assert text.count(answer) == 2
        # "eat a sandwich" "beside ..." "at dawn": an activity's first two words tell its phrase
        assert len({tuple(activity.split()[:2]) for _, activity in stated}) <= phrases
        there = model.tokenizer.decode(prompt.tokens[prompt.facts["needle"] :])
        assert there.startswith(f" The best thing to do in {city} is {answer}.")


@pytest.mark.parametrize("near", [1, 5])
def test_keys_that_share_a_word(model, near):
    tested = MultiKey(length=512, n_keys=6, n=4, near_duplicates=near)
    for text, answer, _ in texts(model, tested):
        stated = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", text)
        numbers = dict(stated)
        assert len(numbers) == len(set(numbers.values())) == len(stated) == 6
        [asked] = re.findall(r"What is the special magic number for (\S+) mentioned", text)
        assert numbers.pop(asked) == answer
        assert text.count(answer) == 2
        shared = {key: len({*key.split("-")} & {*asked.split("-")}) for key in numbers}
        assert sorted(shared.values()) == [0] * (5 - near) + [1] * near
        alike = [answer, *(numbers[key] for key in numbers if shared[key])]
        assert all(len(set(digits)) <= 2 for digits in zip(*alike))


@pytest.mark.parametrize("near", [1, 3, 40])
def test_keys_one_digit_apart(model, near):
    for text, answer, prompt in texts(model, KeyValue(length=900, n=4, near_duplicates=near)):
        pairs = json.loads(text.split("JSON data:\n")[1].split("\n\nKey: ")[0])
        assert len(pairs) == len(set(pairs.values())) == prompt.facts["pairs"]
        [asked] = re.findall(r'Key: "(.+?)"', text)
        assert pairs.pop(asked) == answer
        assert text.count(answer) == 2
        apart = {key: sum(a != b for a, b in zip(key, asked)) for key in pairs}
        close = [key for key in pairs if apart[key] == 1]
        assert len(close) == min(near, len(pairs))
        assert all(n > 10 for n in apart.values() if n != 1)
        alike = [answer, *(pairs[key] for key in close)]
        assert all(len(set(digits)) <= 2 for digits in zip(*alike))


def test_near_duplicates_lie_anywhere(model):
    """Were they first of the other pairs, their place would tell them."""
    places = set()
    for text, *_ in texts(model, KeyValue(length=1200, n=8, near_duplicates=1)):
        pairs = json.loads(text.split("JSON data:\n")[1].split("\n\nKey: ")[0])
        [asked] = re.findall(r'Key: "(.+?)"', text)
        others = [key for key in pairs if key != asked]
        apart = [sum(a != b for a, b in zip(key, asked)) for key in others]
        places.add(apart.index(1))
    assert len(places) > 4

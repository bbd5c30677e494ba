"""Saved results that were edited are refused in one line, or are results all the same."""

from __future__ import annotations

import copy
import hashlib
import inspect
import io
import json
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from helpers import results_by_hand
from tl_posheads import PosheadsError
from tl_posheads.io.files import facts_sha256, table_bytes
from tl_posheads.statistics import power
from tl_posheads.studies.ablation import results

NAN, INF = float("nan"), float("inf")
some = pytest.mark.parametrize("most", [25, pytest.param(None, marks=pytest.mark.slow)])
kinds = pytest.mark.parametrize("kind", list(results_by_hand.KINDS))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fewer draws: what they tell is tested elsewhere."""
    few = lambda *args, **options: power.smallest_detectable(*args, **{**options, "n_sim": 10})
    monkeypatch.setattr(results, "smallest_detectable", few)
    monkeypatch.setattr("tl_posheads.statistics.ranks._N_SPLITS", 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each kind's class, and its files' names and bytes."""
    out = {}
    for kind, build in results_by_hand.KINDS.items():
        result = build()
        folder = result.save(tmp_path_factory.mktemp(kind))
        out[kind] = (type(result), {p.name: p.read_bytes() for p in folder.iterdir()})
    return out


def told(result):
    """Everything that a result says without arguments: its tables, tests and sentences."""
    names = [
        "to_pandas",
        "heads",
        "summary",
        "verdict",
        "effects",
        "trend",
        "losses",
        "answers",
        "curves",
        "achievement",
        "correlation",
        "overlap",
        "drift",
        "lead_lag",
        "pairs",
        "change",
        "attribution",
        "by_pair",
        "split_half",
        "positive_control",
        "cell_tokens",
        "break_point",
    ]
    out = [repr(result)]
    for name in names:
        tell = getattr(type(result), name, None)
        needs = (("AblationStudy", "effects"), ("ExtrapolationComparison", "overlap"))
        if tell is None or (type(result).__name__, name) in needs:
            continue
        try:
            few = {"n_boot", "n_draws"} & {*inspect.signature(tell).parameters}
            out.append(tell(result, **dict.fromkeys(few, 20)))
        except PosheadsError as refusal:
            out.append(one_line(refusal))
    return out


def one_line(refusal):
    assert "\n" not in str(refusal)
    assert len(str(refusal)) < 2000
    return str(refusal)


def loaded(cls, folder, files, *, signed):
    """The result in these files, after all that it says was asked for; None where refused.

    Args:
        signed: with checksums that are right, as of a writer who goes wrong.
    """
    for path in folder.iterdir():
        path.unlink()
    label = f"{cls._files.stem}.json"
    if signed:
        facts = json.loads(files[label])
        sums = facts.pop("sha256")
        if isinstance(sums, dict):
            sums = {
                n: hashlib.sha256(files[n]).hexdigest() if n in files else s
                for n, s in sums.items()
            }
            facts["sha256"] = {**sums, label: facts_sha256(facts)}
        files = {**files, label: json.dumps(facts).encode()}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = cls.load(folder)
        except PosheadsError as refusal:
            one_line(refusal)
            return None
        told(found)
    return found


def places(value, at=()):
    """Paths to everything in nested JSON."""
    yield at
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value[:3]):
            yield from places(part, (*at, key))


def other_values(value, draw):
    odd = [
        None,
        True,
        "",
        "x" * 999,
        "/dev/zero",
        -1,
        0,
        2**62,
        2**80,
        10**400,
        NAN,
        -INF,
        1e308,
        [],
        {},
        [[]],
        {"": None},
        "\ud800",
        [value, value],
    ]
    return [x for x in draw.sample(odd, 6) if repr(x) != repr(value)]


def edited_labels(label, draw):
    """Labels with one value replaced, left out, put twice, or a key renamed or added."""
    for at in places(label):
        if not at or at[0] in ("sha256", "format") or (at[0] == "provenance" and len(at) > 2):
            continue
        for value in [*other_values(label, draw), "left out", "renamed", "twice"]:
            whole = copy.deepcopy(label)
            holder = whole
            for key in at[:-1]:
                holder = holder[key]
            if value == "left out":
                del holder[at[-1]]
            elif value == "renamed" and isinstance(holder, dict):
                holder["other"] = holder.pop(at[-1])
            elif value == "twice" and isinstance(holder, list):
                holder.append(holder[at[-1]])
            else:
                holder[at[-1]] = value
            yield at, value, whole


@kinds
def test_every_edit_of_a_label_is_noticed(saved, tmp_path, kind):
    cls, files = saved[kind]
    name = f"{cls._files.stem}.json"
    label, draw = json.loads(files[name]), random.Random(0)
    assert loaded(cls, tmp_path, files, signed=False) is not None
    for at, value, edited in edited_labels(label, draw):
        changed = {**files, name: json.dumps(edited).encode()}
        if json.dumps(edited) != json.dumps(label):
            assert loaded(cls, tmp_path, changed, signed=False) is None, (at, value)
    data = bytearray(files[name])
    for _ in range(60):
        i = draw.randrange(len(data))
        flipped = data.copy()
        flipped[i] ^= 1 << draw.randrange(8)
        if flipped.decode("utf-8", "replace").split() != data.decode().split():
            found = loaded(cls, tmp_path, {**files, name: bytes(flipped)}, signed=False)
            assert found is None, flipped[max(0, i - 30) : i + 30]


def all_are_refused_or_results(cls, folder, edits, most):
    """Edits are what was edited, how, and the files; ``most`` of them are tried."""
    edits, failures, n_refused = list(edits), [], 0
    if most is not None and len(edits) > most:
        edits = random.Random(1).sample(edits, most)
    for *what, files in edits:
        try:
            n_refused += loaded(cls, folder, files, signed=True) is None
        except Exception as problem:
            failures.append((*map(str, what), repr(problem)[:300]))
    assert not failures
    assert n_refused > len(edits) / 3


@kinds
@some
def test_labels_with_right_checksums_are_refused_or_are_results(saved, tmp_path, kind, most):
    cls, files = saved[kind]
    name = f"{cls._files.stem}.json"
    edits = [
        (at, str(value)[:40], {**files, name: json.dumps(edited).encode()})
        for at, value, edited in edited_labels(json.loads(files[name]), random.Random(1))
    ]
    all_are_refused_or_results(cls, tmp_path, edits, most)


def other_tensors(tensor):
    yield "float", tensor.double() if not tensor.is_floating_point() else tensor.to(torch.int64)
    yield "half", tensor.half()
    yield "bool", tensor > 0
    yield "flat", tensor.flatten()
    yield "more", tensor[None]
    yield "none", tensor[:0]
    yield "none of the last", tensor[..., :0]
    yield "fewer", tensor[:-1]
    yield "turned", tensor.flip(0)
    yield "scalar", torch.tensor(1.0)
    for value in (0, -1, 1, 7, 2**62):
        yield str(value), torch.full_like(tensor, value)
    if tensor.is_floating_point():
        for value in (NAN, INF, -INF, 1e30, -1e30):
            yield str(value), torch.full_like(tensor, value)
        one = tensor.clone()
        one.view(-1)[0] = INF
        yield "one inf", one
    elif tensor.numel():
        one = tensor.clone()
        one.view(-1)[-1] = -(2**62)
        yield "one below", one


@kinds
@some
def test_tensors_with_right_checksums_are_refused_or_are_results(saved, tmp_path, kind, most):
    cls, files = saved[kind]
    name = f"{cls._files.stem}.safetensors"
    if name not in files:
        pytest.skip("it has none")
    tensors = load_tensors(files[name])
    edits = [
        (key, what, {**tensors, key: value})
        for key, tensor in tensors.items()
        for what, value in other_tensors(tensor)
    ]
    edits += [(k, "left out", {x: t for x, t in tensors.items() if x != k}) for k in tensors]
    edits += [(k, "renamed", {x + "_" * (x == k): t for x, t in tensors.items()}) for k in tensors]
    edits = [
        (
            key,
            what,
            {**files, name: save_tensors({k: t.contiguous().clone() for k, t in x.items()})},
        )
        for key, what, x in edits
    ]
    all_are_refused_or_results(cls, tmp_path, edits, most)


def other_tables(table):
    yield "", "none", table[:0]
    yield "", "no columns", table[[]]
    yield "", "fewer", table[:-1]
    yield "", "first gone", table[1:]
    yield "", "twice", pd.concat([table, table])
    yield "", "one twice", pd.concat([table, table[:1]])
    yield "", "turned", table[::-1]
    yield "", "extra", table.assign(extra=1)
    for name in table:
        yield name, "left out", table.drop(columns=name)
        yield name, "renamed", table.rename(columns={name: "other"})
        for value in (None, NAN, INF, -1, 0, 2**62, True, "x", "", b"\xff", 1e300):
            yield name, f"all {value}", table.assign(**{name: value})
            one = table[name].astype(object).copy()
            one.iloc[0] = value
            yield name, f"one {value}", table.assign(**{name: one})
        yield name, "lists", table.assign(**{name: [[1]] * len(table)})


@kinds
@some
def test_tables_with_right_checksums_are_refused_or_are_results(saved, tmp_path, kind, most):
    cls, files = saved[kind]
    names = [name for name in files if name.endswith(".parquet") and name != cls._files.export]
    if not names:
        pytest.skip("it has none")
    edits = []
    for name in names:
        for column, what, table in other_tables(pd.read_parquet(io.BytesIO(files[name]))):
            try:
                edits.append((name, column, what, {**files, name: table_bytes(table)}))
            except Exception:  # no Parquet file holds such a column
                continue
    all_are_refused_or_results(cls, tmp_path, edits, most)


@kinds
def test_flipped_bits_are_noticed(saved, tmp_path, kind):
    cls, files = saved[kind]
    draw = random.Random(2)
    for name, data in files.items():
        if name.endswith(".json"):
            continue
        for _ in range(5):
            flipped = bytearray(data)
            flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            changed = {**files, name: bytes(flipped)}
            assert loaded(cls, tmp_path, changed, signed=False) is None, name


def test_what_is_said_of_whole_results_is_no_refusal(saved, tmp_path):
    """The kinds above are results in the first place, so that a refusal is of the edit."""
    for kind, (cls, files) in saved.items():
        found = loaded(cls, tmp_path, files, signed=True)
        assert found is not None, kind
        for one in told(found):
            assert not isinstance(one, str) or not one.startswith("damaged")
        np.testing.assert_equal(repr(found), repr(results_by_hand.KINDS[kind]()))

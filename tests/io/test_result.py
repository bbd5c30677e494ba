"""What is saved in a folder comes back as it was, or is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import Float, Float64, Int
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tl_posheads import HeadScores, PosheadsError
from tl_posheads.io.files import facts_sha256
from tl_posheads.io.result import Files, Result
from tl_posheads.scoring.curves import DominantDimensionCurve

NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Part:
    weights: Float[Tensor, " item"]
    share: float


@dataclass(frozen=True, eq=False)
class Everything(Result):
    values: Float64[Tensor, "doc head"]
    counts: Int[Tensor, " doc"]
    missing: Float[Tensor, " doc"] | None
    heads: Annotated[tuple[tuple[int, int], ...], "head"]
    names: Annotated[list[str], "doc"]
    windows: tuple[int | None, ...]
    parts: tuple[Part, ...]
    kind: Literal["one", "two"]
    trained: int
    rate: float
    exact: bool
    word: str | None
    cells: Annotated[pd.DataFrame, "prompt effect"]
    table: pd.DataFrame
    provenance: dict[str, Any]

    _files = Files("all", "results of all kinds", "make them again", version=3)

    def _check(self) -> None:
        if self.trained < 1:
            raise ValueError("trained on nothing")


def everything(**changes):
    shared = torch.arange(4.0)
    whole = dict(
        values=torch.tensor([[0.5, -1, 1e-300], [NAN, float("inf"), 2]], dtype=torch.float64).T,
        counts=torch.tensor([3, 2**62, -1]),
        missing=None,
        heads=((0, 1), (2, 3)),
        names=["a", "</script>", "ä\n"],
        windows=(None, 16),
        parts=(Part(shared, NAN), Part(shared[::2], 0.1), Part(shared, 1.0)),
        kind="two",
        trained=24,
        rate=1e-17,
        exact=True,
        word=None,
        cells=pd.DataFrame({"prompt": [0, 1], "effect": [NAN, 0.25], "task": ["x", "y"]}),
        table=pd.DataFrame({"exact": [True, False]}),
        provenance={"nested": {"a": [1, None, 0.1]}, "none": NAN, "text": "ü"},
    )
    return Everything(**{**whole, **changes})


def same(one, other):
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert one.contiguous().numpy().tobytes() == other.numpy().tobytes()
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other)
    elif isinstance(one, Part):
        for f in fields(one):
            same(getattr(one, f.name), getattr(other, f.name))
    elif isinstance(one, tuple | list):
        assert type(one) is type(other)
        assert len(one) == len(other)
        for mine, theirs in zip(one, other):
            same(mine, theirs)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    else:
        assert type(one) is type(other)
        assert one == other or (np.isnan(one) and np.isnan(other))


@pytest.mark.parametrize("missing", [None, torch.tensor([1.0, 2.0, NAN])])
def test_every_kind_of_field_comes_back(tmp_path, missing):
    saved = everything(missing=missing)
    folder = saved.save(tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b"
    names = ["all.json", "all.parquet", "all.safetensors", "cells.parquet"]
    assert sorted(path.name for path in folder.iterdir()) == names
    loaded = Everything.load(folder)
    for f in fields(Everything):
        same(getattr(saved, f.name), getattr(loaded, f.name))
    label = json.loads((folder / "all.json").read_text())
    assert (label["format"], label["version"]) == ("tl_posheads.Everything", 3)
    assert sorted(label["sha256"]) == names


def refused(folder, message, kind=Everything):
    with pytest.raises(PosheadsError, match=message) as caught:
        kind.load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def relabelled(folder, change=lambda label: None):
    """Change the label, and say that every file is what it should be."""
    path = folder / "all.json"
    label = json.loads(path.read_text())
    files = {*label["sha256"]} - {path.name}
    label["sha256"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files
    }
    change(label)
    sums = label.pop("sha256")
    if isinstance(sums, dict):
        sums[path.name] = facts_sha256(label)
    path.write_text(json.dumps({**label, "sha256": sums}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(more=1), "label has other keys"),
        (dict(values=[[1.0]]), "label has other keys"),
        (dict(heads=None), "heads is None"),
        (dict(heads=[[0, 1], [2]]), "shorter"),
        (dict(heads=[[0, 1], [2, 3, 4]]), "longer"),
        (dict(heads=[[0, 1], [2, "3"]]), "heads.1.1 is 3, not int"),
        (dict(heads=[[0, 1], [2, True]]), "heads.1.1 is True, not int"),
        (dict(heads=[[0, 1], [2, 3.0]]), "heads.1.1 is 3.0, not int"),
        (dict(heads=[[0, 1]]), "heads are 1, not one a head"),
        (dict(heads=[[0, 1]] * 3), "heads are 3, not one a head"),
        (dict(names=["a", "b"]), "names are 2, not one a doc"),
        (dict(names="abc"), "names is abc"),
        (dict(names=["a", "b", None]), "names.2 is None"),
        (dict(windows=[None, "a"]), "windows.1 is a"),
        (dict(kind="three"), "kind is three"),
        (dict(kind=[]), "kind is"),
        (dict(trained=NAN), "trained is nan"),
        (dict(trained=2**63), "trained is 9223372036854775808"),
        (dict(trained=True), "trained is True"),
        (dict(trained=-1), "trained is -1"),
        (dict(trained=0), "trained on nothing"),
        (dict(rate="fast"), "rate is fast"),
        (dict(rate=10**400), "too large"),
        (dict(exact=1), "exact is 1"),
        (dict(word=["a", "\n"]), "word is"),
        (dict(provenance=[]), "provenance is"),
        (dict(provenance=None), "provenance is None"),
        (dict(parts=[{"share": 1.0}] * 2), "parts.2.weights"),
        (dict(parts=[{"share": 1.0}] * 4), "parts.3.weights is None"),
        (dict(parts=[{"share": 1.0, "weights": 0}] * 3), "parts.0 has other keys"),
        (dict(parts=[{}] * 3), "parts.0 has other keys"),
        (dict(sha256=None), "no checksums"),
        (dict(sha256=[]), "no checksums"),
        (dict(sha256={}), "values is None"),
        (dict(sha256={"/etc/hostname": "0"}), "other files"),
        (dict(sha256={"../secret": "0"}), "other files"),
        (dict(sha256={"all.safetensors": None}), "checksum of all.safetensors differs"),
    ],
)
def test_hostile_labels_are_refused(tmp_path, changes, message):
    everything().save(tmp_path / "s")
    (tmp_path / "secret").write_text("x")
    relabelled(tmp_path / "s", lambda label: label.update(changes))
    refused(
        tmp_path / "s", f"results of all kinds in .* are damaged .*{message}.*; make them again"
    )


@pytest.mark.parametrize("name", [f.name for f in fields(Everything)])
def test_a_field_that_is_left_out_is_named(tmp_path, name):
    everything(missing=torch.zeros(3)).save(tmp_path)
    label = json.loads((tmp_path / "all.json").read_text())
    tensors = load_tensors((tmp_path / "all.safetensors").read_bytes())
    label.pop(name, None)
    label["sha256"].pop({"table": "all.parquet"}.get(name, f"{name}.parquet"), None)
    tensors.pop(name, None)
    (tmp_path / "all.safetensors").write_bytes(save_tensors(tensors))
    (tmp_path / "all.json").write_text(json.dumps(label))
    relabelled(tmp_path)
    if name == "missing":  # that may be
        assert Everything.load(tmp_path).missing is None
    else:
        refused(tmp_path, f"({name} is None|other keys than .*'{name}')")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(values=torch.zeros(3, 2)), "values is torch.float32"),
        (dict(values=torch.zeros(3, dtype=torch.float64)), "values is torch.float64"),
        (dict(values=torch.zeros(2, 2, dtype=torch.float64)), "counts is torch.int64"),
        (dict(counts=torch.zeros(3)), "counts is torch.float32"),
        (dict(counts=torch.zeros(4, dtype=torch.long)), "counts is torch.int64"),
        (dict(missing=torch.zeros(5)), "missing is torch.float32"),
        (dict(other=torch.zeros(5)), "'other'.* not asked for"),
        ({"parts.3.weights": torch.zeros(5)}, "'parts.3.weights'.* not asked for"),
        ({"parts.1.weights": torch.zeros(5, 1)}, "parts.1.weights is torch.float32"),
    ],
)
def test_tensors_of_another_kind_are_refused(tmp_path, changes, message):
    everything().save(tmp_path)
    tensors = load_tensors((tmp_path / "all.safetensors").read_bytes())
    (tmp_path / "all.safetensors").write_bytes(save_tensors({**tensors, **changes}))
    relabelled(tmp_path)
    refused(tmp_path, f"damaged .*{message}.*; make them again")


def test_tables_without_their_columns_are_refused(tmp_path):
    everything().save(tmp_path)
    pd.DataFrame({"prompt": [1]}).to_parquet(tmp_path / "cells.parquet")
    relabelled(tmp_path)
    refused(tmp_path, "cells has no column effect")
    empty = everything(cells=pd.DataFrame())
    assert Everything.load(empty.save(tmp_path)).cells.empty


@pytest.mark.parametrize("name", ["all.safetensors", "cells.parquet", "all.parquet", "all.json"])
@pytest.mark.parametrize("relabel", [False, True])
@pytest.mark.parametrize("keep", [0, 9, 0.5, -1])
def test_truncated_files_are_refused(tmp_path, name, relabel, keep):
    everything().save(tmp_path)
    data = (tmp_path / name).read_bytes()
    keep = int(keep * len(data)) if isinstance(keep, float) else keep
    (tmp_path / name).write_bytes(data[: keep - (name == "all.json" and keep == -1)])
    if relabel and name != "all.json":
        relabelled(tmp_path)
    refused(tmp_path, "damaged")


@pytest.mark.parametrize("name", ["all.safetensors", "cells.parquet", "all.parquet", "all.json"])
def test_what_is_no_file_is_refused(tmp_path, name):
    everything().save(tmp_path)
    (tmp_path / name).unlink()
    refused(tmp_path, f"holds no results of all kinds .*{name} is missing")
    os.mkfifo(tmp_path / name)  # reading it would wait for ever
    refused(tmp_path, f"{name} is no file")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refused(tmp_path, f"{name} is no file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "damaged"),
        ('{"format": "tl_posheads.Everything", "version": 3, "trained": ' + "9" * 5000, "damaged"),
        ("\ud800", "damaged"),
        ("null", "not written by Everything.save"),
        ("[]", "not written by Everything.save"),
        ('{"format": ["tl_posheads.Everything"]}', "not written by Everything.save"),
        ('{"format": "tl_posheads.HeadScores", "version": 3}', "not written by Everything.save"),
        ('{"format": "tl_posheads.Everything"}', "version None"),
        ('{"format": "tl_posheads.Everything", "version": 2}', "otherwise: make them again"),
        ('{"format": "tl_posheads.Everything", "version": 4}', "install a newer"),
        ('{"format": "tl_posheads.Everything", "version": "\\n\\n"}', "install a newer"),
        ('{"format": "tl_posheads.Everything", "version": [' + "1, " * 9999 + "1]}", "version .1"),
    ],
)
def test_other_labels_are_refused(tmp_path, text, message):
    everything().save(tmp_path)
    (tmp_path / "all.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(tmp_path, message)


def test_a_label_too_large_is_not_read(tmp_path):
    everything().save(tmp_path)
    with open(tmp_path / "all.json", "r+b") as file:
        file.truncate(2**40)
    refused(tmp_path, "all.json is no file, or too large")


def test_a_save_that_fails_in_between_is_refused(tmp_path, monkeypatch):
    everything().save(tmp_path)
    real, calls = os.replace, []

    def fails(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError("disk full")
        real(*args)

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        everything(values=torch.zeros(3, 2, dtype=torch.float64), cells=everything().table).save(
            tmp_path
        )
    refused(tmp_path, "checksum of .* differs")
    assert not list(tmp_path.glob(".*"))


def test_checks_of_a_class_hold_for_what_it_is_made_of(tmp_path):
    @dataclass(frozen=True, eq=False)
    class Several(Result):
        scores: tuple[HeadScores, ...]
        curve: DominantDimensionCurve

        _files = Files("several", "several", "again")

    names, curve = (
        ("a", "b"),
        DominantDimensionCurve(
            heads=[(0, 1)],
            distance=torch.arange(1, 4),
            n_qk_pairs=torch.ones(1, 3, dtype=torch.long),
            mean=torch.zeros(1, 3),
            quantiles=torch.zeros(1, 2, 3),
            levels=(0.1, 0.9),
            allocation=torch.zeros(1, 5, 3),
            wavelengths=torch.ones(1, 5),
        ),
    )
    good = HeadScores(torch.zeros(6, 2, 1, 3, dtype=torch.float64), names, (None,), {})
    saved = Several((good, good), curve).save(tmp_path / "good")
    assert [s.document_names for s in Several.load(saved).scores] == [names] * 2
    for wrong in (
        HeadScores(good.values + 2, names, (None,), {}),
        HeadScores(good.values[:5], names, (None,), {}),
        HeadScores(good.values, ("a",), (None,), {}),
        HeadScores(good.values, names, (0,), {}),
        HeadScores(good.values, names, (None, None), {}),
        HeadScores(good.values.float(), names, (None,), {}),
    ):
        refused(Several((good, wrong), curve).save(tmp_path), "damaged", Several)

"""Files of scores, which are whole or refused."""

from __future__ import annotations

import hashlib
import json

import pandas as pd
import pytest
import torch
from safetensors.torch import save as save_tensors

from helpers.scores_by_hand import scores_with_gaps
from tl_posheads import HeadScores, PosheadsError
from tl_posheads.io.files import facts_sha256, write_bytes


def test_save_and_load_round_trip_bit_for_bit(tmp_path):
    s = scores_with_gaps()
    s.save(tmp_path / "a" / "b")
    loaded = HeadScores.load(tmp_path / "a" / "b")
    assert loaded.values.dtype == torch.float64
    assert loaded.values.numpy().tobytes() == s.values.numpy().tobytes()
    assert (loaded.document_names, loaded.windows) == (s.document_names, s.windows)
    assert loaded.provenance == s.provenance
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "a" / "b" / "table.parquet"), s.to_pandas()
    )
    assert loaded.summary() == s.summary()
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "scores.json",
        "scores.safetensors",
        "table.parquet",
    ]


def refused(folder, message):
    with pytest.raises(PosheadsError, match=message) as caught:
        HeadScores.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scores.safetensors", lambda b: b[:-9], "damaged"),
        ("table.parquet", lambda b: b + b"x", "damaged"),
        ("scores.json", lambda b: b[:40], "damaged"),
        ("scores.json", lambda b: b"{}", "not written by HeadScores"),
        ("scores.json", lambda b: b"[1]", "not written by HeadScores"),
        (
            "scores.json",
            lambda b: b.replace(b'"version": 2', b'"version": 1'),
            "version 1, .* measured otherwise: score again",
        ),
        (
            "scores.json",
            lambda b: b.replace(b'"version": 2', b'"version": 3'),
            "version 3, .* install a newer",
        ),
        ("scores.json", lambda b: b.replace(b'"version": 2', b'"version": "x"'), "version x"),
        ("scores.json", lambda b: b'{"format": "tl_posheads.HeadScores", "version": 2}', "damaged"),
    ],
)
def test_damaged_foreign_and_old_files_are_refused(tmp_path, name, change, message):
    scores_with_gaps().save(tmp_path)
    path = tmp_path / name
    path.write_bytes(change(path.read_bytes()))
    refused(tmp_path, message)


def relabelled(folder, **changes):
    """Change the label, and say that every part is what it should be."""
    label = json.loads((folder / "scores.json").read_text())
    label.update(changes)
    sums = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in {*label.pop("sha256")} - {"scores.json"}
    }
    sums["scores.json"] = facts_sha256(label)
    (folder / "scores.json").write_text(json.dumps({**label, "sha256": sums}))


@pytest.mark.parametrize(
    "changes",
    [
        dict(document_names=["a"] * 7),
        dict(document_names=["a", *map(str, range(6)), "a"]),
        dict(document_names=list(range(8))),
        dict(document_names=None),
        dict(windows=[None] * 3),
        dict(windows=None),
        dict(provenance=[]),
        dict(provenance=None),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, changes):
    scores_with_gaps().save(tmp_path)
    relabelled(tmp_path, **changes)
    refused(tmp_path, "scores in .* are damaged .*; score again")


@pytest.mark.parametrize("windows", [["a", None, None, None], [[], None, None, None]])
def test_windows_of_another_kind_are_refused(tmp_path, windows):
    scores_with_gaps().save(tmp_path)
    relabelled(tmp_path, windows=windows)
    refused(tmp_path, "scores in .* are damaged .*; score again")


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v * 9,
        lambda v: v.float(),
        lambda v: v[:5],
        lambda v: v[:, :4],
        lambda v: v[0],
        lambda v: v[:, :, :3],
    ],
)
def test_values_that_no_scores_have_are_refused(tmp_path, change):
    s = scores_with_gaps()
    s.save(tmp_path)
    data = save_tensors({"values": change(s.values).contiguous()})
    (tmp_path / "scores.safetensors").write_bytes(data)
    relabelled(tmp_path)
    refused(tmp_path, "scores in .* are damaged .*; score again")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(save_tensors({"other": torch.zeros(3)}), id="another tensor"),
        pytest.param(
            b"",
            id="nothing",
        ),
        pytest.param(
            b"no tensors",
            id="text",
        ),
    ],
)
def test_files_that_hold_no_values_are_refused(tmp_path, data):
    scores_with_gaps().save(tmp_path)
    (tmp_path / "scores.safetensors").write_bytes(data)
    relabelled(tmp_path)
    refused(tmp_path, "scores in .* are damaged .*; score again")


def test_missing_files_are_refused(tmp_path):
    refused(tmp_path / "nothing", "holds no scores")
    scores_with_gaps().save(tmp_path / "s")
    (tmp_path / "s" / "table.parquet").unlink()
    refused(tmp_path / "s", "holds no scores")
    (tmp_path / "file").write_text("x")
    with pytest.raises(PosheadsError, match="is a file"):
        scores_with_gaps().save(tmp_path / "file")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_bytes(path, b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_label_is_plain_json(tmp_path):
    scores_with_gaps().save(tmp_path)
    label = json.loads((tmp_path / "scores.json").read_text())
    assert (label["format"], label["version"]) == ("tl_posheads.HeadScores", 2)
    assert set(label["sha256"]) == {"scores.json", "scores.safetensors", "table.parquet"}

"""Tables, comparison, and files that are whole or refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from tl_posheads import HeadScores, PosheadsError
from tl_posheads.files import write_bytes


def scores(seed=0, layers=4, heads=5):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(layers, heads, generator=generator, dtype=torch.float64)

    rho = draw() / 3
    rho[2] = float("nan")
    n_pairs = torch.full((layers, heads), 77)
    n_pairs[2] = 0
    return HeadScores(
        rho=rho, ci_low=rho - 0.1, ci_high=rho + 0.1, rho_geometry=draw(), p_null=draw().abs(),
        se=draw() * float("nan"), n_pairs=n_pairs, windows=(None, 16, None, None),
        provenance={"model": "toy </script>", "seed": 3, "nested": {"a": [1, None]}},
    )  # fmt: skip


def test_top_takes_counts_and_fractions_best_first():
    s = scores()
    best = s.top(4)
    values = [float(s.rho[place]) for place in best]
    assert values == sorted(s.rho[torch.isfinite(s.rho)].tolist(), reverse=True)[:4]
    assert len(s.top(0.2)) == 3  # of 15 scored heads
    assert s.top(1.0) == s.top(15) == s.top(999)
    assert len(s.top(1)) == 1
    for wrong in (0, -1, 0.0, 1.5, "5", True):
        with pytest.raises(PosheadsError, match="expected a"):
            s.top(wrong)
    assert s.above(0.0) == [place for place in s.top(15) if s.ci_low[place] > 0]


def test_table_has_the_scored_heads():
    frame = scores().to_pandas()
    assert frame.columns.tolist() == ["layer", "head", "rho", "ci_low", "ci_high", "rho_geometry",
                                      "p_null", "n_pairs", "window"]  # fmt: skip
    assert frame.layer.unique().tolist() == [0, 1, 3]
    assert frame.window.isna().tolist() == [True] * 5 + [False] * 5 + [True] * 5


def test_save_and_load_round_trip_bit_for_bit(tmp_path):
    s = scores()
    s.save(tmp_path / "a" / "b")
    loaded = HeadScores.load(tmp_path / "a" / "b")
    for name in ("rho", "ci_low", "ci_high", "rho_geometry", "p_null", "se", "n_pairs"):
        mine, theirs = getattr(s, name), getattr(loaded, name)
        assert mine.dtype == theirs.dtype
        assert mine.numpy().tobytes() == theirs.numpy().tobytes()
    assert (loaded.windows, loaded.provenance) == (s.windows, s.provenance)
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "a" / "b" / "table.parquet"), s.to_pandas()
    )
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "scores.json", "scores.safetensors", "table.parquet"
    ]  # fmt: skip


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scores.safetensors", lambda b: b[:-9], "damaged"),
        ("table.parquet", lambda b: b + b"x", "damaged"),
        ("scores.json", lambda b: b[:40], "damaged"),
        ("scores.json", lambda b: b"{}", "not written by HeadScores"),
        ("scores.json", lambda b: b"[1]", "not written by HeadScores"),
        ("scores.json", lambda b: b.replace(b'"version": 1', b'"version": 2'), "version 2"),
        ("scores.json", lambda b: b'{"format": "tl_posheads.HeadScores", "version": 1}', "damaged"),
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, name, change, message):
    scores().save(tmp_path)
    damage(tmp_path, name, change)
    with pytest.raises(PosheadsError, match=message):
        HeadScores.load(tmp_path)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(PosheadsError, match="holds no scores"):
        HeadScores.load(tmp_path / "nothing")
    scores().save(tmp_path / "s")
    (tmp_path / "s" / "table.parquet").unlink()
    with pytest.raises(PosheadsError, match="holds no scores"):
        HeadScores.load(tmp_path / "s")
    (tmp_path / "file").write_text("x")
    with pytest.raises(PosheadsError, match="is a file"):
        scores().save(tmp_path / "file")


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


def test_comparison_with_itself_another_and_chance():
    a, b = scores(0), scores(1)
    same = a.compare(a, k=5)
    assert (same.rank_correlation, same.overlap, same.n_heads) == (pytest.approx(1.0), 5, 15)
    assert same.chance == pytest.approx(25 / 15)
    other = a.compare(b, k=5)
    known = torch.isfinite(a.rho)
    assert other.rank_correlation == pytest.approx(
        stats.spearmanr(a.rho[known], b.rho[known]).statistic
    )
    assert other.overlap == len(set(a.top(5)) & set(b.top(5)))
    assert 0 < same.p_chance < other.p_chance <= 1
    with pytest.raises(PosheadsError, match="same heads"):
        a.compare(scores(layers=3))
    empty = HeadScores(**{**a.__dict__, "rho": a.rho * np.nan})
    with pytest.raises(PosheadsError, match="0 heads in common"):
        a.compare(empty)


def test_label_is_plain_json(tmp_path):
    scores().save(tmp_path)
    label = json.loads((tmp_path / "scores.json").read_text())
    assert label["format"] == "tl_posheads.HeadScores"
    assert set(label["sha256"]) == {"scores.safetensors", "table.parquet"}

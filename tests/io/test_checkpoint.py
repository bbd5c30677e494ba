"""Units of a long run: whole and of this run, or done again."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from tl_posheads import PosheadsError
from tl_posheads.io.checkpoint import Checkpoint

UNIT = {"0": torch.arange(6.0).view(2, 3), "1": torch.tensor([float("nan"), -0.0])}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes()


def test_units_come_back(tmp_path):
    Checkpoint(tmp_path / "c", {"seed": 0}).write("a", UNIT)
    kept = Checkpoint(tmp_path / "c", {"seed": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(kept.read("a"), UNIT)
        assert kept.read("b") is None
    # An open format: others read it, too.
    same(load_tensors((tmp_path / "c" / "a.safetensors").read_bytes()), UNIT)
    with pytest.raises(PosheadsError, match="belongs to another run"):
        Checkpoint(tmp_path / "c", {"seed": 1})


def test_every_flipped_bit_is_noticed(tmp_path):
    kept = Checkpoint(tmp_path, {})
    kept.write("a", UNIT)
    path = tmp_path / "a.safetensors"
    data = path.read_bytes()
    for i in range(len(data)):
        flipped = bytearray(data)
        flipped[i] ^= 1 << i % 8
        path.write_bytes(flipped)
        with pytest.warns(UserWarning, match="a in the checkpoint .* is damaged .*done again"):
            assert kept.read("a") is None
    path.write_bytes(data)
    same(kept.read("a"), UNIT)


def test_units_of_others_are_done_again(tmp_path):
    kept = Checkpoint(tmp_path, {"seed": 0})
    kept.write("a", UNIT)
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(data)  # another unit's name
    (tmp_path / "c.safetensors").write_bytes(save_tensors(UNIT))  # without a checksum
    os.mkfifo(tmp_path / "d.safetensors")  # reading it would wait for ever
    for unit in "bcd":
        with pytest.warns(UserWarning, match=f"{unit} in the checkpoint"):
            assert kept.read(unit) is None
    # Two that began at the same moment: the later one's plan is the folder's.
    (tmp_path / "plan.json").unlink()
    for unit in "abcd":
        (tmp_path / f"{unit}.safetensors").unlink()
    (tmp_path / "a.safetensors").write_bytes(data)
    (tmp_path / "plan.json").write_text('{"seed": 1}')
    with pytest.warns(UserWarning, match="a in the checkpoint"):
        assert Checkpoint(tmp_path, {"seed": 1}).read("a") is None


def test_what_a_kill_left_does_not_refuse_the_folder(tmp_path):
    (tmp_path / ".plan.json.0123abcd.part").write_text("{")
    Checkpoint(tmp_path, {}).write("a", UNIT)
    same(Checkpoint(tmp_path, {}).read("a"), UNIT)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(PosheadsError, match="holds no checkpoint"):
        Checkpoint(tmp_path / "mine", {})
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 99])
def test_other_plans_are_refused(tmp_path, text):
    (tmp_path / "plan.json").write_bytes(text)
    with pytest.raises(PosheadsError, match="belongs to another run"):
        Checkpoint(tmp_path, {})
    (tmp_path / "plan.json").unlink()
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(PosheadsError, match=r"plan\.json can't be read"):
        Checkpoint(tmp_path, {})

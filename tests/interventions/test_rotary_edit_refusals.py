"""Edits of rotary pairs that are refused, and leave the model as it was."""

from __future__ import annotations

import pytest

from helpers import small_models
from helpers.traces import state, warm
from tl_posheads import PosheadsError, edit_rotary
from tl_posheads import extrapolation as ex

pytestmark = pytest.mark.lens

HEADS = [(1, 2), (0, 1)]


@pytest.fixture(scope="module")
def llama():
    return warm(small_models.rotary_model("Llama"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(), "no edit was given"),
        (dict(scale={}), "no edit was given"),
        (dict(scale={4: 0.0}), "pairs 0 to 3"),
        (dict(freeze=[-1]), "pairs 0 to 3"),
        (dict(swap=[(0, 9)]), "pairs 0 to 3"),
        (dict(scale={0: float("nan")}), "finite number"),
        (dict(shift={0: "far"}), "finite number"),
        (dict(scale={0: 1.0}, shift={0: 1.0}), "two edits"),
        (dict(scale={0: 1.0, range(2): 0.5}), "two edits"),
        (dict(swap=[(0, 1), (1, 2)]), "two edits"),
        (dict(swap=[(0, 1)], remap={0: 3}), "two edits"),
        (dict(swap=3), "pairs of pairs"),
        (dict(scale=0.0), "expected a dict"),
        (dict(remap=[1, 2]), "expected a dict"),
        (dict(scale={"slow": 0.0}), "pair's number"),
        (dict(scale={True: 0.0}), "pair's number"),
        (dict(scale={range(2, 2): 0.0}), "pair's number"),
        (dict(scale={0: 10**400}), "finite number"),
        (dict(shift={0: -float("inf")}), "finite number"),
        (dict(remap={0: (1, 2)}), "one pair's number"),
        (dict(remap={(0, 1): 2}), "one pair's number"),
        (dict(swap=[(1, 1)]), "two edits"),
    ],
)
def test_bad_edits(llama, given, message):
    before = state(llama)
    with pytest.raises(PosheadsError, match=message), edit_rotary(llama, HEADS, **given):
        pass
    assert state(llama)[:2] == before[:2]


def test_refusals(llama):
    before = state(llama)
    with pytest.raises(PosheadsError, match="layer 5"), edit_rotary(llama, [(5, 0)], scale={0: 0}):
        pass
    edit = edit_rotary(llama, HEADS, scale={0: 0.0})
    with edit:
        with pytest.raises(PosheadsError, match="all edits in one call"):
            edit_rotary(llama, HEADS, scale={1: 0.0}).__enter__()
        with pytest.raises(PosheadsError, match="enter the method first"):
            ex.Linear(2)(llama).__enter__()
    with ex.SelfExtend(2, 4)(llama), pytest.raises(PosheadsError, match="inside SelfExtend"):
        edit_rotary(llama, HEADS, swap=[(0, 1)]).__enter__()
    with ex.DynamicNTK(2)(llama), pytest.raises(PosheadsError, match="depend on the text's"):
        edit_rotary(llama, HEADS, freeze=[0]).__enter__()
    with ex.NoPE(pairs=(3,))(llama), pytest.raises(PosheadsError, match="doesn't turn"):
        edit_rotary(llama, HEADS, remap={3: 0}).__enter__()
    with pytest.raises(PosheadsError, match="tiny-GPT2.*not RoPE"):
        edit_rotary(small_models.other_model("GPT-2"), [(0, 0)], scale={0: 0.0}).__enter__()
    assert state(llama)[:2] == before[:2]

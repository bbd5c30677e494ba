"""Lags between a head's score and the loss: by hand, of logistic curves, and planted ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tl_posheads as ph
from helpers.planted_training import STEPS, planted
from tl_posheads import emergence

pytestmark = pytest.mark.lens


@pytest.mark.parametrize(
    ("values", "octave"),
    [
        ([0, 0, 0, 1, 1, 1, 1], 2.5),
        ([5, 5, 1, 1, 1, 1, 1], 1.5),
        ([0, 1, 0, 0, 0, 1, 1], 4.5),  # it must stay beyond half
        ([0, 0.25, 0.75, 1, 1, 1, 1], 1.5),
        ([0, 0, 0, 0, 0, 0, 1], 5.5),
        ([1, 1, 1, 1, 1, 1, 1], np.nan),
        ([0, np.nan, 1, 1, 1, 1, 1], np.nan),
    ],
)
def test_crossing_by_hand(values, octave):
    found = emergence.crossing(STEPS, np.array(values, dtype=float))
    np.testing.assert_allclose(np.log2(found + 1), octave)


@given(at=st.lists(st.floats(1, 5), min_size=2, max_size=2), scale=st.floats(-9, 9))
def test_lags_of_logistic_curves(at, scale):
    octaves = np.linspace(0, 6, 200)
    both = [1 / (1 + np.exp(-40 * (octaves - place))) for place in at]
    steps = 2**octaves - 1
    rising = both[0] * (1 + abs(scale)) + scale
    lag = float(emergence.lead_lag.lag_of(steps, rising, -3 * both[1]))
    assert lag == pytest.approx(at[0] - at[1], abs=0.01)


@pytest.mark.parametrize(("score", "loss"), [(1.5, 3.5), (4.2, 2.2), (3.0, 3.0)])
def test_planted_lags_are_found_with_an_interval_around_them(score, loss):
    table = planted(score, loss).lead_lag(n_draws=200)
    head = table.iloc[0]
    assert (head["layer"], head["head"]) == (0, 0)
    for name in ("loss", "gain"):
        assert head[f"lag_{name}"] == pytest.approx(score - loss, abs=0.25)
        assert head[f"lag_{name}_low"] <= head[f"lag_{name}"] <= head[f"lag_{name}_high"]
        assert head[f"lag_{name}_high"] - head[f"lag_{name}_low"] < 0.5
    # The head that didn't rise has no time.
    assert np.isnan(table.iloc[1]["lag_loss"])
    assert np.isnan(table.iloc[1]["step_score"])


def test_pooled_lags_draw_runs_and_heads():
    runs = [planted(2.0, 4.0, seed=seed).lead_lag(n_draws=50) for seed in range(3)]
    pooled = emergence.pooled_lag(runs)
    assert pooled["lag"] == pytest.approx(-2, abs=0.2)
    assert pooled["ci_low"] <= pooled["lag"] <= pooled["ci_high"] < 0
    assert (pooled["n_heads"], pooled["n_runs"]) == (3, 3)
    assert np.isnan(emergence.pooled_lag([pd.DataFrame({"lag_loss": [np.nan]})])["lag"])
    with pytest.raises(ph.PosheadsError, match="column='nothing'"):
        emergence.pooled_lag(runs, "nothing")

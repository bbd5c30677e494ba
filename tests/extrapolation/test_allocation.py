"""By how much planted weights of slow pairs are drawn out, and what can't be told."""

from __future__ import annotations

import numpy as np
import pytest

from tl_posheads import PosheadsError, allocation_stretch

TRAINED, LONGEST = 256, 2048
D = np.arange(1, LONGEST + 1)
H = np.arange(3)[None, :, None]


def line(d):
    """Rises evenly with the logarithm of the distance, so that bins and levels add no error."""
    return 0.3 + 0.02 * H + 0.04 * np.log2(d)[None, None]


def saturating(d):
    return 0.2 + 0.05 * H + 0.6 * (1 - np.exp(-(np.log2(d)[None, None] + 3) / 5))


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_known_stretch_is_found_exactly(scale, sign):
    extended, bare = line(D / scale), line(D[:TRAINED])
    if sign < 0:
        extended, bare = 1 - extended, 1 - bare
    found = allocation_stretch(extended, bare, trained=TRAINED, n_boot=20)
    assert found.reason is None
    assert found.scale == pytest.approx(scale, rel=1e-9)
    assert (found.unit, found.n_heads, found.n_docs) == ("heads", 3, 1)


def test_curves_that_are_no_lines():
    found = allocation_stretch(saturating(D / 4), saturating(D[:TRAINED]), trained=TRAINED)
    assert found.scale == pytest.approx(4, rel=0.01)
    assert found.monotone_bare == pytest.approx(1)
    low, high = saturating(D[:1]).mean(), saturating(D[TRAINED - 1 : TRAINED]).mean()
    assert low <= found.weight_low < found.weight_high <= high


def planted(rng, scale, docs=8):
    shared = rng.normal(0, 0.02, (docs, 1, 1)) + rng.normal(0, 0.01, (docs, 3, LONGEST))
    extended = saturating(D / scale) + shared + rng.normal(0, 0.01, shared.shape)
    return extended + rng.normal(0, 0.005, (docs, 1, 1)), (saturating(D) + shared)[..., :TRAINED]


def test_the_interval_over_documents_covers():
    covered = []
    for seed in range(40):
        extended, bare = planted(np.random.default_rng(seed), 3.0)
        found = allocation_stretch(extended, bare, trained=TRAINED, n_boot=200, seed=seed)
        assert found.unit == "documents"
        covered.append(found.ci_low <= 3.0 <= found.ci_high)
    assert np.mean(covered) >= 0.85
    few = allocation_stretch(extended[:3], bare[:3], trained=TRAINED, n_boot=50)
    assert np.isfinite(few.scale)
    assert np.isnan(few.ci_low)


NOWHERE = np.full((1, 3, LONGEST), np.nan)


@pytest.mark.parametrize(
    ("extended", "bare", "reason"),
    [
        (line(D), 0.5 + 0.2 * np.sin(np.log2(D) * 3)[None, None] + 0 * H, "the bare curve is not"),
        (0.5 + 0.2 * np.sin(np.log2(D) * 3)[None, None] + 0 * H, line(D), "the extended curve is"),
        (1 - line(D), line(D), "the extended curve is not monotone"),
        (0.4 + line(D), line(D), "0 % of the bare one's weights in common"),
        (0 * line(D) + 0.5, line(D), "a curve is flat"),
        (line(D), 0 * line(D) + 1, "a curve is flat"),
        (NOWHERE, NOWHERE, "no head has pairs that are slow"),
    ],
)
def test_what_cannot_be_told_has_a_reason(extended, bare, reason):
    found = allocation_stretch(extended, bare[..., :TRAINED], trained=TRAINED, n_boot=20)
    assert np.isnan([found.scale, found.ci_low, found.ci_high]).all()
    assert reason in found.reason
    assert not found.identifiable


def test_resamples_that_share_no_weights_are_said():
    """Half of the texts lie where the others' weights are not reached."""
    bare = np.concatenate([line(D[:TRAINED]), 0.5 + line(D[:TRAINED])] * 2)
    extended = np.concatenate([line(D), line(D) + 0.1] * 2)
    found = allocation_stretch(extended, bare - 0.25, trained=TRAINED, n_boot=200)
    assert "of the resamples" in found.reason or "in common" in found.reason


def test_heads_without_slow_pairs_and_with_a_window_take_no_part():
    extended, bare = line(D / 4).copy(), line(D[:TRAINED]).copy()
    extended[:, 0], bare[:, 0] = np.nan, np.nan
    extended[:, 1, 128:] = np.nan
    found = allocation_stretch(extended, bare, trained=TRAINED, n_boot=20)
    assert found.n_heads == 1
    assert found.scale == pytest.approx(4, rel=1e-9)


def test_refusals():
    with pytest.raises(PosheadsError, match="the same documents and heads"):
        allocation_stretch(line(D), line(D)[:, :2], trained=TRAINED)
    with pytest.raises(PosheadsError, match="n_boot=0"):
        allocation_stretch(line(D), line(D), trained=TRAINED, n_boot=0)

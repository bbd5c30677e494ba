"""Dominant dimension and weights by distance, against means over diagonals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tl_posheads as ph
from helpers import small_models
from tl_posheads.rotary import contributions


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_curves_equal_means_over_diagonals(name, monkeypatch):
    monkeypatch.setattr(contributions, "_CHUNK", 1500)
    model = small_models.rotary_model(name)
    documents = torch.randint(3, 90, (3, 60), generator=torch.Generator().manual_seed(0))
    heads = [(0, 1), (1, 2), (0, 3)]
    curve = ph.dominant_dimension_curve(model, documents, heads=heads, progress=False)
    geometry = ph.RotaryGeometry.from_model(model)
    kept = {}
    ph.capture_rotary(model, documents, lambda at, q, k: kept.update({at: (q, k)}))
    for n, (layer, head) in enumerate(heads):
        g = geometry[layer]
        c = ph.dimension_contributions(*kept[layer], g)[:, head].double()
        d, weight = ph.dominant_dimension(c), c.softmax(-1)
        for far in (1, 2, 15, 16, 40, 59):
            if g.window is not None and far >= g.window:
                assert curve.n_qk_pairs[n, far - 1] == 0
                assert bool(curve.mean[n, far - 1].isnan())
                continue
            values = torch.cat([torch.diagonal(one, -far) for one in d])
            assert curve.n_qk_pairs[n, far - 1] == len(values)
            assert curve.mean[n, far - 1].item() == pytest.approx(values.mean().item(), abs=1e-6)
            shares = torch.stack([torch.diagonal(one, -far) for one in weight]).mean((0, 2))
            torch.testing.assert_close(curve.allocation[n, :, far - 1], shares, atol=1e-6, rtol=0)
            middle = values.quantile(0.5, interpolation="lower").item()
            assert curve.quantiles[n, 2, far - 1].item() == pytest.approx(middle, abs=1 / 16)
    frame = curve.to_pandas()
    assert frame.columns.tolist() == [
        "layer",
        "head",
        "distance",
        "n_qk_pairs",
        "mean",
        "q5",
        "q25",
        "q50",
        "q75",
        "q95",
    ]
    assert len(frame) == len(heads) * 59
    for n, place in enumerate(heads):
        own = frame[(frame["layer"] == place[0]) & (frame["head"] == place[1])]
        np.testing.assert_array_equal(own["distance"], np.arange(1, 60))
        np.testing.assert_array_equal(own["n_qk_pairs"], curve.n_qk_pairs[n])
        np.testing.assert_array_equal(own["mean"], curve.mean[n])
        np.testing.assert_array_equal(own.iloc[:, 5:].T, curve.quantiles[n])
    with pytest.raises(ph.PosheadsError, match="at least one"):
        ph.dominant_dimension_curve(model, documents, heads=[], progress=False)
    with pytest.raises(ph.PosheadsError, match="has 4 heads per layer"):
        ph.dominant_dimension_curve(model, documents, heads=[(0, 9)], progress=False)

"""Scores of given size, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tl_posheads import HeadScores
from tl_posheads.scoring.draws import MEASURES

N_PAIRS = 1000  # query-key pairs of a document


def head_scores(
    rho: Any,
    *,
    n_documents: int = 8,
    spread: float = 0.02,
    seed: int = 0,
    windows: Sequence[int | None] | None = None,
    provenance: dict[str, Any] | None = None,
) -> HeadScores:
    """Scores whose means over documents are ``rho``, up to rounding.

    Rotation is 0.6 and content 0.3 times rho, in every document; D goes from ``3 - rho`` near to
    ``3 + rho`` far.

    Args:
        rho: numbers ``[layer, head]`` between -1 and 1; heads that are NaN are not scored.
        n_documents: documents they are spread over; one is ``rho`` itself.
        spread: standard deviation over documents, less near -1 and 1. With 0 all documents are
            alike and equal heads stay equal.
        seed: of that spread.
        windows: of the layers; none by default.
        provenance: as ``{"model": "by hand"}``.
    """
    mean = torch.as_tensor(rho, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n_documents, *mean.shape, generator=generator, dtype=torch.float64)
    noise = spread * (noise - noise.mean(0))
    room = (1 - mean.abs()) / noise.abs().amax(0).clamp_min(1e-12)
    rows = mean + noise * room.clamp(0, 1)
    measures = {
        "rho": rows,
        "rotation": 0.6 * rows,
        "content": 0.3 * rows,
        "d_near": 3 - rows,
        "d_far": 3 + rows,
        "n_qk_pairs": torch.where(rows.isnan(), 0.0, float(N_PAIRS)).double(),
    }
    return HeadScores(
        torch.stack([measures[name] for name in MEASURES]),
        tuple(f"{i:024x}" for i in range(n_documents)),
        (None,) * len(mean) if windows is None else tuple(windows),
        {"model": "by hand"} if provenance is None else provenance,
    )


def scores_with_gaps(seed=0, layers=4, heads=5, **options):
    """A layer without scores, a layer with a window, and one head that has no D to speak of."""
    generator = torch.Generator().manual_seed(seed)
    rho = torch.randn(layers, heads, generator=generator, dtype=torch.float64) / 4
    rho[2] = float("nan")
    options = {
        "windows": (None, 16, None, None)[:layers],
        "spread": 0.1,
        "seed": seed,
        "provenance": {"model": "toy </script>", "seed": 3, "nested": {"a": [1, None]}},
        **options,
    }
    return head_scores(rho.clamp(-0.9, 0.9), **options)


def toy_scores(name="toy", layers=6, heads=4, scored=True, **more):
    generator = torch.Generator().manual_seed(0)
    rho = torch.randn(layers, heads, generator=generator).double() / 4
    rho[1] = float("nan")
    if not scored:
        rho[:] = float("nan")
    facts = {"model": name, "corpus": name, "versions": {"torch": "2"}, "layers": [0, 2]}
    return head_scores(
        rho, spread=0.2, windows=(None, 64) * (layers // 2), provenance=facts, **more
    )

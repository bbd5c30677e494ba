"""Mean query-key products by distance: how planes are ordered where the encoding moves no vector.

ALiBi, T5's relative bias and no encoding at all leave q and k where they are: moving a token
changes nothing in them, ``T_s = 1``, and no direction of ``q . k`` varies with distance because of
the encoding. What the model has learned may still vary with distance, by the content and by what
causal attention tells about positions. So the planes are ordered by data:
``M_d = E[q_i k_{i-d}^T]`` over texts and queries. The faster ``e^T M_d e`` changes with d, the
faster is the direction e.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.studies.encodings.transport import log_shifts


@dataclass(frozen=True, eq=False)
class DistanceProducts:
    """Mean outer products of queries and keys in bins of distance, text by text.

    Attributes:
        products: ``E[q_i k_{i-d}^T]`` over the bin's pairs of one text.
        distance: mean distance of each bin's pairs, in tokens; the first bin is distance 1.
    """

    products: Float[Tensor, "doc bin head d_head d_head"] = field(repr=False)
    distance: Float[Tensor, " bin"] = field(repr=False)


def distance_products(
    q: Float[Tensor, "doc pos head d_head"], k: Float[Tensor, "doc pos head d_head"]
) -> DistanceProducts:
    """``E[q_i k_{i-d}^T]`` in bins of distance, two an octave from 1 to ``pos / 2``.

    Larger distances have few queries, all at the end of the text.

    Args:
        q: queries as they are multiplied with the keys. k: keys, one for each query head.

    Memory: ``8 * doc * bin * head * d_head**2`` bytes; no pair of tokens is ever written out.

    Raises:
        PosheadsError: shapes that differ; texts of fewer than 8 tokens.

    Example:
        >>> import torch
        >>> found = distance_products(torch.ones(1, 16, 1, 2), torch.ones(1, 16, 1, 2))
        >>> [round(d, 2) for d in found.distance.tolist()], found.products[0, -1, 0].tolist()
        ([1.0, 2.0, 3.0, 4.48, 6.47], [[1.0, 1.0], [1.0, 1.0]])
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape[1] < 8:
        raise PosheadsError(
            f"queries of shape {tuple(q.shape)} and keys of shape {tuple(k.shape)} were given; "
            "expected the same [doc, pos, head, d_head], at least 8 positions"
        )
    q, k = q.detach().double().cpu(), k.detach().double().cpu()
    n = q.shape[1]
    edges = log_shifts(n // 2)
    # Sums of keys up to each position: a bin's keys are a difference of two of them.
    sums = torch.cat([torch.zeros_like(k[:, :1]), k.cumsum(1)], dim=1)
    position = torch.arange(n)
    out, centre = [], []
    for low, high in pairwise(edges):
        first = (position - high + 1).clamp_min(0)
        last = (position - low + 1).clamp_min(0)
        near = sums[:, last] - sums[:, first]
        count = last - first
        out.append(torch.einsum("dnhi,dnhj->dhij", q, near) / count.sum())
        lengths = torch.arange(low, high).double()
        centre.append(float((lengths * (n - lengths)).sum() / (n - lengths).sum()))
    return DistanceProducts(torch.stack(out, dim=1), torch.tensor(centre, dtype=torch.float64))

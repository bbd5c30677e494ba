"""All query-key pairs of a tile in two loops: contributions, softmax, dominant dimension; cells.

:func:`tile_dominant` has no axis of rotary pairs once ``torch.compile`` has turned it into C++ (on
a CPU) or Triton (on a GPU): nothing between q, k and D is kept. :func:`tile_cells` looks D up
among the table's edges. The compiled code is cached on disk by torch. Without a compiler
:func:`compiled_cells` gives None, and ``counting`` goes in eager bites instead: the same numbers
up to float32's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

TILE = 128  # queries and keys a side
BAND = 8  # queries of a tile that one thread takes in turn
WORTH_COMPILING = 10**8  # exponentials in a text and layer
LOG2_E = 1.4426950408889634
_EDGES = 255  # of D's bins, padded with infinity
# 2**f on [-1/2, 1/2] to 1e-7, the fifth power first: least squares of relative errors.
_POWERS = (1.32669704e-3, 9.67545975e-3, 5.55074262e-2, 0.240221218, 0.693146949, 1.00000007)
_TO_WHOLE = 12582912.0  # 1.5 * 2**23: added, it leaves a number's nearest whole in its last bits
# Keeps torch.compile from writing the products or exponentials of all rotary pairs to memory,
# and from writing out the loop over them; and lets it multiply and add at once.
_ONE_LOOP: dict[str, Any] = {
    "realize_reads_threshold": 1000,
    "realize_opcount_threshold": 10000,
    "realize_acc_reads_threshold": 1000,
    "unroll_reductions_threshold": 1,
    "cpp.enable_floating_point_contract_flag": "fast",
}

_at = torch.ops.aten._unsafe_index.Tensor
Cells = Callable[..., None]


def centred(
    edges: Float[Tensor, "head edge"], n_pairs: int
) -> tuple[Float[Tensor, "head 255"], Float[Tensor, "head pair"]]:
    """Edges of D's bins and the numbers of the rotary pairs, from a pair of the head's own.

    A head that rests on one pair has D within 1e-13 of a whole number, and the order of those last
    digits is part of its score. Counted from that number, where most edges crowd, they are small
    numbers that float32 tells apart.
    """
    heads, n_edges = edges.shape
    pair = torch.arange(n_pairs, dtype=edges.dtype, device=edges.device)
    crowd = ((edges[:, None] - pair[:, None]).abs() < 1e-3).sum(-1)
    centre = pair[crowd.argmax(1)][:, None]
    rest = edges.new_full((heads, _EDGES - n_edges), float("inf"))
    return torch.cat([edges - centre, rest], 1).float(), (pair - centre).float()


def _exp2(power: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """2 to powers that are not above 0, to 2e-7 of itself.

    In plain arithmetic, which the compiler fuses and vectorises where it would call a library's
    exponential, and keep its results, because they are used twice.
    """
    power = torch.where(power > -126.0, power, -126.0)
    whole = power + _TO_WHOLE
    rest = power - (whole - _TO_WHOLE)
    result = rest * _POWERS[0] + _POWERS[1]
    for factor in _POWERS[2:]:
        result = result * rest + factor
    return (result.view(torch.int32) + (whole.view(torch.int32) << 23)).view(torch.float32)


def tile_dominant(
    q: Float[Tensor, "band head 2 pair row"],
    k: Float[Tensor, "head 2 pair key"],
    pair: Float[Tensor, "head pair"],
) -> Float[Tensor, "band head row key"]:
    """D of every pair of a tile, counted from the pair that is 0 in :func:`centred`; float32.

    ``q`` is multiplied with :data:`LOG2_E` beforehand.
    """
    exp2 = torch.exp2 if q.is_cuda else _exp2
    q_x, q_y = q[:, :, 0, :, :, None], q[:, :, 1, :, :, None]
    k_x, k_y = k[:, 0, :, None], k[:, 1, :, None]
    contribution = q_x * k_x + q_y * k_y
    weight = exp2(contribution - contribution.amax(2, keepdim=True))
    return (weight * pair[:, :, None, None]).sum(2) / weight.sum(2)


def _bins(
    dominant: Float[Tensor, "band head row key"],
    edges: Float[Tensor, "head 255"],
    heads: Int[Tensor, "head 1 1"],
) -> Int[Tensor, "band head row key"]:
    """How many edges lie below D: a binary search without branches.

    Its first four steps choose among edges that all rows share, which stay in registers; only the
    last four look an edge up for every pair.
    """
    columns, above = edges[:, :, None, None], [dominant > edges[:, 127, None, None]]

    def edge(lowest: int, n: int, steps: list[Tensor]) -> Tensor:
        if not steps:
            return columns[:, lowest + n // 2 - 1]
        n //= 2
        upper, lower = edge(lowest + n, n, steps[1:]), edge(lowest, n, steps[1:])
        return torch.where(steps[0], upper, lower)

    while len(above) < 4:
        above.append(dominant > edge(0, _EDGES + 1, above))
    d = torch.zeros_like(dominant, dtype=torch.int32)
    for step, bit in zip(above, (7, 6, 5, 4)):
        d = d + (step.int() << bit)
    flat = edges.flatten()
    for bit in (3, 2, 1, 0):
        # Never out of bounds, and unchecked half as slow.
        there = _at(flat, [heads * _EDGES + d + ((1 << bit) - 1)])
        d = d + ((dominant > there).int() << bit)
    return d


def tile_cells(
    dominant: Float[Tensor, "band head row key"],
    edges: Float[Tensor, "head 255"],
    x: Int[Tensor, "band 1 row key"],
    block: tuple[Int[Tensor, "band 1 row 1"], Int[Tensor, "key"]],
    shape: tuple[Tensor, Tensor, Tensor, Tensor],
    pool_bits: int,
    out: Int[Tensor, "2 band head row key"],
) -> None:
    """Each pair's cell in the table of D bin by distance bin, and in the small table of its block.

    Args:
        dominant: from :func:`tile_dominant`.
        edges: of D's bins, from :func:`centred`.
        x: distance bins; negative where attention doesn't see.
        block: what queries and keys add to the number of their block.
        shape: D bins and distance bins of the table and of the small tables.
        pool_bits: 2 to it cells a side are one in the small tables.
        out: for the flat indices, from 1 on; 0 for pairs that attention doesn't see.
    """
    bins, n_x, small_d, small_x = shape
    n_heads = dominant.shape[1]
    heads = torch.arange(n_heads, dtype=torch.int32, device=dominant.device)[:, None, None]
    d = _bins(dominant, edges, heads)
    cell = (heads * bins + d) * n_x + x + 1
    number = block[0] + block[1]
    small = (number * n_heads + heads) * small_d + (d >> pool_bits)
    small = small * small_x + (x >> pool_bits) + 1
    nothing = torch.zeros_like(cell)
    out[0] = torch.where(x < 0, nothing, cell)
    out[1] = torch.where(x < 0, nothing, small)


@cache
def _compiled() -> tuple[Callable[..., Tensor], Cells]:
    return (
        torch.compile(tile_dominant, dynamic=False, options=_ONE_LOOP),
        torch.compile(tile_cells, dynamic=False),
    )


class CannotCompile(Exception):
    """There is no compiler, or it refused; nothing was counted."""


_refusal: list[Exception] = []


def compiled_cells(n_exponentials: int, device: torch.device) -> Cells | None:
    """:func:`tile_cells` after :func:`tile_dominant`, compiled: ``(q, k, pair, edges, ...)``.

    None where that isn't worth it or there is no compiler. A call that can't be compiled raises
    :class:`CannotCompile`, and from then on there is None.
    """
    if n_exponentials < WORTH_COMPILING or _refusal or device.type not in ("cpu", "cuda"):
        return None

    def cells(q: Tensor, k: Tensor, pair: Tensor, *rest: Any) -> None:
        try:
            with torch.no_grad():
                dominant, cells_of = _compiled()
                cells_of(dominant(q, k, pair), *rest)
        except Exception as problem:
            _refusal.append(problem)
            raise CannotCompile(str(problem)) from problem

    return cells

"""One orthonormal basis for several symmetric matrices: Jacobi angles."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_posheads.errors import PosheadsError

_SWEEPS = 200
_SMALL_ANGLE = 1e-10  # radians
_STAGNANT = 1e-9  # of the off-diagonal part, a sweep


def symmetric_part(matrices: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
    """``(A + A^T) / 2`` in float64."""
    matrices = matrices.double()
    return (matrices + matrices.mT) / 2


def joint_diagonalisation(matrices: Float[Tensor, "k n n"]) -> Float[Tensor, "n n"]:
    """The orthonormal basis that makes symmetric matrices jointly as diagonal as possible.

    Least sum of squared off-diagonal entries, by plane rotations with the closed-form angle of
    Cardoso and Souloumiac, "Jacobi angles for simultaneous diagonalization", SIAM J. Matrix Anal.
    Appl. 17, 161 (1996). Matrices that commute become diagonal; of others it is a local minimum,
    begun from the eigenvectors of one combination of them. The same matrices give the same basis.

    Args:
        matrices: symmetric; computed in float64.

    Returns:
        Basis vectors in the rows, in no particular order, each with its largest entry positive.
        Where all matrices agree on an eigenvalue of several vectors, any basis of their space.

    Memory: the matrices twice over. ``10 * n**2 * k`` multiplications a sweep, a few sweeps where
    the matrices commute and some tens elsewhere.

    Raises:
        PosheadsError: another shape, matrices that aren't symmetric, NaN or infinity.

    Example:
        >>> import torch
        >>> basis = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
        >>> both = torch.tensor([[1.0, 1.0, 2.0, 2.0], [5.0, 6.0, 7.0, 5.0]], dtype=torch.float64)
        >>> found = joint_diagonalisation(torch.stack([basis @ d.diag() @ basis.T for d in both]))
        >>> torch.allclose((found @ basis).abs().round(), (found @ basis).abs(), atol=1e-7)
        True
    """
    if matrices.ndim != 3 or 0 in matrices.shape or matrices.shape[1] != matrices.shape[2]:
        raise PosheadsError(
            f"matrices of shape {tuple(matrices.shape)} were given; expected [k, n, n], at least "
            "one matrix"
        )
    work = matrices.detach().double().cpu().numpy()
    largest = float(np.abs(work).max())
    if not np.isfinite(largest):
        raise PosheadsError("the matrices hold NaN or infinity; leave those samples out")
    if np.abs(work - work.swapaxes(1, 2)).max() > 1e-9 * largest:
        raise PosheadsError(
            "matrices that aren't symmetric were given; pass their symmetric parts, (A + A^T) / 2"
        )
    n = work.shape[1]
    # No accident makes two eigenvalues of all matrices equal in this combination.
    weights = np.sqrt(np.arange(2.0, len(work) + 2))
    vectors = np.linalg.eigh(np.tensordot(weights, work, 1))[1]
    work = vectors.T @ work @ vectors
    energy = float((work**2).sum())
    before = np.inf
    for _ in range(_SWEEPS):
        angle = max((_rotate(work, vectors, pairs, energy) for pairs in _rounds(n)), default=0.0)
        off = energy - float((np.diagonal(work, axis1=1, axis2=2) ** 2).sum())
        if angle < _SMALL_ANGLE or off > (1 - _STAGNANT) * before:
            break
        before = off
    rows = vectors.T
    sign = np.sign(rows[np.arange(n), np.abs(rows).argmax(1)])
    return torch.from_numpy(np.ascontiguousarray(rows * sign[:, None]))


def diagonal_share(matrices: Float[Tensor, "k n n"], basis: Float[Tensor, "n n"]) -> float:
    """Share of the matrices' squared entries that is on their diagonals in a basis (rows)."""
    turned = basis.double() @ matrices.double() @ basis.double().T
    whole = float(turned.square().sum())
    return float(turned.diagonal(dim1=1, dim2=2).square().sum()) / whole if whole else 1.0


def _rounds(n: int) -> list[np.ndarray]:
    """Every pair of indices once, in rounds of pairs that share none (round robin)."""
    even = n + n % 2
    ring, out = list(range(even)), []
    for _ in range(even - 1):
        pairs = [(ring[i], ring[-1 - i]) for i in range(even // 2)]
        inside = [sorted(pair) for pair in pairs if max(pair) < n]
        if inside:
            out.append(np.array(inside).T)
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return out


def _rotate(work: np.ndarray, vectors: np.ndarray, pairs: np.ndarray, energy: float) -> float:
    """Turn disjoint planes by their best angles, in place; the largest angle is returned."""
    i, j = pairs
    apart = work[:, i, i] - work[:, j, j]
    between = 2 * work[:, i, j]
    g11, g22, g12 = (
        (x * y).sum(0) for x, y in ((apart, apart), (between, between), (apart, between))
    )
    angle = 0.5 * np.arctan2(2 * g12, g11 - g22 + np.hypot(g11 - g22, 2 * g12))
    # Where all that stands between the two is rounding, the angle would be too.
    angle[g22 <= energy * (len(work[0]) * np.finfo(float).eps) ** 2] = 0.0
    if not angle.any():
        return 0.0
    c, s = np.cos(angle), np.sin(angle)
    for x in (work, vectors):
        a, b = x[..., i], x[..., j]
        x[..., i], x[..., j] = c * a + s * b, c * b - s * a
    c, s = c[:, None], s[:, None]
    a, b = work[:, i, :], work[:, j, :]
    work[:, i, :], work[:, j, :] = c * a + s * b, c * b - s * a
    return float(np.abs(angle).max())

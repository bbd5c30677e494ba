"""Joint diagonalisation: planted bases, the best of all rotations, noise, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from helpers.matrices import orthonormal, seeded
from tl_posheads import PosheadsError
from tl_posheads.studies.encodings import joint_diagonalisation
from tl_posheads.studies.encodings.diagonalise import diagonal_share


@pytest.mark.parametrize("n", [2, 5, 8])
def test_commuting_matrices_give_back_their_basis(n):
    basis = orthonormal(n)
    values = torch.randn(3, n, generator=seeded(1), dtype=torch.float64)
    values[:2] = values[:2].round()  # no single matrix tells all vectors apart
    found = joint_diagonalisation(torch.stack([basis @ row.diag() @ basis.T for row in values]))
    overlap = (found @ basis).abs()
    assert torch.allclose(overlap.amax(1), torch.ones(n).double(), atol=1e-9)
    assert torch.allclose(found @ found.T, torch.eye(n).double(), atol=1e-12)
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()


def test_matrices_that_do_not_commute_are_as_diagonal_as_any_rotation_makes_them():
    a = torch.randn(4, 2, 2, generator=seeded(), dtype=torch.float64)
    a = a + a.mT
    found = joint_diagonalisation(a)
    best = 0.0
    for angle in np.linspace(0, math.pi / 2, 20001):
        c, s = math.cos(angle), math.sin(angle)
        best = max(best, diagonal_share(a, torch.tensor([[c, s], [-s, c]])))
    assert diagonal_share(a, found) == pytest.approx(best, abs=1e-7)
    assert best < 0.99


def test_noise_moves_the_basis_little_and_never_makes_it_worse_than_the_truth():
    basis = orthonormal(8)
    values = torch.randn(6, 8, generator=seeded(1), dtype=torch.float64)
    noise = 0.02 * torch.randn(6, 8, 8, generator=seeded(2), dtype=torch.float64)
    noisy = torch.stack([basis @ row.diag() @ basis.T for row in values]) + noise + noise.mT
    found = joint_diagonalisation(noisy)
    assert (found @ basis).abs().amax(1).min() > 0.99
    assert diagonal_share(noisy, found) > diagonal_share(noisy, basis.T)


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (torch.zeros(3, 3), "expected \\[k, n, n\\]"),
        (torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), "aren't symmetric"),
        (torch.full((1, 2, 2), float("nan")), "NaN"),
    ],
)
def test_what_cannot_be_diagonalised_is_refused(matrices, message):
    with pytest.raises(PosheadsError, match=message):
        joint_diagonalisation(matrices)

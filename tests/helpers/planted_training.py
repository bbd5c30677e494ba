"""A training of which it is known when a head's score rises and when the loss falls."""

from __future__ import annotations

import numpy as np
import torch

from tl_posheads import emergence
from tl_posheads.studies.emergence.measuring import Moment

STEPS = np.array([0, 1, 3, 7, 15, 31, 63])


def planted(score_octave, loss_octave, *, noise=0.02, n_texts=12, seed=0):
    """A head whose score rises at one octave of training; the far loss falls at another."""
    random = np.random.default_rng(seed)
    at = np.log2(STEPS + 1.0)
    rise = 1 / (1 + np.exp(-12 * (at - score_octave)))
    fall = 1 / (1 + np.exp(-12 * (at - loss_octave)))
    moments = {}
    for i, step in enumerate(STEPS.tolist()):
        rho = torch.zeros(1, 2, dtype=torch.float64)
        rho[0, 0] = 0.6 * rise[i]
        own = rho + noise * torch.as_tensor(random.standard_normal((n_texts, 1, 2)))
        loss = torch.full((n_texts, 6), 5.0, dtype=torch.float64)
        loss[:, 3] -= 0.5 * fall[i]
        loss[:, 5] -= 2 * fall[i]
        loss += noise * torch.as_tensor(random.standard_normal((n_texts, 6)))
        moments[step] = Moment(
            rho=rho,
            ci_low=rho - 0.1,
            ci_high=rho + 0.1,
            rotation=rho / 2,
            content=rho / 4,
            p_adjusted=rho + 0.01,
            doc_rho=own,
            curve=torch.rand(1, 2, 6).double(),
            loss=loss,
        )
    return emergence.Emergence.of(moments, {"model": "planted"})

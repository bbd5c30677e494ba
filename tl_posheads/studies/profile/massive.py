"""Massive values in queries and keys, and what lies in dimensions that hardly turn."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_posheads.rotary.contributions import join_pairs, rotate_by
from tl_posheads.rotary.geometry import LayerGeometry


def before_rotation(
    rotated: Float[Tensor, "pos head d_head"], geometry: LayerGeometry
) -> Float[Tensor, "pos head d_head"]:
    """Queries or keys of one text as they were before RoPE turned them, in float64.

    Example:
        >>> import torch
        >>> from tl_posheads.rotary.contributions import rotate_by
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]))
        >>> x = torch.ones(5, 1, 4, dtype=torch.float64)
        >>> back = before_rotation(rotate_by(x, torch.arange(5), g), g)
        >>> torch.allclose(back, x)
        True
    """
    steps = -torch.arange(rotated.shape[0], device=rotated.device)
    x = rotate_by(rotated.double(), steps, geometry)
    scale = torch.ones(geometry.d_head, dtype=x.dtype, device=x.device)
    scale[: geometry.rotary_dim] = geometry.rotation_scale
    return x / scale


def dimension_norms(x: Float[Tensor, "pos head d_head"]) -> Float[Tensor, "head d_head"]:
    """L2 norm over the tokens of every dimension of every head.

    Jin et al. 2025, "Massive values in self-attention modules are the key to contextual knowledge
    understanding", arXiv 2502.01563: their ``M``, of queries and keys as the projections give
    them, before RoPE (:func:`before_rotation`).

    Example:
        >>> import torch
        >>> dimension_norms(torch.tensor([[[3.0, 1.0]], [[4.0, 0.0]]]))
        tensor([[5., 1.]], dtype=torch.float64)
    """
    return x.double().square().sum(0).sqrt()


def massive_share(
    norms: Float[Tensor, "head d_head"], *, factor: float = 5.0
) -> Float[Tensor, "head"]:
    """Share of a head's dimensions that are massive: above ``factor`` times the head's mean norm.

    Jin et al. 2025, whose lambda the factor is. NaN for a head whose norms are all 0.

    Example:
        >>> import torch
        >>> massive_share(torch.tensor([[100.0] + 9 * [1.0], 10 * [1.0]]))
        tensor([0.1000, 0.0000], dtype=torch.float64)
    """
    norms = norms.double()
    mean = norms.mean(-1, keepdim=True)
    share = (norms > factor * mean).double().mean(-1)
    return share.masked_fill(mean[:, 0] == 0, float("nan"))


def slow_dimensions(geometry: LayerGeometry, length: int) -> Bool[Tensor, "d_head"]:
    """Dimensions that don't turn once in a text: their pair's wavelength exceeds ``length`` tokens.

    Coordinates that RoPE leaves alone never turn and are among them.

    Example:
        >>> import torch
        >>> g = LayerGeometry.from_inv_freq(torch.tensor([1.0, 0.1]), d_head=5)
        >>> slow_dimensions(g, 40)
        tensor([False,  True, False,  True,  True])
    """
    slow = (geometry.wavelengths > length).double().cpu()
    rest = torch.ones(geometry.d_head - geometry.rotary_dim, dtype=slow.dtype)
    return join_pairs(slow, slow, rest, geometry).bool()


def slow_share(
    weight: Float[Tensor, "head d_head"], slow: Bool[Tensor, "d_head"]
) -> Float[Tensor, "head"]:
    """Share of a head's weight, norms for one, that lies in slow dimensions; NaN without weight.

    Example:
        >>> import torch
        >>> slow_share(torch.tensor([[1.0, 3.0]]), torch.tensor([False, True]))
        tensor([0.7500], dtype=torch.float64)
    """
    weight = weight.double()
    return weight[:, slow.to(weight.device)].sum(-1) / weight.sum(-1)

"""Columns of an atlas for a whole head: from its spectrum, and from its mean curve."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tl_posheads.studies.atlas.measure import BY_DISTANCE

if TYPE_CHECKING:
    from tl_posheads.studies.atlas.results import RotaryAtlas

_ERROR = 0.1  # of the scores, that rotating the pairs needed may leave
_FEWEST = 3  # bins of a correlation


def curve_at(
    product: Tensor, speed: Float[Tensor, "*batch pair"], distance: Float[Tensor, " distance"]
) -> Float[Tensor, "*batch distance"]:
    """``Re sum_m product_m exp(i speed_m d)`` at every distance.

    Example:
        >>> import torch
        >>> product, speed = torch.tensor([2.0 + 0j]), torch.tensor([torch.pi])
        >>> curve_at(product, speed, torch.arange(3.0)).round().tolist()
        [2.0, -2.0, 2.0]
    """
    angle = speed[..., None] * distance
    real = product.real[..., None, :] @ angle.cos()
    return (real - product.imag[..., None, :] @ angle.sin())[..., 0, :]


def centroid(atlas: RotaryAtlas) -> Float[Tensor, "doc layer head"]:
    """Mean pair number, weighted by usage."""
    share = atlas.by_document("usage_share")
    return _summed(share * torch.arange(share.shape[-1]))


def entropy(atlas: RotaryAtlas) -> Float[Tensor, "doc layer head"]:
    """Entropy of usage, as a share of that of even usage; 0 if all lies in one pair."""
    share = atlas.by_document("usage_share")
    n_pairs = share.isfinite().sum(-1)
    return -_summed(torch.xlogy(share, share)) / n_pairs.double().log()


def slow_text(atlas: RotaryAtlas) -> Float[Tensor, "doc layer head"]:
    """Share of usage in pairs that don't turn once in the text."""
    return _slower(atlas, torch.tensor(atlas.lengths, dtype=torch.float64))


def slow_trained(atlas: RotaryAtlas) -> Float[Tensor, "doc layer head"]:
    """Share of usage in pairs that don't turn once in a training text."""
    length = float("nan") if atlas.trained is None else float(atlas.trained)
    return _slower(atlas, torch.full((len(atlas.lengths),), length, dtype=torch.float64))


def pairs_needed(atlas: RotaryAtlas) -> Float[Tensor, "doc layer head"]:
    """How many pairs have to be rotated, in the greedy order, for an error of 10 %."""
    rank, error = (atlas.by_document(f"needed_{x}") for x in ("rank", "error"))
    enough = torch.where(error <= _ERROR, rank, float("inf")).amin(-1)
    return enough.masked_fill(enough.isinf(), float("nan"))


def curve_correlation(atlas: RotaryAtlas) -> Float[Tensor, "doc layer head"]:
    """Pearson correlation of the mean curve with the measured mean scores, over log distance."""
    x, y = (atlas.by_distance[BY_DISTANCE.index(name)] for name in ("mean_curve", "score"))
    both = x.isfinite() & y.isfinite()
    n = both.sum(-1, keepdim=True)
    x, y = (torch.where(both, v, 0.0) for v in (x, y))
    x, y = (torch.where(both, v - v.sum(-1, keepdim=True) / n, 0.0) for v in (x, y))
    norm = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    unknown = (n[..., 0] < _FEWEST) | (norm == 0)
    return ((x * y).sum(-1) / norm).clamp(-1, 1).masked_fill(unknown, float("nan"))


COLUMNS: dict[str, Callable[[RotaryAtlas], Tensor]] = {
    "centroid": centroid,
    "entropy": entropy,
    "slow_text": slow_text,
    "slow_trained": slow_trained,
    "curve_correlation": curve_correlation,
    "pairs_needed": pairs_needed,
}


def preferred(atlas: RotaryAtlas) -> Float[Tensor, "layer head"]:
    """Distance at which the documents' mean curve is highest, in tokens; NaN without a curve."""
    product, speed = atlas.mean_product, 2 * torch.pi / atlas.wavelengths
    same = bool((speed == speed[:1]).logical_or(speed.isnan()).all())
    if same:  # then the mean of curves is the curve of the mean
        parts = [x.nanmean(0, keepdim=True) for x in (product.real, product.imag)]
        product, speed = torch.complex(*parts), speed[:1]
    out = torch.full(product.shape[1:3], float("nan"), dtype=torch.float64)
    for layer in range(len(out)):
        here = speed[0, layer].isfinite()
        if not bool(here.any()) or bool(product[:, layer][..., here].isnan().all()):
            continue
        distance = torch.arange(1, atlas.reach(layer) + 1, dtype=torch.float64)
        of_texts = [
            curve_at(p[:, here], s[here], distance)
            for p, s in zip(product[:, layer], speed[:, layer], strict=True)
        ]
        curve = torch.stack(of_texts).nanmean(0)
        best = curve.nan_to_num(-torch.inf).argmax(-1).double() + 1
        out[layer] = best.masked_fill(curve.isnan().all(-1), float("nan"))
    return out


def _slower(atlas: RotaryAtlas, length: Float[Tensor, " doc"]) -> Float[Tensor, "doc layer head"]:
    slow = atlas.wavelengths > length[:, None, None]
    found = _summed(atlas.by_document("usage_share") * slow[:, :, None])
    return found.masked_fill(length.isnan()[:, None, None], float("nan"))


def _summed(values: Float[Tensor, "*head pair"]) -> Float[Tensor, "*head"]:
    """Over the existing pairs; NaN without any."""
    none = values.isnan().all(-1)
    return values.nansum(-1).masked_fill(none, float("nan"))

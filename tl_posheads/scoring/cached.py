"""Dominant dimension from cached activations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import hook_names
from tl_posheads.hooks.heads import heads_of
from tl_posheads.hooks.model import LensModel, require_rotary
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.rotary.contributions import Scale, check_scale
from tl_posheads.scoring.maps import dominant_map


def dominant_from_cache(
    model: LensModel, cache: Mapping[str, Tensor], layer: int, head: int, *, scale: Scale = "none"
) -> Float[Tensor, "batch q_pos k_pos"]:
    """Dominant dimension of every query-key pair of a head, from an ``ActivationCache``.

    Args:
        model: the model that filled the cache; it runs a short text to measure its geometry.
        cache: with the layer's ``hook_rot_q`` and ``hook_rot_k``, of texts without padding. Where
            TransformerLens leaves these out, run the model inside ``ph.rotary_hook_points(model)``.
        layer, head: of the model.
        scale: as in ``score_heads``.

    Returns:
        D in float64, on the cache's device; NaN where the key is masked or at the query's own
        position.

    Raises:
        PosheadsError: a head that the model doesn't have, a cache without the two activations.

    Example:
        >>> with rotary_hook_points(model):                             # doctest: +SKIP
        ...     logits, cache = model.run_with_cache(tokens)
        >>> dominant_from_cache(model, cache, 6, 6)[0, -1].nanmean()    # doctest: +SKIP
    """
    require_rotary(model)
    check_scale(scale)
    heads_of(model, [(layer, head)])
    names = hook_names([layer])
    missing = [name for name in names if name not in cache]
    if missing:
        raise PosheadsError(
            f"the cache holds no {missing[0]}; run the model inside "
            "`with tl_posheads.rotary_hook_points(model):`, with a names_filter that includes it"
        )
    rot_q, rot_k = (cache[name] for name in names)
    geometry = RotaryGeometry.from_model(model, length=rot_q.shape[1], layers=[layer])
    texts = zip(rot_q, rot_k, strict=True)
    return torch.stack(
        [dominant_map(q, k, geometry, layer=layer, head=head, scale=scale) for q, k in texts]
    )

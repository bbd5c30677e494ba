"""``rotary_atlas``: every head and rotary pair, measured in one pass per document."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import capture_rotary, rotary_hook_points
from tl_posheads.hooks.changes import trained_of
from tl_posheads.hooks.inputs import by_content, documents_of, layers_of, require_finite
from tl_posheads.hooks.model import LensModel, require_clean, require_rotary
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.rotary.contributions import Scale
from tl_posheads.scoring.draws import Settings
from tl_posheads.scoring.head_scores import HeadScores
from tl_posheads.scoring.score import (
    empty_accumulator,
    facts_of,
    geometry_by_length,
    plan_of,
)
from tl_posheads.studies.atlas.measure import (
    BY_DISTANCE,
    BY_HEAD,
    BY_PAIR,
    AtlasDraws,
    Measured,
    bin_edges,
    measure_layer,
)
from tl_posheads.studies.atlas.results import SCORES, RotaryAtlas
from tl_posheads.studies.given_scores import facts_of_scores, require_scores_of

Found = dict[int, Measured]  # of one text, by layer


def rotary_atlas(
    model: LensModel,
    tokens: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]],
    *,
    layers: Sequence[int] | None = None,
    needed: bool = False,
    scores: HeadScores | None = None,
    trained: int | None = None,
    scale: Scale = "none",
    qk_pairs: int = 1000,
    attention_mask: Int[Tensor, "doc pos"] | None = None,
    skip_first: int = 0,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> RotaryAtlas:
    """How every head uses every rotary frequency, in one pass per document.

    =====================  =======================================================================
    by head and pair       what it is
    =====================  =======================================================================
    ``wavelength``         tokens of a full turn
    ``usage``              ``E|q_m| E|k_m|`` over positions (Barbero et al. 2024, "Round and round
                           we go!", arXiv 2410.06205); ``usage_share`` of the head's sum
    ``realised``           ``E|c_m|`` over usage: how far queries and keys turn towards each other
    ``concentration_q``    ``|E q_m| / E|q_m|`` before rotation, as complex numbers
    ``concentration_k``    ("TriAttention", arXiv 2604.04921)
    ``weight_near``        mean softmax weight among the pairs 1 or 2 tokens apart,
    ``weight_far``         and in the farthest octave of distances that the layer sees
    ``needed_rank``        with ``needed``: when its rotation is given back, the most needed pair
    ``needed_error``       first, and the error that this leaves (``needed_order``)
    =====================  =======================================================================

    =====================  =======================================================================
    by head                what it is
    =====================  =======================================================================
    ``centroid``           mean pair number, weighted by usage, 0 the fastest
    ``entropy``            of usage, as a share of the largest possible, that of even use
    ``slow_text``          share of usage in pairs with a wavelength above the text's length,
    ``slow_trained``       and above the training length
    ``slow_norm_q``,       share of the norms in such dimensions of the text, as ``profile_heads``
    ``slow_norm_k``        has them: unrotated coordinates among them
    ``separation``         how far apart queries and keys lie (Frayed RoPE, arXiv 2603.18017)
    ``preferred``          distance at which the mean curve is highest, in tokens
    ``curve_correlation``  of the mean curve with the measured mean scores, over log distance
    ``pairs_needed``       with ``needed``: pairs to rotate for an error of 10 %
    =====================  =======================================================================

    Values are means over documents, which are the replicates of the intervals (Student's t).

    Args:
        model: HookedTransformer or TransformerBridge with RoPE. A method of extrapolation in force
            counts, with its own map of positions; the model is left as it was.
        tokens, layers, scale, attention_mask, skip_first, seed: as for ``score_heads``. Usage and
            curves are scaled like contributions.
        needed: measure which rotary pairs need their rotation; adds
            ``qk_pairs * heads * rotary_pairs^2 / 2`` additions a layer and text.
        scores: of this model's heads; their rho, rotation and content stand beside the columns.
        trained: training length in tokens; the model's own by default, if known.
        qk_pairs: query-key pairs drawn in every document for ``realised`` and ``needed``.
        checkpoint: folder that keeps every finished document; the same call resumes from it.
        progress: show a bar.
        provenance: more facts to keep with the result.

    Returns:
        :class:`RotaryAtlas`; NaN for layers without RoPE and, under a Fourier series (FoPE), for
        what needs the rotation undone.

    Memory: one layer of one document at a time, beyond the model's own forward pass some 10 MB on
    a CPU. With ``needed``, ``4 * qk_pairs * heads * rotary_pairs`` bytes more.

    Raises:
        PosheadsError: scores of other heads; an invalid ``trained`` or ``qk_pairs``; what
            ``score_heads`` refuses.

    Example:
        >>> atlas = rotary_atlas(model, tokens, scores=scores)          # doctest: +SKIP
        >>> atlas.heads().sort_values("slow_text"); atlas.plot()        # doctest: +SKIP
    """
    require_rotary(model)
    if isinstance(qk_pairs, str):
        raise PosheadsError(f"qk_pairs={qk_pairs!r} was given; expected a number of at least 3")
    Settings.of(qk_pairs, 1, scale=scale, seed=seed)
    require_clean(model)
    require_scores_of(model, scores)
    documents = documents_of(model, tokens, attention_mask, skip_first)
    wanted = layers_of(model, layers)
    units = by_content(documents)
    known = _trained(model, trained)
    settings = Settings.of(qk_pairs, len(units), scale=scale, skip_first=skip_first, seed=seed)
    edges = bin_edges(max(len(document) for _, document in units) - skip_first - 1)
    with rotary_hook_points(model):
        empty = empty_accumulator(model, units, wanted, settings)
        plan = {**plan_of(model, empty, units), "needed": needed, "edges": edges.tolist()}
        kept = Checkpoint(checkpoint, plan)
        sizes = geometry_by_length(model, empty.geometry, empty.layers)
        texts: list[Found] = []
        total = len(units) * len(empty.layers)
        with tqdm(total=total, desc="atlas", disable=not progress, dynamic_ncols=True) as bar:
            for unit, document in units:
                geometry = sizes(len(document))
                found = _read(kept, unit, empty.layers)
                if found is None:
                    draws = AtlasDraws(unit, len(document) - skip_first, settings, edges)
                    found = _measured(model, document, geometry, empty.layers, draws, needed, bar)
                    kept.write(unit, _tensors(found))
                else:
                    bar.update(len(empty.layers))
                texts.append(found)
        wavelengths = [_wavelengths(sizes(len(text))) for _, text in units]
    facts = {**facts_of(model, units), "qk_pairs": qk_pairs, "skip_first": skip_first, "seed": seed}
    facts |= {
        "layers": empty.layers,
        "needed": needed,
        "scores": scores and facts_of_scores(scores),
    }
    shape = (len(wavelengths[0]), empty.geometry.n_heads)
    return RotaryAtlas(
        by_pair=_stacked([_values(x, "by_pair") for x in texts], len(BY_PAIR), *shape),
        by_head=_stacked([_values(x, "by_head") for x in texts], len(BY_HEAD), *shape),
        by_distance=_stacked([_values(x, "by_distance") for x in texts], len(BY_DISTANCE), *shape),
        wavelengths=_padded(wavelengths),
        lengths=[len(document) for _, document in units],
        document_names=tuple(unit for unit, _ in units),
        windows=tuple(layer.window for layer in empty.geometry.layers),
        trained=known,
        scale=scale,
        scores=None if scores is None else torch.stack([getattr(scores, x) for x in SCORES]),
        provenance={**facts, **(provenance or {})},
    )


def _trained(model: LensModel, trained: int | None) -> int | None:
    try:
        return trained_of(model, trained)
    except PosheadsError:
        if trained is not None:
            raise
        return None  # unknown; the columns that need it are NaN


def _measured(
    model: LensModel,
    document: Int[Tensor, " pos"],
    geometry: RotaryGeometry,
    layers: Sequence[int],
    draws: AtlasDraws,
    needed: bool,
    bar: Any,
) -> Found:
    first, found = draws.settings.skip_first, Found()

    def consumer(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
        here, q, k = geometry[layer], rot_q[0, first:], rot_k[0, first:]
        if q.device.type == "mps":  # it has no float64
            q, k = q.cpu(), k.cpu()
        require_finite(layer, q, k, here.kv_head)
        found[layer] = measure_layer(q, k, here.after(first), draws, needed=needed)
        bar.update(1)

    capture_rotary(model, document[None], consumer, layers=layers)
    return found


def _tensors(found: Found) -> dict[str, Tensor]:
    return {
        f"{name}.{layer}": value
        for layer, measured in found.items()
        for name, value in vars(measured).items()
    }


def _read(kept: Checkpoint, unit: str, layers: Sequence[int]) -> Found | None:
    tensors = kept.read(unit)
    names = ("by_pair", "by_head", "by_distance")
    if tensors is None or tensors.keys() != {f"{x}.{layer}" for x in names for layer in layers}:
        return None
    return {layer: Measured(*(tensors[f"{x}.{layer}"] for x in names)) for layer in layers}


def _values(found: Found, name: str) -> dict[int, Tensor]:
    return {layer: getattr(measured, name) for layer, measured in found.items()}


def _stacked(
    texts: Sequence[dict[int, Tensor]], n_measures: int, n_layers: int, n_heads: int
) -> Float[Tensor, "measure doc layer head *rest"]:
    """NaN where a layer was not measured or has fewer rotary pairs than another."""
    rest = [max(sizes) for sizes in zip(*(x.shape[2:] for x in texts[0].values()), strict=True)]
    shape = (n_measures, len(texts), n_layers, n_heads, *rest)
    out = torch.full(shape, float("nan"), dtype=torch.float64)
    for i, text in enumerate(texts):
        for layer, value in text.items():
            place = out[:, i, layer]
            place[tuple(slice(0, size) for size in value.shape)] = value
    return out


def _wavelengths(geometry: RotaryGeometry) -> list[Tensor]:
    return [layer.wavelengths.double().cpu() for layer in geometry.layers]


def _padded(texts: Sequence[Sequence[Tensor]]) -> Float[Tensor, "doc layer pair"]:
    most = max(len(row) for row in texts[0])
    out = torch.full((len(texts), len(texts[0]), most), float("nan"), dtype=torch.float64)
    for i, text in enumerate(texts):
        for layer, row in enumerate(text):
            out[i, layer, : len(row)] = row
    return out

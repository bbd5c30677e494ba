"""One pass over one text, in which every head of every layer is measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.hooks.capture import rotary_consumer
from tl_posheads.hooks.inputs import require_finite
from tl_posheads.hooks.model import LensModel, attention_of, read_pass
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.rotary.contributions import evenly, expand_keys
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.studies.atlas.vectors import VectorMeans, slow_dimensions, slow_share
from tl_posheads.studies.profile.detection import detected_share, detection_patterns
from tl_posheads.studies.profile.distance_and_sink import mean_distance, sink_mass
from tl_posheads.studies.profile.long_context import long_context_share
from tl_posheads.studies.profile.massive import massive_share
from tl_posheads.studies.profile.settings import ProfileSettings, columns_of
from tl_posheads.studies.profile.utility import dimension_utility

_FACTS = "facts"
_SAME = 0.02  # mean distance in total variation between the pattern and softmax(q . k)


@dataclass(frozen=True)
class Layer:
    """One layer's vectors on one text, ``[pos, head, d_head]``, and the pattern."""

    geometry: LayerGeometry
    pattern: Float[Tensor, "head q_pos k_pos"]
    q: Float[Tensor, "pos head d_head"] | None = None
    k: Float[Tensor, "pos kv_head d_head"] | None = None
    v: Float[Tensor, "pos kv_head d_v"] | None = None


@dataclass
class Collected:
    """Values of one text, and why some are missing.

    Attributes:
        values: ``[layer, head]`` in float64 for every column.
        reasons: column to a sentence.
        lost: of each layer, mean share of the output that the utility masks lose.
    """

    values: dict[str, Tensor]
    reasons: dict[str, str] = field(default_factory=dict)
    lost: dict[int, float] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a file."""
        facts = json.dumps({"reasons": self.reasons, "lost": [*self.lost.items()]}).encode()
        return {**self.values, _FACTS: torch.tensor([*facts], dtype=torch.uint8)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Collected:
        """The inverse of :meth:`tensors`."""
        values = dict(tensors)
        facts = json.loads(bytes(values.pop(_FACTS).tolist()))
        return cls(values, facts["reasons"], dict(facts["lost"]))


def head_scores(
    q: Float[Tensor, "q_pos d_head"], k: Float[Tensor, "k_pos d_head"], geometry: LayerGeometry
) -> Float[Tensor, "q_pos k_pos"]:
    """One head's scores as they enter the softmax, unmasked."""
    scores = geometry.attention_scale * (q.float() @ k.float().T)
    cap = geometry.softcap
    return scores if cap is None else cap * torch.tanh(scores / cap)


def measure_text(
    model: LensModel,
    document: Int[Tensor, " pos"],
    geometry: RotaryGeometry,
    measures: Sequence[str],
    settings: ProfileSettings,
    window: int,
    tick: Callable[[], Any] = lambda: None,
) -> Collected:
    """Every measure but retrieval, of one text, a layer at a time.

    Memory: the lens's eager attention of one layer and some tensors of ``[pos, pos]``.
    """
    n_layers, n_heads = len(geometry), int(model.cfg.n_heads)
    nothing = torch.full((n_layers, n_heads), float("nan"), dtype=torch.float64)
    out = Collected({column: nothing.clone() for column in columns_of(measures)})
    wants = set(measures)
    layers = [layer for layer in range(n_layers) if attention_of(model, layer) is not None]
    rotary = [layer for layer in layers if geometry[layer].n_pairs]
    if len(rotary) < n_layers:
        rest = sorted(set(range(n_layers)) - set(rotary))
        for column in columns_of(
            [m for m in measures if m in ("long_context", "massive", "utility")]
        ):
            out.reasons[column] = f"layers {rest} have no RoPE"
    detection = detection_patterns(document) if wants & {"induction", "previous_token"} else {}
    detection = {name: mask for name, mask in detection.items() if name in wants}
    shown: dict[tuple[int, str], Tensor] = {}

    def keep(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
        shown[layer, "q"], shown[layer, "k"] = rot_q[0], rot_k[0]

    def keep_value(layer: int, value: Tensor) -> None:
        shown[layer, "v"] = value[0]

    def read(layer: int, pattern: Tensor) -> None:
        parts = {name: shown.pop((layer, name), None) for name in "qkv"}
        seen = Layer(geometry[layer], pattern[0], **parts)
        _measure(seen, layer, detection, wants, settings, window, out)
        tick()

    readers: list[Any] = []
    for layer in layers:
        attn: Any = attention_of(model, layer)
        value = getattr(attn, "hook_v", None)
        if "utility" in wants and value is not None:
            readers.append((value, partial(keep_value, layer)))
        readers.append((attn.hook_pattern, partial(read, layer)))
    rotated = wants & {"long_context", "massive", "utility"} and rotary
    with rotary_consumer(model, keep, rotary) if rotated else nullcontext():
        read_pass(model, document[None], readers)
    return out


def _measure(
    seen: Layer,
    layer: int,
    detection: dict[str, Tensor],
    wants: set[str],
    settings: ProfileSettings,
    window: int,
    out: Collected,
) -> None:
    pattern = seen.pattern
    for head in range(pattern.shape[0]):
        one = pattern[head]
        for name, mask in detection.items():
            out.values[name][layer, head] = float(detected_share(one, mask.to(one.device)))
        if "sink" in wants:
            out.values["sink"][layer, head] = float(sink_mass(one))
        if "distance" in wants:
            out.values["distance"][layer, head] = float(mean_distance(one))
            out.values["distance_beyond_sink"][layer, head] = float(mean_distance(one, first=1))
    if seen.q is None or seen.k is None:
        return
    require_finite(layer, seen.q, seen.k, seen.geometry.kv_head)
    if "massive" in wants:
        _massive(seen, layer, settings, out)
    if wants & {"long_context", "utility"}:
        _from_scores(seen, layer, wants, settings, window, out)


def _massive(seen: Layer, layer: int, settings: ProfileSettings, out: Collected) -> None:
    slow = slow_dimensions(seen.geometry, seen.pattern.shape[-1])
    for name, rotated in (("q", seen.q), ("k", seen.k)):
        assert rotated is not None
        norms = VectorMeans.of(rotated, seen.geometry).dimension_norms
        if name == "k":  # heads that share keys share the keys' measures
            norms = norms[torch.as_tensor(seen.geometry.kv_head, device=norms.device)]
        share = massive_share(norms, factor=settings.massive_factor)
        out.values[f"massive_{name}"][layer] = share.cpu()
        out.values[f"slow_norm_{name}"][layer] = slow_share(norms, slow).cpu()


def _from_scores(
    seen: Layer, layer: int, wants: set[str], settings: ProfileSettings, window: int, out: Collected
) -> None:
    """Measures that need the scores; none if attention isn't the softmax of the scores alone."""
    assert seen.q is not None
    assert seen.k is not None
    geometry, q = seen.geometry, seen.q
    keys = expand_keys(seen.k, q, geometry)
    n_pos = q.shape[0]
    at = torch.arange(n_pos, device=q.device)
    distance = at[:, None] - at
    hidden = distance < 0
    if geometry.window is not None:
        hidden |= distance >= geometry.window
    apart = 0.0
    shares = []
    for head in range(q.shape[1]):
        scores = head_scores(q[:, head], keys[:, head], geometry)
        ours = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        apart = max(apart, float((ours - seen.pattern[head].float()).abs().sum(-1).mean()) / 2)
        if apart > _SAME:
            break
        if "long_context" in wants:
            shares.append(
                long_context_share(
                    scores,
                    window=window,
                    n_sink=settings.n_sink,
                    threshold=settings.threshold,
                    sliding_window=geometry.window,
                )
            )
    if apart > _SAME:
        why = f"attention of layer {layer} is not softmax of the rotated q . k alone"
        for column in columns_of([m for m in ("long_context", "utility") if m in wants]):
            out.reasons.setdefault(column, why)
        return
    if shares:
        predicted, oracle = torch.tensor(shares, dtype=torch.float64).T
        out.values["long_context"][layer] = predicted
        out.values["long_context_oracle"][layer] = oracle
        if not bool(predicted.isfinite().any()):
            why = f"texts of {n_pos} tokens leave too little outside a window of {window}"
            for column in columns_of(["long_context"]):
                out.reasons.setdefault(column, why)
    if "utility" in wants:
        _utility(seen, keys, layer, settings, out)


def _utility(
    seen: Layer, keys: Tensor, layer: int, settings: ProfileSettings, out: Collected
) -> None:
    geometry, q, v = seen.geometry, seen.q, seen.v
    assert q is not None
    if v is None or v.shape[:2] != (q.shape[0], geometry.n_kv_heads):
        for column in columns_of(["utility"]):
            out.reasons.setdefault(column, f"layer {layer} shows no values of its key heads")
        return
    rows = evenly(q.shape[0], settings.utility_queries, q.device)
    kv_head = torch.as_tensor(geometry.kv_head, device=v.device)
    mask, lost = dimension_utility(
        q[rows],
        keys,
        v[:, kv_head],
        rows,
        scale=geometry.attention_scale,
        softcap=geometry.softcap,
        window=geometry.window,
        penalty=settings.utility_penalty,
        steps=settings.utility_steps,
    )
    slow = slow_dimensions(geometry, q.shape[0])
    out.values["dimensions_used"][layer] = mask.mean(-1).cpu()
    out.values["slow_utility"][layer] = slow_share(mask, slow).cpu()
    out.lost[layer] = float(lost.nanmean())

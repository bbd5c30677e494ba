"""Settings for DPE: the effective distance of each group of pairs, and each head's key pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation.base import require_whole
from tl_posheads.extrapolation.methods.dpe import DPE, KeyPairs
from tl_posheads.extrapolation.methods.unchanged import Unchanged
from tl_posheads.hooks.capture import capture_rotary
from tl_posheads.hooks.changes import trained_of
from tl_posheads.hooks.inputs import documents_of
from tl_posheads.hooks.logprobs import mean_loss
from tl_posheads.hooks.model import LensModel, require_clean, require_rotary
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.rotary.contributions import expand_keys, split_pairs

Texts = Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]]
# The largest distances that the paper's code tries, in halves of the training length.
_TRIED = (1 / 16, 1 / 4, 1 / 2, 1, 2, 4, 16)


@dataclass(frozen=True, eq=False)
class EffectiveLengths:
    """The largest effective token distance of each group of neighbouring pairs.

    Attributes:
        lengths: of each group, fastest first, the largest relative distance, in tokens, at which
            the loss is within the tolerance of the group's best.
        candidates: relative distances that were tried, ascending.
        loss: mean negative log-probability of the scored tokens, in nats.
        pairs: how many pairs each group has.
    """

    lengths: tuple[int, ...]
    candidates: tuple[int, ...]
    loss: Float[Tensor, "group candidate"] = field(repr=False)
    pairs: tuple[int, ...]

    def scales(self, target: int) -> tuple[int, ...]:
        """The scale of every pair for texts of ``target`` tokens: target / length, rounded up."""
        return _by_pair([-(-target // length) for length in self.lengths], self.pairs)


def detect_effective_lengths(
    model: LensModel,
    tokens: Texts,
    *,
    targets: Sequence[Int[Tensor, " target"]] | None = None,
    trained: int | None = None,
    window: int | None = None,
    groups: int = 8,
    candidates: Sequence[int] | None = None,
    chosen: KeyPairs | None = None,
    tolerance: float = 0.01,
    progress: bool = True,
) -> EffectiveLengths:
    """The effective relative distance of each group of rotary pairs, from the loss on long texts.

    As in the DPE paper's code (Lu et al. 2025, arXiv 2504.18857), one group at a time is scaled so
    that the text's length becomes a candidate distance, all others so that it becomes half the
    training length. The paper scores needles found in generation; here it is the loss on chosen
    tokens, which may be the needles' answers. The tolerance is ours.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE, no method in force.
        tokens: texts as long as those that the method will read.
        targets: positions scored in each text; None scores all past the training length, or the
            last half where that is more.
        trained: positions that the model was trained on; its checkpoint's own by default.
        window: of DPE; an eighth of the training length by default, as in the paper.
        groups: into how many neighbouring groups, as equal as can be, the pairs are divided.
        candidates: relative distances; None tries the paper's, up to the texts' length.
        chosen: key pairs, from :func:`key_pairs`; None changes all.
        tolerance: nats by which a larger distance may be worse than the best one.
        progress: show a bar.

    Example:
        >>> found = detect_effective_lengths(model, long_tokens)        # doctest: +SKIP
        >>> found.lengths                                               # doctest: +SKIP
    """
    known, window = _settings(model, trained, window)
    if not 0 <= tolerance < float("inf"):
        raise PosheadsError(f"tolerance={tolerance!r} was given; expected nats, 0 or more")
    with Unchanged()(model, trained=known):
        documents = documents_of(model, tokens, None, 0)
    longest, sizes = max(len(document) for document in documents), _groups(model, groups)
    if candidates is None:
        candidates = [max(1, min(longest, int(known / 2 * factor))) for factor in _TRIED]
    tried = tuple(sorted(set(candidates)))
    require_whole("detect_effective_lengths", candidates=(min(tried, default=0), 1))
    if targets is None:
        targets = [torch.arange(min(known, len(d) // 2), len(d)) for d in documents]
    if len(targets) != len(documents):
        raise PosheadsError(
            f"{len(targets)} targets were given for {len(documents)} texts; expected one each"
        )
    others = [-(-2 * longest // known)] * groups
    settings = [
        [_by_pair([*others[:g], -(-longest // e), *others[g + 1 :]], sizes) for e in tried]
        for g in range(groups)
    ]
    found = dict.fromkeys((scales for row in settings for scales in row), 0.0)
    for scales in tqdm(found, desc="effective lengths", disable=not progress):
        with DPE(scales, window, chosen)(model, trained=known):
            found[scales] = mean_loss(model, documents, targets)
    loss = torch.tensor([[found[scales] for scales in row] for row in settings], dtype=torch.double)
    good = loss <= loss.min(1, keepdim=True).values + tolerance
    lengths = tuple(tried[int(row.nonzero()[-1])] for row in good)
    return EffectiveLengths(lengths, tried, loss, sizes)


def key_pairs(
    model: LensModel,
    tokens: Texts,
    *,
    share: float = 0.75,
    trained: int | None = None,
    progress: bool = True,
) -> KeyPairs:
    """The pairs that contribute most to each head's scores, by the DPE paper's 2-norm.

    That is the length of the query in the pair times that of the key at the same position, mean
    over a text and then over texts, as in the paper's code.

    Args:
        model, tokens, trained, progress: as for :func:`detect_effective_lengths`.
        share: of each head's pairs that are chosen, above 0 and up to 1; 48 of 64 in the paper.

    Returns:
        ``key_pairs[layer][head]``, ascending; empty in layers without RoPE.

    Example:
        >>> chosen = key_pairs(model, long_tokens, share=0.75)          # doctest: +SKIP
        >>> chosen[6][6]  # rotary pairs of L6H6                        # doctest: +SKIP
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise PosheadsError(f"share={share!r} was given; expected a number above 0 and up to 1")
    known, _ = _settings(model, trained, None)
    geometry = RotaryGeometry.from_model(model)
    rotary = [g.layer for g in geometry.layers if g.n_pairs]
    total = [torch.zeros(g.n_heads, g.n_pairs).double() for g in geometry.layers]

    def add(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
        both = (rot_q, expand_keys(rot_k, rot_q, geometry[layer]))
        # Rotation keeps lengths: it need not be undone.
        q, k = (torch.stack(split_pairs(x[0].float(), geometry[layer])).norm(dim=0) for x in both)
        total[layer] += (q * k).mean(0).cpu()

    with Unchanged()(model, trained=known):
        documents = documents_of(model, tokens, None, 0)
        for document in tqdm(documents, desc="key pairs", disable=not progress):
            capture_rotary(model, document[None], add, layers=rotary)
    out = []
    for g in geometry.layers:
        n = max(1, round(share * g.n_pairs)) if g.n_pairs else 0
        # Stable, so that equal contributions fall to the faster pair on every machine.
        order = total[g.layer].argsort(dim=-1, descending=True, stable=True)[:, :n]
        out.append(tuple(tuple(sorted(row)) for row in order.tolist()))
    return tuple(out)


def fit_dpe(
    model: LensModel,
    tokens: Texts,
    *,
    target: int,
    share: float = 0.75,
    trained: int | None = None,
    window: int | None = None,
    progress: bool = True,
    **detection: Any,
) -> DPE:
    """DPE for texts of ``target`` tokens, set by the paper's three steps.

    Args:
        model, tokens, trained, window, progress: as for :func:`detect_effective_lengths`.
        target: tokens of the longest text that is to be read.
        share: as for :func:`key_pairs`.
        detection: ``targets``, ``groups``, ``candidates``, ``tolerance``.

    Example:
        >>> method = fit_dpe(model, long_tokens, target=32768)      # doctest: +SKIP
    """
    require_whole("fit_dpe", target=(target, 2))
    known, window = _settings(model, trained, window)
    chosen = key_pairs(model, tokens, share=share, trained=known, progress=progress)
    found = detect_effective_lengths(
        model, tokens, trained=known, window=window, chosen=chosen, progress=progress, **detection
    )
    return DPE(found.scales(target), window, chosen)


def _settings(model: LensModel, trained: int | None, window: int | None) -> tuple[int, int]:
    require_rotary(model)
    require_clean(model)
    known = trained_of(model, trained)
    return known, max(1, known // 8) if window is None else window


def _groups(model: LensModel, groups: int) -> tuple[int, ...]:
    """How many pairs each group has."""
    require_whole("detect_effective_lengths", groups=(groups, 1))
    found = {layer.n_pairs for layer in RotaryGeometry.from_model(model).layers} - {0}
    if len(found) != 1 or groups > min(found):
        raise PosheadsError(
            f"groups={groups} was given for layers with {sorted(found)} rotary pairs; expected at "
            "most as many groups as pairs, and layers with equally many"
        )
    n = found.pop()
    return tuple(n * (g + 1) // groups - n * g // groups for g in range(groups))


def _by_pair(scales: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(s for scale, n in zip(scales, sizes, strict=True) for s in (scale,) * n)

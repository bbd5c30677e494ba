"""The parts of a change, and the confidence intervals of their shares, from sums by bin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_posheads.statistics.log_bins import bootstrap_counts, interval_of

if TYPE_CHECKING:
    from tl_posheads.studies.ood_angles.results import OODAngles

_FEWEST = 4  # units, or their spread tells nothing of others


@dataclass(frozen=True, eq=False)
class Parts:
    """Means of D past training and what their change is made of, NaN where there is no pair.

    Attributes:
        d_bare: of the unmodified model.
        d_reference: its mean in the last octave inside training.
        d_paired: the same of the bin's own queries.
        change: ``d_bare - d_reference``. change_paired: ``d_bare - d_paired``.
        change_from_ood, change_from_in_distribution: what goes when those pairs are clamped.
        share: of the change, that of out-of-distribution pairs.
        remainder: ``change_from_ood`` less the sum of its pairs' single parts.
        interaction: what goes when all are clamped, less both.
        other: the change that stays when all are clamped.
        d_live, change_live: of the model that reads with all out-of-distribution pairs clamped.
        single: what goes when each pair is clamped alone.
    """

    d_bare: Float[np.ndarray, "head bin"]
    d_reference: Float[np.ndarray, "head bin"]
    d_paired: Float[np.ndarray, "head bin"]
    change: Float[np.ndarray, "head bin"]
    change_paired: Float[np.ndarray, "head bin"]
    change_from_ood: Float[np.ndarray, "head bin"]
    change_from_in_distribution: Float[np.ndarray, "head bin"]
    share: Float[np.ndarray, "head bin"]
    remainder: Float[np.ndarray, "head bin"]
    interaction: Float[np.ndarray, "head bin"]
    other: Float[np.ndarray, "head bin"]
    d_live: Float[np.ndarray, "head bin"]
    change_live: Float[np.ndarray, "head bin"]
    single: Float[np.ndarray, "head pair bin"]

    @classmethod
    def of(cls, found: OODAngles, texts: Float[np.ndarray, " doc"]) -> Parts:
        """With every text counted so often."""
        octave = found.bin_octave.numpy()
        past, inside = octave >= 0, octave == -1

        def pooled(name: str) -> np.ndarray:
            return np.tensordot(texts, getattr(found, name).numpy().astype(float), 1)

        def level(total: np.ndarray) -> np.ndarray:
            mean: np.ndarray = total[:, inside].sum(1) / n[:, inside].sum(1)
            return mean

        n = pooled("n_qk_pairs")
        with np.errstate(invalid="ignore", divide="ignore"):
            over = np.where((n > 0) & past, 1 / n, np.nan)
            total = pooled("bare")
            bare, paired = total * over, pooled("paired") * over
            reference = np.broadcast_to(level(total)[:, None], bare.shape)
            ood, other, both = np.moveaxis(pooled("joint") * over[:, None], 1, 0)
            single = bare[:, None] - pooled("single") * over[:, None]
            live = change_live = np.full_like(bare, np.nan)
            if found.live is not None:
                total = pooled("live")
                live = total * over
                change_live = live - level(total)[:, None]
            change, from_ood, from_other = bare - reference, bare - ood, bare - other
            alone = np.where(found.ood[..., None], single, 0.0).sum(1)
            return cls(
                d_bare=bare,
                d_reference=reference,
                d_paired=paired,
                change=change,
                change_paired=bare - paired,
                change_from_ood=from_ood,
                change_from_in_distribution=from_other,
                share=from_ood / change,
                remainder=from_ood - alone,
                interaction=(bare - both) - from_ood - from_other,
                other=both - reference,
                d_live=live,
                change_live=change_live,
                single=single,
            )


_MEANS = (
    "change",
    "change_from_ood",
    "change_from_in_distribution",
    "interaction",
    "other",
    "remainder",
    "change_paired",
    "change_live",
)
_SLOPES = {
    "head_share": "change_from_ood",
    "head_share_in_distribution": "change_from_in_distribution",
    "head_share_interaction": "interaction",
    "head_share_other": "other",
    "head_share_live": "change_live",
}


class Bootstrap:
    """Means and shares of a result and of draws of its heads and texts."""

    def __init__(self, found: OODAngles, n_boot: int) -> None:
        self.found = found
        octave = found.bin_octave.numpy()
        past = [int(k) for k in np.unique(octave[octave >= 0])]
        self.spans = [(k, k + 1, octave == k) for k in past]
        if len(past) > 1:
            self.spans.append((0, past[-1] + 1, octave >= 0))
        sizes = (found.bare.shape[0], len(found.heads))
        seeds = np.random.SeedSequence(found.seed).generate_state(2)
        counts = [
            bootstrap_counts(n, n_boot, int(seed)) if n >= _FEWEST else np.ones((n_boot, n))
            for n, seed in zip(sizes, seeds, strict=True)
        ]
        self.counts = list(zip(*counts, strict=True))
        self.n_units = min((n for n in sizes if n >= _FEWEST), default=0)
        self.whole = (np.ones(sizes[0]), np.ones(sizes[1]))

    def _draws(self) -> Iterator[tuple[Parts, np.ndarray]]:
        for texts, heads in [self.whole, *self.counts]:
            yield Parts.of(self.found, texts), heads

    def summary(self) -> pd.DataFrame:
        drawn: list[dict[tuple[int, str], float]] = []
        for parts, heads in self._draws():
            values: dict[tuple[int, str], float] = {}
            for s, (_, _, bins) in enumerate(self.spans):
                values |= {(s, k): v for k, v in _summary(parts, heads, bins).items()}
            drawn.append(values)
        rows = []
        for s, quantity in drawn[0]:
            first, last, _ = self.spans[s]
            low, high = self._interval(np.array([values[s, quantity] for values in drawn[1:]]))
            rows.append(
                {
                    "start": self.found.trained * 2**first,
                    "end": self.found.trained * 2**last,
                    "quantity": quantity,
                    "value": drawn[0][s, quantity],
                    "ci_low": low,
                    "ci_high": high,
                }
            )
        return pd.DataFrame(rows)

    def by_pair(self) -> pd.DataFrame:
        past = self.found.bin_octave.numpy() >= 0
        means, slopes = [], []
        for parts, heads in self._draws():
            weight = np.where(np.isfinite(parts.change), heads[:, None], 0.0)[:, past]
            single = np.nan_to_num(parts.single[..., past])
            change = np.nan_to_num(parts.change[:, past])
            with np.errstate(invalid="ignore", divide="ignore"):
                means.append(np.einsum("hpb,hb->p", single, weight) / weight.sum())
                slopes.append(
                    np.einsum("hpb,hb->p", single, weight * change) / (weight * change**2).sum()
                )
        inv_freq = self.found.inv_freq.numpy()
        with np.errstate(divide="ignore"):
            wavelength = np.nanmean(2 * np.pi / inv_freq, axis=0)
        rows = []
        for m in range(inv_freq.shape[1]):
            has = np.isfinite(inv_freq[:, m])
            row = {
                "pair": m,
                "wavelength": wavelength[m],
                "ood": float(self.found.ood[has, m].mean()),
            }
            for name, values in (("change_from_pair", means), ("head_share", slopes)):
                low, high = self._interval(np.array([v[m] for v in values[1:]]))
                row |= {name: values[0][m], f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
        return pd.DataFrame(rows)

    def _interval(self, values: np.ndarray) -> tuple[float, float]:
        if not np.isfinite(values).all():
            return float("nan"), float("nan")
        return interval_of(values, self.n_units)


def _summary(parts: Parts, heads: np.ndarray, bins: np.ndarray) -> dict[str, float]:
    change = parts.change[:, bins]
    weight = np.where(np.isfinite(change), heads[:, None], 0.0)

    def of(name: str) -> np.ndarray:
        values: np.ndarray = np.nan_to_num(getattr(parts, name)[:, bins])
        return values

    live = bool(np.isfinite(parts.change_live[:, bins]).any())
    with np.errstate(invalid="ignore", divide="ignore"):
        out = {name: float((weight * of(name)).sum() / weight.sum()) for name in _MEANS}
        out["share"] = out["change_from_ood"] / out["change"] if out["change"] else np.nan
        out["share_in_distribution"] = (
            out["change_from_in_distribution"] / out["change"] if out["change"] else np.nan
        )
        squares = float((weight * of("change") ** 2).sum())
        for name, part in _SLOPES.items():
            product = float((weight * of(part) * of("change")).sum())
            out[name] = product / squares if squares else np.nan
        squares = float((weight * of("change_paired") ** 2).sum())
        product = float((weight * of("change_from_ood") * of("change_paired")).sum())
        out["head_share_paired"] = product / squares if squares else np.nan
    if not live:
        del out["change_live"], out["head_share_live"]
    return out

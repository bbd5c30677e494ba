"""Scores, curves and loss over the steps of training: tables, lags, a picture, files."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.heads import Heads, as_heads, count_of
from tl_posheads.io.result import Files, Result
from tl_posheads.statistics.ranks import chance_overlap
from tl_posheads.studies.emergence.lead_lag import crossing, lag_of
from tl_posheads.studies.emergence.measuring import SCORES, Moment


@dataclass(frozen=True, eq=False, repr=False)
class Emergence(Result):
    """A training run as seen at some of its steps.

    Attributes:
        steps: of training, ascending.
        rho, ci_low, ci_high, rotation, content, p_adjusted: of every head, as
            :class:`tl_posheads.HeadScores` has them. ``p_adjusted`` is corrected for the number of
            heads at one step, not for that of the steps.
        doc_rho: rho of every text by itself; what the lags' intervals are drawn from.
        curve: mean dominant dimension by octave of distance: 1, 2 to 3, 4 to 7 and so on.
        loss: mean negative log-probability by text and octave of position, nats per token.
        provenance: how it came about.
    """

    steps: Int[Tensor, " step"]
    rho: Float[Tensor, "step layer head"]
    ci_low: Float[Tensor, "step layer head"]
    ci_high: Float[Tensor, "step layer head"]
    rotation: Float[Tensor, "step layer head"]
    content: Float[Tensor, "step layer head"]
    p_adjusted: Float[Tensor, "step layer head"]
    doc_rho: Float[Tensor, "step doc layer head"]
    curve: Float[Tensor, "step layer head octave"]
    loss: Float[Tensor, "step doc octave"]
    provenance: dict[str, Any]

    _files = Files("emergence", "emergence studies", "track it again", 2, "emergence.parquet")

    def _check(self) -> None:
        if not len(self.steps) or not bool((self.steps.diff() > 0).all()):
            raise ValueError("steps that don't ascend")

    @classmethod
    def of(cls, moments: dict[int, Moment], provenance: dict[str, Any]) -> Emergence:
        """Combine the results of several steps.

        Raises:
            PosheadsError: there are none.
        """
        if not moments:
            raise PosheadsError("no step of training was measured; measure at least one")
        steps = sorted(moments)
        parts = {
            f.name: torch.stack([getattr(moments[step], f.name) for step in steps])
            for f in fields(Moment)
        }
        return cls(steps=torch.tensor(steps), **parts, provenance=provenance)

    def _about(self) -> str:
        return (
            f"{self.provenance.get('model')}: {len(self.steps)} steps up to {int(self.steps[-1])}"
        )

    def _finding(self) -> list[str]:
        highest = self.to_pandas().groupby("step")["rho"].max()
        first, last = highest.index[0], highest.index[-1]
        return [
            f"highest score: {highest[first]:.2f} at step {first}, {highest[last]:.2f} at {last}"
        ]

    def to_pandas(self) -> pd.DataFrame:
        """One row per step and head."""
        rows = []
        for i, step in enumerate(self.steps.tolist()):
            for layer in range(self.rho.shape[1]):
                for head in range(self.rho.shape[2]):
                    at = (i, layer, head)
                    numbers = {name: float(getattr(self, name)[at]) for name in SCORES}
                    rows.append({"step": step, "layer": layer, "head": head, **numbers})
        return pd.DataFrame(rows)

    def losses(self) -> pd.DataFrame:
        """Loss by step and octave of position (``start`` to ``end - 1``), mean over texts."""
        mean = torch.nanmean(self.loss, dim=1)
        rows = [
            {"step": step, "start": 2**o, "end": 2 ** (o + 1), "loss": float(mean[i, o])}
            for i, step in enumerate(self.steps.tolist())
            for o in range(mean.shape[1])
        ]
        return pd.DataFrame(rows)

    def top(self, k: int, step: int | None = None) -> list[tuple[int, int]]:
        """The ``k`` heads of highest score at a step, the last one by default.

        Raises:
            PosheadsError: a step that wasn't measured.
        """
        known = self.steps.tolist()
        if step is not None and step not in known:
            raise PosheadsError(f"step={step} was given; the measured steps are {known}")
        rho = self.rho[-1 if step is None else known.index(step)]
        places = [(float(rho[p]), p) for p in np.ndindex(*rho.shape) if bool(rho[p].isfinite())]
        return [place for _, place in sorted(places, key=lambda x: (-x[0], x[1]))[:k]]

    def drift(
        self, reference: Float[Tensor, "layer head"] | None = None, *, k: int | float = 0.05
    ) -> pd.DataFrame:
        """Are the same heads positional at every step? A row per step.

        Args:
            reference: scores to compare with, like ``rho`` of another :class:`HeadScores`; those
                of the first step by default.
            k: how many heads, or which share of them, are the best.

        Returns:
            ``rank_correlation`` of the scores with the reference's; ``overlap`` of the best ``k``,
            with the overlap that ``chance`` gives and the probability ``p_chance`` of so much of
            it; ``curve_change``, by how many rotary pairs the heads' curves lie from those of the
            first step (mean over heads and octaves of distance).

        Raises:
            PosheadsError: a reference of other layers and heads, or another kind of ``k``.
        """
        first = self.rho[0] if reference is None else reference.double()
        if first.shape != self.rho.shape[1:]:
            raise PosheadsError(
                f"a reference of shape {tuple(first.shape)} was given; the model's heads are of "
                f"shape {tuple(self.rho.shape[1:])}"
            )
        rows = []
        for i, step in enumerate(self.steps.tolist()):
            both = torch.isfinite(first) & torch.isfinite(self.rho[i])
            mine, theirs = self.rho[i][both], first[both]
            n = len(mine)
            count = count_of(k, n)
            best = (set(x.argsort(descending=True)[:count].tolist()) for x in (mine, theirs))
            overlap = len(set.intersection(*best))
            chance, p = chance_overlap(n, count, count, overlap)
            change = (self.curve[i] - self.curve[0]).abs().nanmean()
            rows.append(
                {
                    "step": step,
                    "k": count,
                    "overlap": overlap,
                    "chance": chance,
                    "p_chance": p,
                    "rank_correlation": float(stats.spearmanr(mine, theirs).statistic),
                    "curve_change": float(change),
                }
            )
        return pd.DataFrame(rows)

    def lead_lag(
        self, *, min_rise: float = 0.1, n_draws: int = 1000, seed: int = 0
    ) -> pd.DataFrame:
        """Which comes first: the rise of a head's score, or the fall of the loss on far tokens?

        A time is the step from which a quantity stays past the midpoint between its first and last
        value (:func:`tl_posheads.emergence.crossing`). A lag is the score's time after the loss's,
        in octaves of steps; negative: the score rises first.

        Args:
            min_rise: heads whose rho rises by less from the first to the last step have no time.
            n_draws, seed: texts are resampled for the intervals, the same for scores and loss.

        Returns:
            A row per head, largest rise first: ``rise``, ``step_score``; ``step_loss``, of the loss
            in the last octave of positions, and ``lag_loss`` with its interval; ``step_gain``, of
            the far context's gain (loss in the octave of position 8 less loss in the last one,
            after Olsson et al. 2022), and ``lag_gain`` with its interval. NaN without a rise, and
            with fewer than three texts for the intervals.

        Raises:
            PosheadsError: fewer than three steps.
        """
        steps = self.steps.double().numpy()
        if len(steps) < 3:
            raise PosheadsError(f"{len(steps)} steps were measured; expected at least 3")
        n_texts = self.loss.shape[1]
        random = np.random.default_rng(seed)
        draws = random.multinomial(n_texts, np.full(n_texts, 1 / n_texts), size=n_draws) / n_texts
        weights = np.concatenate([np.full((1, n_texts), 1 / n_texts), draws])
        loss = self.loss.numpy()
        # Texts too short for the last octave say nothing of it.
        whole = np.isfinite(loss[:, :, -1]).all(0)
        weights = weights * whole
        with np.errstate(invalid="ignore"):
            weights = weights / weights.sum(1, keepdims=True)
        early = min(3, loss.shape[2] - 2)
        last = np.nan_to_num(loss[:, :, -1])
        far = np.einsum("bd,sd->bs", weights, last)
        gain = np.einsum("bd,sd->bs", weights, np.nan_to_num(loss[:, :, early]) - last)
        doc_rho = np.nan_to_num(self.doc_rho.numpy())
        rows = []
        for layer, head in np.ndindex(*self.rho.shape[1:]):
            own = self.rho[:, layer, head].numpy()
            rise = float(own[-1] - own[0])
            row = {"layer": layer, "head": head, "rho": float(own[-1]), "rise": rise}
            score = np.einsum("bd,sd->bs", weights, doc_rho[:, :, layer, head])
            # Resampled around the mean over all texts, also those too short for the last octave.
            score = own + score - score[0]
            rises = rise >= min_rise
            row["step_score"] = float(crossing(steps, own)) if rises else np.nan
            for name, reference in (("loss", far), ("gain", gain)):
                lags = lag_of(steps, score, reference) if rises else np.full(len(weights), np.nan)
                row[f"step_{name}"] = float(crossing(steps, reference[0]))
                row[f"lag_{name}"] = float(lags[0])
                known = lags[1:][np.isfinite(lags[1:])]
                ends = (np.nan, np.nan)
                if n_texts >= 3 and len(known) > n_draws // 2:
                    ends = tuple(np.quantile(known, [0.025, 0.975]))
                row[f"lag_{name}_low"], row[f"lag_{name}_high"] = float(ends[0]), float(ends[1])
            rows.append(row)
        return pd.DataFrame(rows).sort_values("rise", ascending=False, ignore_index=True)

    def plot(self, heads: Heads | None = None) -> Any:
        """Scores of some heads, loss by octave and the best head's curve over training.

        Args:
            heads: those drawn each in its own colour, ``"L6H6"``, ``(6, 6)`` or a list; the four of
                highest last score by default.

        Raises:
            PosheadsError: no heads, or one that was not scored.
        """
        from tl_posheads.figures.emergence import emergence_figure

        chosen, table = self.top(4) if heads is None else as_heads(heads), self.to_pandas()
        scored = {*zip(table["layer"], table["head"], strict=True)}
        if not chosen or not scored.issuperset(chosen):
            raise PosheadsError(
                f"heads={heads!r} were given; expected some of the {len(scored)} heads scored, as "
                "to_pandas() has them"
            )
        layer, head = chosen[0]
        curve = self.curve[:, layer, head].numpy()
        return emergence_figure(table, self.losses(), curve, chosen)

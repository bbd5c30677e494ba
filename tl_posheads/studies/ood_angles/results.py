"""What clamping out-of-distribution angles did to dominant dimensions and loss: tables, files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.io.result import Files, Result
from tl_posheads.statistics.log_bins import bootstrap_counts, interval_of
from tl_posheads.studies.ood_angles.clamping import ood_pairs
from tl_posheads.studies.ood_angles.shares import Bootstrap, Parts


@dataclass(frozen=True, eq=False, repr=False)
class OODAngles(Result):
    """Dominant dimension past the training length, as it is and with angles held.

    ``bare``, ``paired``, ``joint``, ``single`` and ``live`` are sums over the query-key pairs of a
    bin, so that texts add up; the tables have the means.

    Attributes:
        heads: ``(layer, head)`` of each.
        trained: tokens of a training text.
        bin_start, bin_end: first distance of each bin, and the one after its last, tokens.
        bin_octave: octave of each bin from the training length; -1 is the last one inside.
        inv_freq: radians a token of each head's pairs; NaN where a layer has fewer.
        n_qk_pairs: query-key pairs.
        bare: of D in the unmodified model.
        paired: past training, of the mean D that each pair's query has in the last octave inside.
        joint: past training, of D with the out-of-distribution, the other and all pairs clamped.
        single: past training, of D with each pair clamped.
        live: of D where all out-of-distribution pairs are clamped in the model as it reads; None
            without.
        loss: a row per condition, text and octave of the position: mean loss, nats per token.
        seed: of the bootstrap.
        provenance: how it came about.
    """

    heads: Annotated[list[tuple[int, int]], "head"]
    trained: int
    bin_start: Int[Tensor, " bin"]
    bin_end: Int[Tensor, " bin"]
    bin_octave: Int[Tensor, " bin"]
    inv_freq: Float[Tensor, "head pair"]
    n_qk_pairs: Int[Tensor, "doc head bin"]
    bare: Float[Tensor, "doc head bin"]
    paired: Float[Tensor, "doc head bin"]
    joint: Float[Tensor, "doc head set=3 bin"]
    single: Float[Tensor, "doc head pair bin"]
    live: Float[Tensor, "doc head bin"] | None
    loss: Annotated[
        pd.DataFrame, "condition:string text:integer octave:integer n:integer loss:floating"
    ]
    seed: int
    provenance: dict[str, Any]

    _files = Files("ood_angles", "results on out-of-distribution angles", "run it again", version=2)

    def _check(self) -> None:
        if self.trained < 1 or self.seed < 0:
            raise ValueError("a training length below 1, or a seed below 0")
        ascends = bool((self.bin_start.diff() > 0).all()) and bool((self.bin_start > 0).all())
        if not ascends or not bool((self.bin_end > self.bin_start).all()) or not self.heads:
            raise ValueError("bins that don't ascend, or no heads")
        if bool((self.bin_octave.abs() > 63).any()) or bool((self.n_qk_pairs < 0).any()):
            raise ValueError("octaves beyond all distances, or negative numbers of pairs")
        if len(self.loss):
            keys = ["condition", "octave", "text"]
            octaves = {*self.loss.loc[self.loss["condition"] == "bare", "octave"]}
            octaves &= {*range(-63, 64)}
            inside = self.loss["text"].between(0, self.bare.shape[0] - 1).all()
            if not inside or {*self.loss["octave"]} - octaves or self.loss.duplicated(keys).any():
                raise ValueError("losses of other texts, without the unmodified model's, or twice")

    @cached_property
    def ood(self) -> np.ndarray:
        """Which pairs of which heads saw less than a full turn in training, ``[head, pair]``."""
        found: np.ndarray = ood_pairs(self.inv_freq.nan_to_num(0.0), self.trained).numpy()
        return found

    @cached_property
    def parts(self) -> Parts:
        """The change and what it is made of; texts pooled."""
        return Parts.of(self, np.ones(self.bare.shape[0]))

    def pairs(self) -> pd.DataFrame:
        """A row per head and pair: wavelength in tokens, turns in training, largest angle there.

        ``max_angle_in_training`` is ``theta * (trained - 1)``, radians; ``ood`` says whether the
        pair is out of distribution: it turned less than once.
        """
        rows = []
        for h, (layer, head) in enumerate(self.heads):
            for m, theta in enumerate(self.inv_freq[h].tolist()):
                if math.isnan(theta):
                    continue
                rows.append(
                    {
                        "layer": layer,
                        "head": head,
                        "pair": m,
                        "wavelength": 2 * math.pi / theta if theta else math.inf,
                        "turns_in_training": theta * self.trained / (2 * math.pi),
                        "max_angle_in_training": theta * (self.trained - 1),
                        "ood": bool(self.ood[h, m]),
                    }
                )
        return pd.DataFrame(rows)

    def change(self) -> pd.DataFrame:
        """A row per head and bin of distance past training; texts pooled, rotary dimensions.

        ``change = d_bare - d_reference``, the level in the last octave inside training; it is
        ``change_from_ood + change_from_in_distribution + interaction + other``. ``other`` is what
        is left with the angles of all pairs held: content, the queries' places, and the level at
        the last distance of training against the octave's mean. ``change_from_ood`` is the sum of
        its pairs' single parts (:meth:`attribution`) and ``remainder``. ``share`` is
        ``change_from_ood / change``, as good as the change is large. ``d_paired`` is the
        reference of the same queries that the bin has, ``d_live`` D where the model reads under the
        clamp, ``change_live`` against that model's own reference.
        """
        return self._long(
            {name: values for name, values in vars(self.parts).items() if values.ndim == 2}
        )

    def attribution(self) -> pd.DataFrame:
        """A row per head, pair and bin past training: what clamping that pair alone takes away."""
        frames = []
        wavelength = 2 * math.pi / self.inv_freq.numpy()
        for m in range(self.single.shape[2]):
            values = {"change_from_pair": self.parts.single[:, m]}
            table = self._long({**values, "_which": self._which})
            which = table.pop("_which").to_numpy()
            table.insert(4, "pair", m)
            table.insert(5, "wavelength", wavelength[which, m])
            table.insert(6, "ood", self.ood[which, m])
            frames.append(table.dropna(subset="wavelength"))
        return pd.concat(frames, ignore_index=True)

    @property
    def _which(self) -> np.ndarray:
        """The head's number, by head and bin."""
        return np.repeat(np.arange(len(self.heads))[:, None], len(self.bin_start), axis=1)

    def _long(self, columns: dict[str, np.ndarray]) -> pd.DataFrame:
        past = np.flatnonzero(self.bin_octave.numpy() >= 0)
        which = np.repeat(np.arange(len(self.heads)), len(past))
        at = np.tile(past, len(self.heads))
        heads = np.array(self.heads)
        n_qk_pairs = self.n_qk_pairs.sum(0).numpy()[which, at]
        table = pd.DataFrame(
            {
                "layer": heads[which, 0],
                "head": heads[which, 1],
                "start": self.bin_start.numpy()[at],
                "end": self.bin_end.numpy()[at],
                "n_qk_pairs": n_qk_pairs,
                **{name: values[which, at] for name, values in columns.items()},
            }
        )
        return table[n_qk_pairs > 0].reset_index(drop=True)

    def _about(self) -> str:
        return (
            f"{self.provenance.get('model')}: {len(self.heads)} heads, {self.bare.shape[0]} texts, "
            f"trained on {self.trained} tokens"
        )

    def _finding(self) -> list[str]:
        table = self.summary(n_boot=1)  # its intervals take seconds and are left out
        if table.empty:
            return []
        share = table.loc[table["quantity"] == "head_share", "value"]
        share_ood = f"{share.iloc[-1]:.2f} of each head's change past training"
        return [f"out-of-distribution pairs (wavelength above training length): {share_ood}"]

    def to_pandas(self) -> pd.DataFrame:
        """:meth:`by_pair`."""
        return self.by_pair()

    def sentences(self) -> list[str]:
        """The findings in words: the change, its parts, and the loss."""
        table = self.summary()
        if table.empty:
            return ["The texts reach no distance past the training length."]
        last = table.iloc[-1]
        span = (table["start"] == last["start"]) & (table["end"] == last["end"])
        rows = table[span].set_index("quantity")

        def said(quantity: str, form: str = "{:+.2f}") -> str:
            value, low, high = (rows.loc[quantity, name] for name in ("value", "ci_low", "ci_high"))
            known = low == low
            shown = [form.format(x) for x in (value, low, high)]
            return f"{shown[0]} ({shown[1]} to {shown[2]})" if known else shown[0]

        n_ood = sorted(set(self.ood.sum(1).tolist()))
        out = [
            f"{len(self.heads)} heads, {self.bare.shape[0]} texts, trained on {self.trained} "
            f"tokens; out-of-distribution pairs of a head (wavelength above training length): "
            f"{', '.join(map(str, n_ood))}.",
            f"Change of the mean dominant dimension at distances {last['start']} to {last['end']}: "
            f"{said('change')}.",
            f"Of this, out-of-distribution pairs: {said('change_from_ood')}; other pairs: "
            f"{said('change_from_in_distribution')}; interaction of both: {said('interaction')}; "
            f"left with all angles clamped: {said('other')}.",
            f"Share of each head's own change: out-of-distribution pairs "
            f"{said('head_share', '{:.2f}')}, other pairs "
            f"{said('head_share_in_distribution', '{:.2f}')}.",
        ]
        losses = self.losses()
        past = losses[losses["start"] == losses["start"].max()].set_index("condition")
        if "ood" in past.index:
            names = {
                "bare": "unmodified",
                "ood": "out-of-distribution pairs clamped",
                "in_distribution": "other pairs clamped",
                "all": "all clamped",
                "hidden": "far keys hidden",
            }
            told = ", ".join(f"{text} {past.loc[name, 'loss']:.2f}" for name, text in names.items())
            out.append(f"Loss from position {past['start'].iloc[0]} on, nats per token: {told}.")
        return out

    def summary(self, *, n_boot: int = 1000) -> pd.DataFrame:
        """Means over heads and bins past training, by octave and over all, with 95 % intervals.

        All bins and all heads have equal weight. ``share`` is of the mean curve: mean
        ``change_from_ood`` over mean ``change``; heads that move up and heads that move down
        cancel in it. ``head_share`` is how much of each head's own change it explains: the slope of
        ``change_from_ood`` on ``change`` through the origin, over heads and bins;
        ``_in_distribution`` is the control's, ``_other`` that of content, and with
        ``head_share_interaction`` they sum to 1. ``_paired`` is against each query's own reference.

        The interval is a percentile bootstrap over heads and texts at once; where there are fewer
        than four of one, only the other is drawn, and with fewer than four of both it is NaN.
        Heads of one model are no random sample of heads.

        Args:
            n_boot: bootstrap draws.
        """
        return Bootstrap(self, n_boot).summary()

    def by_pair(self, *, n_boot: int = 1000) -> pd.DataFrame:
        """A row per pair: its part past training by single clamps, mean over heads and bins.

        ``change_from_pair`` in rotary dimensions, ``head_share`` as in :meth:`summary`, each with
        its 95 % interval. ``wavelength`` is the mean over heads, ``ood`` the share of heads in
        which the pair is out of distribution.
        """
        return Bootstrap(self, n_boot).by_pair()

    def losses(self, *, n_boot: int = 1000) -> pd.DataFrame:
        """Loss by octave of the token's position, a row per condition, nats per token.

        Conditions are ``bare``; ``ood``, ``in_distribution`` and ``all`` pairs clamped; ``hidden``,
        where the heads see no key at a distance beyond training: what removing those keys gains,
        whatever their angles; and single pairs. Texts are weighted by their tokens. ``change`` is
        against the unmodified model with its 95 % bootstrap interval over texts (NaN with fewer
        than four). ``recovered`` is the share of the unmodified model's rise since the last octave
        inside training that is taken back; NaN without a rise.
        """
        if self.loss.empty:
            return pd.DataFrame()
        n_texts = self.bare.shape[0]
        counts = bootstrap_counts(n_texts, n_boot, self.seed)
        totals: dict[tuple[str, int], np.ndarray] = {}
        for (condition, octave), mine in self.loss.groupby(["condition", "octave"], sort=False):
            both = np.zeros((2, n_texts))
            both[0, mine["text"]], both[1, mine["text"]] = mine["loss"] * mine["n"], mine["n"]
            totals[str(condition), int(octave)] = both
        inside = totals.get(("bare", -1), np.full((2, n_texts), np.nan)).sum(1)
        rows = []
        for (condition, octave), both in totals.items():
            bare = totals["bare", octave]
            value, was = both[0].sum() / both[1].sum(), bare[0].sum() / bare[1].sum()
            low = high = recovered = math.nan
            if condition != "bare":
                with np.errstate(invalid="ignore"):
                    drawn = (counts @ (both[0] - bare[0])) / (counts @ both[1])
                low, high = interval_of(np.nan_to_num(drawn), n_texts)
                rise = was - inside[0] / inside[1]
                recovered = (was - value) / rise if octave >= 0 and rise > 0 else math.nan
            start, end = (math.ceil(self.trained * 2.0**k) for k in (octave, octave + 1))
            start = 1 if octave == self.loss["octave"].min() else start
            rows.append(
                {
                    "condition": condition,
                    "start": start,
                    "end": end,
                    "n": int(both[1].sum()),
                    "loss": value,
                    "change": value - was,
                    "ci_low": low,
                    "ci_high": high,
                    "recovered": recovered,
                }
            )
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """Mean curve with and without clamps, each pair's part, the loss; a matplotlib figure."""
        from tl_posheads.figures.ood_angles import ood_figure

        return ood_figure(
            self._mean_curves(),
            self.by_pair(n_boot=500),
            self.losses(n_boot=500),
            n_heads=len(self.heads),
            trained=self.trained,
        )

    def _mean_curves(self) -> pd.DataFrame:
        """Dominant dimension by distance, mean over heads, each alike; clamped past training."""
        n = self.n_qk_pairs.sum(0).numpy().astype(float)
        past = self.bin_octave.numpy() >= 0

        def mean(total: Tensor) -> np.ndarray:
            with np.errstate(invalid="ignore", divide="ignore"):
                by_head = np.where(n > 0, total.numpy() / n, np.nan)
            return np.asarray(pd.DataFrame(by_head).mean())

        ood, other, _ = self.joint.sum(0).unbind(1)
        return pd.DataFrame(
            {
                "distance": np.sqrt(self.bin_start.numpy() * (self.bin_end.numpy() - 1.0)),
                "bare": mean(self.bare.sum(0)),
                "ood": np.where(past, mean(ood), np.nan),
                "in_distribution": np.where(past, mean(other), np.nan),
                "live": np.nan if self.live is None else mean(self.live.sum(0)),
            }
        )

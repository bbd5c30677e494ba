"""What methods did to a model's dominant dimensions, scores, losses and tasks: tables, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation import summary
from tl_posheads.extrapolation.break_point import BreakPoint, break_point
from tl_posheads.extrapolation.observing import TextUnder
from tl_posheads.extrapolation.stretch import Stretch, stretch
from tl_posheads.hooks.heads import Head
from tl_posheads.io.result import Files, Result
from tl_posheads.scoring.agreement import Comparison
from tl_posheads.scoring.head_scores import HeadScores
from tl_posheads.statistics.log_bins import log_bins
from tl_posheads.statistics.ranks import mean_over_documents


@dataclass(frozen=True, eq=False, repr=False)
class ExtrapolationComparison(Result):
    """Curves, scores, losses and answers of the same texts under several methods.

    ``within`` covers query-key pairs inside the training length, ``whole`` the whole text. The
    unmodified model is method 0.

    Attributes:
        methods: each with its settings, as text.
        settings: the same as numbers and words, by name.
        heads: ``(layer, head)`` of the curves.
        trained: positions of training.
        slow: rotary pairs of each head that are slow, the same under every method.
        whole, within: mean dominant dimension by distance from 1; NaN where there is no pair.
        slow_whole, slow_within: softmax weight of the slow pairs together, from 0 to 1; NaN where
            there is no pair, and for a head that has no slow one.
        n_whole, n_within: query-key pairs of each of these means.
        scores_within, scores_whole: positional scores of each method, all heads; documents are
            the same in all, so that ``compare`` tests heads in pairs.
        loss: a row per method, document and scored token: ``position`` and ``loss`` in nats.
        tasks: a row per method, task and prompt: ``length`` in tokens, ``logprob`` (mean of the
            answer's tokens, nats) and ``exact`` (all of them were the likeliest).
        provenance: how it came about.
    """

    methods: Annotated[tuple[str, ...], "method"]
    settings: Annotated[tuple[dict[str, Any], ...], "method"]
    heads: Annotated[tuple[Head, ...], "head"]
    slow: Annotated[tuple[tuple[int, ...], ...], "head"]
    trained: int
    whole: Float[Tensor, "method doc head distance"]
    n_whole: Int[Tensor, "doc distance"]
    within: Float[Tensor, "method doc head near"]
    n_within: Int[Tensor, "doc near"]
    slow_whole: Float[Tensor, "method doc head distance"]
    slow_within: Float[Tensor, "method doc head near"]
    scores_within: Annotated[tuple[HeadScores, ...], "method"]
    scores_whole: Annotated[tuple[HeadScores, ...], "method"]
    loss: Annotated[pd.DataFrame, "method:string document:integer position:integer loss:floating"]
    tasks: Annotated[
        pd.DataFrame,
        "method:string task:string prompt:integer length:integer logprob:floating exact:boolean",
    ]
    provenance: dict[str, Any]

    _files = Files("comparison", "comparisons", "compare again", version=4)

    def _check(self) -> None:
        if self.trained < 1 or not all(isinstance(s.get("name"), str) for s in self.settings):
            raise ValueError("a training length below 1, or a method without a name")
        if len({*self.methods}) < len(self.methods) or not self.heads:
            raise ValueError("a method twice, or no heads")
        if not {*self.loss["method"], *self.tasks["method"]} <= {*self.methods}:
            raise ValueError("losses or answers of methods that aren't listed")
        if {*self.loss["method"]} != {*self.methods}:
            raise ValueError("methods without a loss")
        for m in range(len(self.methods)):
            self._factor(m)
        scores = [*self.scores_within, *self.scores_whole]
        if len({s.rho.shape for s in scores}) != 1 or len({s.document_names for s in scores}) != 1:
            raise ValueError("scores of different heads or documents")
        n_layers, n_heads = scores[0].rho.shape
        if not all(layer < n_layers and head < n_heads for layer, head in self.heads):
            raise ValueError("curves of heads that have no scores")
        for weight in (self.slow_whole, self.slow_within):
            if bool((weight < -1e-6).any()) or bool((weight > 1 + 1e-6).any()):
                raise ValueError("softmax weights outside of 0 to 1")
        if bool((self.n_whole < 0).any()) or bool((self.n_within < 0).any()):
            raise ValueError("negative numbers of pairs")

    def _about(self) -> str:
        return (
            f"{self.provenance.get('model')}: {', '.join(self.methods)}; "
            f"{self.n_whole.shape[0]} texts, trained on {self.trained} tokens"
        )

    def _finding(self) -> list[str]:
        loss = self.to_pandas().set_index("method")["loss_past"].dropna()
        if loss.empty:
            return []
        best, bare = loss.idxmin(), loss.get(self.methods[0], float("nan"))
        lowest = f"lowest under {best}, {loss[best]:.2f} nats"
        return [f"loss past training: {lowest}; unmodified model {bare:.2f}"]

    @classmethod
    def of(
        cls,
        *,
        methods: Sequence[str],
        settings: Sequence[Mapping[str, Any]],
        heads: Sequence[Head],
        slow: Sequence[Sequence[int]],
        trained: int,
        texts: Sequence[Sequence[TextUnder]],
        within: Sequence[HeadScores],
        whole: Sequence[HeadScores],
        tasks: pd.DataFrame,
        provenance: Mapping[str, Any],
    ) -> ExtrapolationComparison:
        """From the measurements of each text under each method; pads texts of unequal length."""
        losses = [
            pd.DataFrame(
                {
                    "method": methods[m],
                    "document": d,
                    "position": text.positions.numpy(),
                    "loss": text.loss.numpy(),
                }
            )
            for m, row in enumerate(texts)
            for d, text in enumerate(row)
        ]
        nan = float("nan")
        return cls(
            methods=tuple(methods),
            settings=tuple(dict(s) for s in settings),
            heads=tuple((int(layer), int(head)) for layer, head in heads),
            slow=tuple(tuple(map(int, pairs)) for pairs in slow),
            trained=trained,
            whole=torch.stack([_padded([t.whole for t in row], nan) for row in texts]),
            n_whole=_padded([t.n_whole for t in texts[0]], 0),
            within=torch.stack([_padded([t.within for t in row], nan) for row in texts]),
            n_within=_padded([t.n_within for t in texts[0]], 0),
            slow_whole=torch.stack([_padded([t.whole_slow for t in row], nan) for row in texts]),
            slow_within=torch.stack([_padded([t.within_slow for t in row], nan) for row in texts]),
            scores_within=tuple(within),
            scores_whole=tuple(whole),
            loss=pd.concat(losses, ignore_index=True),
            tasks=tasks,
            provenance=dict(provenance),
        )

    def _number(self, method: str | int) -> int:
        if isinstance(method, int) and 0 <= method < len(self.methods):
            return method
        named = [i for i, name in enumerate(self.methods) if str(method) in (name, repr(name))]
        named += [i for i, s in enumerate(self.settings) if s["name"] == method]
        if len(set(named)) != 1:
            raise PosheadsError(
                f"method={method!r} was given; expected one of {list(self.methods)}, or its number"
            )
        return named[0]

    def stretch(self, method: str | int, *, seed: int = 0) -> Stretch:
        """How far a method stretches the unmodified model's curves within training.

        Args:
            method: its name, its text or its number. seed: of the bootstrap.
        """
        m = self._number(method)
        return self._stretch(m, self.whole[m], self.within[0], seed)

    def allocation_stretch(self, method: str | int, *, seed: int = 0) -> Stretch:
        """How far a method stretches the slow pairs' softmax weight over distance.

        "The extension of the high-dimensional attention allocation" (Hong et al. 2024, arXiv
        2410.08703, section 4.3), as a number: :func:`stretch` of the slow pairs' softmax weight.

        Args:
            method: its name, its text or its number. seed: of the bootstrap.
        """
        m = self._number(method)
        found = self._stretch(m, self.slow_whole[m], self.slow_within[0], seed)
        return found if found.n_heads else replace(found, reason="no head has slow pairs")

    def _stretch(self, m: int, extended: Tensor, bare: Tensor, seed: int) -> Stretch:
        return stretch(
            extended.numpy(),
            bare.numpy(),
            n_extended=self.n_whole.numpy(),
            n_bare=self.n_within.numpy(),
            trained=self.trained,
            factor=self._factor(m),
            seed=seed,
        )

    def break_point(self, *, seed: int = 0) -> BreakPoint:
        """The distance at which the unmodified model's curves break from their trend, if any."""
        return break_point(self.whole[0].numpy(), n_qk_pairs=self.n_whole.numpy(), seed=seed)

    def overlap(
        self,
        method: str | int,
        *,
        k: int | float = 0.05,
        reference: Literal["within", "whole"] = "within",
    ) -> Comparison:
        """Compare the Positional Heads of the unmodified model with the method's on whole texts.

        ``by_head`` says by how much each head's score differs, with a paired t test over texts.

        Args:
            method: its name, its text or its number; 0 is the unmodified model.
            k: best heads compared, as in ``scores.top``.
            reference: ``"within"`` takes the unmodified model's heads on each text's beginning,
                inside the training length; ``"whole"`` those on the same whole texts, so that only
                the method differs.

        Raises:
            PosheadsError: another ``reference``, an unknown method, a ``k`` that ``top`` refuses.
        """
        if reference not in ("within", "whole"):
            raise PosheadsError(f"reference={reference!r} was given; expected 'within' or 'whole'")
        bare = self.scores_within[0] if reference == "within" else self.scores_whole[0]
        return bare.compare(self.scores_whole[self._number(method)], k=k)

    def _factor(self, m: int) -> float | None:
        settings = self.settings[m]
        asked = settings.get("factor", settings.get("group"))
        return None if asked is None else float(asked)

    def losses(self, edges: Sequence[int] | None = None) -> pd.DataFrame:
        """Mean loss by position, in nats, a row per method and bin; 95 % intervals over texts.

        Args:
            edges: ascending positions; by default the training length halved and doubled.
        """
        if edges is None:
            last = int(self.loss["position"].max()) + 1
            near = [1, *(self.trained // 2**k for k in (2, 1, 0)), 2 * self.trained]
            while near[-1] < last:
                near.append(2 * near[-1])
            edges = sorted({min(edge, last) for edge in near if edge >= 1})
        place = pd.cut(self.loss["position"], list(edges), right=False, labels=False)
        table = self.loss.assign(bin=place).dropna(subset="bin")
        rows = table.groupby(["method", "bin"], sort=False)["loss"].agg(["mean", "size"])
        by_text = table.pivot_table("loss", "document", ["method", "bin"], aggfunc="mean")
        values = np.ascontiguousarray(by_text.reindex(columns=rows.index).to_numpy(dtype=float))
        test = mean_over_documents(torch.tensor(values))
        rows["ci_low"], rows["ci_high"] = test.ci_low.numpy(), test.ci_high.numpy()
        rows = rows.reset_index().sort_values(["bin"], kind="stable")
        rows["start"] = [edges[int(b)] for b in rows["bin"]]
        rows["end"] = [edges[int(b) + 1] for b in rows["bin"]]
        order = {name: i for i, name in enumerate(self.methods)}
        rows = rows.sort_values("method", key=lambda names: names.map(order), kind="stable")
        rows = rows.rename(columns={"mean": "loss", "size": "n"})
        return rows[["method", "start", "end", "loss", "ci_low", "ci_high", "n"]].reset_index(
            drop=True
        )

    def answers(self) -> pd.DataFrame:
        """Mean answer of every task by length, a row per method, task and length."""
        groups = self.tasks.groupby(["method", "task", "length"], sort=False)
        return groups.agg(
            logprob=("logprob", "mean"), exact=("exact", "mean"), n=("prompt", "size")
        ).reset_index()

    def curves(self, *, per_octave: int = 8) -> pd.DataFrame:
        """Curves over bins of log distance, a row per method, head and bin, texts pooled."""
        frames = []
        distance = np.arange(1, self.whole.shape[-1] + 1)
        for m, method in enumerate(self.methods):
            bins = log_bins(
                distance,
                self.n_whole.numpy()[:, None],
                self.whole[m].numpy(),
                per_octave=per_octave,
            )
            weight = np.where(np.isfinite(bins.mean), bins.n_qk_pairs, 0)
            total = np.nansum(weight * np.nan_to_num(bins.mean), axis=0)
            with np.errstate(invalid="ignore"):
                pooled = total / weight.sum(0)
            for h, (layer, head) in enumerate(self.heads):
                frames.append(
                    pd.DataFrame(
                        {
                            "method": method,
                            "layer": layer,
                            "head": head,
                            "distance": bins.distance,
                            "mean": pooled[h],
                            "n_qk_pairs": weight.sum(0)[h],
                        }
                    )
                )
        return pd.concat(frames, ignore_index=True)

    def mean_curves(self, *, per_octave: int = 4) -> pd.DataFrame:
        """The heads' mean curves over bins of log distance, a row per method and bin.

        Columns: ``distance``; ``mean`` dominant dimension and ``slow_weight``, means over texts,
        and their 95 % intervals over texts by Student's t, ``mean_low`` to ``slow_weight_high``.
        """
        return summary.mean_curves(self, per_octave)

    @cached_property
    def _summary(self) -> pd.DataFrame:
        return pd.DataFrame([summary.of_method(self, m) for m in range(len(self.methods))])

    def to_pandas(self) -> pd.DataFrame:
        """A row per method.

        Columns: ``factor`` asked for (``base`` of :func:`~tl_posheads.sweep_theta`); ``stretch``
        with its 95 % interval, ``misfit`` (dimensions) and ``r2`` of its fit;
        ``allocation_stretch`` with its interval and ``r2``; mean score of ``heads`` within training
        and on whole texts; ``rank_correlation`` and ``overlap`` of each method's best ``k`` heads
        on whole texts with the unmodified model's within training, with ``chance`` and
        ``p_chance``, and ``overlap_whole`` with the unmodified model's on the same whole texts;
        mean loss of tokens within and past the training length, nats; for every task the share of
        prompts answered exactly, and the answers' mean log-probability past training; ``reason``,
        why numbers are missing.
        """
        return self._summary.copy()

    def achievement(self) -> pd.DataFrame:
        """Do methods that stretch more achieve more? Spearman's rho over methods.

        So the paper interprets its finding (Hong et al. 2024, section 4.3). A row per kind of
        ``stretch`` (of the mean curve, of the slow pairs' allocation) and measure (loss past
        training, log-probability of each task past training): ``rho`` over methods, ``p`` (exact
        up to eight methods) and ``n``; NaN, with the ``reason``, with fewer than four methods with
        a known stretch. A few methods chosen by hand are not a random sample.
        """
        return summary.achievement(self.to_pandas())

    def verdict(self) -> dict[str, str]:
        """What each method does, in sentences, and whether more stretch comes with better results.

        By method; ``"stretch and achievement"``; and ``"note"``, if there is one. For each method:
        how far the mean curve and the slow pairs' allocation are stretched, how many of the best
        heads are kept and how many by chance, loss within and past training relative to the
        unmodified model.
        """
        from tl_posheads.extrapolation.verdict import verdict

        return verdict(self)

    def plot(self, methods: Sequence[str | int] | None = None) -> Any:
        """Curves, losses and answers by length; a matplotlib figure that shows itself.

        Args:
            methods: what to draw, as names, texts or numbers; all by default.
        """
        from tl_posheads.figures.extrapolation import comparison_figure

        chosen = range(len(self.methods)) if methods is None else map(self._number, methods)
        return comparison_figure(
            self.mean_curves(per_octave=4),
            self.losses(),
            self.answers(),
            methods={m: self.methods[m] for m in chosen},
            n_heads=len(self.heads),
            trained=self.trained,
        )


def _padded(rows: Sequence[Tensor], value: float) -> Tensor:
    longest = max(row.shape[-1] for row in rows)
    return torch.stack(
        [torch.nn.functional.pad(row, (0, longest - row.shape[-1]), value=value) for row in rows]
    )

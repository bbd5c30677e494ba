"""What a dose-response run found: a table with tests, a picture, files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_posheads.io.result import Files, Result
from tl_posheads.statistics.effects import Effect, paired_effect, rank_tests, spearman
from tl_posheads.studies.ablation.dose_controls import CONTROLS, EditedSet

_RESOLUTION = 1e-4  # nats; what is below is rounding
_LABELS = dict(
    zip(
        CONTROLS, ("other heads", "other rotary pairs", "rotary pairs of similar norm"), strict=True
    )
)


@dataclass(frozen=True, eq=False, repr=False)
class DoseResponse(Result):
    """Every prompt's answer at every strength, under the tested edit and under each draw.

    Attributes:
        cells: a row per prompt, set and strength: ``logprob``, mean log-probability of the scored
            tokens in nats; ``exact``, all of them were the likeliest; ``clean``, ``logprob``
            without an edit.
        sets: what each set edits: ``control`` (empty for set 0, which is under test), ``heads``
            and ``rotary_pairs``.
        norms: of every rotary pair ``E|q_m| E|k_m|``, the mean over the heads under test; empty
            where no control draws pairs.
        provenance: how it came about.
    """

    cells: Annotated[
        pd.DataFrame,
        "prompt:integer set:integer strength:floating logprob:floating exact:boolean "
        "clean:floating",
    ]
    sets: list[EditedSet]
    norms: list[float]
    provenance: dict[str, Any]

    _files = Files("dose", "dose responses", "run it again", version=2)

    def _check(self) -> None:
        keys = ["set", "prompt", "strength"]
        if {*self.cells["set"]} != {*range(len(self.sets))}:
            raise ValueError("answers of other sets than the label's")
        if len(self.sets) < 2 or self.cells.duplicated(keys).any():
            raise ValueError("no draws, or an answer twice")
        if not all(one.heads and one.rotary_pairs for one in self.sets):
            raise ValueError("a set that edits nothing")
        if self.sets[0].control or not all(one.control in CONTROLS for one in self.sets[1:]):
            raise ValueError("unknown controls")
        highest = max(m for one in self.sets for m in one.rotary_pairs)
        known = np.asarray(self.norms)
        if len(known) and (highest >= len(known) or not (np.isfinite(known) & (known >= 0)).all()):
            raise ValueError("invalid norms")
        if not np.isfinite(self.cells["strength"]).all():
            raise ValueError("a strength that is not a number")
        self.effects()  # every prompt at every strength of every set

    def _about(self) -> str:
        return (
            f"{self.provenance.get('model')}: {self.provenance.get('edit')} of "
            f"{len(self.sets[0].rotary_pairs)} rotary pairs in {len(self.sets[0].heads)} heads, "
            f"{len(self.strengths)} strengths, {len(self.sets) - 1} control draws"
        )

    def _finding(self) -> list[str]:
        table = self.to_pandas()
        most = table[table["strength"] == self.strengths[-1]]
        first = most.iloc[0]
        told = []
        for row in most.to_dict("records"):
            text = f"{_LABELS[row['control']]} {row['control_effect']:+.2f}"
            if np.isfinite(row["norm_ratio"]):
                text += f" at {row['norm_ratio']:.2g} of the norm"
            draws = "draw" if row["n_draws"] == 1 else "draws"
            told.append(f"{text} (corrected p {row['p_adjusted']:.2g}, {row['n_draws']} {draws})")
        return [
            f"at strength {first['strength']:g}: {first['effect']:+.2f} nats per token "
            f"(95 % interval {first['ci_low']:+.2f} to {first['ci_high']:+.2f})",
            "; ".join(told),
        ]

    @property
    def strengths(self) -> list[float]:
        return [float(value) for value in sorted(self.cells["strength"].unique())]

    @property
    def controls(self) -> dict[str, list[int]]:
        """Numbers of each control's sets."""
        out: dict[str, list[int]] = {}
        for number, one in enumerate(self.sets[1:], 1):
            out.setdefault(one.control, []).append(number)
        return out

    def effects(self) -> Float[np.ndarray, "set prompt strength"]:
        """Edited minus clean, in nats; lower is more harm."""
        change = self.cells.assign(effect=self.cells["logprob"] - self.cells["clean"])
        return self._array(change, "effect")

    def _array(self, cells: pd.DataFrame, column: str) -> Float[np.ndarray, "set prompt strength"]:
        ordered = cells.sort_values(["set", "prompt", "strength"])[column]
        shape = (len(self.sets), cells["prompt"].nunique(), len(self.strengths))
        values: np.ndarray = ordered.to_numpy().reshape(shape)
        return values

    def to_pandas(self) -> pd.DataFrame:
        """A row per strength and control.

        Columns: ``effect`` of the edit under test (edited minus clean, nats per token) and
        ``exact``, the share of prompts still answered exactly; ``control_effect``, the draws'
        mean, with their ``control_min`` and ``control_max``, and ``control_exact``;
        ``difference``, effect minus the draws' mean; ``norm_ratio``, the draws' norm over the
        edited pairs' (NaN for other heads); ``n_draws``; ``p``, of the effect's rank among the
        draws', one-sided; ``p_adjusted``, corrected for all strengths together (Westfall and
        Young), control by control. ``ci_low`` and ``ci_high`` of the effect and
        ``difference_low`` and ``difference_high`` are 95 % intervals over prompts. At strength 0
        there is nothing to test.
        """
        effects, exact = self.effects(), self._array(self.cells, "exact").mean(1)
        means = effects.mean(1)
        rows = []
        for control, draws in self.controls.items():
            tests = rank_tests(means[0], means[draws], resolution=_RESOLUTION)
            for i, strength in enumerate(self.strengths):
                effect = _over_prompts(effects[0, :, i])
                beyond = _over_prompts(effects[0, :, i] - effects[draws, :, i].mean(0))
                rows.append(
                    {
                        "strength": strength,
                        "control": control,
                        "effect": effect.mean,
                        "ci_low": effect.ci_low,
                        "ci_high": effect.ci_high,
                        "exact": float(exact[0, i]),
                        "control_effect": float(means[draws, i].mean()),
                        "control_min": float(means[draws, i].min()),
                        "control_max": float(means[draws, i].max()),
                        "control_exact": float(exact[draws, i].mean()),
                        "difference": beyond.mean,
                        "difference_low": beyond.ci_low,
                        "difference_high": beyond.ci_high,
                        "norm_ratio": self._norm_ratio(control),
                        "n_draws": len(draws),
                        "n_prompts": effect.n_prompts,
                        "p": float("nan") if strength == 0 else float(tests.p[i]),
                        "p_adjusted": float("nan") if strength == 0 else float(tests.p_adjusted[i]),
                    }
                )
        return pd.DataFrame(rows).sort_values("strength", kind="stable", ignore_index=True)

    def _norm_ratio(self, control: str) -> float:
        """Norm of the control's rotary pairs, mean over draws, over that of the edited ones."""
        if control == CONTROLS[0] or not self.norms:
            return float("nan")
        norms = np.asarray(self.norms)
        mine = norms[self.sets[0].rotary_pairs].sum()
        theirs = [norms[self.sets[draw].rotary_pairs].sum() for draw in self.controls[control]]
        return float(np.mean(theirs) / mine) if mine > 0 else float("nan")

    def trend(self) -> tuple[Effect, dict[str, float]]:
        """Does harm grow with strength? Spearman's rho of strength and effect, prompt by prompt.

        Returns:
            Mean rho of the edit under test with its 95 % interval over prompts, -1 being more harm
            at every step; and by control the mean rho of its draws. NaN with fewer than three
            strengths. Changes of less than 1e-4 nats are rounding and count as none, prompts in
            which nothing changes as 0.
        """
        strengths = np.asarray(self.strengths)
        effects = np.round(self.effects() / _RESOLUTION)  # rounding follows strength, too
        if len(strengths) < 3:
            nan = float("nan")
            return Effect(nan, nan, nan, effects.shape[1]), dict.fromkeys(self.controls, nan)
        rho = np.nan_to_num(spearman(np.broadcast_to(strengths, effects.shape), effects))
        means = {control: float(rho[draws].mean()) for control, draws in self.controls.items()}
        return _over_prompts(rho[0]), means

    def plot(self) -> Any:
        """Effect against strength, a panel for each control; a matplotlib figure."""
        from tl_posheads.figures.dose import dose_figure

        shift = self.provenance.get("edit") == "shift"
        means = self.effects().mean(1)
        asked = self.sets[0]
        return dose_figure(
            self.to_pandas(),
            {control: means[draws] for control, draws in self.controls.items()},
            titles=_LABELS,
            label=f"{len(asked.rotary_pairs)} rotary pairs of {len(asked.heads)} heads",
            xlabel="shift of the query (tokens)" if shift else "share taken away",
        )


def _over_prompts(values: Float[np.ndarray, " prompt"]) -> Effect:
    return paired_effect(values, np.zeros_like(values))

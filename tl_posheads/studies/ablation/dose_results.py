"""What a dose-response run found: a table with tests, a picture, files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_posheads.io.result import Files, Result
from tl_posheads.statistics.effects import Effect, paired_effect, rank_tests, spearman
from tl_posheads.studies.ablation.controls import Head
from tl_posheads.studies.ablation.results import RESOLUTION


@dataclass(frozen=True, eq=False, repr=False)
class DoseResponse(Result):
    """Every prompt's answer at every strength, of the heads asked about and of the control draws.

    Attributes:
        cells: a row per prompt, set and strength: ``logprob``, mean log-probability of the scored
            tokens in nats; ``exact``, all of them were the likeliest; ``clean``, ``logprob``
            without an edit. Set 0 are the heads asked about, the others the draws.
        sets: heads of each set.
        provenance: how it came about.
    """

    cells: Annotated[
        pd.DataFrame,
        "prompt:integer set:integer strength:floating logprob:floating exact:boolean "
        "clean:floating",
    ]
    sets: list[list[Head]]
    provenance: dict[str, Any]

    _files = Files("dose", "dose responses", "run it again")

    def _check(self) -> None:
        keys = ["set", "prompt", "strength"]
        if not all(self.sets) or {*self.cells["set"]} != {*range(len(self.sets))}:
            raise ValueError("answers of other sets than the label's")
        if len(self.sets) < 2 or self.cells.duplicated(keys).any():
            raise ValueError("no draws, or an answer twice")
        if not np.isfinite(self.cells["strength"]).all():
            raise ValueError("a strength that is no number")
        if not isinstance(self.provenance.get("pairs", []), list):
            raise ValueError("pairs that are no list")
        self.effects()  # every prompt at every strength of every set

    def _about(self) -> str:
        return (
            f"{self.provenance.get('model')}: {self.provenance.get('edit')} of "
            f"{len(self.provenance.get('pairs', []))} pairs in {len(self.sets[0])} heads, "
            f"{len(self.strengths)} strengths, {len(self.sets) - 1} control draws"
        )

    def _finding(self) -> list[str]:
        most = self.to_pandas().iloc[-1]
        return [
            f"at strength {most['strength']:g}: {most['effect']:+.2f} nats a token, other heads "
            f"{most['control_effect']:+.2f} (corrected p {most['p_adjusted']:.2g})"
        ]

    @property
    def strengths(self) -> list[float]:
        return [float(value) for value in sorted(self.cells["strength"].unique())]

    def effects(self) -> Float[np.ndarray, "set prompt strength"]:
        """Edited minus clean, in nats; lower is more harm."""
        change = self.cells.assign(effect=self.cells["logprob"] - self.cells["clean"])
        change = change.sort_values(["set", "prompt", "strength"])
        shape = (len(self.sets), self.cells["prompt"].nunique(), len(self.strengths))
        effects: np.ndarray = change["effect"].to_numpy().reshape(shape)
        return effects

    def to_pandas(self, *, seed: int = 0) -> pd.DataFrame:
        """A row per strength.

        Columns: ``effect`` of the heads asked about (edited minus clean, nats a token) with its
        95 % bootstrap interval over prompts; ``exact``, the share of prompts still answered
        exactly; ``control_effect``, the draws' mean, with their ``control_min`` and
        ``control_max``; ``p``, of the effect's rank among the draws', one-sided; ``p_adjusted``,
        corrected for all strengths together (Westfall and Young). At strength 0 there is nothing
        to test.
        """
        effects = self.effects()
        means = effects.mean(1)
        tests = rank_tests(means[0], means[1:], resolution=RESOLUTION)
        rows = []
        for i, strength in enumerate(self.strengths):
            mine = effects[0, :, i]
            effect = paired_effect(mine, np.zeros_like(mine), seed=seed)
            here = self.cells[(self.cells["strength"] == strength) & (self.cells["set"] == 0)]
            rows.append(
                {
                    "strength": strength,
                    "effect": effect.mean,
                    "ci_low": effect.ci_low,
                    "ci_high": effect.ci_high,
                    "exact": float(here["exact"].mean()),
                    "control_effect": float(means[1:, i].mean()),
                    "control_min": float(means[1:, i].min()),
                    "control_max": float(means[1:, i].max()),
                    "n_draws": len(self.sets) - 1,
                    "n_prompts": effect.n_prompts,
                    "p": float("nan") if strength == 0 else float(tests.p[i]),
                    "p_adjusted": float("nan") if strength == 0 else float(tests.p_adjusted[i]),
                }
            )
        return pd.DataFrame(rows)

    def trend(self, *, seed: int = 0) -> tuple[Effect, float]:
        """Does more strength do more? Spearman's rho of strength and effect, prompt by prompt.

        Returns:
            Mean rho of the heads asked about with its 95 % bootstrap interval over prompts, -1
            being more harm at every step; and the mean rho of the draws. NaN with fewer than three
            strengths. Changes of less than 1e-4 nats are rounding and count as none, prompts in
            which nothing changes as 0.
        """
        strengths = np.asarray(self.strengths)
        effects = np.round(self.effects() / RESOLUTION)  # rounding follows strength, too
        if len(strengths) < 3:
            nan = float("nan")
            return Effect(nan, nan, nan, effects.shape[1]), nan
        rho = np.nan_to_num(spearman(np.broadcast_to(strengths, effects.shape), effects))
        mine = paired_effect(rho[0], np.zeros_like(rho[0]), seed=seed)
        return mine, float(rho[1:].mean())

    def plot(self) -> Any:
        """Effect against strength, over the draws; a matplotlib figure that shows itself."""
        from tl_posheads.figures.dose import dose_figure

        shift = self.provenance.get("edit") == "shift"
        return dose_figure(
            self.to_pandas(),
            self.effects()[1:].mean(1),
            n_heads=len(self.sets[0]),
            xlabel="shift of the query (tokens)" if shift else "share of the pairs taken away",
        )

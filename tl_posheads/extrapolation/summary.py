"""Tables of a comparison: a row per method, mean curves, correlations with stretch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from tl_posheads.statistics.log_bins import log_bins
from tl_posheads.statistics.ranks import mean_over_documents, spearman_of_few

if TYPE_CHECKING:
    from tl_posheads.extrapolation.comparison import ExtrapolationComparison
    from tl_posheads.scoring.head_scores import HeadScores

FEWEST_METHODS = 4  # four in perfect order have p = 0.08, three 0.33


def of_method(found: ExtrapolationComparison, m: int) -> dict[str, Any]:
    """A method's row of ``ExtrapolationComparison.to_pandas``."""
    method = found.methods[m]
    drawn, allocated, alike = found.stretch(m), found.allocation_stretch(m), found.overlap(m)
    loss = found.loss[found.loss["method"] == method]
    past = loss["position"] >= found.trained
    missing = {"stretch": drawn.reason, "allocation_stretch": allocated.reason}
    row: dict[str, Any] = {
        "method": method,
        "factor": drawn.factor,
        **({"base": found.settings[m]["base"]} if "base" in found.settings[m] else {}),
        "stretch": drawn.scale,
        "stretch_low": drawn.ci_low,
        "stretch_high": drawn.ci_high,
        "misfit": drawn.misfit,
        "r2": drawn.r2,
        "allocation_stretch": allocated.scale,
        "allocation_low": allocated.ci_low,
        "allocation_high": allocated.ci_high,
        "allocation_r2": allocated.r2,
        "rho_within": _mean_rho(found, found.scores_within[m]),
        "rho_whole": _mean_rho(found, found.scores_whole[m]),
        "rank_correlation": alike.rank_correlation,
        "overlap": alike.overlap,
        "k": alike.k,
        "chance": alike.chance,
        "p_chance": alike.p_chance,
        "overlap_whole": found.overlap(m, reference="whole").overlap,
        "loss_within": loss["loss"][~past].mean(),
        "loss_past": loss["loss"][past].mean(),
    }
    asked = found.tasks[found.tasks["method"] == method]
    for name, group in asked.groupby("task", sort=False):
        far = group["length"] > found.trained
        row[f"{name}_within"] = group["exact"][~far].mean()
        row[f"{name}_past"] = group["exact"][far].mean()
        row[f"{name}_logprob_past"] = group["logprob"][far].mean()
        for side, n in (("within", (~far).sum()), ("past", far.sum())):
            if not n:
                missing[str(name)] = f"no prompts {side} training"
    units = {"stretch": drawn.unit, "allocation_stretch": allocated.unit}
    for name, fit in (("stretch", drawn), ("allocation_stretch", allocated)):
        if fit.identifiable and np.isnan(fit.ci_low):
            missing[f"interval of {name}"] = f"fewer than four {units[name]}"
    row["reason"] = "; ".join(f"{name}: {why}" for name, why in missing.items() if why)
    return row


def _mean_rho(found: ExtrapolationComparison, scores: HeadScores) -> float:
    return float(np.mean([float(scores.rho[head]) for head in found.heads]))


def achievement(table: pd.DataFrame) -> pd.DataFrame:
    """``ExtrapolationComparison.achievement`` from its ``to_pandas``."""
    measures = [c for c in table.columns if c == "loss_past" or c.endswith("logprob_past")]
    rows = []
    for kind in ("stretch", "allocation_stretch"):
        for measure in measures:
            known = table[[kind, measure]].dropna()
            rho = p = float("nan")
            reason = ""
            if len(known) < FEWEST_METHODS:
                reason = f"fewer than {FEWEST_METHODS} methods with a known {kind}"
            elif known.nunique().min() == 1:
                reason = "the same for all methods"
            else:
                rho, p = spearman_of_few(known[kind].to_numpy(), known[measure].to_numpy())
            rows.append(
                {
                    "stretch": kind,
                    "measure": measure,
                    "rho": rho,
                    "p": p,
                    "n": len(known),
                    "reason": reason,
                }
            )
    return pd.DataFrame(rows, columns=["stretch", "measure", "rho", "p", "n", "reason"])


def mean_curves(found: ExtrapolationComparison, per_octave: int) -> pd.DataFrame:
    """``ExtrapolationComparison.mean_curves``: the mean over heads, then over texts."""
    frames = []
    distance = np.arange(1, found.whole.shape[-1] + 1)
    pairs = found.n_whole.numpy()[:, None]
    for m, method in enumerate(found.methods):
        columns: dict[str, Any] = {"method": method}
        for name, values in (("mean", found.whole[m]), ("slow_weight", found.slow_whole[m])):
            # Bins without a slow pair stay, for those of both curves to be the same.
            curves = torch.where(found.whole[m].isnan(), torch.nan, values.nan_to_num(-1))
            bins = log_bins(distance, pairs, curves.numpy(), per_octave=per_octave)
            by_head = np.where(bins.mean < 0, np.nan, bins.mean)
            known = np.isfinite(by_head)
            with np.errstate(invalid="ignore"):
                by_text = np.where(known, by_head, 0).sum(1) / known.sum(1)
            test = mean_over_documents(torch.as_tensor(by_text))
            columns |= {
                "distance": bins.distance,
                name: test.mean.numpy(),
                f"{name}_low": test.ci_low.numpy(),
                f"{name}_high": test.ci_high.numpy(),
            }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)

"""What a comparison of methods found, in sentences that say no more than its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tl_posheads.extrapolation.summary import FEWEST_METHODS
from tl_posheads.statistics.ranks import mean_over_documents

if TYPE_CHECKING:
    import pandas as pd

    from tl_posheads.extrapolation.comparison import ExtrapolationComparison

_ALPHA = 0.05
_KINDS = {"stretch": "the mean curve", "allocation_stretch": "the slow pairs' allocation"}


def verdict(found: ExtrapolationComparison) -> dict[str, str]:
    """``ExtrapolationComparison.verdict``."""
    table = found.to_pandas()
    said = {str(row["method"]): _method(found, row) for row in table.to_dict("records")}
    said["stretch and achievement"] = " ".join(
        _achievement(row) for row in found.achievement().to_dict("records")
    )
    if "note" in found.provenance:
        said["note"] = f"{found.provenance['note']}."
    return said


def _method(found: ExtrapolationComparison, row: dict[Any, Any]) -> str:
    method, bare = row["method"], found.methods[0]
    m = found.methods.index(method)
    drawn, allocated = found.stretch(m), found.allocation_stretch(m)
    kept = (
        f"{row['overlap']} of the unmodified model's best {row['k']} heads within training are kept"
    )
    if m == 0:
        kept = (
            f"{row['overlap']} of the best {row['k']} heads within training are still among the "
            "best"
        )
    parts = [
        f"{method}: the mean curve is {_drawn(drawn)}; the slow pairs' allocation is "
        f"{_drawn(allocated)}",
        f"on whole texts {kept} (chance {row['chance']:.1f}, p {_p(row['p_chance'])})",
    ]
    for side, name in (("within", "loss_within"), ("past", "loss_past")):
        beside = "" if m == 0 else _beside(found, method, bare, side)
        parts.append(f"loss {side} training {row[name]:.2f} nats{beside}")
    return "; ".join(parts) + "."


def _drawn(fit: Any) -> str:
    """How far a curve is stretched, or why that is unknown."""
    if fit.reason is not None:
        return f"stretched by an unknown factor ({fit.reason})"
    if fit.ci_low != fit.ci_low:
        return f"stretched by {fit.scale:.2f} (fewer than four {fit.unit}: no interval)"
    return f"stretched by {fit.scale:.2f} ({fit.ci_low:.2f} to {fit.ci_high:.2f} over {fit.unit})"


def _beside(found: ExtrapolationComparison, method: str, bare: str, side: str) -> str:
    """Difference from the unmodified model's loss on the same texts, with its interval."""
    past = found.loss["position"] >= found.trained
    rows: pd.DataFrame = found.loss[past if side == "past" else ~past]
    by_text = rows.pivot_table("loss", "document", "method")
    if by_text.empty:
        return ""
    test = mean_over_documents(torch.tensor((by_text[method] - by_text[bare]).to_numpy()))
    said = f", {float(test.mean):+.2f} against the unmodified model"
    if bool(test.ci_low.isfinite()):
        said += (
            f" ({float(test.ci_low):+.2f} to {float(test.ci_high):+.2f} over {int(test.n)} texts)"
        )
    return said


def _achievement(row: dict[Any, Any]) -> str:
    what, n = _KINDS[row["stretch"]], row["n"]
    measure = str(row["measure"]).removesuffix("_past").replace("_", " ")
    asked = f"Stretch of {what} and {measure} past training"
    if n < FEWEST_METHODS:
        methods = "method" if n == 1 else "methods"
        return (
            f"{asked}: too few methods to say, {n} {methods} with a known stretch, and "
            f"at least {FEWEST_METHODS} are needed."
        )
    if row["reason"]:
        return f"{asked}: nothing to correlate, {row['reason']}."
    said = f"{asked}: Spearman's rho {row['rho']:+.2f} over {n} methods (p {_p(row['p'])}), "
    if row["p"] > _ALPHA:
        return said + "no evidence that they are correlated."
    better = (row["rho"] < 0) == (measure == "loss")
    return said + f"more stretch comes with {'better' if better else 'worse'} results."


def _p(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.3f}"

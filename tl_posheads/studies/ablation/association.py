"""Does the harm of ablating a head correlate with its score?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tl_posheads.errors import PosheadsError
from tl_posheads.scoring.head_scores import HeadScores
from tl_posheads.statistics.association import rank_association
from tl_posheads.statistics.ranks import benjamini_hochberg
from tl_posheads.studies.ablation.head_effects_results import VARIANTS, HeadEffects
from tl_posheads.studies.profile.results import HeadProfile

_SCORES = ("rho", "rotation", "content")


def association(
    scores: HeadScores | HeadProfile | pd.DataFrame,
    effects: HeadEffects,
    *,
    columns: Sequence[str] | None = None,
    n_permutations: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Does harm correlate with the score, over all heads? Rank correlations with their tests.

    Spearman's rho between a column of ``scores`` and the harm of ablating each head by itself
    (minus its mean effect over prompts), controlling for the head's layer and output norm: positive
    where heads with a higher score do more harm. See
    :func:`tl_posheads.statistics.association.rank_association`.

    Args:
        scores: what ``score_heads`` or ``profile_heads`` returned, or any table with the columns
            ``layer`` and ``head``.
        effects: what ``head_effects`` returned, for the same model.
        columns: which of the scores; None is ``rho``, ``rotation`` and ``content`` of
            ``score_heads``, and of the others all columns with a value.
        n_permutations: permutations within layers.
        seed: of these.

    Returns:
        A row per task, variant and column: ``rho``, ``ci_low`` and ``ci_high`` (95 %, over
        prompts), ``p`` (permutation within layers), ``p_adjusted`` for all rows of the table
        (Benjamini and Hochberg), ``raw_rho`` (without controlling for layer and norm), ``n_heads``,
        ``n_prompts``. ``rho`` and ``p`` are NaN where nothing is left to compare.

    Raises:
        PosheadsError: scores of another model or number of heads, columns that don't exist, fewer
            than 8 heads with both.

    Example:
        >>> effects = head_effects(model, [tasks.MultiKey(length=512)])    # doctest: +SKIP
        >>> association(scores, effects)[["column", "rho", "p_adjusted"]]  # doctest: +SKIP
    """
    table, model = _table(scores)
    if model is not None and model != effects.provenance.get("model"):
        raise PosheadsError(
            f"scores of {model} and effects of {effects.provenance.get('model')} were given; give "
            "both of the same model"
        )
    shape = tuple(effects.norms.shape)
    place = (table["layer"].to_numpy(), table["head"].to_numpy())
    if len(table) == 0 or any(
        x.min() < 0 or x.max() >= n for x, n in zip(place, shape, strict=True)
    ):
        raise PosheadsError(
            f"scores of {len(table)} heads were given, but the effects are of {shape[0]} layers of "
            f"{shape[1]} heads; give both of the same model"
        )
    if table.duplicated(["layer", "head"]).any():
        raise PosheadsError("scores with a head twice were given; give one row for each head")
    known = [str(c) for c in table.select_dtypes("number") if c not in ("layer", "head")]
    some = [column for column in known if table[column].notna().any()]
    wanted = list(columns or (_SCORES if isinstance(scores, HeadScores) else some))
    if not wanted or not set(wanted) <= set(known):
        raise PosheadsError(f"columns={wanted} was given; expected some of {', '.join(known)}")
    rows = []
    for task in effects.tasks:
        for variant in VARIANTS:
            values = effects.of(task, variant).numpy()
            if not np.isfinite(values).any():
                continue
            for column in wanted:
                score = np.full(shape, np.nan)
                score[place] = table[column].to_numpy(dtype=float)
                found = rank_association(
                    score,
                    values,
                    norms=effects.norms.numpy(),
                    n_permutations=n_permutations,
                    seed=seed,
                )
                rows.append({"task": task, "variant": variant, "column": column, **vars(found)})
    out = pd.DataFrame(rows)
    out.insert(out.columns.get_loc("p") + 1, "p_adjusted", benjamini_hochberg(out["p"].to_numpy()))
    return out


def _table(scores: object) -> tuple[pd.DataFrame, str | None]:
    """A row a head, and the model's name where it is known."""
    if isinstance(scores, HeadScores | HeadProfile):
        model = scores.provenance.get("model")
        return scores.to_pandas(), None if model is None else str(model)
    if isinstance(scores, pd.DataFrame) and {"layer", "head"} <= set(scores.columns):
        return scores, None
    raise PosheadsError(
        f"scores={type(scores).__name__} was given; expected what score_heads or profile_heads "
        "returns, or a table with the columns layer and head"
    )

"""A small result of every kind that can be saved, without a model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import torch

from helpers.scores_by_hand import head_scores
from tl_posheads import AblationStudy, ExtrapolationComparison, HeadEffects
from tl_posheads.interventions.patching import HeadPatching
from tl_posheads.scoring.curves import DominantDimensionCurve
from tl_posheads.scoring.maps import HeadMaps
from tl_posheads.studies.ablation.dose_controls import EditedSet
from tl_posheads.studies.ablation.dose_results import DoseResponse
from tl_posheads.studies.atlas.measure import BY_DISTANCE, BY_HEAD, BY_PAIR
from tl_posheads.studies.atlas.results import RotaryAtlas
from tl_posheads.studies.emergence.results import Emergence
from tl_posheads.studies.encodings.basis import QKBasis
from tl_posheads.studies.encodings.results import EncodingScores
from tl_posheads.studies.ood_angles.results import OODAngles
from tl_posheads.studies.profile.results import HeadProfile

HEADS = [(0, 1), (1, 0)]
FACTS = {"model": "by hand", "seed": 3}


def _random(*shape: int, seed: int = 0) -> Any:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores():
    return head_scores(_random(2, 3) - 0.5, n_documents=3, windows=(None, 16), provenance=FACTS)


def encodings():
    def basis():
        vectors = torch.linalg.qr(_random(4, 4))[0]
        speeds = torch.tensor([0.5, 0.5, 0.1, 0.0], dtype=torch.float64)
        shifts = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
        return QKBasis(vectors, speeds, _random(3, 4), shifts, 0.9, 0.8, 0.7, "transport", None)

    of, which = scores(), torch.tensor([[0, 0, -1], [1, 1, 1]])
    facts = {**FACTS, "encoding": "learned"}
    return EncodingScores(
        of.values, of.document_names, of.windows, facts, which=which, bases=(basis(), basis())
    )


def curve():
    return DominantDimensionCurve(
        heads=list(HEADS),
        distance=torch.arange(1, 6),
        n_qk_pairs=torch.full((2, 5), 7),
        mean=_random(2, 5),
        quantiles=_random(2, 2, 5),
        levels=(0.1, 0.9),
        allocation=_random(2, 3, 5),
        wavelengths=_random(2, 3) + 6,
    )


def maps():
    return HeadMaps(
        model="by hand",
        heads=list(HEADS),
        tokens=["a", "<b>", "c"],
        step=2,
        pattern=_random(2, 2, 2),
        dominant=_random(2, 2, 2),
        distance=_random(2, 3),
        dimension=_random(2, 3),
        q_pos=[2],
        row_pattern=_random(2, 1, 3),
        row_dominant=_random(2, 1, 3),
        n_pairs=[3, 3],
        wavelengths=torch.tensor([[6.0, 60.0, 600.0]] * 2),
    )


def study():
    rng, rows = np.random.default_rng(0), []
    for kind, n in (("top", 1), ("retrieval", 1), ("random", 3), ("lowest", 1)):
        for draw in range(n):
            for n_heads, fraction in ((1, 0.17), (2, 0.33)):
                heads = rng.permutation(6)[:n_heads]
                rows.append(
                    {
                        "condition": len(rows),
                        "kind": kind,
                        "draw": draw,
                        "fraction": fraction,
                        "n_heads": n_heads,
                        "heads": json.dumps([[int(h) // 3, int(h) % 3] for h in heads]),
                    }
                )
    cells = [
        (task, variant, prompt, condition, float(rng.normal(-1, 0.1)), 0.5, prompt > 0)
        for task in ("passkey", "copying")
        for variant in ("long", "short")
        for prompt in range(3)
        for condition in range(-1, len(rows))
    ]
    columns = ["task", "variant", "prompt", "condition", "value", "accuracy", "exact"]
    rungs = [("passkey", 0, 0.95, False), ("passkey", 1, 0.6, True), ("copying", 0, 0.5, True)]
    facts = {
        "tasks": {task: {"rungs": 2, "metric": False} for task in ("passkey", "copying")},
        "left_out": {"needle": "at its floor on the easiest rung"},
        "positive_control": {"n_heads": 2},
    }
    return AblationStudy(
        pd.DataFrame(rows),
        pd.DataFrame(cells, columns=columns),
        pd.DataFrame(rungs, columns=["task", "rung", "probability", "taken"]),
        {**FACTS, **facts},
    )


def effects():
    rows = [
        (task, prompt, 64, -0.5, 0.5, prompt > 0, -0.1)
        for task in ("passkey", "copying")
        for prompt in range(3)
    ]
    columns = ["task", "prompt", "n_tokens", "clean", "accuracy", "exact", "clean_short"]
    long, short = (-_random(6, 2, 3, seed=i) for i in range(2))
    long[:, 1, 2] = short[:, 1, 2] = short[3:] = float("nan")
    agreement = [("passkey", 5, 0.7, 0.2, 0.9, 1.1), ("copying", 5, 0.5, 0.1, 0.8, 0.9)]
    return HeadEffects(
        pd.DataFrame(rows, columns=columns),
        long,
        short,
        _random(2, 3).float(),
        pd.DataFrame(
            agreement,
            columns=["task", "n_heads", "rank_correlation", "ci_low", "ci_high", "slope"],
        ),
        dict(FACTS),
    )


def dose():
    rng = np.random.default_rng(0)
    rows = [
        (prompt, number, strength, float(rng.normal(-1, 0.1)), prompt > 0, -1.0)
        for number in range(3)
        for prompt in range(3)
        for strength in (0.0, 0.5, 1.0)
    ]
    columns = ["prompt", "set", "strength", "logprob", "exact", "clean"]
    facts = {**FACTS, "edit": "scale", "rotary_pairs": [0, 1]}
    sets = [
        EditedSet("", [(0, 0)], [0, 1]),
        EditedSet("layer_matched_heads", [(0, 1)], [0, 1]),
        EditedSet("norm_matched_rotary_pairs", [(0, 0)], [2, 3]),
    ]
    return DoseResponse(pd.DataFrame(rows, columns=columns), sets, [2.0, 1.0, 1.5, 0.5], facts)


def comparison():
    methods = ("Unchanged()", "Linear(factor=2.0)")
    loss = [(m, d, p, 2.0 + 0.1 * d) for m in methods for d in range(3) for p in range(1, 16)]
    tasks = [(m, "passkey", n, i, -1.0, i > 0) for m in methods for n in (6, 12) for i in range(2)]
    far, near = torch.arange(15, 0, -1), torch.arange(7, 0, -1)
    return ExtrapolationComparison(
        methods=methods,
        settings=({"name": "none"}, {"name": "linear", "factor": 2.0}),
        heads=tuple(HEADS),
        trained=8,
        whole=_random(2, 3, 2, 15),
        n_whole=far.repeat(3, 1),
        within=_random(2, 3, 2, 7),
        n_within=near.repeat(3, 1),
        slow=((2, 3),) * len(HEADS),
        slow_whole=_random(2, 3, 2, 15).sigmoid(),
        slow_within=_random(2, 3, 2, 7).sigmoid(),
        scores_within=(scores(), scores()),
        scores_whole=(scores(), scores()),
        loss=pd.DataFrame(loss, columns=["method", "document", "position", "loss"]),
        tasks=pd.DataFrame(
            tasks, columns=["method", "task", "length", "prompt", "logprob", "exact"]
        ),
        provenance=dict(FACTS),
    )


def emergence():
    return Emergence(
        steps=torch.tensor([0, 16, 128]),
        doc_rho=_random(3, 4, 2, 3),
        curve=_random(3, 2, 3, 5),
        loss=_random(3, 4, 5) + 2,
        provenance=dict(FACTS),
        **{
            name: _random(3, 2, 3, seed=i)
            for i, name in enumerate(
                ["rho", "ci_low", "ci_high", "rotation", "content", "p_adjusted"]
            )
        },
    )


def profile():
    table = pd.DataFrame(_random(6, 3).numpy(), columns=["positional", "sink", "induction"])
    table.insert(0, "layer", [0, 0, 0, 1, 1, 1])
    table.insert(1, "head", [0, 1, 2] * 2)
    table.loc[2, "sink"] = np.nan
    return HeadProfile(
        table, {**FACTS, "missing": {"sink": "no"}, "needles": {"n_prompts": 2, "n_answered": 1}}
    )


def atlas():
    """Three documents, two layers of three heads, three rotary pairs, four bins; one layer bare."""
    by_pair = _random(len(BY_PAIR), 3, 2, 3, 3)
    by_distance = _random(len(BY_DISTANCE), 3, 2, 3, 4, seed=1)
    by_distance[0] = torch.tensor([1.0, 2.0, 3.0, 4.5])
    by_pair[:, :, 1, 2] = float("nan")
    return RotaryAtlas(
        by_pair=by_pair,
        by_head=_random(len(BY_HEAD), 3, 2, 3, seed=2),
        by_distance=by_distance,
        wavelengths=torch.tensor([6.0, 60.0, 600.0]).double().expand(3, 2, 3),
        lengths=[8, 8, 8],
        document_names=("a", "b", "c"),
        windows=(None, 6),
        trained=100,
        scale="none",
        scores=_random(3, 2, 3, seed=3) - 0.5,
        provenance=dict(FACTS),
    )


def ood_angles():
    loss = [
        (condition, text, octave, 8, 2.0 + 0.1 * octave)
        for condition in ("bare", "ood", "in_distribution", "all", "hidden")
        for text in range(4)
        for octave in (-1, 0, 1)
    ]
    bins = torch.tensor([1, 4, 8, 16, 32])
    shape = (4, 2, 4)  # texts, heads, bins
    return OODAngles(
        heads=list(HEADS),
        trained=8,
        bin_start=bins[:-1],
        bin_end=bins[1:],
        bin_octave=torch.tensor([-2, -1, 0, 1]),
        inv_freq=torch.tensor([[2.0, 0.1], [2.0, float("nan")]]),
        n_qk_pairs=torch.full(shape, 9),
        bare=9 * _random(*shape),
        paired=9 * _random(*shape),
        joint=9 * _random(4, 2, 3, 4),
        single=9 * _random(4, 2, 2, 4),
        live=9 * _random(*shape),
        loss=pd.DataFrame(loss, columns=["condition", "text", "octave", "n", "loss"]),
        seed=0,
        provenance=dict(FACTS),
    )


def patching():
    effects = pd.DataFrame(
        {
            "layer": [0, 1],
            "head": [1, 2],
            "patched": [0.5, 1.5],
            "effect": [-0.5, 0.5],
            "recovered": [-0.25, 0.25],
        }
    )
    return HeadPatching(effects, clean=3.0, corrupted=1.0, provenance={**FACTS, "seed": 0})


KINDS = {
    build.__name__: build
    for build in (
        scores,
        encodings,
        curve,
        maps,
        study,
        effects,
        dose,
        comparison,
        emergence,
        profile,
        atlas,
        ood_angles,
        patching,
    )
}

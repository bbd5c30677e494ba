"""A small result of every kind that can be saved, without a model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import torch

from helpers.scores_by_hand import head_scores
from tl_posheads import AblationStudy, ExtrapolationComparison
from tl_posheads.interventions.patching import HeadPatching
from tl_posheads.scoring.curves import DominantDimensionCurve
from tl_posheads.scoring.maps import HeadMaps
from tl_posheads.studies.ablation.dose_results import DoseResponse
from tl_posheads.studies.emergence.results import Emergence
from tl_posheads.studies.encodings.basis import QKBasis
from tl_posheads.studies.encodings.results import EncodingScores
from tl_posheads.studies.profile.results import HeadProfile
from tl_posheads.studies.unseen.results import UnseenAngles

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
        n_pairs=torch.full((2, 5), 7),
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
    )


def study():
    rng, rows = np.random.default_rng(0), []
    for kind, n in (("top", 1), ("random", 3), ("lowest", 1)):
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
    cells, screen, tests = [], [], []
    for task in ("passkey", "copying"):
        for variant in ("long", "short"):
            for prompt in range(3):
                for condition in range(-1, len(rows)):
                    value = float(rng.normal(-1, 0.1))
                    cells.append((task, variant, prompt, condition, value, 0.5, prompt > 0))
                for place in range(6):
                    effect = float(rng.normal(-0.1, 0.1))
                    screen.append((task, variant, prompt, place // 3, place % 3, effect))
            for fraction in (0.17, 0.33):
                for control, n in (("random", 9), ("lowest", 0)):
                    p = 0.2 if n else np.nan
                    tests.append((task, variant, fraction, control, -0.1, n, p))
    columns = ["task", "variant", "prompt"]
    return AblationStudy(
        pd.DataFrame(rows),
        pd.DataFrame(cells, columns=[*columns, "condition", "logprob", "accuracy", "exact"]),
        pd.DataFrame(screen, columns=[*columns, "layer", "head", "effect"]),
        pd.DataFrame(
            tests,
            columns=[
                "task",
                "variant",
                "fraction",
                "control",
                "screen_effect",
                "n_screen_draws",
                "p_screen",
            ],
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
    facts = {**FACTS, "edit": "scale", "pairs": [0, 1]}
    return DoseResponse(pd.DataFrame(rows, columns=columns), [[(0, i)] for i in range(3)], facts)


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


def unseen():
    loss = [
        (condition, text, octave, 8, 2.0 + 0.1 * octave)
        for condition in ("bare", "unseen", "seen", "all", "hidden")
        for text in range(4)
        for octave in (-1, 0, 1)
    ]
    bins = torch.tensor([1, 4, 8, 16, 32])
    shape = (4, 2, 4)  # texts, heads, bins
    return UnseenAngles(
        heads=list(HEADS),
        trained=8,
        bin_start=bins[:-1],
        bin_end=bins[1:],
        bin_octave=torch.tensor([-2, -1, 0, 1]),
        inv_freq=torch.tensor([[2.0, 0.1], [2.0, float("nan")]]),
        n_pairs=torch.full(shape, 9),
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
        dose,
        comparison,
        emergence,
        profile,
        unseen,
        patching,
    )
}

"""What is drawn of a text, and how far drawing is from all pairs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from helpers.text_by_hand import (
    CPU,
    GEOMETRIES,
    NAME,
    every_pair,
    measured,
    planted,
    positions,
    rising,
    text,
)
from tl_posheads import LayerGeometry
from tl_posheads.rotary.contributions import rotate_by
from tl_posheads.rotary.remapping import pair_vectors
from tl_posheads.scoring.draws import DocumentDraws, Settings, draw_pairs


@pytest.mark.parametrize(("nearest", "longest"), [(1, 11), (1, 4), (3, 7), (11, 11)])
@pytest.mark.parametrize("weighting", ["pair", "distance"])
def test_where_there_are_no_more_every_pair_is_taken_once(nearest, longest, weighting):
    there = sorted((i, j) for i, j in every_pair(12) if nearest <= i - j <= longest)
    generator = np.random.default_rng(0)
    for n in (len(there), len(there) + 1, 10_000):
        found, weights = draw_pairs(12, nearest, longest, n, weighting, generator)
        assert sorted(zip(found.q_pos.tolist(), found.k_pos.tolist())) == there
        if weighting == "pair":
            assert weights is None
        else:
            apart = (found.q_pos - found.k_pos).numpy()
            sums = np.bincount(apart, weights.numpy())[nearest:]
            np.testing.assert_allclose(sums, 1.0)
    if len(there) > 1:
        assert len(
            draw_pairs(12, nearest, longest, len(there) - 1, weighting, generator)[0].q_pos
        ) < (len(there))


@pytest.mark.parametrize("longest", [19, 6])
def test_every_pair_is_drawn_as_often(longest):
    there = every_pair(20, longest + 1)
    found, weights = draw_pairs(20, 1, longest, 40_000, "pair", np.random.default_rng(1))
    assert weights is None
    # More are asked for than there are: each once. Below, fewer at a time.
    assert len(found.q_pos) == len(there)
    generator, count = np.random.default_rng(1), np.zeros((20, 20))
    for _ in range(600):
        found, weights = draw_pairs(20, 1, longest, len(there) - 1, "pair", generator)
        np.add.at(count, (found.q_pos.numpy(), found.k_pos.numpy()), 1)
    seen = count[tuple(np.array(there).T)]
    assert seen.sum() == count.sum() == 600 * (len(there) - 1)
    assert stats.chisquare(seen).pvalue > 1e-3


@pytest.mark.parametrize("longest", [19, 6])
def test_every_distance_is_drawn_as_often_and_every_pair_within_it(longest):
    n = len(every_pair(20, longest + 1)) - 1
    generator, count = np.random.default_rng(2), np.zeros((20, 20))
    for _ in range(600):
        found, weights = draw_pairs(20, 1, longest, n, "distance", generator)
        assert weights is None
        np.add.at(count, (found.q_pos.numpy(), found.k_pos.numpy()), 1)
    by_distance = [np.diagonal(count, -d) for d in range(1, longest + 1)]
    assert sum(map(np.sum, by_distance)) == count.sum() == 600 * n
    assert stats.chisquare([x.sum() for x in by_distance]).pvalue > 1e-3
    within = [stats.chisquare(x).statistic for x in by_distance if len(x) > 1]
    freedom = sum(len(x) - 1 for x in by_distance)
    assert stats.chi2.sf(sum(within), freedom) > 1e-3


@pytest.mark.parametrize("weighting", ["pair", "distance"])
def test_drawn_pairs_keep_to_their_bounds(weighting):
    found, weights = draw_pairs(3000, 700, 1400, 5000, weighting, np.random.default_rng(3))
    apart = found.q_pos - found.k_pos
    assert (int(apart.min()), int(apart.max())) == (700, 1400)
    assert 0 <= int(found.k_pos.min()) < 5
    assert 2995 <= int(found.q_pos.max()) < 3000


def test_a_documents_draw_is_of_its_name_and_seed_and_its_layers_share_it():
    settings = Settings(draws=200)
    one = DocumentDraws(NAME, 100, settings)
    assert one.within(None, CPU) is one.within(500, CPU)
    assert one.within(30, CPU) is not one.within(None, CPU)
    assert int(one.within(30, CPU).qk_pairs.distance.max()) <= 29

    def drawn(name, seed):
        return (
            DocumentDraws(name, 100, replace(settings, seed=seed)).within(None, CPU).qk_pairs.q_pos
        )

    assert torch.equal(drawn(NAME, 0), one.within(None, CPU).qk_pairs.q_pos)
    assert not torch.equal(drawn(NAME, 0), drawn(NAME, 1))
    assert not torch.equal(drawn(NAME, 0), drawn("f" + NAME[1:], 0))
    own, given, *_ = positions(one.within(None, CPU))
    assert len(own) == 200
    assert sorted(own) == sorted(given)
    assert own != given


def curves(n_pos):
    """Heads whose D hardly changes but by distance: rising, falling and rising, crossed, waves."""
    slow = np.pi / n_pos
    geometry = LayerGeometry.from_inv_freq(torch.tensor([slow, 2 * slow, 8 * slow, 0.0]), 4)
    content = torch.zeros(4, 8, dtype=torch.float64)
    content[0, [0]] = 1.0
    content[1, [1]] = 2.0
    content[2, [2]] = 2.0
    content[3, [3]] = 1.0
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, n_pos, 4, 8, generator=generator, dtype=torch.float64)
    noise = noise * torch.tensor([0.05, 0.05, 0.3, 0.6]).double()[:, None]
    q, k = (rotate_by(content + x, torch.arange(n_pos), geometry) for x in noise)
    return geometry, q, k


@pytest.mark.parametrize("weighting", ["pair", "distance"])
@pytest.mark.parametrize("n_docs", [1, 8])
def test_drawing_errs_less_than_was_asked(weighting, n_docs):
    geometry, q, k = curves(200)
    target = 0.02
    settings = Settings.of("auto", n_docs, target_se=target, weighting=weighting)
    assert settings.draws == -(-3750 // n_docs) < 199 * 100
    exact = measured(q, k, geometry, replace(settings, exact=True))["rho"]
    assert abs(exact[1]) < 0.8 < abs(exact[0])
    off = np.array(
        [
            measured(q, k, geometry, replace(settings, seed=seed))["rho"] - exact
            for seed in range(200)
        ]
    )
    spread = np.sqrt((off**2).mean(0))
    # The spread of 200 draws is itself known to one part in twenty.
    assert spread.max() < target * np.sqrt(n_docs) * (1 + 2 / np.sqrt(2 * len(off)))
    assert spread.max() > 0.3 * target * np.sqrt(n_docs)
    # No head is off to one side.
    assert (np.abs(off.mean(0)) < 4 * spread / np.sqrt(len(off))).all()


@pytest.mark.parametrize("weighting", ["pair", "distance"])
def test_counting_and_drawing_measure_the_same(weighting):
    """Over 40 texts: rho, rotation and content of all pairs, and of a sixth of them."""
    geometry, found = rising(60, heads=2), []
    for seed in range(40):
        steady = torch.tensor([[1.5, 1.0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0, 0]])
        q, k = planted(geometry, 60, steady, 0.5, seed)
        q[:, 1, 2] += torch.linspace(-2, 2, 60)  # the queries of one head drift
        name = f"{seed:015x}"
        found.append(
            [
                [
                    measured(q, k, geometry, Settings(draws=n, weighting=weighting), name)[part]
                    for part in ("rho", "rotation", "content")
                ]
                for n in (5000, 300)
            ]
        )
    counted, drawn = np.array(found).transpose(1, 0, 2, 3)
    apart = drawn - counted
    se = apart.std(0, ddof=1) / np.sqrt(len(apart))
    assert (se < 0.02).all()
    assert (np.abs(apart.mean(0)) < 4 * se).all()
    rho, rotation, content = counted.mean(0)
    assert (rho > 0.2).all()
    assert rotation[0] > 0.2 > 0.05 > abs(rotation[1])
    assert content[1] > 0.2 > 0.05 > abs(content[0])


def test_near_and_far_means_are_drawn():
    geometry = GEOMETRIES["half"]
    q, k = text(geometry, 400)
    d = pair_vectors(q, k, geometry).dominant_rows(torch.arange(400), slice(0, 400)).numpy()
    i, j = np.tril_indices(400, -1)
    found = measured(q, k, geometry, Settings(draws=10))
    for name, here in (("d_near", i - j <= 2), ("d_far", i - j >= 200)):
        values = d[:, i[here], j[here]]
        off = np.abs(found[name] - values.mean(1)) / (values.std(1) / np.sqrt(256))
        assert (off > 1e-6).all()
        assert (off < 4).all()


@pytest.mark.parametrize(
    ("options", "n_docs", "expected"),
    [
        (dict(qk_pairs="auto"), 16, 3750),
        (dict(qk_pairs="auto"), 1, 60_000),
        (dict(qk_pairs="auto", target_se=0.5), 64, 3),
        (dict(qk_pairs=77), 4, 77),
        (dict(qk_pairs="all"), 16, 3750),
    ],
)
def test_how_many_are_drawn(options, n_docs, expected):
    settings = Settings.of(**options, n_documents=n_docs)
    assert settings.draws == expected
    assert settings.exact == (options["qk_pairs"] == "all")

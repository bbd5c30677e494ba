"""Harm beside a score over heads: by hand, and in simulated models with effects as they lie."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from tl_posheads import PosheadsError
from tl_posheads.statistics.association import rank_association

N_LAYERS, N_HEADS = 12, 9


def model(rng, link):
    """Score, norms and true harm ``[layer, head]``: nearly none, but for five vital heads.

    Layers differ in score, norm and harm, and what a head writes drives both its score and its
    harm; beyond these, harm goes with the score by ``link``.
    """
    shape, layer = (N_LAYERS, N_HEADS), rng.normal(size=(N_LAYERS, 1))
    log_norm = 0.5 * rng.normal(size=shape) + 0.3 * layer
    score = rng.normal(size=shape) + 0.5 * log_norm + 0.5 * layer
    latent = link * score + rng.normal(size=shape) + 0.7 * log_norm
    latent += 0.6 * rng.normal(size=(N_LAYERS, 1))
    vital = latent >= np.sort(latent.ravel())[-5]
    return score, np.exp(log_norm), 0.004 * latent + vital * rng.lognormal(-1.5, 0.8, shape)


def measured(rng, harm, n_prompts):
    """Large effects differ more from prompt to prompt, and some prompts hurt under any ablation."""
    shape = (n_prompts, *harm.shape)
    noise = 0.02 * rng.standard_t(4, shape) + 0.01 * rng.normal(size=(n_prompts, 1, 1))
    return -harm * rng.lognormal(-0.125, 0.5, shape) + noise


def p_values(link, n_studies, n_prompts=8, with_norms=True):
    found = []
    for seed in range(n_studies):
        rng = np.random.default_rng(seed)
        score, norms, harm = model(rng, link)
        effects = measured(rng, harm, n_prompts)
        norms = norms if with_norms else None
        one = rank_association(score, effects, norms=norms, n_permutations=400, seed=seed)
        found.append(one.p)
    return np.array(found)


def by_hand(score, harm, norms):
    """Partial correlation: what a regression on layers and norm leaves of the ranks."""
    layers = np.repeat(np.eye(score.shape[0]), score.shape[1], axis=0)
    known = np.isfinite(score).ravel()
    design = layers
    if norms is not None:
        design = np.column_stack([layers, np.zeros(len(layers))])
        design[known, -1] = stats.rankdata(norms.ravel()[known])
    ranks = [stats.rankdata(x.ravel()[known]) for x in (score, harm)]
    left = [y - design[known] @ np.linalg.lstsq(design[known], y)[0] for y in ranks]
    return np.corrcoef(*left)[0, 1], left, design[known]


@pytest.mark.parametrize("with_norms", [False, True])
def test_rho_is_the_partial_correlation_of_ranks(with_norms):
    rng = np.random.default_rng(3)
    score, norms, harm = model(rng, 0.5)
    score[2, 3] = score[7] = np.nan  # a layer without any score, too
    score[4, :3] = score[4, 0]
    effects = measured(rng, harm, 6)
    norms = norms if with_norms else None
    found = rank_association(score, effects, norms=norms, seed=0)
    rho, _, _ = by_hand(score, -effects.mean(0), norms)
    assert found.rho == pytest.approx(rho)
    assert (found.n_heads, found.n_prompts) == (98, 6)
    known = np.isfinite(score)
    raw = stats.spearmanr(score[known], -effects.mean(0)[known]).statistic
    assert found.raw_rho == pytest.approx(raw)
    # The jackknife, a prompt at a time.
    without = [by_hand(score, -np.delete(effects, i, 0).mean(0), norms)[0] for i in range(6)]
    se = np.sqrt(5 / 6 * np.sum((np.array(without) - np.mean(without)) ** 2))
    half = stats.t.ppf(0.975, 5) * se
    assert (found.ci_low, found.ci_high) == pytest.approx((rho - half, rho + half))
    flipped = rank_association(-score, effects, norms=norms, seed=0)
    assert flipped.rho == pytest.approx(-found.rho)
    assert flipped.p == found.p


@pytest.mark.parametrize("with_norms", [False, True])
def test_p_is_the_share_of_all_orders_within_layers(with_norms):
    """Two layers of four heads: 576 orders, all looked at."""
    rng = np.random.default_rng(1)
    score, norms, effects = rng.normal(size=(2, 4)), rng.random((2, 4)), rng.normal(size=(3, 2, 4))
    effects -= 0.8 * score
    norms = norms if with_norms else None
    rho, (a, b), design = by_hand(score, -effects.mean(0), norms)
    reached = []
    for first, second in itertools.product(itertools.permutations(range(4)), repeat=2):
        y = b[[*first, *(4 + np.array(second))]]
        y = y - design @ np.linalg.lstsq(design, y)[0]
        reached.append(abs(np.corrcoef(a, y)[0, 1]) >= abs(rho) - 1e-9)
    found = rank_association(score, effects, norms=norms, n_permutations=20_000, seed=0)
    assert 0.005 < np.mean(reached) < 0.3
    assert found.p == pytest.approx(np.mean(reached), abs=0.01)


def test_level_where_layers_and_norms_drive_both():
    p = p_values(0.0, 500)
    for level in (0.05, 0.01):
        assert np.mean(p <= level) == pytest.approx(
            level, abs=3 * np.sqrt(level * (1 - level) / len(p))
        )
    # Without the norms, what they do to both is taken for a dependence.
    assert np.mean(p_values(0.0, 150, n_prompts=24, with_norms=False) <= 0.05) > 0.08


def test_a_planted_dependence_is_found():
    weak, strong = (np.mean(p_values(link, 100, n_prompts=24) <= 0.05) for link in (0.3, 0.7))
    assert 0.15 < weak < strong
    assert strong > 0.8


def test_one_vital_head_is_no_dependence():
    rng = np.random.default_rng(5)
    score, effects = rng.normal(size=(12, 9)), 0.01 * rng.normal(size=(8, 12, 9))
    effects[:, 3, 2] -= 5.0
    score[3, 2] = 4.0
    assert rank_association(score, effects, seed=0).p > 0.05


@pytest.mark.parametrize(
    ("n_prompts", "n_studies", "least"),
    [
        (5, 40, 0.86),
        *(pytest.param(n, 150, 0.91, marks=pytest.mark.slow) for n in (5, 8, 24)),
    ],
)
def test_the_interval_covers_what_so_many_prompts_give_on_average(n_prompts, n_studies, least):
    hits = []
    for seed in range(n_studies):
        rng = np.random.default_rng(seed)
        score, norms, harm = model(rng, 0.7)

        def rho(n=n_prompts, score=score, norms=norms, harm=harm, rng=rng):
            effects = measured(rng, harm, n)
            return rank_association(score, effects, norms=norms, n_permutations=1, seed=0)

        truth = np.mean([rho().rho for _ in range(25)])
        found = rho()
        hits.append(found.ci_low <= truth <= found.ci_high)
    assert np.mean(hits) >= least


def test_heads_that_stand_in_for_each_other_are_not_seen():
    """Twelve pairs of high-scoring heads, either of which is enough: only both together harm."""
    rng = np.random.default_rng(0)
    score = rng.normal(size=(N_LAYERS, N_HEADS))
    score[:, :2] += 4
    works = np.ones((N_LAYERS, N_HEADS))

    def loss(works):
        return 2.0 * (1 - works[:, :2].max(1)).sum()

    harm = np.zeros_like(score)
    for at in np.ndindex(*score.shape):
        alone = works.copy()
        alone[at] = 0
        harm[at] = loss(alone) - loss(works)
    pair = works.copy()
    pair[0, :2] = 0
    assert loss(pair) == 2.0
    p = []
    for _ in range(100):
        effects = 0.02 * rng.normal(size=(8, *score.shape)) - harm
        p.append(rank_association(score, effects, n_permutations=200, seed=0).p)
    assert np.mean(np.array(p) <= 0.05) < 0.13
    # With one head of each pair gone for good, the other is seen.
    works[:, 0] = 0
    harm[:, 1] = 2.0
    effects = 0.02 * rng.normal(size=(8, *score.shape)) - harm
    assert rank_association(score, effects, seed=0).p < 0.01


def test_what_cannot_be_told():
    rng = np.random.default_rng(0)
    score, effects = rng.normal(size=(4, 5)), rng.normal(size=(6, 4, 5))
    one = rank_association(score, effects[:1], seed=0)
    assert np.isfinite([one.rho, one.p]).all()
    assert np.isnan([one.ci_low, one.ci_high]).all()
    two = rank_association(score, effects[:2], seed=0)
    assert -1 <= two.ci_low <= two.rho <= two.ci_high <= 1
    flat = rank_association(np.ones((4, 5)), effects, seed=0)
    assert np.isnan([flat.rho, flat.p, flat.ci_low, flat.raw_rho]).all()
    # The same in all heads of a layer, or nothing but the norm: nothing is left after adjustment.
    layers = rank_association(np.arange(4.0)[:, None] * np.ones(5), effects, seed=0)
    assert np.isnan([layers.rho, layers.p]).all()
    assert np.isfinite(layers.raw_rho)
    norm = rank_association(score, effects, norms=np.exp(score), seed=0)
    assert np.isnan([norm.rho, norm.p]).all()
    none = rank_association(score, np.zeros((6, 4, 5)), seed=0)
    assert np.isnan([none.rho, none.p, none.raw_rho]).all()
    # Norms that are the same everywhere adjust nothing.
    same = rank_association(score, effects, norms=np.ones((4, 5)), seed=0)
    assert same == rank_association(score, effects, seed=0)
    assert same != rank_association(score, effects, seed=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": np.zeros(20)}, r"expected \[layer, head\]"),
        ({"score": np.zeros((5, 4))}, r"expected \[layer, head\]"),
        ({"effects": np.zeros((4, 5))}, r"expected \[layer, head\]"),
        ({"effects": np.zeros((0, 4, 5))}, "at least one prompt"),
        ({"norms": np.zeros((5, 4))}, r"norms of shape \(5, 4\)"),
        ({"score": np.r_[np.arange(7.0), np.full(13, np.nan)].reshape(4, 5)}, "7 heads"),
        ({"n_permutations": 0}, "n_permutations=0"),
    ],
)
def test_refusals(change, said):
    given = {"score": np.zeros((4, 5)), "effects": np.zeros((6, 4, 5)), "seed": 0}
    with pytest.raises(PosheadsError, match=said):
        rank_association(**given | change)

"""Levels and coverage of the tests over documents, by simulation through the accumulator.

128 tokens, 8 rotary pairs, 300 query-key pairs a document. Heads have queries and keys of their own
but share the pairs drawn, and where contents depend on the position they go astray together. So the
heads are simulated in batches with documents and draws of their own, and the error of a share is
taken from the spread over batches where that is more than the binomial one.

Measured with 100 batches, 6,000 heads: shares of p below 0.05 and 0.01 of rho, rotation and content
with 8 documents, then with 16. Their standard errors are about 0.003 and 0.0013.

====================  ================================  ================================
contents at random    .046 .011  .046 .010  .051 .008   .049 .011  .052 .010  .048 .011
loud slow pairs       .055 .011  .048 .007  .044 .009   .049 .009  .050 .009  .049 .010
half never turn       .049 .009  .052 .012  .045 .009   .051 .011  .050 .011  .049 .010
none ever turns       .053 .012  .053 .011  .053 .012   .051 .011  .055 .011  .051 .011
four loud keys        .055 .014  .048 .008  .057 .011   .053 .010  .049 .009  .050 .010
drifting queries      1.00 .968  .050 .010  1.00 .968   1.00 1.00  .052 .010  1.00 1.00
====================  ================================  ================================
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

from tl_posheads import LayerGeometry, RotaryGeometry, ScoreAccumulator
from tl_posheads.rotary.contributions import rotate_by
from tl_posheads.scoring import draws
from tl_posheads.scoring.draws import MEASURES
from tl_posheads.scoring.head_scores import TESTED
from tl_posheads.statistics.ranks import mean_over_documents

N_POS, N_PAIRS = 128, 8
N_HEADS, N_BATCHES = 60, 20  # heads of a batch
TURNING = 50.0 ** (-torch.arange(N_PAIRS) / (N_PAIRS - 1))
STILL = torch.zeros(N_PAIRS)


@pytest.fixture(scope="module", autouse=True)
def few_in_octaves():
    """Their means are not looked at here, and would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "_OCTAVE_DRAWS", 8)
        yield


def isotropic(generator, heads):
    return torch.randn(2, N_POS, heads, 2 * N_PAIRS, generator=generator)


def loud_slow_pairs(generator, heads):
    return isotropic(generator, heads) * torch.linspace(0.3, 3, N_PAIRS).repeat(2)


def four_loud_keys(generator, heads):
    """Elsewhere in every head and document."""
    q, k = isotropic(generator, heads)
    loud = torch.rand(N_POS, heads, generator=generator).argsort(0) < 4
    return q, k * torch.where(loud, 6.0, 1.0)[..., None]


def drifting_queries(generator, heads):
    """Queries grow into the slowest pair along the text; keys have a part there."""
    q, k = isotropic(generator, heads)
    q[..., N_PAIRS - 1] += torch.linspace(-1.5, 1.5, N_POS)[:, None]
    k[..., N_PAIRS - 1] += 1.5
    return q, k


SCENARIOS = {
    "contents at random": (isotropic, TURNING),
    "loud slow pairs": (loud_slow_pairs, TURNING),
    "half of the pairs never turn": (isotropic, TURNING * (torch.arange(N_PAIRS) < 4)),
    "no pair ever turns": (isotropic, STILL),
    "four keys of six times the norm": (four_loud_keys, TURNING),
    "drifting queries, no pair ever turns": (drifting_queries, STILL),
}


def accumulated(contents, inv_freq, n_docs, heads, *, seed=0, n_pos=N_POS, **options):
    """An accumulator of documents whose contents are made by ``contents``."""
    geometry = LayerGeometry.from_inv_freq(inv_freq, heads)
    options = {"qk_pairs": 300, **options}
    accumulator = ScoreAccumulator(RotaryGeometry("toy", (geometry,)), **options)
    for n in range(n_docs):
        generator = torch.Generator().manual_seed(1000 * seed + n)
        q, k = (x[:n_pos] for x in contents(generator, heads))
        accumulator.update(0, q[None], k[None], [f"{1000 * seed + n + 1:015x}"])
    return accumulator


def by_document(*args, **kwargs):
    """``[measure, doc, head]``, in the order of the documents' numbers."""
    return accumulated(*args, **kwargs).scores().values[:, :, 0]


def in_batches(contents, inv_freq, n_docs, first_seed, **options):
    """``[measure, doc, batch, head]``."""
    batches = [
        by_document(contents, inv_freq, n_docs, N_HEADS, seed=first_seed + b, **options)
        for b in range(N_BATCHES)
    ]
    return torch.stack(batches, 2)


@cache
def simulated(scenario):
    number = list(SCENARIOS).index(scenario)
    return in_batches(*SCENARIOS[scenario], 16, first_seed=1000 * number)


def rejected(values, measure, n_docs):
    """Heads with p below 0.05, with p below 0.01, and whose interval has zero in it."""
    test = mean_over_documents(values[MEASURES.index(measure), :n_docs])
    assert bool(torch.isfinite(test.p).all())
    return test.p < 0.05, test.p < 0.01, (test.ci_low <= 0) & (test.ci_high >= 0)


def four_errors(found, level):
    """Four standard errors of the share of a ``[batch, head]`` table that is true."""
    batches = found.double().mean(1)
    spread = float(batches.std()) / len(batches) ** 0.5
    return 4 * max(spread, (level * (1 - level) / found.numel()) ** 0.5)


def assert_level(values, measure, n_docs):
    for found, level in zip(rejected(values, measure, n_docs), (0.05, 0.01, 0.95)):
        share = float(found.double().mean())
        assert abs(share - level) < four_errors(found, level), (share, level)


@pytest.mark.parametrize("n_docs", [8, 16])
@pytest.mark.parametrize("measure", TESTED)
@pytest.mark.parametrize("scenario", list(SCENARIOS)[:-1])
def test_without_a_tie_tests_keep_their_level(scenario, measure, n_docs):
    assert_level(simulated(scenario), measure, n_docs)


@pytest.mark.parametrize("options", [dict(n_pos=24), {}])
def test_with_distances_weighed_alike_they_do_as_well(options):
    """Counted, where the farthest pair weighs as much as 23 of the nearest, and drawn."""
    values = in_batches(isotropic, TURNING, 8, 9000, weighting="distance", **options)
    for measure in TESTED:
        assert_level(values, measure, 8)


@pytest.mark.parametrize("n_docs", [8, 16])
def test_contents_that_drift_are_content_and_no_rotation(n_docs):
    values = simulated("drifting queries, no pair ever turns")
    for measure in ("rho", "content"):
        assert float(rejected(values, measure, n_docs)[0].double().mean()) > 0.99
    assert_level(values, "rotation", n_docs)
    content, rotation = (values[MEASURES.index(name)].mean() for name in ("content", "rotation"))
    assert content > 0.1 > 0.005 > abs(rotation)


# Half a turn of the first pair over the text and none of the second: D has to grow.
RISING = torch.tensor([np.pi / N_POS, *[0.0] * (N_PAIRS - 1)])


def steady(strength, noise=1.0):
    """Contents with a mean in the first two pairs, the same at every position, and noise."""

    def contents(generator, heads):
        mean = torch.zeros(heads, 2 * N_PAIRS)
        mean[:, :2] = torch.as_tensor(strength).reshape(-1, 1)
        q, k = mean + noise * isotropic(generator, heads)
        geometry = LayerGeometry.from_inv_freq(RISING, heads)
        return [rotate_by(x, torch.arange(N_POS), geometry) for x in (q, k)]

    return contents


@pytest.mark.parametrize("n_docs", [8, 16])
def test_a_planted_head_is_found_first(n_docs):
    strength = torch.zeros(200)
    strength[37] = 1.4
    scores = accumulated(steady(strength), RISING, n_docs, 200).scores()
    assert scores.top(1) == [(0, 37)]
    assert scores.positional()[0] == (0, 37)
    assert len(scores.positional()) <= 3
    test = scores.test("rotation")
    assert int(test.mean[0].argmax()) == 37
    assert float(test.p_adjusted[0, 37]) < 0.05
    assert float(scores.test("content").p[0, 37]) > 0.001


def test_of_contents_that_are_one_and_the_same_everything_is_rotation():
    contents = steady(torch.linspace(0.5, 2, 20), noise=0.0)
    scores = accumulated(contents, RISING, 8, 20).scores()
    torch.testing.assert_close(scores.rotation, scores.rho, atol=2e-3, rtol=0)
    assert float(scores.rho[0].min()) > 0.9
    # Within a document; drawing alone makes it differ from zero.
    assert float(scores.content[0].abs().max()) < 0.1
    torch.testing.assert_close(scores.interaction, -scores.content, atol=2e-3, rtol=0)


@cache
def planted_documents(strength):
    """160 documents of 100 heads with one truth."""
    return by_document(steady(strength), RISING, 160, 100, seed=7)


@pytest.mark.parametrize("n_docs", [8, 16])
@pytest.mark.parametrize(("measure", "strength"), [("rho", 0.6), ("rotation", 0.6), ("rho", 1.0)])
def test_intervals_cover_a_truth_that_is_not_zero(measure, strength, n_docs):
    values = planted_documents(strength)[MEASURES.index(measure)]
    truth = float(values.mean())  # of 16,000 documents and heads: 30 times less uncertain
    assert truth > 0.03
    inside = []
    for group in values.split(n_docs):
        test = mean_over_documents(group)
        inside.append((test.ci_low <= truth) & (test.ci_high >= truth))
    found = torch.stack(inside)  # groups of documents are batches
    assert found.numel() == 16_000 // n_docs
    share = float(found.double().mean())
    assert abs(share - 0.95) < four_errors(found, 0.95), share


def test_p_values_without_a_tie_are_uniform():
    p = mean_over_documents(simulated("contents at random")[0]).p.flatten()
    assert stats.kstest(p.numpy(), "uniform").pvalue > 1e-3

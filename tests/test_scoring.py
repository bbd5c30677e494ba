"""Scores against scipy on full lists, against planted truths, and under everything that is fed."""

from __future__ import annotations

import architectures
import numpy as np
import pytest
import torch
from scipy import stats

import tl_posheads as ph
from tl_posheads import counting, scoring
from tl_posheads.contributions import rotate_by
from tl_posheads.statistics import shift_p_value


def tokens_of(n_docs, length, seed=0):
    return torch.randint(3, 90, (n_docs, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama():
    return architectures.rotary_model("Llama")


@pytest.fixture(scope="module")
def gemma():
    return architectures.rotary_model("Gemma 2")


def full_lists(model, documents, layer, window):
    """Distances and D of every pair of the documents, in float64."""
    distances, dominants = [], []
    geometry = ph.RotaryGeometry.from_model(model)[layer]

    def consumer(_, q, k):
        d = ph.dominant_dimension(ph.dimension_contributions(q.double(), k.double(), geometry))[0]
        i, j = np.tril_indices(q.shape[1], -1)
        if window is not None:
            i, j = i[i - j < window], j[i - j < window]
        distances.append(i - j)
        dominants.append(d[:, i, j].numpy())

    for document in documents:
        ph.capture_rotary(model, document[None], consumer, layers=[layer])
    return np.concatenate(distances), np.concatenate(dominants, axis=1)


@pytest.mark.parametrize("layer", [0, 1])
def test_all_pairs_equal_scipy_exactly_up_to_512_tokens(gemma, layer):
    documents = tokens_of(3, 70)
    scores = ph.score_heads(gemma, documents, progress=False)
    distance, dominant = full_lists(gemma, documents, layer, [16, None][layer])
    assert scores.provenance["estimator"] == "exact ranks of all pairs"
    assert scores.n_pairs[layer].tolist() == [len(distance)] * 4
    for head in range(4):
        expected = stats.spearmanr(distance, dominant[head]).statistic
        assert scores.rho[layer, head].item() == pytest.approx(expected, abs=1e-6)


def test_per_distance_weighs_every_distance_the_same(llama):
    documents = tokens_of(2, 40)
    distance, dominant = full_lists(llama, documents, 0, None)
    weights = 1 / np.bincount(distance)[distance]

    def weighted(x, y):
        def ranks(v):
            return np.array([weights[v < a].sum() + weights[v == a].sum() / 2 for a in v])

        c = np.cov(ranks(x), ranks(y), aweights=weights)
        return c[0, 1] / np.sqrt(c[0, 0] * c[1, 1])

    exact = ph.score_heads(llama, documents, pairs="per_distance", progress=False)
    binned = ph.score_heads(llama, documents, pairs="per_distance", exact=False, progress=False)
    for head in range(4):
        expected = weighted(distance, dominant[head])
        assert exact.rho[0, head].item() == pytest.approx(expected, abs=1e-9)
        assert binned.rho[0, head].item() == pytest.approx(expected, abs=2e-3)


def test_drawn_pairs_estimate_the_per_distance_score_within_their_error(llama):
    documents = tokens_of(2, 60)
    truth = ph.score_heads(llama, documents, pairs="per_distance", progress=False)
    far = []
    for seed in range(12):
        drawn = ph.score_heads(llama, documents, pairs=800, seed=seed, progress=False)
        assert drawn.n_pairs.unique().tolist() == [1600]
        far += ((drawn.rho - truth.rho) / drawn.se).flatten().tolist()
    # 96 standardised errors: their spread is 1 up to 4 of its own standard errors
    assert 0.7 < np.std(far) < 1.3
    assert abs(np.mean(far)) < 0.5
    again = ph.score_heads(llama, documents, pairs=800, seed=0, progress=False)
    first = ph.score_heads(llama, documents.flip(0), pairs=800, seed=0, progress=False)
    torch.testing.assert_close(again.rho, first.rho, atol=1e-12, rtol=0)


def test_auto_draws_what_the_error_asks_for(llama):
    documents = tokens_of(2, 60)
    truth = ph.score_heads(llama, documents, pairs="per_distance", progress=False)
    inside, n = 0, 0
    for seed in range(25):
        drawn = ph.score_heads(
            llama, documents, pairs="auto", error=0.05, seed=seed, progress=False
        )
        assert drawn.n_pairs.unique().tolist() == [800]
        assert float(drawn.se.max()) < 0.05
        inside += int(((drawn.rho - truth.rho).abs() < 1.96 * drawn.se).sum())
        n += drawn.rho.numel()
    # 95 % up to 4 standard deviations of a binomial
    assert abs(inside / n - 0.95) < 4 * (0.95 * 0.05 / n) ** 0.5
    plain = ph.score_heads(llama, documents, pairs=400, seed=0, progress=False)
    again = ph.score_heads(llama, documents, pairs="auto", error=0.05, seed=0, progress=False)
    assert torch.equal(plain.rho, again.rho)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(error=0.01), "beside pairs='all'"),
        (dict(pairs="auto", error=0), "error=0"),
        (dict(pairs="auto", error="small"), "error='small'"),
    ],
)
def test_errors_that_choose_no_number(llama, options, said):
    with pytest.raises(ph.PosheadsError, match=said):
        ph.score_heads(llama, tokens_of(2, 60), progress=False, **options)


@pytest.mark.lens
def test_binned_ranks_stay_within_a_thousandth_on_every_head_of_smollm2(smollm2_bridge):
    documents = ph.load_corpus("python-docs", smollm2_bridge, n_docs=2, length=400)
    layers = [0, 3, 10, 17, 24, 29]
    exact = ph.score_heads(smollm2_bridge, documents, layers=layers, progress=False)
    binned = ph.score_heads(smollm2_bridge, documents, layers=layers, exact=False, progress=False)
    assert binned.provenance["estimator"] == "binned ranks"
    assert int(torch.isfinite(exact.rho).sum()) == 54
    assert (exact.rho - binned.rho)[layers].abs().max() < 1e-3


@pytest.mark.lens
def test_smollm2_scores_are_those_of_every_class_and_version(smollm2):
    """The same numbers, kept here from HookedTransformer 3.9, whatever the lens installed."""
    documents = ph.load_corpus("python-docs", smollm2, n_docs=2, length=300)
    scores = ph.score_heads(smollm2, documents, layers=range(20), progress=False)
    kept = {(16, 6): 0.286241, (18, 4): 0.273692, (13, 7): 0.258100,
            (15, 1): 0.256699, (19, 1): 0.248092}  # fmt: skip
    for place, rho in kept.items():
        assert scores.rho[place].item() == pytest.approx(rho, abs=1e-4)
    assert scores.top(1) == [(16, 6)]


def test_later_documents_that_crowd_are_counted_in_bins_of_their_own(llama, monkeypatch):
    """A grid from a text that the others don't resemble is made again from all of them."""
    documents = tokens_of(2, 90)
    whole = ph.score_heads(llama, documents, exact=True, progress=False)
    made = counting.DominantGrid.from_sample
    calls = []

    def poor_first(dominant, n_pairs):
        calls.append(1)
        if len(calls) <= 4:  # two layers, two grids each
            dominant = dominant * 0
        return made(dominant, n_pairs)

    monkeypatch.setattr(counting.DominantGrid, "from_sample", staticmethod(poor_first))
    binned = ph.score_heads(llama, documents, exact=False, progress=False)
    assert len(calls) > 4
    assert (binned.rho - whole.rho).abs().max() < 1e-3


def planted(n_pos, *, heads=2, n_pairs=6, loud=2.0, seed=0, drift=False):
    """A toy layer: pair amplitudes and content are given, the rotation is ours."""
    g = ph.LayerGeometry.from_inv_freq(10.0 ** -(torch.arange(n_pairs) / 1.5), heads)
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, n_pos, heads, 2 * n_pairs, generator=generator) * loud
    if drift:
        for x in (q, k):
            for i in range(1, n_pos):
                x[i] = 0.9 * x[i - 1] + 0.19**0.5 * x[i]
    return g, q, k


def accumulate(g, documents, **options):
    acc = ph.ScoreAccumulator(ph.RotaryGeometry("toy", (g,)), **options)
    for n, (q, k) in enumerate(documents):
        acc.update(0, q[None], k[None], [f"{n:015x}"])
    return acc


def test_a_head_whose_content_never_changes_is_all_geometry():
    g, _, _ = planted(10)
    x = torch.tensor([2.0, 1.0, 1.0, 0.5, 1.5, 2.0] * 2)
    same = x.expand(120, 2, 12)
    steps = torch.arange(120)
    q = k = rotate_by(same, steps, g)
    scores = accumulate(g, [(q, k)]).scores()
    torch.testing.assert_close(scores.rho, scores.rho_geometry, atol=5e-3, rtol=0)
    d = ph.dominant_dimension(ph.dimension_contributions(q.double(), k.double(), g))[0]
    i, j = np.tril_indices(120, -1)
    expected = stats.spearmanr(i - j, d[i, j]).statistic
    assert scores.rho[0, 0].item() == pytest.approx(expected, abs=2e-3)


def test_a_head_that_content_alone_moves_has_no_geometry():
    """Slow pairs speak up between far positions because their content says so."""
    g, q, k = planted(160, seed=4, loud=0.3)
    # The slowest pair's product falls with |i-j| in nothing but the order of the contents.
    place = torch.linspace(-1, 1, 160)[:, None]
    q[..., 5], k[..., 5] = 4 * place, -4 * place
    q[..., 11] = k[..., 11] = 0.0
    scores = accumulate(g, [(q, k)]).scores()
    assert float(scores.rho[0].min()) > 0.15
    assert float(scores.rho_geometry[0].abs().max()) < 0.1


@pytest.mark.parametrize(
    ("n_docs", "n_pos", "drift"), [(1, 128, False), (4, 96, False), (1, 160, True)]
)
def test_without_a_tie_intervals_cover_and_p_values_are_no_smaller_than_they_should(
    n_docs, n_pos, drift
):
    p, covered = [], []
    for repeat in range(12):
        documents = []
        for n in range(n_docs):
            g, q, k = planted(n_pos, heads=10, seed=100 * repeat + n, drift=drift)
            documents.append((q, k))
        acc = accumulate(g, documents, seed=repeat, n_blocks=-(-16 // n_docs))
        table, scores = acc.tables[0], acc.scores()
        p += shift_p_value(table.null_observed, table.null_draws).tolist()
        covered += ((scores.ci_low[0] <= 0) & (scores.ci_high[0] >= 0)).tolist()
    p = np.array(p)
    # 120 heads, not all independent: the bounds leave room for about four standard errors.
    assert np.mean(p < 0.05) <= 0.13
    assert np.mean(p < 0.5) == pytest.approx(0.5, abs=0.2)
    assert np.mean(covered) >= 0.88


def test_a_planted_tie_is_found():
    """Half a turn of the first pair over the text, next to nothing of the second: D has to grow."""
    g = ph.LayerGeometry.from_inv_freq(torch.tensor([np.pi / 220, np.pi / 9000]), 3)
    documents = []
    for n in range(4):
        noise = torch.randn(2, 200, 3, 4, generator=torch.Generator().manual_seed(n))
        base = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(200, 3, 4)
        turned = rotate_by(base, torch.arange(200), g)
        documents.append(tuple(turned + 0.7 * x for x in noise))
    scores = accumulate(g, documents, n_blocks=4).scores()
    assert bool((scores.rho[0] > 0.2).all())
    assert bool((scores.ci_low[0] > 0.05).all())
    assert bool((scores.p_null[0] < 0.01).all())
    assert bool((scores.rho_geometry[0] > 0.2).all())
    assert scores.above(0.0) == scores.top(3)
    # The other way round nothing is found: the test asks for growth.
    falling = ph.LayerGeometry.from_inv_freq(torch.tensor([np.pi / 9000, np.pi / 220]), 3)
    swapped = [tuple(x[..., [1, 0, 3, 2]] for x in pair) for pair in documents]
    assert bool((accumulate(falling, swapped, n_blocks=4).scores().p_null[0] > 0.9).all())


@pytest.mark.parametrize("pairs", ["all", "per_distance", 500])
def test_merging_equals_one_pass_in_any_order(pairs):
    g, *_ = planted(4)
    documents = [planted(n, seed=n)[1:] for n in (150, 60, 90)]
    whole = accumulate(g, documents, pairs=pairs)
    parts = []
    for n, (q, k) in enumerate(documents):
        part = whole.like()
        part.update(0, q[None], k[None], [f"{n:015x}"])
        parts.append(part)
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = whole.like()
        for n in order:
            merged.merge(parts[n])
        a, b = whole.scores(), merged.scores()
        for name in ("rho", "rho_geometry", "ci_low", "p_null", "n_pairs"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-9, rtol=0)
    assert parts[0].scores().n_pairs.sum() < whole.scores().n_pairs.sum()
    other = accumulate(g, documents, pairs=pairs, skip_first=1)
    with pytest.raises(ph.PosheadsError, match=r"like\(\)"):
        whole.merge(other)


@pytest.mark.lens
def test_hooks_and_caches_give_what_score_heads_gives():
    model = architectures.rotary_model("GPT-NeoX, Pythia")
    tokens = tokens_of(3, 50)
    direct = ph.score_heads(model, tokens, exact=False, progress=False)
    acc = ph.ScoreAccumulator(ph.RotaryGeometry.from_model(model), n_blocks=6)
    cached = acc.like()
    with torch.no_grad(), ph.rotary_hook_points(model):
        model.run_with_hooks(tokens, fwd_hooks=acc.fwd_hooks)
        _, cache = model.run_with_cache(tokens, names_filter=cached.names_filter)
    cached.grids = dict(acc.grids)
    cached.update_from_cache(cache)
    assert (acc.scores().rho - direct.rho).abs().max() < 1e-3
    assert torch.equal(acc.scores().rho, cached.scores().rho)
    assert torch.equal(acc.scores().rho_geometry, cached.scores().rho_geometry)
    with pytest.raises(ph.PosheadsError, match="names_filter"):
        cached.update_from_cache({})


@pytest.mark.lens
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(llama, side):
    texts = [tokens_of(1, n, seed=n)[0] for n in (30, 45, 38)]
    alone = ph.score_heads(llama, texts, progress=False)
    padded, mask = torch.zeros(3, 45).long(), torch.zeros(3, 45).long()
    for row, on, text in zip(padded, mask, texts, strict=True):
        at = slice(45 - len(text), None) if side == "left" else slice(0, len(text))
        row[at], on[at] = text, 1
    scores = ph.score_heads(llama, padded, attention_mask=mask, progress=False)
    assert torch.equal(scores.rho, alone.rho)
    assert torch.equal(scores.p_null, alone.p_null)
    acc = ph.ScoreAccumulator(ph.RotaryGeometry.from_model(llama), exact=True, n_blocks=6)
    with torch.no_grad():
        llama.run_with_hooks(padded, attention_mask=mask, fwd_hooks=acc.hooks_for(mask))
    torch.testing.assert_close(acc.scores().rho, alone.rho, atol=2e-3, rtol=0)
    broken = mask.clone()
    broken[1, 20] = 1 - broken[1, 20]
    with pytest.raises(ph.PosheadsError, match="document 1 is not one run"):
        ph.score_heads(llama, padded, attention_mask=broken, progress=False)


def test_skipped_positions_are_left_out_as_queries_and_keys(llama):
    documents = tokens_of(2, 40)
    skipped = ph.score_heads(llama, documents, skip_first=7, progress=False)
    _, dominant = full_lists(llama, documents, 1, None)
    i, j = np.tril_indices(40, -1)
    keep = np.tile(j >= 7, 2)
    distance = np.tile(i - j, 2)[keep]
    assert skipped.n_pairs[1, 0] == keep.sum()
    expected = stats.spearmanr(distance, dominant[2][keep]).statistic
    assert skipped.rho[1, 2].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.lens
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_scored_in_float32_or_better(dtype):
    model = architectures.rotary_model("Llama").to(dtype)
    documents = tokens_of(2, 60)
    scores = ph.score_heads(model, documents, progress=False)
    distance, dominant = full_lists(model, documents, 0, None)
    expected = stats.spearmanr(distance, dominant[1]).statistic
    assert scores.rho[0, 1].item() == pytest.approx(expected, abs=1e-6)
    assert scores.provenance["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(("hook", "named"), [("hook_rot_q", "queries of layer 1 head 2"),
                                             ("hook_rot_k", "keys of layer 1 head 2")])  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(llama, hook, named, value):
    def spoil(x, hook):
        x = x.clone()
        x[0, 3, 2 if x.shape[2] == 4 else 1, 0] = value
        return x

    with (
        llama.hooks(fwd_hooks=[(f"blocks.1.attn.{hook}", spoil)]),
        pytest.raises(ph.PosheadsError, match=named),
    ):
        ph.score_heads(llama, tokens_of(1, 20), progress=False)


def test_the_same_seed_gives_the_same_numbers_in_any_order_of_documents(llama):
    documents = tokens_of(4, 50)
    one = ph.score_heads(llama, documents, progress=False)
    for other in (documents, documents[[2, 0, 3, 1]]):
        two = ph.score_heads(llama, other, progress=False)
        for name in ("rho", "ci_low", "ci_high", "rho_geometry", "p_null"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert one.provenance["interval"] == "stretches of queries and keys"
    many = ph.score_heads(llama, tokens_of(9, 30), progress=False)
    assert many.provenance["interval"] == "documents"
    assert bool((many.ci_low < many.ci_high).all())


def test_chosen_layers_alone_are_scored(llama):
    one = ph.score_heads(llama, tokens_of(2, 30), layers=[1], progress=False)
    both = ph.score_heads(llama, tokens_of(2, 30), progress=False)
    assert bool(torch.isnan(one.rho[0]).all())
    assert torch.equal(one.rho[1], both.rho[1])
    assert one.to_pandas().layer.unique().tolist() == [1]


def test_an_interrupted_run_goes_on_without_doing_anything_twice(llama, tmp_path, monkeypatch):
    documents = tokens_of(3, 80)
    whole = ph.score_heads(llama, documents, exact=False, progress=False)
    runs = []
    count = scoring.capture_rotary

    def stop_in_the_second(*args, **kwargs):
        if len(runs) == 1:
            raise KeyboardInterrupt
        runs.append(1)
        return count(*args, **kwargs)

    monkeypatch.setattr(scoring, "capture_rotary", stop_in_the_second)
    options = dict(exact=False, progress=False, checkpoint=tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        ph.score_heads(llama, documents, **options)
    monkeypatch.setattr(
        scoring, "capture_rotary", lambda *a, **k: (runs.append(1), count(*a, **k))[1]
    )
    resumed = ph.score_heads(llama, documents, **options)
    assert len(runs) == 3
    assert torch.equal(resumed.rho, whole.rho)
    assert torch.equal(resumed.p_null, whole.p_null)
    with pytest.raises(ph.PosheadsError, match="belongs to another run"):
        ph.score_heads(llama, documents, seed=1, **options)
    half = next((tmp_path / "kept").glob("*.safetensors"))
    half.write_bytes(half.read_bytes()[:100])
    again = ph.score_heads(llama, documents, **options)
    assert len(runs) == 4
    assert torch.equal(again.rho, whole.rho)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.ones(2, 1).long(), {}, "at least 2 positions"),
        (torch.ones(2, 9).long() * 500, {}, "token id 500 .* ids 0 to 96"),
        (-torch.ones(2, 9).long(), {}, "token id -1"),
        (torch.ones(2, 9), {}, "expected whole numbers"),
        (torch.ones(1, 2, 9).long(), {}, r"shape \[doc, pos\]"),
        ("some text", {}, "type str"),
        (torch.ones(2, 300).long(), {}, "at most 256"),
        (torch.ones(2, 9).long(), {"layers": [5]}, "layers 0 to 1"),
        (torch.ones(2, 9).long(), {"layers": []}, "layers 0 to 1"),
        (torch.ones(2, 9).long(), {"pairs": "some"}, "expected 'all'"),
        (torch.ones(2, 9).long(), {"pairs": 0}, "at least 3"),
        (torch.ones(2, 9).long(), {"skip_first": 8}, "skip_first=8"),
        (torch.ones(2, 9).long(), {"skip_first": -1}, "whole number"),
        (torch.ones(2, 9).long(), {"attention_mask": torch.ones(9)}, "expected the same"),
    ],
)
def test_bad_input_is_refused_before_any_forward(llama, monkeypatch, tokens, options, message):
    def never(*args, **kwargs):
        raise AssertionError("a forward pass was run")

    monkeypatch.setattr(llama, "forward", never)
    with pytest.raises(ph.PosheadsError, match=message):
        ph.score_heads(llama, tokens, progress=False, **options)


def test_exact_ranks_that_no_memory_holds_are_refused(llama, monkeypatch):
    monkeypatch.setattr(scoring, "_LISTS_AT_MOST", 1000)
    with pytest.raises(ph.PosheadsError, match="leave exact out"):
        ph.score_heads(llama, tokens_of(1, 40), exact=True, progress=False)


def test_exact_ranks_in_groups_of_layers_are_the_same(llama, monkeypatch):
    whole = ph.score_heads(llama, tokens_of(2, 40), progress=False)
    monkeypatch.setattr(scoring, "_LISTS_AT_ONCE", 1)
    assert torch.equal(ph.score_heads(llama, tokens_of(2, 40), progress=False).rho, whole.rho)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_curves_equal_means_over_diagonals(name, request, monkeypatch):
    monkeypatch.setattr(counting, "_CHUNK", 1500)
    model = request.getfixturevalue(name)
    documents, heads = tokens_of(3, 60), [(0, 1), (1, 2), (0, 3)]
    curve = ph.dominant_dimension_curve(model, documents, heads=heads, progress=False)
    geometry = ph.RotaryGeometry.from_model(model)
    kept = {}
    ph.capture_rotary(model, documents, lambda at, q, k: kept.update({at: (q, k)}))
    for n, (layer, head) in enumerate(heads):
        g = geometry[layer]
        c = ph.dimension_contributions(*kept[layer], g)[:, head].double()
        d, weight = ph.dominant_dimension(c), c.softmax(-1)
        for far in (1, 2, 15, 16, 40, 59):
            if g.window is not None and far >= g.window:
                assert curve.n_pairs[n, far - 1] == 0
                assert bool(curve.mean[n, far - 1].isnan())
                continue
            values = torch.cat([torch.diagonal(one, -far) for one in d])
            assert curve.n_pairs[n, far - 1] == len(values)
            assert curve.mean[n, far - 1].item() == pytest.approx(values.mean().item(), abs=1e-6)
            shares = torch.stack([torch.diagonal(one, -far) for one in weight]).mean((0, 2))
            torch.testing.assert_close(curve.allocation[n, :, far - 1], shares, atol=1e-6, rtol=0)
            middle = values.quantile(0.5, interpolation="lower").item()
            assert curve.quantiles[n, 2, far - 1].item() == pytest.approx(middle, abs=1 / 16)
    frame = curve.to_pandas()
    assert frame.columns.tolist() == ["layer", "head", "distance", "n_pairs", "mean", "q5", "q25",
                                      "q50", "q75", "q95"]  # fmt: skip
    with pytest.raises(ph.PosheadsError, match="at least one"):
        ph.dominant_dimension_curve(model, documents, heads=[], progress=False)
    with pytest.raises(ph.PosheadsError, match="has 4 heads a layer"):
        ph.dominant_dimension_curve(model, documents, heads=[(0, 9)], progress=False)

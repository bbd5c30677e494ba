"""Patched heads against hooks set by hand and the lens's own sweep, and nothing left behind."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from transformer_lens import patching as lens_patching

from helpers import small_models
from helpers.scores_by_hand import head_scores
from helpers.traces import assert_same, state, warm
from tl_posheads import PosheadsError
from tl_posheads.interventions import ablation
from tl_posheads.interventions.patching import HeadPatching, patch_heads

CLEAN = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(1))
CORRUPTED = CLEAN.clone()
CORRUPTED[:, 5:7] = (CLEAN[:, 5:7] + 20) % 80 + 3
ANSWER = 11
# Grouped queries, one joint projection, transformers' own attention, parallel MLP, one key head,
# sliding windows, experts, latent attention.
FAMILIES = [
    "Llama",
    "GPT-NeoX, Pythia",
    "GPT-J",
    "Phi",
    "Falcon",
    "Gemma 2",
    "Mixtral",
    "DeepSeek-V3",
]


def log_prob(logits):
    return logits[:, -1].log_softmax(-1)[:, ANSWER].mean()


def heads_in(model):
    return [(i, h) for i in range(model.cfg.n_layers) for h in range(model.cfg.n_heads)]


def by_hand(model, clean, corrupted, metric):
    """The metric with each head copied, by hooks that share nothing with the library."""
    kept, out = {}, {}

    def keep(z, hook):
        kept[hook.layer()] = z.clone()

    with torch.no_grad():
        names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
        model.run_with_hooks(clean, fwd_hooks=[(name, keep) for name in names])
        for layer, head in heads_in(model):

            def copy(z, hook, layer=layer, head=head):
                parts = [kept[layer] if h == head else z for h in range(model.cfg.n_heads)]
                return torch.stack([part[:, :, h] for h, part in enumerate(parts)], dim=2)

            logits = model.run_with_hooks(corrupted, fwd_hooks=[(names[layer], copy)])
            out[layer, head] = float(metric(logits))
    return out


def scores_of(model, seed=0):
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    rho = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return head_scores(2 * rho - 1, seed=seed)


@pytest.fixture(scope="module")
def llama():
    return warm(small_models.rotary_model("Llama"))


@pytest.mark.lens
@pytest.mark.parametrize("name", FAMILIES)
def test_every_head_equals_hooks_by_hand_and_the_lens_sweep(name):
    model = warm(small_models.rotary_model(name))
    before = state(model)
    result = patch_heads(model, CLEAN, CORRUPTED, log_prob, progress=False)
    assert_same(before, state(model))
    frame = result.to_pandas()
    assert list(zip(frame["layer"], frame["head"])) == heads_in(model)
    expected = by_hand(model, CLEAN, CORRUPTED, log_prob)
    np.testing.assert_allclose(frame["patched"], list(expected.values()), rtol=0, atol=1e-6)
    with torch.no_grad():
        clean, corrupted = (float(log_prob(model(tokens))) for tokens in (CLEAN, CORRUPTED))
        _, cache = model.run_with_cache(CLEAN)
        lens = lens_patching.get_act_patch_attn_head_out_all_pos(
            model, CORRUPTED, cache, log_prob
        ).flatten()
    np.testing.assert_allclose(frame["patched"], lens.cpu(), rtol=0, atol=1e-6)
    assert (result.clean, result.corrupted) == pytest.approx((clean, corrupted), abs=1e-6)
    # No family in which a head's output can be read but not replaced.
    assert frame["effect"].abs().min() > 1e-6
    np.testing.assert_allclose(frame["effect"], frame["patched"] - corrupted, atol=1e-6)
    np.testing.assert_allclose(
        frame["recovered"], (frame["patched"] - corrupted) / (clean - corrupted), rtol=1e-3
    )


def test_exactly_the_heads_asked_for_in_their_order(llama):
    asked = [(1, 3), (0, 2), (1, 0)]
    everything = patch_heads(llama, CLEAN, CORRUPTED, log_prob, progress=False).to_pandas()
    runs = []

    def counted(logits):
        runs.append(logits.shape)
        return log_prob(logits)

    some = patch_heads(llama, CLEAN, CORRUPTED, counted, asked, progress=False)
    assert len(runs) == len(asked) + 3  # a rehearsal, the clean and the corrupted run
    frame = some.to_pandas().set_index(["layer", "head"])
    assert frame.index.tolist() == asked
    pd.testing.assert_frame_equal(frame, everything.set_index(["layer", "head"]).loc[asked])
    assert some.provenance["n_heads"] == 3
    assert some.provenance["heads"] == [2, 4]
    assert {"torch", "transformer-lens"} <= set(some.provenance["versions"])


def test_only_the_head_that_writes_something_has_an_effect():
    model = small_models.rotary_model("Llama")
    width = model.cfg.d_head
    with torch.no_grad():
        for layer in (0, 1):
            weight = model.original_model.model.layers[layer].self_attn.o_proj.weight
            kept = weight[:, 2 * width : 3 * width].clone()
            weight.zero_()
            if layer == 1:
                weight[:, 2 * width : 3 * width] = kept
    frame = patch_heads(model, CLEAN, CORRUPTED, log_prob, progress=False).to_pandas()
    alone = (frame["layer"] == 1) & (frame["head"] == 2)
    assert abs(frame["effect"][alone].item()) > 1e-3
    assert (frame["effect"][~alone] == 0).all()
    assert (frame["recovered"][~alone] == 0).all()


def test_swapping_the_runs_one_text_and_floats(llama):
    there = patch_heads(llama, CLEAN, CORRUPTED, log_prob, [(0, 1)], progress=False)
    back = patch_heads(llama, CORRUPTED, CLEAN, log_prob, [(0, 1)], progress=False)
    assert (there.clean, there.corrupted) == pytest.approx((back.corrupted, back.clean), abs=1e-6)
    one = patch_heads(llama, CLEAN[0], CORRUPTED[0], log_prob, progress=False)
    row = patch_heads(
        llama, CLEAN[:1], CORRUPTED[:1], lambda logits: log_prob(logits).item(), progress=False
    )
    pd.testing.assert_frame_equal(one.effects, row.effects)


@pytest.mark.lens
def test_hooks_of_a_context_and_an_ablation_stay_in_force(llama):
    plain = patch_heads(llama, CLEAN, CORRUPTED, log_prob, progress=False).effects
    name = "blocks.0.attn.hook_z"
    fixed = torch.full((1, 1, 4, 8), 0.3).expand(2, 14, 4, 8)  # cannot be written into

    def replace(z, hook):
        return torch.cat([fixed[:, :, :2], z[:, :, 2:]], dim=2)

    with llama.hooks(fwd_hooks=[(name, replace)]):
        hooked = patch_heads(llama, CLEAN, CORRUPTED, log_prob, progress=False).effects
        expected = by_hand(llama, CLEAN, CORRUPTED, log_prob)
        assert len(llama.blocks[0].attn.hook_z.fwd_hooks) == 1
    np.testing.assert_allclose(hooked["patched"], list(expected.values()), atol=1e-6)
    assert not np.allclose(hooked["patched"], plain["patched"], atol=1e-4)
    # Both runs hold the same fixed values there, so copying them changes nothing.
    assert hooked["effect"][:2].abs().max() < 1e-6
    kept = fixed.clone()  # could be written into, but is the hook's own

    def half(z, hook):
        return kept if torch.equal(seen.setdefault("z", z), z) else z

    seen = {}
    with llama.hooks(fwd_hooks=[(name, half)]):
        llama(CORRUPTED)  # from here on the corrupted run alone gets what is kept
        patch_heads(llama, CLEAN, CORRUPTED, log_prob, [(0, 0)], progress=False)
    assert torch.equal(kept, fixed)
    with ablation.ablate(llama, [(0, 1)]):
        ablated = patch_heads(llama, CLEAN, CORRUPTED, log_prob, progress=False).effects
    assert abs(ablated["effect"][1]) < 1e-6
    assert not np.allclose(ablated["patched"], plain["patched"], atol=1e-4)
    assert patch_heads(llama, CLEAN, CORRUPTED, log_prob, progress=False).effects.equals(plain)


@pytest.mark.lens
@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_no_hook_is_left_whatever_the_metric_raises(llama, raised, at):
    before, bar, runs = state(llama), lens_patching.tqdm, []

    def breaks(logits):
        runs.append(1)
        if len(runs) == at:
            raise raised("stop")
        return log_prob(logits)

    with pytest.raises(raised, match="stop"):
        patch_heads(llama, CLEAN, CORRUPTED, breaks, progress=False)
    assert len(runs) == at
    assert_same(before, state(llama))
    assert lens_patching.tqdm is bar


BAD_VALUES = [
    (
        lambda logits: logits.mean() * float("nan"),
        "the metric is nan on the rehearsal with random logits",
    ),
    (lambda logits: float("inf"), "the metric is inf on the rehearsal with random logits"),
    (
        lambda logits: logits[:, -1, 0],
        r"gave Tensor tensor\(.*on the rehearsal.*; expected one real",
    ),
    (lambda logits: logits[:1, -1, 0], "on the rehearsal.*; expected one real"),
    (lambda logits: None, "gave NoneType None on the rehearsal with random logits"),
    (lambda logits: "0.5", "gave str '0.5' on the rehearsal with random logits"),
    (lambda logits: torch.tensor(1j), "expected one real"),
    (lambda logits: 0.25, "the metric is 0.25 on both runs"),
    # What comes before the first changed token doesn't know of it.
    (lambda logits: logits[:, :5].square().mean(), "both runs, so there is nothing to restore"),
]


@pytest.mark.parametrize(("metric", "message"), BAD_VALUES)
def test_metrics_that_measure_nothing_are_refused_before_the_sweep(llama, metric, message):
    before, runs = state(llama), []

    def counted(logits):
        runs.append(1)
        return metric(logits)

    passes = []
    with (
        llama.hooks(fwd_hooks=[("hook_embed", lambda value, hook: passes.append(1))]),
        pytest.raises(PosheadsError, match=message),
    ):
        patch_heads(llama, CLEAN, CORRUPTED, counted, progress=False)
    # What is no number is known before any pass; that nothing differs takes both runs.
    assert len(runs) == (3 if "both runs" in message else 1)
    assert len(passes) == len(runs) - 1
    assert_same(before, state(llama))


def test_a_metric_that_breaks_later_names_the_run(llama):
    for at, run in ((3, "corrupted run"), (5, "run with layer 1 head 0 patched")):
        runs = []

        def later(logits, at=at, runs=runs):
            runs.append(1)
            return float("nan") if len(runs) == at else log_prob(logits)

        with pytest.raises(PosheadsError, match=f"nan on the {run}"):
            patch_heads(llama, CLEAN, CORRUPTED, later, [(0, 3), (1, 0)], progress=False)


BAD_INPUT = [
    (dict(heads=[(0, 4)]), "layer 0 head 4"),
    (dict(heads=[(2, 0)]), "layer 2 head 0"),
    (dict(heads=[(0, 1), (1, 1), (0, 1)]), "given twice"),
    (dict(heads=[]), "heads is empty"),
    (dict(corrupted=CORRUPTED[:, :-1]), r"\[14, 14\] tokens and corrupted of \[13, 13\]"),
    (dict(clean=CLEAN[0]), r"\[14\] tokens and corrupted of \[14, 14\]"),
    (dict(clean=[CLEAN[0], CLEAN[1, 1:]], corrupted=[*CORRUPTED]), r"of \[14, 13\] tokens"),
    (dict(clean=5), "tokens of type int"),
    (dict(clean=CLEAN[None], corrupted=CORRUPTED[None]), "whole numbers of shape"),
    (dict(corrupted=CORRUPTED + 90), "has ids 0 to 96"),
    (dict(corrupted=-CORRUPTED), "has ids 0 to 96"),
    (dict(clean=CLEAN.repeat(1, 20), corrupted=CORRUPTED.repeat(1, 20)), "at most 256"),
    (dict(corrupted=CLEAN.clone()), "the same tokens"),
    (dict(metric="log_prob"), "metric is a str"),
    (dict(scores="rho"), "scores of str"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_INPUT)
def test_bad_input_is_refused_before_any_pass(llama, wrong, message):
    passes = []
    handle = llama.register_forward_pre_hook(lambda module, args: passes.append(1))
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": log_prob, **wrong}
    try:
        with pytest.raises(PosheadsError, match=message):
            patch_heads(llama, **given, progress=False)
    finally:
        handle.remove()
    assert passes == []


def test_a_model_in_training_mode_or_with_forgotten_hooks_is_refused():
    model = small_models.rotary_model("Llama")
    model.train()
    with pytest.raises(PosheadsError, match="training mode"):
        patch_heads(model, CLEAN, CORRUPTED, log_prob, progress=False)
    model.eval()
    model.blocks[0].attn.hook_z.add_hook(lambda z, hook: z * 0)
    with pytest.raises(PosheadsError, match="still carries hooks"):
        patch_heads(model, CLEAN, CORRUPTED, log_prob, progress=False)


def test_scores_stand_beside_the_effects_and_are_ranked_over_all_heads(llama):
    scores = scores_of(llama)
    scores.rho[0, 1] = float("nan")
    asked = [(0, 0), (0, 1), (1, 2), (1, 3)]
    frame = patch_heads(
        llama, CLEAN, CORRUPTED, log_prob, asked, scores=scores, progress=False
    ).to_pandas()
    assert frame.columns.tolist() == [
        "layer",
        "head",
        "patched",
        "effect",
        "recovered",
        "rho",
        "rank",
    ]
    order = scores.top(8)
    assert len(order) == 7
    assert frame["rank"].isna().tolist() == [False, True, False, False]
    for row in frame[frame["head"] != 1].itertuples():
        assert row.rho == float(scores.rho[row.layer, row.head])
        assert order[row.rank - 1] == (row.layer, row.head)


def test_rank_correlation_follows_recovery_with_its_sign(llama):
    scores = scores_of(llama)
    result = patch_heads(llama, CLEAN, CORRUPTED, log_prob, scores=scores, seed=3, progress=False)
    found = result.rank_correlation()
    frame = result.to_pandas()
    expected = stats.spearmanr(frame["rho"], frame["recovered"])
    orders = stats.permutation_test(
        (frame["rho"],),
        lambda x: abs(stats.spearmanr(x, frame["recovered"]).statistic),
        permutation_type="pairings",
        n_resamples=999,
        alternative="greater",
        random_state=0,
    )
    assert found.rho == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(orders.pvalue, abs=0.06)
    assert found.n_heads == 8
    assert -1 <= found.ci_low < found.rho < found.ci_high <= 1
    assert found == result.rank_correlation(seed=3) == result.rank_correlation(scores)
    assert found != result.rank_correlation(seed=4)
    # The bootstrap again, a resample at a time.
    random, rhos = np.random.default_rng(5), []
    for chosen in random.integers(8, size=(300, 8)):
        drawn = frame.iloc[chosen]
        if drawn["rho"].nunique() > 1:
            rhos.append(stats.spearmanr(drawn["rho"], drawn["recovered"]).statistic)
    again = result.rank_correlation(n_boot=300, seed=5)
    assert (again.ci_low, again.ci_high) == pytest.approx(np.percentile(rhos, [2.5, 97.5]))
    # Scores that order the heads as recovery does; turned round where the metric is turned.
    shape = tuple(scores.rho.shape)
    scores.rho[:] = torch.tensor(frame["recovered"].to_numpy()).reshape(shape)
    assert result.rank_correlation(scores).rho == pytest.approx(1)
    flipped = patch_heads(
        llama, CLEAN, CORRUPTED, lambda x: -log_prob(x), scores=scores, progress=False
    )
    assert flipped.rank_correlation().rho == pytest.approx(1)
    assert (np.sign(flipped.effects["effect"]) == -np.sign(frame["effect"])).all()


def test_rank_correlation_refuses_what_has_no_order(llama):
    scores = scores_of(llama)
    result = patch_heads(llama, CLEAN, CORRUPTED, log_prob, [(0, 0), (1, 1)], progress=False)
    with pytest.raises(PosheadsError, match="no scores"):
        result.rank_correlation()
    with pytest.raises(PosheadsError, match="2 of the patched heads.*at least 3"):
        result.rank_correlation(scores)
    with pytest.raises(PosheadsError, match="2 layers and 4 heads"):
        result.rank_correlation(head_scores(torch.zeros(3, 4)))
    three = patch_heads(llama, CLEAN, CORRUPTED, log_prob, [(0, 0), (0, 1), (1, 1)], progress=False)
    assert three.rank_correlation(scores).n_heads == 3
    scores.rho[:] = 0.5
    with pytest.raises(PosheadsError, match="are equal"):
        three.rank_correlation(scores)
    assert isinstance(three, HeadPatching)


def test_the_bar_can_be_silenced(llama, capsys):
    patch_heads(llama, CLEAN, CORRUPTED, log_prob, [(0, 0)], progress=False)
    assert capsys.readouterr().err == ""
    patch_heads(llama, CLEAN, CORRUPTED, log_prob, [(0, 0)])
    assert "patching" in capsys.readouterr().err
    assert "tqdm" in repr(lens_patching.tqdm)


@pytest.mark.lens
def test_a_needle_in_smollm2_is_restored_by_few_heads(smollm2):
    text = "The secret number is {}. The sky is blue and the grass is green. The secret number is"
    clean, corrupted = (smollm2.to_tokens(text.format(word)) for word in ("seven", "three"))
    answers = [smollm2.to_tokens(word, prepend_bos=False)[0, 0] for word in (" seven", " three")]

    def difference(logits):
        return logits[0, -1, answers[0]] - logits[0, -1, answers[1]]

    heads = [(23, 0), (23, 2), (0, 0)]
    result = patch_heads(smollm2, clean, corrupted, difference, heads, progress=False)
    assert result.clean > 1 > -1 > result.corrupted
    recovered = result.to_pandas()["recovered"].tolist()
    assert recovered == pytest.approx([0.46, 0.43, 0.0], abs=0.05)

"""Edits of rotary pairs, against scores that numpy computes from complex numbers, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import architectures, small_models
from helpers.traces import state, warm
from tl_posheads import PosheadsError, RotaryGeometry, edit_rotary, score_heads
from tl_posheads import extrapolation as ex
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.io import models
from tl_posheads.rotary.contributions import split_pairs

pytestmark = pytest.mark.lens

TOKENS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(6))
HEADS = [(1, 2), (0, 1)]
EDITS = {
    "scale": dict(scale={0: 0.0, (1,): -2.5}),
    "shift": dict(shift={range(0, 2): 3.5}),
    "freeze": dict(freeze={0: 4.0}),
    "freeze at 0": dict(freeze=range(0, 2)),
    "swap": dict(swap=[(0, 1)]),
    "remap": dict(remap={1: 0}),
    "scale and freeze": dict(scale={1: 0.5}, freeze={0: 2}),
}
LATE = ("GPT-J", "DeepSeek-V3", "DeepSeek-V2")  # their scores can't be computed again
FAMILIES = [f for f in architectures.ROTARY if not f.startswith(("Llama,", "Phi-3"))]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    if request.param == "Cohere" and models.hooked_available():
        pytest.skip("the Bridge of transformer-lens 3.9 rotates Cohere otherwise than transformers")
    model = warm(small_models.rotary_model(request.param))
    model.family = request.param
    return model


@pytest.fixture(scope="module")
def llama():
    return warm(small_models.rotary_model("Llama"))


def in_scores(edit):
    return any(name in edit for name in ("freeze", "swap", "remap"))


def spread(edit, name, n_pairs):
    """An edit's dict with a key for each pair."""
    given = edit.get(name) or {}
    if name == "freeze" and not isinstance(given, dict):
        given = dict.fromkeys(given, 0.0)
    return {
        pair: value
        for pairs, value in given.items()
        for pair in ([pairs] if isinstance(pairs, int) else pairs)
    }


def expected_change(cache, geometry, layer, head, edit):
    """New minus old ``q . k``, unscaled, from what the rotation hooks of an unedited pass hold."""
    g = geometry[layer]
    w = g.inv_freq.numpy()
    q, k = (cache[f"blocks.{layer}.attn.hook_rot_{x}"].double() for x in "qk")
    q, k = q[:, :, head], k[:, :, g.kv_head[head]]
    a, b = (torch.complex(*split_pairs(x, g)).numpy() for x in (q, k))
    n = a.shape[1]
    source = {a: b for pair in edit.get("swap", ()) for a, b in (pair, pair[::-1])}
    source |= edit.get("remap", {})
    scale, shift, freeze = (spread(edit, x, g.n_pairs) for x in ("scale", "shift", "freeze"))
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    total = np.zeros((len(q), n, n))
    for m in range(g.n_pairs):
        old = a[:, :, None, m] * b[:, None, :, m].conj()
        content = old * np.exp(-1j * w[m] * (i - j))  # both turned back to position 0
        apart = np.broadcast_to(i - j, (n, n)).astype(float)
        if m in freeze:
            apart = np.full((n, n), float(freeze[m]))
        angle = w[source.get(m, m)] * apart + w[m] * shift.get(m, 0.0)
        new = scale.get(m, 1.0) * content * np.exp(1j * angle)
        total += (new - old).real
    return total


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@torch.no_grad()
def test_scores_are_the_edits_and_neighbours_stay(family, edit):
    if family.family in LATE and in_scores(edit):
        with pytest.raises(PosheadsError, match="tiny-"), edit_rotary(family, HEADS, **edit):
            pass
        return
    names = [f"blocks.0.attn.hook_{x}" for x in ("rot_q", "rot_k", "attn_scores", "pattern")]
    geometry = RotaryGeometry.from_model(family)
    if geometry[0].n_pairs < 2:
        pytest.fail("an edit of pair 1 needs two pairs")
    with ex.Unchanged()(family):  # the hook points of joint projections
        bare = family.run_with_cache(TOKENS, names_filter=names)[1]
    with edit_rotary(family, HEADS, **edit):
        logits, got = family.run_with_cache(TOKENS, names_filter=names)
        again = family(TOKENS)
    assert torch.equal(logits, again)
    scores = names[2]
    others = [0, 2, 3]
    assert torch.equal(got[scores][:, others], bare[scores][:, others])
    assert torch.equal(got[names[1]], bare[names[1]])
    if family.family == "GPT-J":
        return  # the pattern goes under the scores' name
    g = geometry[0]
    change = g.attention_scale * expected_change(bare, geometry, 0, 1, edit)
    seen = np.tril(np.ones((24, 24), dtype=bool))
    if g.window is not None:
        seen &= ~np.tril(seen, -g.window)
    old, new = (x[scores][:, 1].double().numpy() for x in (bare, got))
    if g.softcap is not None:
        with np.errstate(invalid="ignore"):  # masked scores
            old, new = (g.softcap * np.arctanh(x / g.softcap) for x in (old, new))
    np.testing.assert_allclose((new - old)[:, seen], change[:, seen], atol=2e-3, rtol=1e-3)
    assert np.abs(change[:, seen]).max() > 1e-2
    np.testing.assert_array_equal(old[:, ~seen], new[:, ~seen])


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@torch.no_grad()
def test_later_layers_given_the_same_input(family, edit):
    """Scores of the edited head, and what its neighbours write, bit for bit."""
    if family.family in LATE and in_scores(edit):
        return
    names = [f"blocks.1.attn.hook_{x}" for x in ("rot_q", "rot_k", "attn_scores", "z")]
    with ex.Unchanged()(family):
        bare = family.run_with_cache(TOKENS, names_filter=names)[1]
    with edit_rotary(family, [(1, 2)], **edit):
        got = family.run_with_cache(TOKENS, names_filter=names)[1]
    z = names[3]
    others = [0, 1, 3]
    assert torch.equal(got[z][:, :, others], bare[z][:, :, others])
    assert float((got[z] - bare[z])[:, :, 2].abs().max()) > 1e-4
    if family.family in ("GPT-J", "Gemma 2"):
        return  # no scores before the softmax, or capped ones: the first layer's test sees to them
    geometry = RotaryGeometry.from_model(family)
    change = geometry[1].attention_scale * expected_change(bare, geometry, 1, 2, edit)
    assert_changed(bare[names[2]][:, 2], got[names[2]][:, 2], change)


def assert_changed(old, new, change):
    """Scores before and after, where they aren't masked, ``[batch, pos, pos]``."""
    seen = torch.isfinite(old) & (old > -1e30)
    assert float(np.abs(change[seen.numpy()]).max()) > 1e-3
    np.testing.assert_allclose(
        (new - old).double()[seen].numpy(), change[seen.numpy()], atol=2e-3, rtol=1e-3
    )


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@torch.no_grad()
def test_fused_cached_and_plain_passes_agree(llama, edit):
    with edit_rotary(llama, HEADS, **edit):
        plain = llama(TOKENS)
        with fused_attention(llama) as on:
            assert on
            torch.testing.assert_close(llama(TOKENS), plain, atol=1e-4, rtol=1e-4)
        options = dict(
            max_new_tokens=6,
            do_sample=False,
            verbose=False,
            stop_at_eos=False,
            return_type="tokens",
        )
        cached, fresh = (
            llama.generate(TOKENS[:1, :12], use_past_kv_cache=use, **options)
            for use in (True, False)
        )
    assert torch.equal(cached, fresh)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@torch.no_grad()
def test_smollm2_in_both_classes(smollm2, edit):
    tokens = smollm2.to_tokens("The quick brown fox jumps over the lazy dog.")
    heads = [(7, 8), (0, 1)]
    names = [f"blocks.0.attn.hook_{x}" for x in ("rot_q", "rot_k", "attn_scores")]
    bare = smollm2.run_with_cache(tokens, names_filter=names)[1]
    with edit_rotary(smollm2, heads, **edit):
        logits, got = smollm2.run_with_cache(tokens, names_filter=names)
        # A HookedTransformer calls the hooks on its scores in a fused pass, too.
        with fused_attention(smollm2) as on:
            assert on
            torch.testing.assert_close(smollm2(tokens), logits, atol=1e-3, rtol=1e-3)
    others = [0, 2, 3, 4, 5, 6, 7, 8]
    assert torch.equal(got[names[2]][:, others], bare[names[2]][:, others])
    geometry = RotaryGeometry.from_model(smollm2, layers=[0])
    change = geometry[0].attention_scale * expected_change(bare, geometry, 0, 1, edit)
    assert_changed(bare[names[2]][:, 1], got[names[2]][:, 1], change)


@torch.no_grad()
def test_smollm2_padded_cached_and_scored(smollm2):
    edit = dict(
        scale={range(20, 26): 0.3},
        shift={(26, 27): -7.25},
        freeze={(0, 1): 5.5},
        swap=[(3, 19)],
        remap={4: 18},
    )
    text = smollm2.to_tokens("One two three four five six seven eight nine ten.")[0]
    short = text[:7]
    padded = torch.cat([text.new_full((len(text) - 7,), 2), short])
    mask = torch.ones(2, len(text), dtype=torch.long)
    mask[1, :-7] = 0
    left = {"padding_side": "left"} if "Hooked" in type(smollm2).__name__ else {}
    with edit_rotary(smollm2, [(7, 8), (7, 2), (0, 1)], **edit):
        alone = smollm2(short[None])[0]
        both = smollm2(torch.stack([text, padded]), attention_mask=mask, **left)
        torch.testing.assert_close(both[1, -7:], alone, atol=1e-3, rtol=1e-3)
        options = dict(
            max_new_tokens=4,
            do_sample=False,
            verbose=False,
            stop_at_eos=False,
            return_type="tokens",
        )
        cached, fresh = (
            smollm2.generate(text[None], use_past_kv_cache=use, **options) for use in (True, False)
        )
        assert torch.equal(cached, fresh)
        found = score_heads(smollm2, text[None], layers=[0, 1], progress=False)
    assert bool(found.rho[:2].isfinite().all())


@torch.no_grad()
def test_what_changes_nothing(llama):
    bare = llama(TOKENS)
    for edit in (dict(scale={range(4): 1.0}), dict(shift={0: 0.0}), dict(scale={0: 1})):
        with edit_rotary(llama, HEADS, **edit):
            assert torch.equal(llama(TOKENS), bare)
    with edit_rotary(llama, HEADS, scale={np.int64(1): np.float32(1)}):  # numbers of any kind
        assert torch.equal(llama(TOKENS), bare)
    for edit in (dict(remap={0: 0}), dict(remap={3: 3})):
        with edit_rotary(llama, HEADS, **edit):
            torch.testing.assert_close(llama(TOKENS), bare, atol=1e-5, rtol=1e-5)
    with edit_rotary(llama, [], scale={0: 0.0}):
        assert torch.equal(llama(TOKENS), bare)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 30), st.integers(0, 3))
def test_shift_of_all_pairs_is_a_move(llama, tokens, head):
    """Tokens put between queries and keys move them apart; the first layer sees nothing else."""
    name = "blocks.0.attn.hook_attn_scores"
    row = TOKENS[:1]
    apart = torch.cat([row[:, :12], torch.full((1, tokens), 7), row[:, 12:]], 1)
    with torch.no_grad():
        moved = llama.run_with_cache(apart, names_filter=[name])[1][name]
        with edit_rotary(llama, [(0, head)], shift={range(4): tokens}):
            here = llama.run_with_cache(row, names_filter=[name])[1][name]
    torch.testing.assert_close(
        here[:, head, 12:, :12], moved[:, head, 12 + tokens :, :12], atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_frozen_heads_do_not_know_the_distance(llama):
    same = torch.full((1, 20), 5)
    name = "blocks.0.attn.hook_attn_scores"
    with edit_rotary(llama, [(0, 1)], freeze=range(4)):
        scores = llama.run_with_cache(same, names_filter=[name])[1][name][0]
    seen = torch.ones(20, 20, dtype=torch.bool).tril()
    assert float(scores[1][seen].std()) < 1e-4
    assert float(scores[0][seen].std()) > 1e-2


@torch.no_grad()
def test_scores_of_heads_know_the_edit(llama):
    bare = score_heads(llama, TOKENS, progress=False)
    for edit in (EDITS["swap"], EDITS["freeze"], EDITS["scale"]):
        with edit_rotary(llama, HEADS, **edit):
            found = score_heads(llama, TOKENS, progress=False)
            names = ["blocks.0.attn.hook_rot_q", "blocks.0.attn.hook_rot_k"]
            cache = llama.run_with_cache(TOKENS, names_filter=names)[1]
            geometry = RotaryGeometry.from_model(llama)
        assert found.provenance["inside"][0].startswith("edit_rotary([(0, 1), (1, 2)]")
        others = [0, 2, 3]
        torch.testing.assert_close(found.rho[0, others], bare.rho[0, others], atol=1e-6, rtol=0)
        expected = rho_by_hand(cache, geometry[0], 1, edit)
        assert float(found.rho[0, 1]) == pytest.approx(expected, abs=1e-5)


def rho_by_hand(cache, g, head, edit):
    from scipy import stats

    q, k = (cache[f"blocks.0.attn.hook_rot_{x}"].double() for x in "qk")
    a = torch.complex(*split_pairs(q[:, :, head], g)).numpy()
    b = torch.complex(*split_pairs(k[:, :, g.kv_head[head]], g)).numpy()
    w = g.inv_freq.numpy()
    source = {x: y for pair in edit.get("swap", ()) for x, y in (pair, pair[::-1])}
    freeze = spread(edit, "freeze", g.n_pairs)
    found = []
    for row in range(len(a)):
        apart, dominant = [], []
        for i in range(a.shape[1]):
            for j in range(i):
                c = a[row, i] * b[row, j].conj()
                content = c * np.exp(-1j * w * (i - j))
                turned = np.array(
                    [w[source.get(m, m)] * freeze.get(m, i - j) for m in range(len(w))]
                )
                c = (content * np.exp(1j * turned)).real
                weight = np.exp(c - c.max())
                apart.append(i - j)
                dominant.append(float(weight @ np.arange(len(w)) / weight.sum()))
        found.append(stats.spearmanr(apart, dominant).statistic)
    return np.mean(found)


@torch.no_grad()
def test_inside_a_method_of_frequencies(llama):
    """Frozen at 0, no pair knows of frequencies, whatever the method does to them."""
    name = "blocks.0.attn.hook_attn_scores"
    with edit_rotary(llama, [(0, 1)], freeze=range(4)):
        alone = llama.run_with_cache(TOKENS, names_filter=[name])[1][name][:, 1]
    with ex.Linear(4)(llama), edit_rotary(llama, [(0, 1)], freeze=range(4)):
        inside = llama.run_with_cache(TOKENS, names_filter=[name])[1][name][:, 1]
    torch.testing.assert_close(inside, alone, atol=1e-4, rtol=1e-4)
    names = [name, "blocks.0.attn.hook_rot_q", "blocks.0.attn.hook_rot_k"]
    for method in (ex.Linear(4), ex.YaRN(4), ex.NoPE(pairs=(3,))):
        for edit in EDITS.values():
            with method(llama):
                bare = llama.run_with_cache(TOKENS, names_filter=names)[1]
                geometry = RotaryGeometry.from_model(llama)
                with edit_rotary(llama, [(0, 1)], **edit):
                    got = llama.run_with_cache(TOKENS, names_filter=names)[1]
            change = geometry[0].attention_scale * expected_change(bare, geometry, 0, 1, edit)
            assert_changed(bare[name][:, 1], got[name][:, 1], change)
    with ex.SelfExtend(2, 4)(llama), edit_rotary(llama, [(0, 1)], scale={range(4): 0.0}):
        scores = llama.run_with_cache(TOKENS, names_filter=[name])[1][name][:, 1]
    assert float(scores[:, torch.ones(24, 24, dtype=torch.bool).tril()].abs().max()) < 1e-6


@torch.no_grad()
def test_leaving_restores_bit_for_bit(llama):
    before, bare = state(llama), llama(TOKENS)
    with pytest.raises(IndexError), edit_rotary(llama, HEADS, swap=[(0, 3)], scale={1: 0.0}):
        llama(torch.tensor([[10**6]]))
    after = state(llama)
    assert before[:2] == after[:2]
    assert all(torch.equal(after[2][name], weight) for name, weight in before[2].items())
    assert torch.equal(llama(TOKENS), bare)

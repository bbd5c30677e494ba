"""Methods that change frequencies: geometry, special cases, papers' formulas, and what is left behind."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from helpers import architectures, small_models
from helpers.traces import state, warm
from tl_posheads import PosheadsError, RotaryGeometry
from tl_posheads import extrapolation as ex
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.rotary.contributions import split_pairs

pytestmark = pytest.mark.lens

TRAINED, LENGTH = 64, 200
TOKENS = torch.randint(3, 90, (1, LENGTH), generator=torch.Generator().manual_seed(4))
ALL = [
    ex.Linear(4),
    ex.NTK(4),
    ex.DynamicNTK(4),
    ex.YaRN(4),
    ex.Llama3(4),
    ex.Theta(5e4),
    ex.LongRoPE((1.0, 2.0, 3.0, 4.0), factor=4),
    ex.Resonance(),
    ex.Resonance(ex.YaRN(4)),
    ex.NoPE(pairs=(0,)),
    ex.NoPE(slower_than="trained"),
    ex.FoPE(),
    ex.FoPE(sigma=0.1),
]


@pytest.fixture(scope="module")
def llama():
    return warm(
        small_models.bridge(
            small_models.build("Llama", {**architectures.BASE, "max_position_embeddings": TRAINED})
        )
    )


@pytest.mark.parametrize(
    "method",
    [ex.Unchanged(), ex.Linear(1), ex.NTK(1), ex.YaRN(1), ex.Llama3(1), ex.LongRoPE((1.0,) * 4)],
    ids=repr,
)
@torch.no_grad()
def test_factor_one_changes_nothing(llama, method):
    bare = llama(TOKENS)
    with method(llama):
        assert torch.equal(llama(TOKENS), bare)


@torch.no_grad()
def test_dynamic_ntk_changes_nothing_within_training(llama):
    """Beyond, ``factor=1`` raises the base as well: with the text's length, as in transformers."""
    bare = llama(TOKENS)
    with ex.DynamicNTK(4)(llama, trained=LENGTH):
        assert torch.equal(llama(TOKENS), bare)


@pytest.mark.parametrize("method", ALL, ids=repr)
@torch.no_grad()
def test_leaving_restores_bit_for_bit(llama, method):
    before, bare, n_ctx = state(llama), llama(TOKENS), llama.cfg.n_ctx
    with method(llama):
        assert (llama(TOKENS) - bare).abs().max() > 1e-3
        assert llama.cfg.n_ctx > 10**6
    with pytest.raises(IndexError), method(llama):
        llama(torch.tensor([[10**6]]))  # stops in the middle of a pass
    after = state(llama)
    assert before[:2] == after[:2]
    assert llama.cfg.n_ctx == n_ctx
    assert all(torch.equal(after[2][name], weight) for name, weight in before[2].items())
    assert torch.equal(llama(TOKENS), bare)


@pytest.mark.parametrize("method", ALL, ids=repr)
@torch.no_grad()
def test_fused_passes_and_caches_agree(llama, method):
    with method(llama):
        whole = llama(TOKENS)
        with fused_attention(llama) as on:
            assert on
            torch.testing.assert_close(llama(TOKENS), whole, atol=1e-4, rtol=1e-4)
        if method.length_matters:
            return  # cached keys keep the frequencies of their pass, as in transformers
        options = dict(
            max_new_tokens=8,
            do_sample=False,
            verbose=False,
            stop_at_eos=False,
            return_type="tokens",
        )
        cached, fresh = (
            llama.generate(TOKENS[:, :70], use_past_kv_cache=use, **options)
            for use in (True, False)
        )
        assert torch.equal(cached, fresh)


@torch.no_grad()
def test_hookedtransformer_reads_past_its_tables(smollm2):
    """Its table of rotations starts at 2,048 positions and is cut off at n_ctx."""
    if type(smollm2).__name__ != "HookedTransformer":
        table = None
    else:
        table = smollm2.blocks[0].attn.rotary_cos
    tokens = torch.randint(3, 40000, (1, 40), generator=torch.Generator().manual_seed(1))
    n_ctx = smollm2.cfg.n_ctx
    smollm2.cfg.n_ctx = 32
    try:
        with ex.Linear(2)(smollm2):
            assert torch.isfinite(smollm2(tokens)).all()
        assert smollm2.cfg.n_ctx == 32
    finally:
        smollm2.cfg.n_ctx = n_ctx
    if table is not None:
        assert smollm2.blocks[0].attn.rotary_cos is table


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_geometry_is_the_methods(llama, method):
    own = RotaryGeometry.from_model(llama)[0]
    with method(llama):
        found = RotaryGeometry.from_model(llama, length=LENGTH)[1]
    new = method.frequencies(own.inv_freq, TRAINED, LENGTH)
    torch.testing.assert_close(found.inv_freq, new.inv_freq, rtol=1e-5, atol=1e-9)
    assert found.rotation_scale == pytest.approx(own.rotation_scale * new.scale)
    assert torch.equal(RotaryGeometry.from_model(llama)[0].inv_freq, own.inv_freq)


def rotated(model, tokens, layer=0):
    names = [f"blocks.{layer}.attn.hook_rot_{x}" for x in "qk"]
    cache = model.run_with_cache(tokens, names_filter=names)[1]
    return [cache[name] for name in names]


@torch.no_grad()
def test_a_pair_without_position_does_not_know_the_distance(llama):
    same = torch.full((1, 40), 7)
    geometry = RotaryGeometry.from_model(llama)[0]
    with ex.NoPE(pairs=range(1, 3))(llama):
        q, _ = rotated(llama, same)
    first, second = split_pairs(q[0], geometry)
    moved = ((first - first[:1]).abs() + (second - second[:1]).abs()).amax((0, 1))
    scale = first.abs().max()
    assert (moved[1:3] < 1e-4 * scale).all()
    assert (moved[[0]] > 0.1 * scale).all()


@torch.no_grad()
def test_fourier_series_is_what_the_paper_writes(llama):
    method, geometry = ex.FoPE(sigma=0.3, seed=2), RotaryGeometry.from_model(llama)[0]
    bare, _ = rotated(llama, TOKENS)
    with method(llama):
        got, _ = rotated(llama, TOKENS)
    w = geometry.inv_freq.tolist()
    kept = [m for m in range(4) if w[m] >= 2 * math.pi / TRAINED]
    assert 0 < len(kept) < 4
    cos_mix, sin_mix = method._coefficients(
        method.frequencies(geometry.inv_freq, TRAINED, LENGTH).inv_freq
    )
    x = torch.complex(*split_pairs(bare[0].double(), geometry))
    y = torch.complex(*split_pairs(got[0].double(), geometry))
    for p in (0, 3, 150):
        for m in range(4):
            content = x[p, :, m] * complex(math.cos(w[m] * p), -math.sin(w[m] * p))
            if m in kept:
                real = sum(float(cos_mix[f, m]) * math.cos(w[f] * p) for f in kept)
                imag = sum(float(sin_mix[f, m]) * math.sin(w[f] * p) for f in kept)
                assert cos_mix[m, m] == sin_mix[m, m] == 1
            else:
                real, imag = 1.0, 0.0
            expected = content * complex(real, imag)
            torch.testing.assert_close(y[p, :, m], expected, atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_fope_without_series_is_clipping(llama):
    with ex.FoPE()(llama):
        clipped = llama(TOKENS)
    with ex.NoPE(slower_than="trained")(llama):
        torch.testing.assert_close(llama(TOKENS), clipped, atol=1e-5, rtol=1e-5)


def test_resonant_wavelengths_are_whole_tokens():
    own = 10000.0 ** (-torch.arange(16, dtype=torch.float64) / 16)
    for method in (ex.Resonance(), ex.Resonance(ex.Linear(4)), ex.Resonance(ex.DynamicNTK(3))):
        length = 2 * math.pi / method.frequencies(own, 64, 200).inv_freq
        torch.testing.assert_close(length, length.round(), atol=1e-9, rtol=0)
    inner = ex.YaRN(4).frequencies(own, 64, 200)
    mine = ex.Resonance(ex.YaRN(4)).frequencies(own, 64, 200)
    assert mine.scale == inner.scale
    assert ((2 * math.pi / mine.inv_freq) - (2 * math.pi / inner.inv_freq)).abs().max() <= 0.5
    assert ex.Resonance(ex.DynamicNTK(3)).length_matters
    assert not ex.Resonance().length_matters


def test_yarn_where_frequencies_are_no_series():
    """On top of Llama 3's own scaling the ramp's ends are where pairs turn so often."""
    own = ex.Llama3(8).frequencies(
        500000.0 ** (-torch.arange(64, dtype=torch.float64) / 64), 8192, 8192
    )
    new = ex.YaRN(4).frequencies(own.inv_freq, 65536, 65536)
    turns = 65536 * own.inv_freq / (2 * math.pi)
    ratio = new.inv_freq / own.inv_freq
    assert (ratio[turns > 40] == 1).all()
    torch.testing.assert_close(ratio[turns < 0.9], torch.full_like(ratio[turns < 0.9], 0.25))
    assert (ratio.diff() <= 1e-12).all()


def test_longrope_from_a_config():
    config = small_models.build(*architectures.ROTARY["Phi-3, longrope"]).config
    method = ex.LongRoPE.from_config(config)
    assert method.long_factor == (1.0, 2.0, 3.0, 4.0)
    assert method.short_factor == (1.0, 1.1, 1.2, 1.3)
    assert method.factor == 4.0  # 256 positions over 64
    config.rope_parameters = {**config.rope_parameters, "factor": 8.0}
    given = ex.LongRoPE.from_config(config)
    assert given.factor == 8.0  # a factor that is given goes before
    own = torch.ones(4, dtype=torch.float64)
    theirs = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=200)
    assert given.frequencies(own, 64, 200).scale == pytest.approx(theirs[1])
    assert ex.LongRoPE.from_config(small_models.rotary_model("Phi-3, longrope")) == method
    with pytest.raises(PosheadsError, match="holds no long_factor"):
        ex.LongRoPE.from_config(LlamaConfig())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ex.Linear(0.5), r"Linear\(factor=0.5\)"),
        (lambda: ex.NTK(0), "number of 1 or more"),
        (lambda: ex.DynamicNTK(float("nan")), "number of 1 or more"),
        (lambda: ex.YaRN("4"), "number of 1 or more"),
        (lambda: ex.YaRN(4, beta_fast=1, beta_slow=2), "beta_fast"),
        (lambda: ex.YaRN(4, attention_factor=float("inf")), "above 0"),
        (lambda: ex.YaRN(4, beta_fast="x"), "above 0"),
        (lambda: ex.Llama3(True), "number of 1 or more"),
        (lambda: ex.Llama3(4, low_freq_factor=4), "low_freq_factor"),
        (lambda: ex.LongRoPE((1.0, -1.0)), "above 0"),
        (lambda: ex.LongRoPE(()), "each rotary pair"),
        (lambda: ex.LongRoPE("12"), "each rotary pair"),
        (lambda: ex.Theta(1.0), "above 1"),
        (lambda: ex.NoPE(), "one of them"),
        (lambda: ex.NoPE(pairs=()), "at least one pair"),
        (lambda: ex.NoPE(pairs=3), "at least one pair"),
        (lambda: ex.NoPE(pairs=(1.7,)), "at least one pair"),
        (lambda: ex.NoPE(slower_than=-3), "above 0"),
        (lambda: ex.FoPE(sigma=-1), "above 0"),
        (lambda: ex.FoPE(seed=1.5), "whole number"),
        (lambda: ex.Resonance(3), "only changes frequencies"),
        (lambda: ex.Resonance(ex.FoPE(sigma=0.1)), "only changes frequencies"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(PosheadsError, match=message):
        make()


def test_refusals_leave_the_model_untouched(llama):
    before, bare = state(llama), llama(TOKENS)
    for method, message in (
        (ex.NoPE(pairs=(4,)), "pairs 0 to 3"),
        (ex.LongRoPE((1.0, 2.0)), "4 rotary pairs"),
    ):
        with pytest.raises(PosheadsError, match=message), method(llama):
            pass
    with pytest.raises(PosheadsError, match="2 or more"), ex.Linear(2)(llama, trained=0):
        pass
    with ex.Linear(2)(llama):
        inside = llama(TOKENS)
        with pytest.raises(PosheadsError, match="can't be nested"), ex.YaRN(4)(llama):
            pass
        assert torch.equal(llama(TOKENS), inside)
    assert state(llama)[:2] == before[:2]
    assert torch.equal(llama(TOKENS), bare)


def test_other_models_are_refused_by_name():
    gpt2 = small_models.other_model("GPT-2")
    with pytest.raises(PosheadsError, match="tiny-GPT2.*not RoPE"), ex.YaRN(4)(gpt2):
        pass
    phi3 = small_models.rotary_model("Phi-3, longrope")
    with pytest.raises(PosheadsError, match="depend on the text's length"), ex.YaRN(4)(phi3):
        pass
    with ex.Unchanged()(phi3) as same:
        assert same is phi3
    with nullcontext(), pytest.raises(PosheadsError, match="expected a HookedTransformer"):
        ex.Linear(2)(torch.nn.Linear(2, 2)).__enter__()

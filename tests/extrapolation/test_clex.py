"""CLEX: the ODE against numpy, its special cases, its files, and training on a live model."""

from __future__ import annotations

import builtins
import json
import math

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from helpers import architectures, small_models
from helpers.traces import state, warm
from tl_posheads import PosheadsError
from tl_posheads import extrapolation as ex
from tl_posheads.extrapolation.methods.clex_train import spread_positions
from tl_posheads.hooks.rotary_geometry import RotaryGeometry

pytest.importorskip("torchdiffeq", reason="torchdiffeq (extra clex) is not installed")
pytestmark = pytest.mark.lens

TRAINED = 64
OWN = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
TOKENS = torch.randint(3, 90, (3, 48), generator=torch.Generator().manual_seed(2))
LONG = torch.randint(3, 90, (1, 200), generator=torch.Generator().manual_seed(3))


def planted(act="silu", **more):
    random = torch.Generator().manual_seed(1)
    up, down = (0.1 * torch.randn(*shape, generator=random) for shape in ((4, 8), (8, 4)))
    return ex.CLEX(up, down, max_factor=4, act=act, **more)


def by_numpy(method, t, steps):
    """Runge and Kutta's fourth order with the paper's right-hand side, written out."""
    up, down = method.up.double().numpy(), method.down.double().numpy()
    index, d = np.arange(0, 8, 2), 8
    act = np.tanh if method.act == "tanh" else lambda z: z / (1 + np.exp(-z))

    def slope(time, x):
        alpha = 2 * time - 1
        ntk = (10000 * alpha ** (d / (d - 2))) ** (-index / d)
        moving = -2 * index / (d - 2) / (10000 ** (index / d) * alpha ** (index / (d - 2) + 1))
        return act((x + np.log(ntk)) @ up) @ down + moving / ntk

    x, h = np.log(OWN.numpy()), (t - 1) / steps
    for i in range(steps):
        time = 1 + i * h
        a = slope(time, x)
        b = slope(time + h / 2, x + h / 2 * a)
        c = slope(time + h / 2, x + h / 2 * b)
        x = x + h / 6 * (a + 2 * b + 2 * c + slope(time + h, x + h * c))
    return np.exp(x)


@pytest.mark.parametrize("act", ["silu", "tanh"])
@pytest.mark.parametrize("t", [2, 3, 4])
def test_ode_is_the_papers(act, t):
    method = planted(act)
    got = method.frequencies(OWN, TRAINED, t * TRAINED).inv_freq
    np.testing.assert_allclose(got, by_numpy(method, t, 2000), rtol=1e-5)
    assert (
        got / OWN - ex.NTK(2 * t - 1).frequencies(OWN, 64, 64).inv_freq / OWN
    ).abs().max() > 0.01


def test_special_cases():
    untrained = ex.CLEX.untrained(4, 8)
    for length, t in ((65, 2), (128, 2), (129, 3), (8 * 64, 8), (99 * 64, 8)):
        got = untrained.frequencies(OWN, TRAINED, length).inv_freq
        ntk = ex.NTK(2 * t - 1).frequencies(OWN, TRAINED, length).inv_freq
        torch.testing.assert_close(got, ntk, rtol=1e-6, atol=0)
    assert torch.equal(planted().frequencies(OWN, TRAINED, TRAINED).inv_freq, OWN)


def test_frequencies_carry_gradients_and_are_solved_once(monkeypatch):
    method = planted(time_dt=0.25)
    up, down = (weight.clone().requires_grad_(True) for weight in (method.up, method.down))
    got = ex.CLEX(up, down, max_factor=4, time_dt=0.25).frequencies(OWN, TRAINED, 200).inv_freq
    got.log().sum().backward()
    assert up.grad.abs().max() > 0
    assert down.grad.abs().max() > 0
    assert torch.equal(got.detach(), method.frequencies(OWN, TRAINED, 200).inv_freq)
    monkeypatch.setattr(ex.CLEX, "at", lambda *args: pytest.fail("solved again"))
    assert torch.equal(method.frequencies(OWN, TRAINED, 250).inv_freq, got.detach())


def test_name_tells_settings_apart():
    names = {
        repr(planted(**more))
        for more in ({}, {"base": 5e5}, {"time_dt": 0.1}, {"log_scale": True}, {"act": "tanh"})
    }
    assert len(names) == 5


@pytest.fixture(scope="module")
def llama():
    options = {**architectures.BASE, "max_position_embeddings": TRAINED}
    return warm(small_models.bridge(small_models.build("Llama", options)))


@torch.no_grad()
def test_live_model_has_these_frequencies(llama):
    options = {**architectures.BASE, "max_position_embeddings": TRAINED}
    theirs = small_models.build("Llama", options)
    theirs.model.rotary_emb.inv_freq = planted().frequencies(OWN, TRAINED, 200).inv_freq.float()
    before, bare, expected = state(llama), llama(LONG), theirs(LONG).logits
    for layer in theirs.model.layers:
        layer.self_attn.scaling *= math.log(200) / math.log(TRAINED)
    with planted(log_scale=True)(llama):
        assert (llama(LONG) - theirs(LONG).logits).abs().max() < 1e-3
    assert (theirs(LONG).logits - expected).abs().max() > 1e-2
    with planted()(llama):
        got = llama(LONG)
        assert torch.equal(llama(LONG[:, :TRAINED]), llama(LONG[:, :TRAINED]))
    assert (got - expected).abs().max() < 1e-3
    assert (got - bare).abs().max() > 1e-2
    assert state(llama)[:2] == before[:2]
    assert torch.equal(llama(LONG), bare)


def test_published_form_goes_round(tmp_path):
    method = planted("tanh")
    method.save(tmp_path / "clex")
    again = ex.CLEX.from_published(tmp_path / "clex")
    assert repr(again) == repr(method)
    assert torch.equal(again.up, method.up)
    assert torch.equal(again.down, method.down)
    named = {
        "model.clex_layer.proj_func.ode_up_proj": method.up,
        "model.clex_layer.proj_func.ode_down_proj": method.down,
    }
    rope = {"rope_scaling": {"type": "clex", "max_factor": 4, "act": "tanh", "time_dt": 0.01}}
    assert repr(ex.CLEX.from_published(named, rope)) == repr(method)
    with pytest.raises(PosheadsError, match="0 ode_down_proj"):
        ex.CLEX.from_published({"x.ode_up_proj": method.up}, rope)
    with pytest.raises(PosheadsError, match="no max_factor"):
        ex.CLEX.from_published(named, {})
    with pytest.raises(PosheadsError, match="can't be read"):
        ex.CLEX.from_published(tmp_path / "nothing")


def test_published_settings_and_checkpoints(tmp_path):
    method = planted("tanh", base=5e5, time_dt=0.1, log_scale=True)
    for _ in range(2):  # its own files it writes anew
        assert repr(ex.CLEX.from_published(method.save(tmp_path / "one"))) == repr(method)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(PosheadsError, match="holds a model"):
        method.save(tmp_path / "model")
    named = {
        "model.clex_layer.proj_func.ode_up_proj": method.up,
        "model.clex_layer.proj_func.ode_down_proj": method.down,
    }
    rope = {"type": "clex", "max_factor": 4, "act": "tanh", "time_dt": 0.1}
    config = {"model_type": "llama", "rope_scaling": rope}
    plain = planted("tanh", time_dt=0.1)
    for shards in (False, True):
        folder = tmp_path / f"shards-{shards}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if shards:
            where = dict(zip(named, ("a.safetensors", "b.safetensors")))
            for key, file in where.items():
                save_file({key: named[key], f"{key}.other": torch.ones(1)}, folder / file)
            index = {"weight_map": {**where, "lm_head.weight": "absent.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            torch.save({**named, "lm_head.weight": torch.ones(1)}, folder / "pytorch_model.bin")
        assert repr(ex.CLEX.from_published(folder)) == repr(plain)
    theirs = transformers.LlamaConfig(rope_scaling={"rope_type": "clex", **rope})
    assert repr(ex.CLEX.from_published(named, theirs)) == repr(plain)

    class Rude:
        def __reduce__(self):
            return (pytest.fail, ("code of a checkpoint was run",))

    torch.save({"x": Rude()}, tmp_path / "rude.bin")
    with pytest.raises(PosheadsError, match="can't be read"):
        ex.CLEX.from_published(tmp_path / "rude.bin", config)


def test_training_leaves_windowed_layers_and_solves_once_a_step(monkeypatch):
    gemma = warm(small_models.rotary_model("Gemma 3"))  # layer 0 is windowed, with its own theta
    solved, at = [], ex.CLEX.at

    def counted(self, inv_freq, t):
        solved.append(inv_freq)
        return at(self, inv_freq, t)

    monkeypatch.setattr(ex.CLEX, "at", counted)
    ex.train_clex(gemma, TOKENS, max_factor=2, steps=2, time_dt=0.5, progress=False)
    whole = RotaryGeometry.from_model(gemma)[1].inv_freq
    assert len(solved) == 2
    assert all(torch.equal(one, whole) for one in solved)


def test_training_lowers_the_loss_and_leaves_the_model(llama):
    # What the bare model says itself: spread out, it should say so still. A random model's
    # frequencies carry little, so the gain is small; the seed makes it the same every time.
    texts = llama.generate(
        TOKENS[:, :6],
        max_new_tokens=42,
        do_sample=False,
        verbose=False,
        stop_at_eos=False,
        return_type="tokens",
    )
    before = state(llama)
    flags = [weight.requires_grad for weight in llama.parameters()]
    options = dict(max_factor=4, steps=40, lr=1e-3, time_dt=0.25, progress=False)
    method = ex.train_clex(llama, texts, **options)
    assert [weight.requires_grad for weight in llama.parameters()] == flags
    after = state(llama)
    assert before[:2] == after[:2]
    assert all(torch.equal(after[2][name], weight) for name, weight in before[2].items())
    assert not method.up.requires_grad
    assert method.down.abs().max() > 0
    again = ex.train_clex(llama, texts, **options)
    assert torch.equal(again.down, method.down)
    assert not torch.equal(ex.train_clex(llama, texts, seed=1, **options).down, method.down)

    def spread_loss(clex):
        total, random = 0.0, torch.Generator().manual_seed(9)
        from tl_posheads.extrapolation.methods.clex_train import _hooks
        from tl_posheads.hooks.model import own_hooks

        layers = {g.layer: g for g in RotaryGeometry.from_model(llama).layers}
        for _ in range(4):
            for row in texts:
                at = spread_positions(len(row), 4, random)
                new = {i: clex.at(g.inv_freq, 4.0) for i, g in layers.items()}
                with torch.no_grad(), own_hooks(_hooks(llama, layers, new, at)):
                    logits = llama(row[None])[0].log_softmax(-1)
                total -= float(logits[:-1].gather(-1, row[1:, None]).mean())
        return total / 12

    assert spread_loss(method) < spread_loss(ex.CLEX.untrained(4, 4, time_dt=0.25)) - 0.01


def test_gradient_is_the_derivative():
    up, down = (weight.double().requires_grad_(True) for weight in (planted().up, planted().down))

    def at(up, down):
        return ex.CLEX(up, down, max_factor=4, time_dt=0.25).at(OWN, 3.0).log()

    assert torch.autograd.gradcheck(at, (up, down))


def test_positions_are_spread_over_the_length():
    for t in (1, 3):
        at = spread_positions(20, t, torch.Generator().manual_seed(0))
        assert len(at) == 20
        assert (at.diff() > 0).all()
        assert at[0] == 0
        assert at[-1] == 20 * t - 1


def test_refusals(llama, monkeypatch):
    with pytest.raises(PosheadsError, match="4 rotary pairs"), ex.CLEX.untrained(7, 2)(llama):
        pass
    with pytest.raises(PosheadsError, match="act"):
        planted("relu")
    with pytest.raises(PosheadsError, match="max_factor"):
        ex.CLEX.untrained(4, 0)
    with pytest.raises(PosheadsError, match="trained on 64"):
        ex.train_clex(llama, LONG[:, :5], max_factor=2)
    with pytest.raises(PosheadsError, match="max_factor"):
        ex.train_clex(llama, TOKENS, max_factor=1)
    with pytest.raises(PosheadsError, match="smaller"):
        ex.train_clex(llama, TOKENS, max_factor=4, lr=1e30, time_dt=0.5, progress=False)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torchdiffeq":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PosheadsError, match=r"tl-posheads\[clex\]"):
        planted().frequencies(OWN, TRAINED, 999)

"""Training watched: numbers against score_heads, and nothing left behind."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import Dataset

import tl_posheads as ph
from helpers import architectures, small_models
from helpers.planted_training import planted
from tl_posheads import emergence
from tl_posheads.studies.emergence.measuring import Moment, measure_step, texts_of

pytestmark = pytest.mark.lens
SCORES = ("rho", "ci_low", "ci_high", "rotation", "content", "p_adjusted")


def tokens_of(n_docs, n_pos, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (n_docs, n_pos), generator=generator)


@pytest.fixture(scope="module")
def llama():
    return small_models.rotary_model("Llama")


TEXTS = tokens_of(9, 40)


def test_a_look_is_what_score_heads_curves_and_the_loss_say(llama):
    moment, facts = measure_step(llama, texts_of(llama, TEXTS), seed=3)
    scores = ph.score_heads(llama, TEXTS, seed=3, progress=False)
    for name in SCORES:
        assert torch.equal(getattr(moment, name), getattr(scores, name))
    assert torch.equal(moment.doc_rho, scores.by_document("rho"))
    assert facts == scores.provenance
    heads = [(layer, head) for layer in range(2) for head in range(4)]
    curve = ph.dominant_dimension_curve(llama, TEXTS, heads=heads, progress=False)
    for i, place in enumerate(heads):
        for o, (low, high) in enumerate([(1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 40)]):
            at = slice(low - 1, high - 1)
            n = curve.n_qk_pairs[i, at].double()
            mean = (curve.mean[i, at] * n).sum() / n.sum()
            assert float(moment.curve[place][o]) == pytest.approx(float(mean), abs=1e-6)
    with torch.no_grad():
        logprob = llama(TEXTS).log_softmax(-1)[:, :-1].gather(-1, TEXTS[:, 1:, None])[..., 0]
    order = [
        next(i for i, row in enumerate(TEXTS) if torch.equal(row, text))
        for _, text in texts_of(llama, TEXTS)
    ]
    for o, (low, high) in enumerate([(1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 40)]):
        true = -logprob[order, low - 1 : high - 1].double().mean(1)
        torch.testing.assert_close(moment.loss[:, o], true, atol=1e-4, rtol=0)
    # A text's own rho: so short a text is ranked whole, whatever the number of draws.
    alone = ph.score_heads(llama, TEXTS[order[2]][None], qk_pairs="all", progress=False).rho
    torch.testing.assert_close(moment.doc_rho[2], alone, atol=1e-9, rtol=0)


def test_scale_reaches_scores_and_curves(llama):
    plain, _ = measure_step(llama, texts_of(llama, TEXTS))
    found = emergence.track_emergence({5: llama}, TEXTS, scale="attention", progress=False)
    scores = ph.score_heads(llama, TEXTS, scale="attention", progress=False)
    assert torch.equal(found.rho[0], scores.rho)
    assert not torch.equal(found.rho[0], plain.rho)
    assert found.provenance["scale"] == "attention"
    options = dict(heads=[(1, 2)], scale="attention", progress=False)
    near = float(ph.dominant_dimension_curve(llama, TEXTS, **options).mean[0, 0])
    assert float(found.curve[0, 1, 2, 0]) == pytest.approx(near, abs=1e-6)
    assert float(plain.curve[1, 2, 0]) != pytest.approx(near, abs=1e-3)
    assert torch.equal(found.loss[0], plain.loss)


def test_texts_of_unequal_length(llama):
    texts = [TEXTS[0], TEXTS[1, :20]]
    moment, _ = measure_step(llama, texts_of(llama, texts))
    short = next(i for i, (_, text) in enumerate(texts_of(llama, texts)) if len(text) == 20)
    alone = measure_step(llama, texts_of(llama, texts[1:]))[0].loss[0]
    torch.testing.assert_close(moment.loss[short, :5], alone, atol=1e-9, rtol=0)
    assert moment.loss.isnan().nonzero().tolist() == [[short, 5]]
    curve = ph.dominant_dimension_curve(llama, texts, heads=[(0, 1)], progress=False)
    mean = np.average(curve.mean[0, 15:31], weights=curve.n_qk_pairs[0, 15:31])
    assert float(moment.curve[0, 1, 4]) == pytest.approx(mean, abs=1e-6)


def test_one_pass_a_text(llama, monkeypatch):
    read, forward = [], type(llama).forward

    def counted(model, tokens, **options):
        read.append(tokens.shape[1])
        return forward(model, tokens, **options)

    monkeypatch.setattr(type(llama), "forward", counted)
    measure_step(llama, texts_of(llama, TEXTS[:3]))
    assert read.count(40) == 3


class Repeats(Dataset):
    """Texts whose second half is their first one again."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        text = tokens_of(1, 16, i)[0]
        return {"tokens": torch.cat([text, text])}


def test_the_lens_own_training_is_watched_and_not_disturbed():
    from importlib import import_module

    try:
        training = import_module("transformer_lens.tools.training")
    except ImportError:  # before 4.0
        training = import_module("transformer_lens.train")
    config_class = getattr(training, "TrainConfig", None) or training.HookedTransformerTrainConfig
    config = config_class(num_epochs=1, batch_size=4, lr=1e-3, print_every=None, device="cpu")

    def trained(watch):
        model = small_models.bridge(small_models.build("Llama", architectures.BASE, boost=1.0))
        for weight in model.parameters():
            weight.requires_grad_(True)
        if not watch:
            training.train(model, config, Repeats())
            return model, None
        tracker = emergence.EmergenceTracker(model, TEXTS[:2], every=[0, 2, 4], progress=False)
        with tracker.watching():
            training.train(model, config, Repeats())
        return model, tracker.result()

    bare, _ = trained(False)
    model, found = trained(True)
    assert found.steps.tolist() == [0, 2, 4, 6]
    for a, b in zip(bare.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(found.rho[0], found.rho[-1])
    first, last = found.losses()["loss"].iloc[0], found.losses().iloc[-6]["loss"]
    assert first != last
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert not model._forward_pre_hooks


def test_modes_and_random_state_are_left_alone(llama):
    llama.train()
    llama.blocks[0].eval()
    before = {name: module.training for name, module in llama.named_modules()}
    original = {name: module.training for name, module in llama.original_model.named_modules()}
    state = torch.get_rng_state()
    tracker = emergence.EmergenceTracker(llama, TEXTS[:1], progress=False)
    tracker.look(0)
    assert {name: module.training for name, module in llama.named_modules()} == before
    assert {n: m.training for n, m in llama.original_model.named_modules()} == original
    assert torch.equal(torch.get_rng_state(), state)
    llama.eval()


def models(n=3):
    return {
        step: small_models.bridge(small_models.build("Llama", architectures.BASE, seed=step))
        for step in range(n)
    }


def test_checkpoints_training_and_folders_give_the_same(tmp_path):
    by_step = models()
    saved = {}
    for step in by_step:
        folder = tmp_path / "run" / f"checkpoint-{step}"
        hf_model = small_models.build("Llama", architectures.BASE, seed=step)
        hf_model.save_pretrained(folder)
        small_models.tiny_tokenizer().save_pretrained(folder)
        saved[step] = folder
    (tmp_path / "run" / "logs").mkdir()
    texts = TEXTS[:2]
    found = emergence.track_emergence(by_step, texts, progress=False)
    again = emergence.track_emergence(iter(by_step.items()), texts, progress=False)
    folders = emergence.folder_checkpoints(tmp_path / "run")
    assert folders == saved
    third = emergence.track_emergence(folders, texts, every=2, progress=False)
    assert found.steps.tolist() == [0, 1, 2]
    assert third.steps.tolist() == [0, 2]
    assert torch.equal(found.rho, again.rho)
    torch.testing.assert_close(found.rho[[0, 2]], third.rho, atol=1e-4, rtol=0)
    assert found.top(3, step=0) == ph.score_heads(by_step[0], texts, progress=False).top(3)
    with pytest.raises(ph.PosheadsError, match="none of the steps"):
        emergence.track_emergence(by_step, texts, every=[7], progress=False)
    with pytest.raises(ph.PosheadsError, match="measured steps are"):
        found.top(1, step=9)


def test_a_stopped_run_goes_on_without_loading_what_it_has(tmp_path):
    by_step = models()

    def stop():
        raise KeyboardInterrupt

    texts, folder = TEXTS[:2], tmp_path / "kept"
    options = dict(folder=folder, progress=False)
    with pytest.raises(KeyboardInterrupt):
        emergence.track_emergence({**by_step, 2: stop}, texts, **options)
    again = emergence.track_emergence({**by_step, 1: stop}, texts, **options)
    whole = emergence.track_emergence(by_step, texts, progress=False)
    for f in fields(Moment):
        torch.testing.assert_close(
            getattr(again, f.name), getattr(whole, f.name), rtol=0, atol=0, equal_nan=True
        )
    with pytest.raises(ph.PosheadsError, match="another run"):
        emergence.track_emergence(by_step, TEXTS[:3], **options)
    with pytest.raises(ph.PosheadsError, match="another run"):
        emergence.track_emergence(by_step, texts, scale="attention", **options)


class Writer:
    def __init__(self):
        self.seen = []

    def add_scalar(self, name, number, step):
        self.seen.append((step, name, number))


class Run:
    def __init__(self):
        self.seen = []

    def log(self, numbers, step):
        self.seen += [(step, name, number) for name, number in numbers.items()]


def test_numbers_go_where_the_user_keeps_them(llama):
    writer, run, heard = Writer(), Run(), []

    def hear(step, numbers):
        heard.extend((step, name, number) for name, number in numbers.items())

    for log in (writer, run, hear):
        tracker = emergence.EmergenceTracker(llama, TEXTS[:1], log=log, progress=False)
        moment = tracker.look(5)
    assert writer.seen == run.seen == heard
    assert (5, "rho/L1H2", float(moment.rho[1, 2])) in heard
    assert (5, "loss/from_4", float(moment.loss[:, 2].mean())) in heard
    with pytest.raises(ph.PosheadsError, match="SummaryWriter"):
        emergence.EmergenceTracker(llama, TEXTS[:1], log=3, progress=False)


def test_drift_is_the_overlap_with_where_training_began():
    found = planted(2.0, 4.0)
    rho = torch.zeros(7, 5, 4, dtype=torch.float64)
    rho[0] = torch.arange(20.0).view(5, 4)
    rho[1] = rho[0] * 2 + 1
    rho[2] = -rho[0]
    for step in range(3, 7):
        rho[step] = rho[0]
    curve = torch.zeros(7, 5, 4, 6, dtype=torch.float64)
    curve[2] = 0.5
    table = replace(found, rho=rho, curve=curve).drift(k=0.1)
    assert table["k"].tolist() == [2] * 7
    assert table["overlap"].tolist() == [2, 2, 0, 2, 2, 2, 2]
    assert table["chance"].iloc[0] == pytest.approx(0.2)
    assert table["rank_correlation"].tolist()[:3] == pytest.approx([1, 1, -1])
    assert table["curve_change"].tolist()[:3] == [0, 0, 0.5]
    other = replace(found, rho=rho).drift(-rho[0], k=2)
    assert other["overlap"].tolist()[:3] == [0, 0, 2]
    with pytest.raises(ph.PosheadsError, match=r"shape \(3, 3\)"):
        found.drift(torch.zeros(3, 3))


def test_saved_and_drawn(tmp_path):
    found = planted(2.0, 4.0)
    again = emergence.Emergence.load(found.save(tmp_path / "e"))
    for f in fields(emergence.Emergence)[:-1]:
        assert torch.equal(getattr(found, f.name), getattr(again, f.name))
    assert again.provenance == found.provenance
    table = pd.read_parquet(tmp_path / "e" / "emergence.parquet")
    last = table[(table["step"] == 63) & (table["head"] == 0)].iloc[0]
    for name in SCORES:
        assert last[name] == getattr(found, name)[-1, 0, 0]
    assert len(table) == 14
    scores, losses, curve = found.plot().axes[:3]
    line = next(line for line in scores.lines if line.get_label() == "layer 0, head 0")
    np.testing.assert_allclose(line.get_ydata(), found.rho[:, 0, 0])
    assert "nats" in losses.get_ylabel()
    assert "step" in curve.get_xlabel()
    (scores, *_) = found.plot("L0H1").axes
    labels = [line.get_label() for line in scores.lines]
    assert [label for label in labels if label.startswith("layer")] == ["layer 0, head 1"]
    for wrong in ([], "L9H0"):
        with pytest.raises(ph.PosheadsError, match="expected some of the 2 heads scored"):
            found.plot(wrong)
    (tmp_path / "e" / "emergence.safetensors").write_bytes(b"half")
    with pytest.raises(ph.PosheadsError, match="damaged"):
        emergence.Emergence.load(tmp_path / "e")
    label = tmp_path / "e" / "emergence.json"
    label.write_text(json.dumps(json.loads(label.read_text()) | {"version": 1}))
    with pytest.raises(ph.PosheadsError, match="measured otherwise: track it again"):
        emergence.Emergence.load(tmp_path / "e")


def test_refusals(llama, tmp_path):
    with pytest.raises(ph.PosheadsError, match="every=0"):
        emergence.EmergenceTracker(llama, TEXTS, every=0, progress=False)
    with pytest.raises(ph.PosheadsError, match="scale='both'"):
        emergence.EmergenceTracker(llama, TEXTS, scale="both", progress=False)
    with pytest.raises(ph.PosheadsError, match="scale='both'"):
        emergence.track_emergence({0: llama}, TEXTS, scale="both", progress=False)
    with pytest.raises(ph.PosheadsError, match="GPT2"):
        emergence.EmergenceTracker(small_models.other_model("GPT-2"), TEXTS, progress=False)
    with pytest.raises(ph.PosheadsError, match="no step of training"):
        emergence.EmergenceTracker(llama, TEXTS, progress=False).result()
    with pytest.raises(ph.PosheadsError, match="at least 3"):
        replace(planted(2.0, 4.0), steps=torch.tensor([0, 1])).lead_lag()
    with pytest.raises(ph.PosheadsError, match="holds no checkpoint"):
        emergence.folder_checkpoints(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ph.PosheadsError, match="only hub ids"):
        ph.load_model(str(tmp_path), revision="step10")


def test_hub_checkpoints_load_the_step_they_name(monkeypatch):
    from tl_posheads.io import models as loading

    asked = []
    monkeypatch.setattr(loading, "load_model", lambda name, **o: asked.append((name, o)))
    found = emergence.hub_checkpoints("some/model", [0, 8], cls="bridge")
    found[8]()
    assert asked == [("some/model", {"revision": "step8", "cls": "bridge"})]
    assert emergence.log_steps(100, 1) == [0, 1, 2, 4, 8, 16, 32, 64, 100]

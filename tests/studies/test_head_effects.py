"""Every head by itself: the numbers of a loop with ``ablate``, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from helpers import planted, small_models
from helpers.traces import assert_same, state, warm
from tl_posheads import HeadEffects, PosheadsError, ablate, head_effects
from tl_posheads.hooks.logprobs import target_logprobs
from tl_posheads.studies.ablation import head_effects as module
from tl_posheads.studies.ablation.trial import Trial
from tl_posheads.tasks import Passkey, Prompt

pytestmark = pytest.mark.lens

TOP = (1, 2)
TASKS = [planted.Retrieval(n=3, length=32), planted.Retrieval(n=2, length=24, seed=1)]
NAMES = ["planted-retrieval", "planted-retrieval#2"]
REFERENCE = torch.randint(24, 90, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return warm(planted.planted_retriever(n_layers=3, n_heads=6, planted=TOP))


def run(model, tasks=TASKS, **options):
    return head_effects(model, tasks, **{"progress": False, **options})


@pytest.fixture(scope="module")
def effects(model):
    return run(model)


def value(model, one):
    return float(target_logprobs(model, one.tokens, one.targets)[0].double().mean())


def loop(model, prompts, **how):
    """``[prompt, layer, head]`` of long and short, head after head."""
    shape = (len(prompts), int(model.cfg.n_layers), int(model.cfg.n_heads))
    out = {"long": np.zeros(shape), "short": np.zeros(shape)}
    for i, prompt in enumerate(prompts):
        seed = {"seed": i} if how.get("mode") == "resample" else {}
        for name, one in {"long": prompt, "short": prompt.short}.items():
            clean = value(model, one)
            for layer, head in np.ndindex(shape[1:]):
                with ablate(model, [(layer, head)], **how, **seed):
                    out[name][i, layer, head] = value(model, one) - clean
    return out


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"on": "pattern"},
        {"mode": "mean", "reference": REFERENCE},
        {"mode": "resample", "reference": REFERENCE},
    ],
    ids=["zero", "pattern", "mean", "resample"],
)
def test_effects_are_those_of_a_loop_with_ablate(model, how):
    before = state(model)
    found = run(model, TASKS[:1], **how)
    for variant, expected in loop(model, TASKS[0].prompts(model), **how).items():
        np.testing.assert_allclose(found.of(NAMES[0], variant), expected, atol=2e-4)
        assert np.abs(expected).max() > 0.5
    assert_same(before, state(model))


def test_tables(model, effects):
    assert effects.tasks == NAMES
    assert effects.long.shape == effects.short.shape == (5, 3, 6)
    assert effects.prompts["prompt"].tolist() == [0, 1, 2, 0, 1]
    assert effects.prompts["n_tokens"].tolist() == [32] * 3 + [24] * 2
    prompts = [prompt for task in TASKS for prompt in task.prompts(model)]
    clean = [value(model, prompt) for prompt in prompts]
    near = [value(model, prompt.short) for prompt in prompts]
    np.testing.assert_allclose(effects.prompts["clean"], clean, atol=1e-4)
    np.testing.assert_allclose(effects.prompts["clean_short"], near, atol=1e-4)
    assert effects.prompts["exact"].all()
    table = effects.to_pandas()
    assert len(table) == 2 * 18
    best = table[table["task"] == NAMES[0]].nsmallest(1, "effect").iloc[0]
    assert (best["layer"], best["head"]) == TOP
    rows = effects.of(NAMES[0])[:, 1, 2].numpy()
    assert best["effect"] == pytest.approx(rows.mean())
    interval = stats.t.interval(0.95, 2, rows.mean(), stats.sem(rows))
    np.testing.assert_allclose([best["ci_low"], best["ci_high"]], interval)
    assert best["effect_short"] == pytest.approx(effects.of(NAMES[0], "short")[:, 1, 2].mean())
    gap = effects.of(NAMES[1], "long - short")
    np.testing.assert_allclose(gap, effects.long[3:] - effects.short[3:])
    assert effects.agreement.empty
    assert "18 heads, each by itself; 3 prompts of planted-retrieval, 2 prompts of" in repr(effects)
    assert "most harm from L1H2" in repr(effects)
    with pytest.raises(PosheadsError, match="expected one of planted-retrieval, planted-retr"):
        effects.of("passkey")
    with pytest.raises(PosheadsError, match="and one of long, short, long - short"):
        effects.of(NAMES[0], "near")


def test_norms_are_the_lengths_of_what_heads_write(model, effects):
    total = torch.zeros(3, 6)
    prompts = [prompt for task in TASKS for prompt in task.prompts(model)]
    with torch.no_grad():
        for prompt in prompts:
            _, cache = model.run_with_cache(prompt.tokens[None])
            for layer in range(3):
                z = cache[f"blocks.{layer}.attn.hook_z"][0]
                written = torch.einsum("phd,hdm->phm", z, model.blocks[layer].attn.W_O)
                total[layer] += written.norm(dim=-1).mean(0)
    torch.testing.assert_close(effects.norms, total / 5, atol=1e-4, rtol=1e-3)


def test_some_heads(model, effects):
    some = run(model, heads=[(2, 3), TOP], short=False)
    assert torch.isfinite(some.long).sum(0).nonzero().tolist() == [[1, 2], [2, 3]]
    for layer, head in [(2, 3), TOP]:
        alone, among = (x.long[:, layer, head] for x in (some, effects))
        np.testing.assert_allclose(alone, among, atol=1e-4)
    assert some.short.isnan().all()
    assert some.prompts["clean_short"].isna().all()
    assert len(some.to_pandas()) == 4


def test_layers_without_attention_have_no_effects():
    model = small_models.rotary_model("LFM2")
    tokens = torch.randint(3, 90, (20,), generator=torch.Generator().manual_seed(0))
    task = SimpleNamespace(name="end", prompts=lambda model: [Prompt(tokens, torch.tensor([19]))])
    found = run(model, [task])
    ablated = found.long[0].isfinite()
    assert ablated[1].all()
    assert not ablated[0].any()
    assert found.norms[0].isnan().all()
    assert (found.norms[1] > 0).all()
    assert len(found.to_pandas()) == int(ablated[1].sum())


def test_goes_on_where_it_was_stopped(model, effects, tmp_path, monkeypatch):
    asked, passes = [], Trial.run

    def counted(self, prompt, *args, **options):
        if len(asked) == 3:
            asked.clear()
            raise KeyboardInterrupt
        asked.append(len(prompt.tokens))
        return passes(self, prompt, *args, **options)

    monkeypatch.setattr(Trial, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        run(model, checkpoint=tmp_path / "kept")
    again = run(model, checkpoint=tmp_path / "kept")
    assert asked == [24, 32]  # tasks take turns: 32, 24, 32 were done
    assert torch.equal(again.long, effects.long)
    assert torch.equal(again.short, effects.short)
    assert again.prompts.equals(effects.prompts)
    asked.clear()
    assert torch.equal(run(model, checkpoint=tmp_path / "kept").long, effects.long)
    assert not asked
    for other in (dict(on="pattern"), dict(heads=[TOP]), dict(tasks=TASKS[:1])):
        with pytest.raises(PosheadsError, match="belongs to another run"):
            run(model, checkpoint=tmp_path / "kept", **other)


def test_saved_and_loaded(effects, tmp_path):
    folder = effects.save(tmp_path / "effects")
    back = HeadEffects.load(folder)
    assert torch.equal(back.long, effects.long)
    assert torch.equal(back.norms, effects.norms)
    assert back.to_pandas().equals(effects.to_pandas())
    assert back.provenance == effects.provenance
    assert back.provenance["tasks"][NAMES[0]]["class"] == "Retrieval"
    data = (folder / "prompts.parquet").read_bytes()
    (folder / "prompts.parquet").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(PosheadsError, match="damaged.*ablate the heads again"):
        HeadEffects.load(folder)


def test_the_picture_has_a_map_for_each_task(effects):
    figure = effects.plot()
    maps = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title(loc="left") or ax.get_title() for ax in maps] == NAMES
    shown = np.ma.filled(maps[0].images[0].get_array(), np.nan)
    np.testing.assert_allclose(shown, effects.of(NAMES[0]).mean(0))


def test_estimates_of_small_effects_are_the_effects(monkeypatch, tmp_path):
    """What heads do that write a hundredth is linear."""
    small = warm(planted.planted_retriever(n_layers=3, n_heads=6, planted=TOP))
    with torch.no_grad():
        for layer in small.original_model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
    exact = run(small)
    found = run(small, method="attribution", checkpoint=tmp_path / "kept")
    np.testing.assert_allclose(found.long, exact.long, atol=3e-3)
    largest = exact.long.abs() > 3e-3
    assert largest.any()
    np.testing.assert_allclose(found.long[largest], exact.long[largest], rtol=0.2)
    assert found.prompts.equals(exact.prompts)
    agreement = found.agreement.set_index("task")
    assert agreement.index.tolist() == NAMES
    for name in NAMES:
        guess, true = found.of(name).mean(0).flatten(), exact.of(name).mean(0).flatten()
        rho = stats.spearmanr(guess, true).statistic
        assert agreement.loc[name, "rank_correlation"] == pytest.approx(rho, abs=0.02)
        assert agreement.loc[name, "n_heads"] == 18
        assert agreement.loc[name, "slope"] == pytest.approx(1, abs=0.15)
    monkeypatch.setattr(module, "attributed_effects", lambda *args: pytest.fail("done before"))
    again = run(small, method="attribution", checkpoint=tmp_path / "kept")
    assert torch.equal(again.long, found.long)
    pd.testing.assert_frame_equal(again.agreement, found.agreement)


class Graded:
    name = "graded"

    def prompts(self, model):
        prompt = Prompt(torch.tensor([1, 30, 31]), torch.tensor([2]))
        return [prompt, prompt]

    def evaluate(self, model, prompt):
        return 7.0


def test_a_task_with_a_metric_of_its_own(model):
    found = run(model, [Graded()], heads=[TOP])
    assert found.provenance["tasks"]["graded"]["metric"]
    assert found.prompts["clean"].tolist() == [7, 7]
    assert found.of("graded")[:, TOP[0], TOP[1]].tolist() == [0, 0]
    assert found.short.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tasks=[]), "expected at least one of tl_posheads.tasks"),
        (dict(tasks=TASKS[0]), "expected at least one of tl_posheads.tasks"),
        (dict(tasks=["passkey"]), "expected at least one of tl_posheads.tasks"),
        (dict(tasks=[Passkey]), "expected at least one of tl_posheads.tasks"),
        (dict(tasks=[planted.Retrieval(n=0)]), "has no prompts; raise its n"),
        (dict(tasks=[planted.Retrieval(n=1, length=4000)]), "at most"),
        (dict(method="patching"), "expected 'ablation' or 'attribution'"),
        (dict(method="attribution", on="pattern"), "give method='ablation' for on='pattern'"),
        (dict(method="attribution", tasks=[Graded()]), "tasks with a metric of their own"),
        (dict(heads=[]), "expected at least one, or None for all"),
        (dict(heads=[(3, 0)]), "layers 0 to 2 with heads 0 to 5"),
        (dict(heads=[TOP, TOP]), "given twice"),
        (dict(mode="mean"), "without a reference"),
        (dict(mode="mean", per_position=True, reference=REFERENCE[:, :20]), "20 positions"),
        (dict(mode="resample", reference=REFERENCE, tasks=[Graded()]), "metric of its own"),
        (dict(on="scores"), "expected 'z' or 'pattern'"),
    ],
)
def test_bad_input_is_one_line_before_any_pass(model, tmp_path, change, message):
    ran = []
    with (
        model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: ran.append(1))]),
        pytest.raises(PosheadsError, match=message) as refusal,
    ):
        run(model, checkpoint=tmp_path / "kept", **change)
    assert not ran
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "kept").exists()


def test_other_objects_than_models_are_refused():
    with pytest.raises(PosheadsError):
        run(SimpleNamespace(cfg=None))

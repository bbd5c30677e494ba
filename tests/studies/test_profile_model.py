"""``profile_heads`` on models: planted truth, the lens's own detector, and a model left alone."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import planted, small_models
from tl_posheads import rotary_hook_points, score_heads
from tl_posheads.errors import PosheadsError
from tl_posheads.extrapolation import SelfExtend
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.studies.profile import (
    HeadProfile,
    ProfileSettings,
    long_context_share,
    profile_heads,
)
from tl_posheads.studies.profile.needles import greedy, most_attended, retrieval_scores
from tl_posheads.studies.profile.settings import columns_of
from tl_posheads.tasks.base import Prompt

pytestmark = pytest.mark.lens

CHEAP = ProfileSettings(local_window=8, n_sink=2, utility_steps=5, utility_queries=6)
NO_NEEDLES = dict(needles=0, settings=CHEAP, progress=False)


def tokens_for(n_docs=2, length=48, seed=0):
    return small_models.random_texts(n_docs, length, seed)


@pytest.fixture(scope="module")
def llama():
    return small_models.rotary_model("Llama")


@pytest.fixture(scope="module")
def profile(llama):
    return profile_heads(llama, tokens_for(), **NO_NEEDLES)


def written_by_the_planted_head(planted_head=(2, 5)):
    """One head copies the needle's token to the output; every other one looks at the BOS."""
    hf_model, _ = planted._blank(n_layers=4, n_heads=8, seed=0)
    embed, unembed = hf_model.model.embed_tokens.weight, hf_model.lm_head.weight
    n = planted.N_VALUES
    needle = slice(planted.NEEDLE, planted.NEEDLE + n)
    answer = slice(planted.ANSWER, planted.ANSWER + n)
    with torch.no_grad():
        unembed[needle] = unembed[answer]
        unembed[answer] = 0.0
        shared = embed.mean(0)
        for layer in hf_model.model.layers:
            for head in range(8):  # every query reads what all tokens share, every key the BOS
                row = head * planted._D_HEAD + planted._SLOWEST
                layer.self_attn.q_proj.weight[row] = 3 * shared
                layer.self_attn.k_proj.weight[row] = embed[planted.BOS] - shared
    planted._retrieve(hf_model, *planted_head, strength=1.0)
    return small_models.bridge(hf_model, "planted-copier")


def needle_prompts(n=6, length=60, seed=0):
    found = planted.Retrieval(n=n, length=length, seed=seed).prompts(None)
    shift = planted.ANSWER - planted.NEEDLE
    for prompt in found:
        prompt.tokens[-1] -= shift  # what is to be copied
    return found


def test_the_planted_head_retrieves_and_no_other_does():
    model = written_by_the_planted_head()
    prompts = needle_prompts()
    scores, facts = retrieval_scores(model, prompts)
    assert facts["n_answered"] == facts["n_prompts"] == 6
    assert scores[2, 5] == 1.0
    scores[2, 5] = 0.0
    assert (scores == 0).all()
    whole = profile_heads(
        model, tokens_for(1, 40), needles=prompts, measures=["retrieval"], progress=False
    )
    best = whole.to_pandas().sort_values("retrieval").iloc[-1]
    assert (best["layer"], best["head"], best["retrieval"]) == (2, 5, 1.0)
    assert whole.provenance["needles"]["n_answered"] == 6
    assert whole.provenance["missing"] == {}


def test_a_model_that_answers_nothing_has_no_retrieval_scores():
    model = planted.planted_retriever(n_layers=4, n_heads=8, planted=(2, 5))  # writes ANSWER tokens
    found = profile_heads(
        model, tokens_for(1, 40), needles=needle_prompts(), measures=["retrieval"], progress=False
    )
    assert found.to_pandas()["retrieval"].isna().all()
    assert found.provenance["needles"]["n_answered"] == 0
    assert "answered none of 6 needles" in found.provenance["missing"]["retrieval"]
    far = [Prompt(p.tokens, p.targets) for p in needle_prompts(2)]
    for prompt in far:
        prompt.tokens[1:-2] = planted.FILLER  # the answer stands nowhere
    _, facts = retrieval_scores(model, far)
    assert facts["n_without_copy"] == 2


def test_greedy_writes_what_full_passes_choose(llama):
    text = tokens_for(1, 30)[0]
    written = greedy(llama, text, 6)
    seen = text
    for token in written:
        with torch.no_grad():
            best = llama(seen[None], return_type="logits")[0, -1].argmax()
        assert int(best) == int(token)
        seen = torch.cat([seen, token[None]])
    assert len(written) == 6 or int(llama(seen[None], return_type="logits")[0, -1].argmax()) == 2


def test_most_attended_is_the_cache_s_argmax(llama):
    text = tokens_for(1, 30)[0]
    looks = most_attended(llama, text, slice(20, 30))
    with torch.no_grad():
        _, cache = llama.run_with_cache(text[None])
    for layer in range(2):
        expected = cache["pattern", layer][0, :, 20:].argmax(-1)
        assert torch.equal(looks[layer], expected)


def test_induction_and_previous_token_are_detect_head_s(llama):
    from transformer_lens.head_detector import detect_head

    texts = [" ".join(f"w{t}" for t in row[1:]) for row in tokens_for(2, 40).tolist()]
    tokens = torch.cat([llama.to_tokens(text) for text in texts])
    found = profile_heads(
        llama, tokens, measures=["induction", "previous_token"], **NO_NEEDLES
    ).to_pandas()
    for name in ("induction", "previous_token"):
        expected = torch.stack([detect_head(llama, text, f"{name}_head") for text in texts]).mean(0)
        assert found[name].to_numpy() == pytest.approx(expected.flatten().numpy(), abs=1e-5)
        assert found[name].max() > 0


def test_every_measure_is_what_the_caches_say(llama, profile):
    """Means over the texts, of the functions that are tested by themselves, from run_with_cache."""
    table = profile.to_pandas()
    tokens = tokens_for()
    with rotary_hook_points(llama):
        geometry = RotaryGeometry.from_model(llama, length=48)
        with torch.no_grad():
            _, cache = llama.run_with_cache(tokens)
    scores = score_heads(llama, tokens, progress=False)
    for row in table.to_dict("records"):
        layer, head = int(row["layer"]), int(row["head"])
        g = geometry[layer]
        pattern = cache["pattern", layer][:, head].double().numpy()
        sink = np.mean([pattern[d][:, 0].mean() for d in range(2)])
        at = np.arange(48)
        far = np.mean([(p * (at[:, None] - at)).sum() / 48 for p in pattern])
        assert row["sink"] == pytest.approx(sink, abs=1e-6)
        assert row["distance"] == pytest.approx(far, abs=1e-4)
        assert row["positional"] == float(scores.rho[layer, head])
        q = cache[f"blocks.{layer}.attn.hook_rot_q"]
        k = cache[f"blocks.{layer}.attn.hook_rot_k"]
        shares = [
            long_context_share(
                q[d, :, head] @ k[d, :, g.kv_head[head]].T * g.attention_scale, window=8, n_sink=2
            )
            for d in range(2)
        ]
        expected = np.mean(shares, axis=0)
        assert (row["long_context"], row["long_context_oracle"]) == pytest.approx(tuple(expected))
        raw = cache[f"blocks.{layer}.attn.hook_k"].reshape(2, 48, 2, 8)[:, :, g.kv_head[head]]
        slow = torch.cat([g.wavelengths > 48] * 2)
        norms = [x.double().square().sum(0).sqrt() for x in raw]
        share = np.mean([float(n[slow].sum() / n.sum()) for n in norms])
        assert row["slow_norm_k"] == pytest.approx(share, abs=1e-5)
        massive = np.mean([float((n > 5 * n.mean()).double().mean()) for n in norms])
        assert row["massive_k"] == pytest.approx(massive)
        assert 0 < row["dimensions_used"] <= 1
        assert 0 <= row["slow_utility"] <= 1


def test_provenance_and_the_table_s_shape(profile):
    assert list(profile.to_pandas().columns[:3]) == ["layer", "head", "positional"]
    assert len(profile.to_pandas()) == 8
    facts = profile.provenance
    assert facts["missing"] == {"retrieval": "no needles were asked for"}
    assert facts["scores"]["same_texts"] is True
    assert facts["settings"]["local_window"] == 8
    assert facts["tokens_sha256"]
    assert 0 <= facts["utility_lost"] < 1


def test_same_call_same_numbers_whatever_the_order(llama, profile):
    again = profile_heads(llama, tokens_for().flip(0), **NO_NEEDLES)
    pd.testing.assert_frame_equal(again.to_pandas(), profile.to_pandas())
    assert again.provenance == profile.provenance


def test_given_scores_are_used_and_other_texts_are_told(llama):
    scores = score_heads(llama, tokens_for(seed=5), progress=False)
    found = profile_heads(llama, tokens_for(), scores=scores, measures=["sink"], **NO_NEEDLES)
    assert found.to_pandas()["positional"].tolist() == scores.rho.flatten().tolist()
    assert found.provenance["scores"]["same_texts"] is False
    assert found.columns == ["positional", "sink"]


def test_scale_is_that_of_the_scores(llama):
    scores = score_heads(llama, tokens_for(), scale="attention", progress=False)
    options = dict(measures=["sink"], **NO_NEEDLES)
    found = profile_heads(llama, tokens_for(), scale="attention", **options)
    assert found.to_pandas()["positional"].tolist() == scores.rho.flatten().tolist()
    plain = profile_heads(llama, tokens_for(), **options)
    assert (found.to_pandas()["positional"] != plain.to_pandas()["positional"]).any()
    assert found.provenance["scores"]["scale"] == "attention"
    given = profile_heads(llama, tokens_for(), scores=scores, **options)
    pd.testing.assert_frame_equal(given.to_pandas(), found.to_pandas())
    assert given.provenance["scores"]["scale"] == "attention"


def _state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_model_is_left_as_it_was_even_when_a_measure_fails(llama, monkeypatch):
    from tl_posheads.studies.profile import measure

    before, hooks = _state(llama), [len(p.fwd_hooks) for p in llama.hook_dict.values()]
    extra = set(llama.__dict__)
    profile_heads(llama, tokens_for(), needles=needle_prompts(2), settings=CHEAP, progress=False)

    def fail(*args, **kwargs):
        raise RuntimeError("stop")

    monkeypatch.setattr(measure, "dimension_utility", fail)
    with pytest.raises(RuntimeError, match="stop"):
        profile_heads(llama, tokens_for(), **NO_NEEDLES)
    assert [len(p.fwd_hooks) for p in llama.hook_dict.values()] == hooks
    assert set(llama.__dict__) == extra
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())
    assert all(p.grad is None for p in llama.parameters())


@pytest.mark.parametrize(
    "name", ["Mistral, sliding window", "Gemma 2", "GPT-NeoX, Pythia", "Falcon", "GPT-J", "Phi"]
)
def test_other_architectures(name):
    """Windows, softcaps, joint projections, partial rotary, one key head: nothing is missing."""
    model = small_models.rotary_model(name)
    found = profile_heads(model, tokens_for(1, 40), **NO_NEEDLES)
    assert set(found.provenance["missing"]) == {"retrieval"}, found.provenance["missing"]
    known = found.to_pandas().drop(columns="retrieval")
    assert known.notna().all().all()


def test_what_isn_t_made_of_the_rotated_queries_alone_is_unknown():
    """DeepSeek's scores have a part without position."""
    model = small_models.rotary_model("DeepSeek-V2")
    found = profile_heads(model, tokens_for(1, 40), **NO_NEEDLES)
    missing = found.provenance["missing"]
    for column in columns_of(["long_context", "utility"]):
        assert "not softmax of the rotated q . k" in missing[column]
        assert found.to_pandas()[column].isna().any()
    assert found.to_pandas()["sink"].notna().all()


def test_inside_a_method_that_moves_positions(llama):
    with SelfExtend(group=4, window=8)(llama):
        found = profile_heads(llama, tokens_for(1, 40), **NO_NEEDLES)
    assert "not softmax" in found.provenance["missing"]["long_context"]
    assert found.provenance["inside"]


def test_short_texts_and_missing_tokenizers_are_told(llama, monkeypatch):
    found = profile_heads(
        llama, tokens_for(1, 20), needles=0, measures=["long_context"], progress=False
    )
    assert found.to_pandas()["long_context"].isna().all()
    assert "too little outside a window of 16" in found.provenance["missing"]["long_context"]
    monkeypatch.setattr(llama, "tokenizer", None)
    found = profile_heads(llama, tokens_for(1, 20), measures=["retrieval"], progress=False)
    why = found.provenance["missing"]["retrieval"]
    assert why.startswith("the default needles don't fit: the model has no tokenizer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(measures=["sinks"]), "expected a list of some of"),
        (dict(needles=-1), "needles=-1 was given"),
        (dict(scale="both"), "scale='both' was given"),
        (
            dict(scores=planted.scores_with_top(planted.planted_retriever(3, 4, (1, 1)), [(1, 1)])),
            "give this model's scores",
        ),
    ],
)
def test_refusals_come_before_any_pass(llama, monkeypatch, options, message):
    def forbidden(*args, **kwargs):
        raise AssertionError("a pass was run")

    monkeypatch.setattr(type(llama), "forward", forbidden)
    with pytest.raises(PosheadsError, match=message):
        profile_heads(llama, tokens_for(), progress=False, **options)


def test_models_without_rope_are_refused_by_name():
    with pytest.raises(PosheadsError, match="learned absolute positions"):
        profile_heads(small_models.other_model("GPT-2"), tokens_for())


def test_both_classes_agree_on_smollm2(smollm2, smollm2_bridge):
    """SmolLM2's own text: the same numbers as from the Bridge."""
    tokens = smollm2_bridge.to_tokens("The cat sat on the mat. " * 8)
    scores = planted.scores_with_top(smollm2_bridge, [(1, 1)])
    options = dict(
        scores=scores,
        settings=ProfileSettings(local_window=8),
        needles=0,
        measures=["induction", "sink", "distance", "long_context", "massive"],
        progress=False,
    )
    here, there = (profile_heads(m, tokens, **options) for m in (smollm2, smollm2_bridge))
    for name in here.columns:
        a, b = here.to_pandas()[name].to_numpy(), there.to_pandas()[name].to_numpy()
        assert np.nanmax(abs(a - b)) < 0.02 * max(1.0, np.nanmax(abs(a))), name
    assert isinstance(here, HeadProfile)
    assert not math.isnan(here.correlation().loc["sink", "distance"])

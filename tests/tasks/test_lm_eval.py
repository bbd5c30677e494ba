"""lm-eval on a lens model, against plain transformers and lm-eval's own class, offline."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-eval is missing: pip install 'tl-posheads[evals]'"
)

from lm_eval.tasks import TaskManager  # noqa: E402

from helpers.lens import CLASSES  # noqa: E402
from helpers.lm_eval_tasks import FACTS, PASSAGE, write  # noqa: E402
from helpers.plain_lm import (  # noqa: E402
    instances,
    middle_cut,
    plain_greedy,
    plain_ids,
    plain_logprob,
)
from tl_posheads import PosheadsError  # noqa: E402
from tl_posheads.interventions import ablation  # noqa: E402
from tl_posheads.io import models  # noqa: E402
from tl_posheads.tasks.lens_lm import _cut  # noqa: E402
from tl_posheads.tasks.lm_eval import LensLM, evaluate  # noqa: E402

pytestmark = pytest.mark.lens


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def folder(small_folder) -> Path:
    return small_folder("Llama", tie_word_embeddings=False)


@pytest.fixture(scope="module", params=CLASSES)
def model(request, folder):
    return models.load_model(folder, cls=request.param, device="cpu")


@pytest.fixture(scope="module")
def plain(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


PAIRS = [
    (PASSAGE, " Ann has"),
    ("The sky is", " blue"),
    ("The sky is", " green today"),
    ("The sky is ", "blue"),
    ("", "Nothing came before"),
    ("A grass is", " blue"),
]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_loglikelihoods_are_those_of_plain_transformers(model, plain, tokenizer, batch_size):
    lm = LensLM(model, batch_size=batch_size)
    got = lm.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(PAIRS, got):
        if context:
            # The checkpoint's own tokens: no BOS, though the lens's tokenizer would put one.
            ids = tokenizer(context + continuation)["input_ids"]
            start = len(tokenizer(context.rstrip())["input_ids"])
        else:
            ids, start = [tokenizer.bos_token_id, *tokenizer(continuation)["input_ids"]], 1
        expected = plain_logprob(plain, ids[:start], ids[start:])
        assert logprob == pytest.approx(expected[0], abs=1e-3)
        assert greedy == expected[1]
    best = plain_greedy(plain, tokenizer, tokenizer("The sky is")["input_ids"], 2)
    (again,) = lm.loglikelihood(instances("loglikelihood", ("The sky is", best)), disable_tqdm=True)
    assert again[1] is True
    assert lm.loglikelihood([], disable_tqdm=True) == []


def test_a_long_context_loses_its_middle(model, plain, tokenizer):
    ids = tokenizer(PASSAGE)["input_ids"]
    wanted = tokenizer(PASSAGE + " Ann has")["input_ids"][len(ids) :]
    for length in (20, 21):
        lm = LensLM(model, max_length=length)
        (got,) = lm.loglikelihood(
            instances("loglikelihood", (PASSAGE, " Ann has")), disable_tqdm=True
        )
        # The last token is wanted, not seen: the context and all others fill the length.
        kept = middle_cut(ids, length + 1 - len(wanted))
        assert got[0] == pytest.approx(plain_logprob(plain, kept, wanted)[0], abs=1e-3)
        text = plain_greedy(plain, tokenizer, middle_cut(ids + wanted, length - 4), 4)
        request = (PASSAGE + " Ann has", {"max_gen_toks": 4, "until": [], "do_sample": False})
        assert lm.generate_until(instances("generate_until", request), disable_tqdm=True) == [text]
    lm = LensLM(model, max_length=20)
    with pytest.raises(PosheadsError, match="continuation of .* context holds 20"):
        lm.loglikelihood(instances("loglikelihood", ("It is", PASSAGE)), disable_tqdm=True)
    with pytest.raises(PosheadsError, match="256 new tokens.*context holds 20"):
        lm.generate_until(instances("generate_until", ("It is", {})), disable_tqdm=True)


def test_rolling_windows_cover_every_token_once(model, plain, tokenizer):
    lm = LensLM(model, max_length=16)
    texts = [PASSAGE, "Short."]
    got = lm.loglikelihood_rolling(
        instances("loglikelihood_rolling", *[(text,) for text in texts]), disable_tqdm=True
    )
    for text, logprob in zip(texts, got):
        ids = tokenizer(text)["input_ids"]
        total = plain_logprob(plain, [tokenizer.bos_token_id], ids[:16])[0]
        for first in range(16, len(ids), 16):
            wanted = ids[first : first + 16]
            # A short last window is filled up with context from before it.
            start = first + len(wanted) - 17
            total += plain_logprob(plain, ids[start:first], wanted)[0]
        assert logprob == pytest.approx(total, abs=2e-3)


def test_greedy_texts_are_those_of_plain_transformers(model, plain, tokenizer):
    prompts = ["The sky is", PASSAGE, "A grass is", "Eve"]
    wanted = {"max_gen_toks": 8, "do_sample": False, "temperature": 1, "until": []}
    requests = instances("generate_until", *[(text, dict(wanted)) for text in prompts])
    expected = [plain_greedy(plain, tokenizer, tokenizer(x)["input_ids"], 8) for x in prompts]
    for batch_size in (1, 3):
        lm = LensLM(model, batch_size=batch_size)
        assert lm.generate_until(requests, disable_tqdm=True) == expected
    # Stop strings that greedy decoding is bound to meet, and one in the prompt alone.
    stop = expected[0].strip()[1:4]
    assert stop
    (cut,) = LensLM(model).generate_until(
        instances("generate_until", (prompts[0], {**wanted, "until": [stop, "sky"]})),
        disable_tqdm=True,
    )
    assert cut == expected[0][: expected[0].index(stop)]
    (short,) = LensLM(model, max_gen_toks=2).generate_until(
        instances("generate_until", (prompts[0], {"until": stop * 9})), disable_tqdm=True
    )
    assert short == plain_greedy(plain, tokenizer, tokenizer(prompts[0])["input_ids"], 2)


def test_generation_stops_early_at_strings(model):
    if "stopping_criteria" not in inspect.signature(model.generate).parameters:
        pytest.skip("HookedTransformer's generate doesn't stop at strings; the text is cut after")
    lm, passes = LensLM(model), []
    wanted = {"max_gen_toks": 30, "do_sample": False, "until": []}

    def written(options):
        passes.clear()
        return lm.generate_until(instances("generate_until", ("Eve", options)), disable_tqdm=True)[
            0
        ]

    written(wanted)  # the first time, a few passes find out whether the cache is read
    handle = model.unembed.register_forward_pre_hook(lambda module, args: passes.append(1))
    try:
        text = written(wanted)
        assert len(passes) == 30
        assert text.startswith(written({**wanted, "until": [text.strip()[3:6]]}))
        assert 0 < len(passes) < 10
        # The prompt's own text stops nothing.
        assert written({**wanted, "until": ["Eve"]}) == text.split("Eve")[0]
    finally:
        handle.remove()


def test_texts_end_at_eos(model, plain, tokenizer):
    prompts = ["The sky is", "Two dogs have"]
    contexts = [tokenizer(text)["input_ids"] for text in prompts]
    assert len(contexts[0]) == len(contexts[1])
    ids = [plain_ids(plain, context, 8) for context in contexts]
    # What the first text says third now ends texts; it goes on no longer than that.
    end = ids[0][2]
    assert end not in ids[0][:2]
    other = copy.deepcopy(tokenizer)
    other.eos_token = tokenizer.convert_ids_to_tokens(end)
    lm = LensLM(model, batch_size=2, tokenizer=other)
    requests = instances("generate_until", *[(x, {"max_gen_toks": 8}) for x in prompts])
    rest = ids[1][: ids[1].index(end)] if end in ids[1] else ids[1]
    assert lm.generate_until(requests, disable_tqdm=True) == [
        tokenizer.decode(x, skip_special_tokens=True) for x in (ids[0][:2], rest)
    ]


def test_sampling_follows_the_seed_and_unknown_options_are_refused(model):
    lm = LensLM(model)
    wanted = {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0, "top_k": 50, "until": []}
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts += lm.generate_until(instances("generate_until", ("Eve", wanted)), disable_tqdm=True)
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(PosheadsError, match="generates with num_beams"):
        lm.generate_until(instances("generate_until", ("Eve", {"num_beams": 4})), disable_tqdm=True)


def test_lm_evals_own_class_agrees(model, folder):
    pytest.importorskip("accelerate", reason="lm-eval's own class needs accelerate")
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=1, dtype="float32")
    ours = LensLM(model)
    assert (ours.max_length, ours.eot_token_id, ours.prefix_token_id) == (
        theirs.max_length,
        theirs.eot_token_id,
        theirs.prefix_token_id,
    )
    assert ours.tok_encode("Ann has") == theirs.tok_encode("Ann has")
    assert ours.tok_encode("<|im_start|>Ann") == theirs.tok_encode("<|im_start|>Ann")
    pairs = instances("loglikelihood", *PAIRS)
    for a, b in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs)):
        assert a == (pytest.approx(b[0], abs=1e-3), b[1])
    rolling = instances("loglikelihood_rolling", (PASSAGE * 5,))
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling), abs=1e-2
    )
    wanted = {"max_gen_toks": 8, "do_sample": False, "until": ["\n"]}
    texts = instances("generate_until", *[(text, dict(wanted)) for text in (PASSAGE, "Eve has")])
    assert ours.generate_until(texts) == theirs.generate_until(texts)
    history = [{"role": "user", "content": "Who has dogs?"}]
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tokenizer_name == theirs.tokenizer_name


def test_tasks_are_run_and_tabled(model, plain, tokenizer, tasks):
    names = ["tiny_choice", "tiny_qa"]
    table = evaluate(model, names, include_path=tasks)
    assert table.columns.tolist() == ["task", "metric", "filter", "value", "stderr", "n"]
    assert table["task"].tolist() == names
    assert table["n"].tolist() == [6, 6]
    table = table.set_index("metric")
    right = []
    for i, (name, _) in enumerate(FACTS):
        context = tokenizer(f"{PASSAGE} {name} has")["input_ids"]
        choices = [FACTS[(i + shift - i % 4) % 6][1] for shift in range(4)]
        scores = [
            plain_logprob(plain, context, tokenizer(f" {choice}")["input_ids"])[0]
            for choice in choices
        ]
        right.append(float(np.argmax(scores) == i % 4))
    assert table.loc["acc", "value"] == pytest.approx(np.mean(right))
    assert table.loc["acc", "stderr"] == pytest.approx(np.std(right, ddof=1) / 6**0.5)
    assert table.loc["qa_f1_score", "filter"] == "none"
    limited = evaluate(LensLM(model), "tiny_qa", include_path=str(tasks), limit=2, num_fewshot=1)
    assert limited["n"].tolist() == [2]


def test_hooks_in_force_are_seen_and_gone_afterwards(model, tasks):
    lm = LensLM(model, batch_size=4)
    scored = instances("loglikelihood", ("The sky is", " blue"))
    wanted = {"max_gen_toks": 6, "until": []}
    written = instances("generate_until", *[(text, wanted) for text in ("The sky is", PASSAGE)])

    def run():
        (got,) = lm.loglikelihood(scored, disable_tqdm=True)
        return [got[0]], lm.generate_until(written, disable_tqdm=True)

    plain, heads = run(), [(1, head) for head in range(model.cfg.n_heads)]
    table = evaluate(lm, ["tiny_qa"], include_path=tasks)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * 0)]):
        zeroed = run()
    with ablation.ablate(model, heads):
        ablated = run()
        changed = evaluate(lm, ["tiny_qa"], include_path=tasks)
    assert abs(plain[0][0] - zeroed[0][0]) > 1e-3
    assert plain[1] != zeroed[1]
    assert ablated == (pytest.approx(zeroed[0], abs=1e-4), zeroed[1])
    assert table["value"].item() != changed["value"].item()
    # Weights, too, that a pattern hook takes away: fused attention would pass it by.
    with ablation.ablate(model, heads, on="pattern"):
        assert run() == (pytest.approx(zeroed[0], abs=1e-4), zeroed[1])
    assert run() == plain


def test_what_cannot_work_is_refused(model, plain, tasks):
    for wrong in (
        dict(batch_size=0),
        dict(batch_size="auto"),
        dict(max_gen_toks=0),
        dict(max_length=0),
        dict(max_length=10**6),
    ):
        with pytest.raises(PosheadsError, match=next(iter(wrong))):
            LensLM(model, **wrong)
    with pytest.raises(PosheadsError, match="LlamaForCausalLM was given"):
        LensLM(plain)
    with pytest.raises(PosheadsError, match="use_cache"):
        evaluate(model, ["tiny_qa"], include_path=tasks, use_cache="answers")
    kept, model.tokenizer = model.tokenizer, None
    try:
        with pytest.raises(PosheadsError, match="no tokenizer"):
            LensLM(model)
    finally:
        model.tokenizer = kept


def test_the_names_in_the_docstring_are_tasks_of_lm_eval():
    import re

    from tl_posheads.tasks import lm_eval as evals

    home = Path(lm_eval.__file__).parent / "tasks"
    known = TaskManager(
        include_path=[str(home / "longbench"), str(home / "ruler")], include_defaults=False
    ).all_tasks
    named = re.findall(r"``([a-z_0-9]+)``", evals.__doc__)
    assert {"longbench_qasper", "niah_single_1", "ruler"} <= set(named)
    assert set(named) <= set(known)


def test_stop_strings_cut_at_the_first():
    assert _cut("a b c b", ["c", "b"]) == "a "
    assert _cut("abc", []) == "abc"


def test_without_lm_eval_the_message_says_what_to_install():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from tl_posheads.tasks import lm_eval as evals\n"
        "for call in (lambda: evals.LensLM(None), lambda: evals.evaluate(None, ['x'])):\n"
        "    try: call()\n"
        "    except evals.PosheadsError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'tl-posheads[evals]'") == 2

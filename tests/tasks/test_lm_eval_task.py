"""A task of lm-eval as a task of ours, against lm-eval's own class and plain transformers."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-eval is missing: pip install 'tl-posheads[evals]'"
)

from helpers.lens import CLASSES  # noqa: E402
from helpers.lm_eval_tasks import (  # noqa: E402
    FACTS,
    PASSAGE,
    longbench_text,
    write,
    write_longbench,
)
from helpers.plain_lm import (  # noqa: E402
    instances,
    middle_cut,
    plain_greedy,
    plain_logprob,
)
from tl_posheads import PosheadsError  # noqa: E402
from tl_posheads.hooks.logprobs import target_logprobs  # noqa: E402
from tl_posheads.interventions import ablation  # noqa: E402
from tl_posheads.io import models  # noqa: E402
from tl_posheads.tasks import Evaluated, LMEval, Prompt, Task  # noqa: E402
from tl_posheads.tasks.lm_eval import evaluate  # noqa: E402

pytestmark = pytest.mark.lens

# Of different lengths; the second begins with what the first ends with.
ARTICLES = [PASSAGE, PASSAGE + " " + PASSAGE, "No one has anything.", PASSAGE[20:]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def checkpoint(small_folder) -> Path:
    return small_folder("Llama", tie_word_embeddings=False)


@pytest.fixture(scope="module", params=CLASSES)
def lens(request, checkpoint):
    return models.load_model(checkpoint, cls=request.param, device="cpu")


@pytest.fixture(scope="module")
def hf(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def rows(hf, tokenizer):
    """Answers some of which share words with what the model writes, so that scores differ."""
    out = []
    for i, article in enumerate(ARTICLES):
        question = f"What does {FACTS[i][0]} have?"
        ids = tokenizer(longbench_text(article, question))["input_ids"]
        words = plain_greedy(hf, tokenizer, ids, 8).split()
        out.append((article, question, [FACTS[i][1], " ".join(["never", *words[: 2 * i]])]))
    return out


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, rows) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write(folder)
    write_longbench(folder, rows)
    return folder


@pytest.fixture
def edited(tasks, tmp_path):
    """Writes a task's file again with pieces of it replaced, under the name ``edited``."""

    def write_edited(name: str, **pieces: str) -> Path:
        text = (tasks / f"{name}.yaml").read_text().replace(f"task: {name}", "task: edited")
        for module in tasks.glob("*.py"):
            (tmp_path / module.name).write_text(module.read_text())
        for key, value in pieces.items():
            # A list goes on in the indented lines below its key.
            text = re.sub(rf"^{key}:.*\n(?:  .*\n)*", "", text + "\n", flags=re.MULTILINE)
            text += f"{key}: {value}\n" if value else ""
        (tmp_path / "edited.yaml").write_text(text)
        return tmp_path

    return write_edited


def f1_by_hand(said: str, answers: list[str]) -> float:
    best = 0.0
    for answer in answers:
        left, same = answer.lower().split(), 0
        for word in said.lower().split():
            if word in left:
                left.remove(word)
                same += 1
        best = max(best, 2 * same / (len(said.split()) + len(answer.split())))
    return best


def test_answers_and_scores_are_those_of_lm_evals_own_class(lens, checkpoint, tasks, rows):
    pytest.importorskip("accelerate", reason="lm-eval's own class needs accelerate")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(pretrained=str(checkpoint), device="cpu", batch_size=1, dtype="float32")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        theirs, tasks=["tiny_longbench", "tiny_choice"], task_manager=manager, log_samples=True
    )
    samples = sorted(found["samples"]["tiny_longbench"], key=lambda sample: sample["doc_id"])
    task = LMEval("tiny_longbench", value="metric", include_path=tasks)
    prompts = task.prompts(lens)
    scores = [task.evaluate(lens, prompt) for prompt in prompts]
    assert scores == pytest.approx([sample["score"] for sample in samples])
    assert len(set(scores)) > 2
    said = [prompt.requests[0].resps[0] for prompt in prompts]
    assert said == [sample["resps"][0][0] for sample in samples]
    assert scores == pytest.approx([f1_by_hand(s, r[2]) for s, r in zip(said, rows)])

    choices = sorted(found["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
    task = LMEval("tiny_choice", value="metric", include_path=tasks)
    got = [task.evaluate(lens, prompt) for prompt in task.prompts(lens)]
    assert got == [sample["acc"] for sample in choices]

    prompts = LMEval("tiny_longbench", include_path=tasks).prompts(lens)
    prompts += LMEval("tiny_choice", include_path=tasks).prompts(lens)
    requests = [
        (longbench_text(context, question), " " + answers[0]) for context, question, answers in rows
    ]
    requests += [sample["arguments"][sample["doc"]["gold"]] for sample in choices]
    expected = theirs.loglikelihood(instances("loglikelihood", *requests), disable_tqdm=True)
    for prompt, (logprob, greedy) in zip(prompts, expected, strict=True):
        ours, hit = target_logprobs(lens, prompt.tokens, prompt.targets)
        assert float(ours.sum()) == pytest.approx(logprob, abs=1e-3)
        assert bool(hit.all()) == greedy


@pytest.mark.parametrize("value", ["loglikelihood", "metric"])
def test_long_documents_lose_their_middle(lens, hf, tokenizer, tasks, rows, value):
    for length in (70, 71):
        task = LMEval("tiny_longbench", value=value, include_path=tasks, max_length=length)
        for i, (prompt, row) in enumerate(zip(task.prompts(lens), rows, strict=True)):
            text = longbench_text(*row[:2])
            context = tokenizer(text)["input_ids"]
            answer = tokenizer(f"{text} {row[2][0]}")["input_ids"][len(context) :]
            assert len(answer) < 8
            # Room stays for 8 tokens, all that the task lets the model write.
            kept = middle_cut(context, length - 8)
            assert prompt.tokens.tolist() == kept + answer
            assert prompt.targets.tolist() == list(range(len(kept), len(kept) + len(answer)))
            assert prompt.facts == {
                "document": i,
                "length": len(kept) + len(answer),
                "cut": len(context) - len(kept),
            }
            if length == 70 and len(context) > 62:  # as LongBench's pred.py has it
                assert kept == context[: int(62 / 2)] + context[-int(62 / 2) :]
            if value == "metric":
                said = plain_greedy(hf, tokenizer, kept, 8)
                assert task.evaluate(lens, prompt) == pytest.approx(f1_by_hand(said, row[2]))
        assert {prompt.facts["cut"] > 0 for prompt in task.prompts(lens)} == {True, False}


def test_long_answers_take_room_or_are_cut(lens, tokenizer, edited, rows):
    pieces = {"generation_kwargs": "{max_gen_toks: 3, until: []}"}
    folder = edited("tiny_longbench", **pieces, doc_to_target='"one two three four five six"')
    text = longbench_text(*rows[0][:2])
    context = tokenizer(text)["input_ids"]
    answer = tokenizer(text + " one two three four five six")["input_ids"][len(context) :]
    for value, wanted, room in (
        ("loglikelihood", answer, 60 - len(answer)),
        ("metric", answer[:3], 57),
    ):
        task = LMEval("edited", limit=1, value=value, include_path=folder, max_length=60)
        (prompt,) = task.prompts(lens)
        assert prompt.tokens.tolist() == middle_cut(context, room) + wanted


def test_documents_are_paired_over_ablations(lens, tasks):
    heads = [(1, head) for head in range(lens.cfg.n_heads)]
    for value in ("loglikelihood", "metric"):
        task = LMEval("tiny_longbench", limit=3, value=value, include_path=tasks)
        prompts, again = task.prompts(lens), task.prompts(lens)
        assert [p.tokens.tolist() for p in prompts] == [p.tokens.tolist() for p in again]
        assert [p.facts["document"] for p in prompts] == [0, 1, 2]
        assert all(prompt.short is None for prompt in prompts)
    table = evaluate(lens, "tiny_longbench", include_path=tasks, limit=3).set_index("metric")
    with ablation.ablate(lens, heads):
        ablated = [task.evaluate(lens, prompt) for prompt in prompts]
        said = [prompt.requests[0].resps[0] for prompt in prompts]
    clean = [task.evaluate(lens, prompt) for prompt in prompts]
    assert sum(clean) / 3 == pytest.approx(table.loc["score", "value"])
    assert clean != ablated
    with lens.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * 0)]):
        again = [task.evaluate(lens, prompt) for prompt in prompts]
    assert again == ablated
    assert [prompt.requests[0].resps[0] for prompt in prompts] == said


def test_only_a_task_with_a_metric_is_evaluated(lens, tasks):
    forced = LMEval("tiny_choice", include_path=tasks)
    metric = LMEval("tiny_choice", value="metric", include_path=str(tasks), limit=2)
    assert isinstance(forced, Task)
    assert not isinstance(forced, Evaluated)
    assert isinstance(metric, Evaluated)
    assert forced.rungs() == metric.rungs() == ()
    (first, _) = metric.prompts(lens)
    for same in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert (same, hash(same)) == (metric, hash(metric))
        assert same.evaluate.__self__ is same
        assert same.evaluate(lens, first) == metric.evaluate(lens, first)
    with pytest.raises(PosheadsError, match="a Prompt was given; .* prompts\\(model\\)"):
        metric.evaluate(lens, Prompt(first.tokens, first.targets))


def test_sampling_follows_seed_and_document(lens, edited):
    folder = edited(
        "tiny_longbench",
        generation_kwargs="{max_gen_toks: 8, do_sample: true, temperature: 2.0, until: []}",
    )

    def written(seed):
        task = LMEval("edited", limit=2, value="metric", include_path=folder, seed=seed)
        prompts = task.prompts(lens)
        for prompt in reversed(prompts):
            task.evaluate(lens, prompt)
        return [prompt.requests[0].resps[0] for prompt in prompts]

    state = torch.random.get_rng_state()
    first = written(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)
    assert written(0) == first != written(1)


def test_other_kinds_of_lm_evals_tasks(lens, hf, tokenizer, edited):
    """A plain log-likelihood, choices by their text, and contexts that differ."""

    def summed(folder):
        prompts = LMEval("edited", limit=2, include_path=folder).prompts(lens)
        return [float(target_logprobs(lens, p.tokens, p.targets)[0].sum()) for p in prompts]

    def by_hand(before, after):
        ids = tokenizer(before)["input_ids"]
        return plain_logprob(hf, ids, tokenizer(before + after)["input_ids"][len(ids) :])[0]

    name, thing = FACTS[0]
    folder = edited(
        "tiny_choice",
        output_type="loglikelihood",
        doc_to_choice="",
        doc_to_target='" {{answers[0]}}"',
    )
    assert summed(folder)[0] == pytest.approx(
        by_hand(f"{PASSAGE} {name} has", f" {thing}"), abs=1e-3
    )
    assert len(LMEval("edited", value="metric", include_path=folder).prompts(lens)) == 6
    folder = edited("tiny_choice", doc_to_target='"{{answers[0]}}"')
    assert summed(folder)[0] == pytest.approx(
        by_hand(f"{PASSAGE} {name} has", f" {thing}"), abs=1e-3
    )
    folder = edited("tiny_choice", doc_to_text="gold", doc_to_target="name")
    chosen = FACTS[1][1]  # the second document's right choice is its second
    assert summed(folder)[1] == pytest.approx(by_hand(chosen, f" {FACTS[1][0]}"), abs=1e-3)


def test_rulers_metric_is_the_one_of_the_documents_length(lens, edited):
    lengths = "{metric: '4096', aggregation: mean}, {metric: '200', aggregation: mean}"
    folder = edited(
        "tiny_longbench",
        custom_dataset="!function of_a_length.make",
        dataset_kwargs="{}",
        process_results="!function of_a_length.score",
        metric_list=f"[{lengths}]",
        doc_to_text="input",
        doc_to_target="input",
    )
    (folder / "of_a_length.py").write_text(
        "import datasets\n"
        "def make(**metadata):\n"
        "    (n,) = metadata['max_seq_lengths']\n"
        "    rows = [{'input': 'word ' * 9, 'max_length': n}]\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n"
        "def score(doc, results):\n"
        "    return {'4096': -1.0, str(doc['max_length']): .25}\n"
    )
    task = LMEval("edited", value="metric", include_path=folder, max_length=200)
    (prompt,) = task.prompts(lens)
    assert task.evaluate(lens, prompt) == 0.25


def test_fields_that_cannot_be():
    for message, fields in (
        ("name='my/tiny.yaml' .* include_path", dict(name="my/tiny.yaml")),
        ("value='f1'", dict(value="f1")),
        ("limit=0", dict(limit=0)),
        ("limit=0.5", dict(limit=0.5)),
        ("max_length=0", dict(max_length=0)),
        ("seed=-1", dict(seed=-1)),
    ):
        with pytest.raises(PosheadsError, match=message):
            LMEval(**{"name": "tiny", **fields})


REFUSED = [
    (
        "tiny_longbench",
        {"dataset_path": "nobody/nothing", "dataset_kwargs": "{}"},
        "ConnectionError",
    ),
    ("tiny_longbench", {"dataset_kwargs": "{data_files: nowhere.jsonl}"}, "FileNotFound"),
    ("tiny_longbench", {"process_results": "!function missing.f1"}, "can't prepare edited"),
    (
        "tiny_longbench",
        {"output_type": "loglikelihood_rolling"},
        "of the kind loglikelihood_rolling",
    ),
    ("tiny_longbench", {"doc_to_image": "[context]"}, "images"),
    ("tiny_longbench", {"doc_to_target": "'{{[]}}'"}, "document 0 of edited has no reference"),
    ("tiny_longbench", {"generation_kwargs": "{max_gen_toks: 256}"}, "256 new tokens"),
    ("tiny_choice", {"doc_to_target": "'{{9 if name == \"Ben\" else 0}}'"}, "document 1 .* is 9"),
    ("tiny_choice", {"doc_to_target": "'{{[0, 2]}}'"}, "is \\[0, 2\\]; expected one of 4"),
]
METRIC_REFUSED = [
    ("tiny_longbench", {"unsafe_code": "true"}, "executes generated code"),
    ("tiny_longbench", {"repeats": "3"}, "several answers"),
    ("tiny_longbench", {"generation_kwargs": "{num_beams: 4, max_gen_toks: 8}"}, "num_beams"),
    ("tiny_choice", {"metric_list": "[{metric: f1}]"}, "metric f1 of edited is no number"),
]


@pytest.mark.parametrize(("name", "pieces", "message"), [*REFUSED, *METRIC_REFUSED])
def test_what_cannot_be_asked_is_refused_before_any_pass(lens, edited, name, pieces, message):
    folder = edited(name, **pieces)
    value = "metric" if (name, pieces, message) in METRIC_REFUSED else "loglikelihood"
    handle = lens.unembed.register_forward_pre_hook(lambda *args: pytest.fail("a pass was run"))
    try:
        task = LMEval("edited", limit=2, value=value, include_path=folder)
        with pytest.raises(PosheadsError, match=message) as refused:
            task.prompts(lens)
    finally:
        handle.remove()
    assert "\n" not in str(refused.value)
    if value == "metric" and "metric" not in message:
        assert LMEval("edited", limit=2, include_path=folder).prompts(lens)


def test_a_group_is_refused(lens, tasks, tmp_path):
    for file in tasks.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "group.yaml").write_text(json.dumps({"group": "tiny", "task": ["tiny_qa"]}))
    with pytest.raises(PosheadsError, match="tiny is not one task of lm-eval but a group"):
        LMEval("tiny", include_path=tmp_path).prompts(lens)


@pytest.mark.slow
def test_an_unknown_name_is_refused(lens, tasks):
    with pytest.raises(PosheadsError, match="no task 'huge'"):
        LMEval("huge", include_path=tasks).prompts(lens)


def test_without_lm_eval_the_message_says_what_to_install():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from tl_posheads import PosheadsError, tasks\n"
        "try: tasks.LMEval('longbench_qasper')\n"
        "except PosheadsError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'tl-posheads[evals]'" in done.stdout

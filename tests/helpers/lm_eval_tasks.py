"""Small tasks in a folder, as lm-eval reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

FACTS = [
    ("Ann", "a red hat"),
    ("Ben", "two dogs"),
    ("Cleo", "no time"),
    ("Dan", "a green boat"),
    ("Eve", "five old keys"),
    ("Finn", "a drum"),
]
PASSAGE = " ".join(f"{name} has {thing}." for name, thing in FACTS)

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}} {{{{name}}}} has"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
QA = """
task: tiny_qa
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Answer the question based on the passage.\\n\\n{{{{context}}}}\\n\\nQuestion: What does {{{{name}}}} have?\\nAnswer:"
doc_to_target: "{{{{answers}}}}"
process_results: !function tiny_metrics.qa_f1
generation_kwargs: {{max_gen_toks: 6, do_sample: false, temperature: 1, until: ["\\n"]}}
metric_list:
  - {{metric: qa_f1_score, aggregation: mean, higher_is_better: true}}
"""
METRICS = """
from collections import Counter

def qa_f1(doc, results):
    said, best = results[0].lower().split(), 0.0
    for answer in doc["answers"]:
        true = answer.lower().split()
        same = sum((Counter(said) & Counter(true)).values())
        best = max(best, 2 * same / (len(said) + len(true)))
    return {"qa_f1_score": best + len(results[0])}  # the length, so that any change is seen
"""

LONGBENCH = """
task: tiny_longbench
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Read the article and answer in a few words.\\n\\nArticle: {{{{context}}}}\\n\\nAnswer in a few words.\\n\\nQuestion: {{{{input}}}}\\nAnswer:"
doc_to_target: "{{{{answers}}}}"
process_results: !function longbench_metrics.with_score
generation_kwargs: {{max_gen_toks: 8, temperature: 1, do_sample: false, until: []}}
metric_list:
  - {{metric: score, aggregation: mean, higher_is_better: true}}
  - {{metric: qa_f1_score, aggregation: mean, higher_is_better: true}}
"""
LONGBENCH_METRICS = """
from collections import Counter

def f1(said, true):
    said, true = said.lower().split(), true.lower().split()
    same = sum((Counter(said) & Counter(true)).values())
    return 2 * same / (len(said) + len(true))

def with_score(doc, results):
    best = max(f1(results[0], answer) for answer in doc["answers"])
    return {"qa_f1_score": best, "score": best}
"""


def longbench_text(context: str, question: str) -> str:
    """What the task ``tiny_longbench`` asks."""
    return (
        f"Read the article and answer in a few words.\n\nArticle: {context}\n\n"
        f"Answer in a few words.\n\nQuestion: {question}\nAnswer:"
    )


def write_longbench(folder: Path, rows: Sequence[tuple[str, str, list[str]]]) -> None:
    """Put the task ``tiny_longbench`` there, in LongBench's form, of context, question, answers."""
    data = folder / "longbench.jsonl"
    fixed = {"dataset": "qasper", "language": "en", "all_classes": None}
    with data.open("w") as file:
        for i, (context, question, answers) in enumerate(rows):
            row = {"input": question, "context": context, "answers": answers, **fixed}
            row |= {"length": len(context.split()), "_id": str(i)}
            file.write(json.dumps(row) + "\n")
    (folder / "tiny_longbench.yaml").write_text(LONGBENCH.format(data=data))
    (folder / "longbench_metrics.py").write_text(LONGBENCH_METRICS)


def write(folder: Path) -> None:
    """Put the tasks ``tiny_choice`` and ``tiny_qa`` there."""
    rows = [
        {
            "context": PASSAGE,
            "name": name,
            "answers": [thing],
            "gold": i % 4,
            "choices": [FACTS[(i + shift - i % 4) % len(FACTS)][1] for shift in range(4)],
        }
        for i, (name, thing) in enumerate(FACTS)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny_choice.yaml").write_text(CHOICE.format(data=data))
    (folder / "tiny_qa.yaml").write_text(QA.format(data=data))
    (folder / "tiny_metrics.py").write_text(METRICS)

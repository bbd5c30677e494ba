"""An lm-eval task as a task of this package: LongBench and others in an ablation study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.model import LensModel
from tl_posheads.tasks.base import Prompt, Task, check_fields
from tl_posheads.tasks.lens_lm import (
    LensLM,
    _plan,
    cut_middle,
    new_tokens,
    require_lm_eval,
)
from tl_posheads.tasks.lm_eval import _task_manager

Value = Literal["loglikelihood", "metric"]
_KINDS = ("generate_until", "loglikelihood", "multiple_choice")


@dataclass(frozen=True, eq=False, kw_only=True)
class _Document(Prompt):
    """A prompt with lm-eval's requests for its document, and the lm-eval task."""

    harness: Any
    requests: Sequence[Any]
    tokenizer: Any


@dataclass(frozen=True)
class LMEval:
    """An lm-eval task with one value per document, for studies that pair documents over ablations.

    The value is the log-likelihood of the reference answer from one teacher-forced pass, or the
    task's own metric on generated text. A study averages the log-likelihood over the answer's
    tokens; lm-eval sums it. Prompts longer than ``max_length`` lose their middle, as in LongBench
    (Bai et al. 2024, arXiv 2308.14508), which keeps the instructions at both ends. Room for the
    answer, or for the longest text that the task lets the model generate, is reserved.

    Plain text, no chat template. No short controls. Facts: ``document`` (its number), ``length``
    in tokens and the number of tokens ``cut``.

    Supports lm-eval's kinds ``generate_until``, ``loglikelihood`` and ``multiple_choice``:

    - if there are several reference answers, the first is scored, after the task's
      ``target_delimiter``;
    - in multiple choice the correct choice is scored, and there must be one; ``value="metric"``
      scores all choices;
    - the metric is the first that the task lists, after its first filter, and must be one number
      per document; for RULER, it is the one for the document's length.

    Whole texts (``loglikelihood_rolling``), images and audio are refused; with ``value="metric"``
    also metrics that execute generated code, and several answers to one prompt.

    Attributes:
        name: of one task, as in ``lm_eval ls tasks``; not a group.
        limit: number of documents, from the first; None takes all.
        value: ``"loglikelihood"`` or ``"metric"``. The latter adds the method ``evaluate`` of
            :class:`~tl_posheads.tasks.Evaluated`.
        include_path: folder with your own task files.
        max_length: most tokens of a prompt with its answer; by default the model's context length.
            RULER makes texts of this length, by default 4,096 tokens.
        seed: of the choice of examples and of sampling.

    Raises:
        PosheadsError: lm-eval isn't installed, or an invalid field. From ``prompts``, before any
            pass: no such task, a group, missing data or packages, an unsupported kind, a document
            without a reference answer, no room for an answer.

    Example:
        >>> task = LMEval("longbench_qasper", limit=50)                  # doctest: +SKIP
        >>> study = tl_posheads.ablation_study(model, scores, tasks=[task])      # doctest: +SKIP
        >>> LMEval("longbench_qasper", value="f1")
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: value='f1' was given; expected 'loglikelihood' or 'metric'
    """

    name: str
    limit: int | None = None
    value: Value = "loglikelihood"
    include_path: str | Path | None = None
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_lm_eval()
        if not isinstance(self.name, str) or self.name.endswith((".yaml", ".yml")):
            raise PosheadsError(
                f"name={self.name!r} was given; expected a task's name; the folder of its file is "
                "include_path"
            )
        if self.value not in get_args(Value):
            raise PosheadsError(
                f"value={self.value!r} was given; expected 'loglikelihood' or 'metric'"
            )
        optional = [name for name in ("limit", "max_length") if getattr(self, name) is not None]
        check_fields(self, seed=0, **dict.fromkeys(optional, 1))
        if self.include_path is not None:
            object.__setattr__(self, "include_path", str(self.include_path))
        if self.value == "metric":
            # Not a method of the class: a study checks whether a task has it.
            object.__setattr__(self, "evaluate", self._evaluate)

    def rungs(self) -> Sequence[Task]:
        """None: it isn't calibrated."""
        return ()

    def prompts(self, model: LensModel) -> list[Prompt]:
        """One prompt per document, in order; its tokens end with the reference answer.

        With ``value="metric"`` an answer is truncated where the model would have to stop.

        Args:
            model: a HookedTransformer or TransformerBridge.

        Raises:
            PosheadsError: see the class.
        """
        lm = LensLM(model, max_length=self.max_length)
        harness = self._load(lm)
        self._check(harness)
        with _prepared(self.name):
            harness.set_fewshot_seed(seed=self.seed)
            harness.build_all_requests(limit=self.limit)
        ordered = sorted(harness.instances, key=lambda request: (request.doc_id, request.idx))
        groups = [list(group) for _, group in groupby(ordered, key=lambda r: r.doc_id)]
        if self.value == "metric":
            self._try_metric(model, lm, harness, groups[0])
        return [self._prompt(lm, harness, requests) for requests in groups]

    def _load(self, lm: LensLM) -> Any:
        metadata: dict[str, Any] = {"tokenizer": str(lm.tokenizer.name_or_path)}
        if self.max_length is not None:
            metadata["max_seq_lengths"] = [self.max_length]
        manager = _task_manager([self.name], self.include_path, metadata)
        if self.name not in manager.all_subtasks:
            raise PosheadsError(
                f"{self.name} is not one task of lm-eval but a group; give one of its tasks, which "
                "`lm_eval ls tasks` lists"
            )
        with _prepared(self.name):
            if not hasattr(manager, "load"):  # lm-eval before 2026
                return manager.load_task_or_group([self.name])[self.name]
            return manager.load([self.name])["tasks"][self.name]

    def _check(self, harness: Any) -> None:
        metric, what = self.value == "metric", None
        if harness.OUTPUT_TYPE not in _KINDS:
            what = f"of the kind {harness.OUTPUT_TYPE}; expected {', '.join(_KINDS)}"
        elif getattr(harness, "MULTIMODAL", False):
            what = "about images or sounds; expected text"
        elif metric and getattr(harness, "UNSAFE_CODE", False):
            what = "whose metric executes generated code; use value='loglikelihood'"
        elif metric and (harness.config.repeats or 1) > 1:
            what = "with several answers to each prompt; use value='loglikelihood'"
        if what:
            raise PosheadsError(f"{self.name} is a task {what}")

    def _try_metric(
        self, model: LensModel, lm: LensLM, harness: Any, requests: Sequence[Any]
    ) -> None:
        """Refuse, before any pass, a metric that isn't one number for one document."""
        answer = self._wanted(harness, requests)[1]
        made_up: list[Any] = [(-float(i), i == 0) for i in range(len(requests))]
        if harness.OUTPUT_TYPE == "generate_until":
            _plan(model, requests[0].args[1], lm.max_gen_toks)
            made_up = [answer]
        with _prepared(self.name):
            self._metric(harness, requests, made_up)

    def _wanted(self, harness: Any, requests: Sequence[Any]) -> tuple[str, str]:
        """A document's context, and the expected continuation."""
        doc, context = requests[0].doc, requests[0].args[0]
        if harness.OUTPUT_TYPE == "loglikelihood":
            return context, requests[0].args[1]
        choices = None if harness.config.doc_to_choice is None else harness.doc_to_choice(doc)
        wanted = harness.doc_to_target(doc)
        if harness.OUTPUT_TYPE == "multiple_choice" and harness.multiple_input:
            wanted = harness.doc_to_text(doc)
        several = isinstance(wanted, list | tuple)
        if several and (len(wanted) == 1 or choices is None or self.value == "metric"):
            wanted = next(iter(wanted), "")
        if choices is not None:
            wanted = choices.index(wanted) if wanted in choices else wanted
            if not isinstance(wanted, int) or not 0 <= wanted < len(choices):
                raise PosheadsError(
                    f"the right choice of document {requests[0].doc_id} of {self.name} is "
                    f"{wanted!r}; expected one of {len(choices)}, counted from 0"
                )
            if harness.OUTPUT_TYPE == "multiple_choice":
                context, following = requests[wanted].args[:2]
                return context, following
            wanted = choices[wanted]
        if not str(wanted).strip():
            raise PosheadsError(
                f"document {requests[0].doc_id} of {self.name} has no reference answer; leave it "
                "out by process_docs in the task's file"
            )
        return context, f"{harness.config.target_delimiter}{wanted}"

    def _prompt(self, lm: LensLM, harness: Any, requests: Sequence[Any]) -> Prompt:
        text, following = self._wanted(harness, requests)
        if text:
            context, answer = lm._encode_pair(text, following)
        else:
            context = [lm.prefix_token_id]
            answer = lm.tok_encode(following, add_special_tokens=False)
        budget = 0
        if harness.OUTPUT_TYPE == "generate_until":
            budget = new_tokens(requests[0].args[1], lm.max_gen_toks)
            answer = answer[:budget] if self.value == "metric" else answer
        kept = cut_middle(context, lm.room_before(max(budget, len(answer))))
        tokens = kept + answer
        return _Document(
            torch.tensor(tokens, dtype=torch.long),
            torch.arange(len(kept), len(tokens)),
            {
                "document": requests[0].doc_id,
                "length": len(tokens),
                "cut": len(context) - len(kept),
            },
            harness=harness,
            requests=requests,
            tokenizer=lm.tokenizer,
        )

    def _evaluate(self, model: LensModel, prompt: Prompt) -> float:
        """The task's metric of one document, by lm-eval's own code; hooks are in force."""
        if not isinstance(prompt, _Document):
            raise PosheadsError(
                f"a {type(prompt).__name__} was given; expected one of what prompts(model) returns"
            )
        lm = LensLM(model, max_length=self.max_length, tokenizer=prompt.tokenizer)
        ask = getattr(lm, prompt.requests[0].request_type)
        devices = [lm.device] if lm.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed + prompt.facts["document"])
            responses = ask(prompt.requests, disable_tqdm=True)
        return self._metric(prompt.harness, prompt.requests, responses)

    def _metric(self, harness: Any, requests: Sequence[Any], responses: Sequence[Any]) -> float:
        for request, response in zip(requests, responses, strict=True):
            request.resps = [response]
        pipeline, doc = harness._filters[0], requests[0].doc
        pipeline.apply(requests)
        found = harness.process_results(doc, [r.filtered_resps[pipeline.name] for r in requests])
        # RULER's metrics are lengths, and -1 for all but the document's own.
        names = [str(doc.get("max_length")), *harness.aggregation()]
        metric = next((name for name in names if name in found), None)
        try:
            return float(found[metric])
        except (KeyError, TypeError, ValueError):
            raise PosheadsError(
                f"the metric {metric} of {self.name} is no number for a single document; use "
                "value='loglikelihood'"
            ) from None


@contextmanager
def _prepared(name: str) -> Iterator[None]:
    """Report missing data or packages of an lm-eval task in one line."""
    try:
        yield
    except PosheadsError:
        raise
    except Exception as problem:
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
        todo = f"run `lm_eval --model dummy --tasks {name} --limit 1` once, with a network"
        if isinstance(problem, ImportError):
            todo = "pip install 'tl-posheads[evals]'"
        raise PosheadsError(
            f"lm-eval can't prepare {name} ({reason}); to have its data and packages here, {todo}"
        ) from problem

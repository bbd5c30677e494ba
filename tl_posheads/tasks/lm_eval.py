"""lm-eval's tasks on a TransformerLens model, such as LongBench and RULER under ablation.

The harness is EleutherAI's lm-evaluation-harness (Gao et al. 2024, doi 10.5281/zenodo.12608602),
installed by ``pip install 'tl-posheads[evals]'``. LongBench (Bai et al. 2024, arXiv 2308.14508):
``longbench_qasper``, ``longbench_hotpotqa``, ``longbench_multifieldqa_en`` and others, or the
groups ``longbench_single`` and ``longbench_multi``. RULER (Hsieh et al. 2024, arXiv 2404.06654):
``niah_single_1``, ``niah_multikey_1``, ``ruler_vt``, ``ruler_qa_squad`` and others, or all in
``ruler``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.model import LensModel
from tl_posheads.tasks.lens_lm import LensLM, require_lm_eval

__all__ = ["LensLM", "evaluate"]

COLUMNS = ["task", "metric", "filter", "value", "stderr", "n"]
_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def evaluate(
    model: LensModel,
    tasks: str | Sequence[Any],
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> pd.DataFrame:
    """Run lm-eval's tasks on the model, with its active hooks.

    Args:
        model: HookedTransformer, TransformerBridge or a :class:`LensLM`.
        tasks: names of tasks, groups or tags, or anything that ``lm_eval.simple_evaluate`` takes.
        limit: documents per task; a share if below 1.
        num_fewshot: examples in the prompt; by default the task's own number.
        include_path: folder with your own task files.
        batch_size, max_length: of the :class:`LensLM`.
        seed: of the choice of examples and of sampling; the global generators are seeded with it.
        kwargs: for ``lm_eval.simple_evaluate``: ``apply_chat_template``, ``gen_kwargs``,
            ``metadata={"max_seq_lengths": [4096]}`` for RULER's lengths.

    Returns:
        One row per task, metric and filter: ``task``, ``metric``, ``filter``, ``value``,
        ``stderr`` (NaN where lm-eval has none) and ``n``, the number of documents. RULER's metrics
        are lengths in tokens, with -1 where no text had that length.

    Raises:
        PosheadsError: lm-eval isn't installed, it has no such task, or ``use_cache`` was given,
            which would return another model's answers for an ablated model.

    Example:
        >>> clean = evaluate(model, ["longbench_qasper"], limit=20)     # doctest: +SKIP
        >>> with tl_posheads.ablate(model, heads):              # doctest: +SKIP
        ...     ablated = evaluate(model, ["longbench_qasper"], limit=20)
    """
    require_lm_eval()
    import lm_eval

    if kwargs.get("use_cache") is not None:
        raise PosheadsError(
            "use_cache was given; it would reuse answers across ablations, so leave it out"
        )
    lm = model
    if not isinstance(model, LensLM):
        lm = LensLM(model, batch_size=batch_size, max_length=max_length)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    # RULER makes texts of a given length with a tokenizer that it loads by name.
    metadata = {"tokenizer": str(lm.tokenizer.name_or_path), **(kwargs.pop("metadata", None) or {})}
    manager = kwargs.pop("task_manager", None) or _task_manager(names, include_path, metadata)
    results = lm_eval.simple_evaluate(
        lm,
        tasks=names,
        limit=limit,
        num_fewshot=num_fewshot,
        task_manager=manager,
        **dict.fromkeys(_SEEDS, seed),
        **{"log_samples": False, **kwargs},
    )
    return _table(results)


def _task_manager(names: Sequence[Any], include_path: Any, metadata: Mapping[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    path = None if include_path is None else str(include_path)
    # lm-eval reads thousands of files to list its own tasks; skipped where include_path is enough.
    for defaults in (True,) if path is None else (False, True):
        manager = TaskManager(include_path=path, include_defaults=defaults, metadata=dict(metadata))
        strings = [name for name in names if isinstance(name, str) and not Path(name).is_file()]
        unknown = [name for name in strings if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise PosheadsError(
        f"lm-eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them, such as "
        "longbench_qasper and niah_single_1"
    )


def _table(results: Mapping[str, Any]) -> pd.DataFrame:
    children = results.get("group_subtasks", {})

    def n_docs(task: str) -> int:
        if task in results["n-samples"]:
            return int(results["n-samples"][task]["effective"])
        return sum(n_docs(child) for child in children.get(task, []))

    rows = []
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = found.get(f"{metric}_stderr,{chosen}")
            error = float(stderr) if isinstance(stderr, int | float) else float("nan")
            rows.append((task, metric, chosen, float(value), error, n_docs(task)))
    return pd.DataFrame(rows, columns=COLUMNS)

"""Prompts of tasks, checked before anything runs, and their identification in results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.model import LensModel, model_name
from tl_posheads.tasks.base import Prompt, Task, check_length


def named(tasks: Sequence[Task]) -> list[tuple[str, Task]]:
    """Tasks by name; a second task of the same name gets a number."""
    out: list[tuple[str, Task]] = []
    for task in tasks:
        n = sum(name.partition("#")[0] == task.name for name, _ in out)
        out.append((task.name if not n else f"{task.name}#{n + 1}", task))
    return out


def with_short(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts and their short controls."""
    return [x for prompt in prompts for x in (prompt, prompt.short) if x is not None]


def require_tasks(tasks: Any) -> None:
    """Refuse what isn't a sequence of tasks.

    Raises:
        PosheadsError: no tasks, or something that isn't a task.
    """
    given = list(tasks) if isinstance(tasks, Sequence) else []
    wrong = [task for task in given if isinstance(task, type) or not isinstance(task, Task)]
    if not given or wrong:
        raise PosheadsError(
            f"tasks={wrong or tasks!r} was given; expected at least one of tl_posheads.tasks, like "
            "[tasks.Passkey(length=1024)]"
        )


def prompts_of(model: LensModel, tasks: Sequence[Task]) -> dict[str, list[Prompt]]:
    """Checked prompts by task name.

    Raises:
        PosheadsError: no tasks, or something that isn't a task; a task without prompts; prompts
            that are too long for the model, score nothing or hold unknown token ids.
    """
    require_tasks(tasks)
    out = {}
    for name, task in named(tasks):
        prompts = out[name] = task.prompts(model)
        if not prompts:
            raise PosheadsError(f"the task {name} has no prompts; raise its n")
        check_length(model, prompts)
        for prompt in with_short(prompts):
            n, targets = len(prompt.tokens), prompt.targets
            fits = targets.ndim == 1 and len(targets) > 0
            if not fits or int(targets.min()) < 1 or int(targets.max()) >= n:
                raise PosheadsError(
                    f"a prompt of {name} has {n} tokens and the targets {targets.tolist()}; "
                    f"expected positions from 1 to {n - 1}"
                )
            high = int(prompt.tokens.max())
            if int(prompt.tokens.min()) < 0 or high >= int(model.cfg.d_vocab):
                raise PosheadsError(
                    f"a prompt of {name} has token id {high}, but {model_name(model)} has ids 0 "
                    f"to {int(model.cfg.d_vocab) - 1}; was it made by another tokenizer?"
                )
    return out


def in_turns(prompts: Mapping[str, Sequence[Prompt]]) -> list[list[tuple[str, int]]]:
    """Rounds with one prompt of each task that has any left: task and number.

    Example:
        >>> in_turns({"passkey": [None, None], "copying": [None]})
        [[('passkey', 0), ('copying', 0)], [('passkey', 1)]]
    """
    longest = max(map(len, prompts.values()))
    return [
        [(name, i) for name, these in prompts.items() if i < len(these)] for i in range(longest)
    ]


def request_of(
    model: LensModel, tasks: Sequence[Task], prompts: Mapping[str, Sequence[Prompt]]
) -> dict[str, Any]:
    """Model, tasks and prompts, as identified by a checkpoint."""
    return {
        "model": [model_name(model), str(next(model.parameters()).dtype)],
        "prompts": {name: prompts_digest(these) for name, these in prompts.items()},
        "tasks": repr([task_facts(task) for task in tasks]),
    }


def tensor_digest(tensor: Tensor) -> str:
    """Digest of a tensor's numbers, on any device."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:24]


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Digest of tokens and targets, including the short controls'."""
    tensors = [tensor for p in with_short(prompts) for tensor in (p.tokens, p.targets)]
    return hashlib.sha256("".join(map(tensor_digest, tensors)).encode()).hexdigest()[:24]


def task_facts(task: Task) -> dict[str, Any]:
    """Class and settings of a task, to be stored with a result."""
    fields = getattr(task, "__dataclass_fields__", {})
    rungs = getattr(task, "rungs", tuple)
    return {
        "class": type(task).__name__,
        **{name: getattr(task, name) for name in fields},
        "rungs": len(rungs()),
        "metric": evaluator(task) is not None,
    }


def evaluator(task: Task) -> Callable[[LensModel, Prompt], float] | None:
    """A task's own metric for a prompt; None if it is scored by log-probability."""
    evaluate: Callable[[LensModel, Prompt], float] | None = getattr(task, "evaluate", None)
    return evaluate

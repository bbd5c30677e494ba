"""Long-context tasks, one per file; every prompt comes with a short-context control."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tl_posheads.tasks.base import Calibrated, Evaluated, Prompt, Task, check_length
from tl_posheads.tasks.calibration import Calibration, calibrate
from tl_posheads.tasks.copying import Copying
from tl_posheads.tasks.generation import generate_answers
from tl_posheads.tasks.key_value import KeyValue
from tl_posheads.tasks.longppl import LongPPL
from tl_posheads.tasks.multi_key import MultiKey
from tl_posheads.tasks.needle import Needle
from tl_posheads.tasks.passkey import Passkey
from tl_posheads.tasks.perplexity import Perplexity, loss_by_position
from tl_posheads.tasks.variable_tracking import VariableTracking

if TYPE_CHECKING:
    from tl_posheads.tasks import lm_eval
    from tl_posheads.tasks.lm_eval_task import LMEval

# By their names on the command line.
TASKS: dict[str, type] = {
    "passkey": Passkey,
    "needle": Needle,
    "key-value": KeyValue,
    "multi-key": MultiKey,
    "variable-tracking": VariableTracking,
    "copying": Copying,
    "perplexity": Perplexity,
    "longppl": LongPPL,
}

__all__ = [
    "TASKS",
    "Calibrated",
    "Calibration",
    "Copying",
    "Evaluated",
    "KeyValue",
    "LMEval",
    "LongPPL",
    "MultiKey",
    "Needle",
    "Passkey",
    "Perplexity",
    "Prompt",
    "Task",
    "VariableTracking",
    "calibrate",
    "check_length",
    "generate_answers",
    "lm_eval",
    "loss_by_position",
]


def __getattr__(name: str) -> Any:
    # lm-eval's harness takes seconds to import.
    if name == "lm_eval":
        return import_module("tl_posheads.tasks.lm_eval")
    if name == "LMEval":
        return import_module("tl_posheads.tasks.lm_eval_task").LMEval
    raise AttributeError(f"module 'tl_posheads.tasks' has no attribute {name!r}")

"""Times of several ways in turn, their ratios, and how far the memory of a process grows."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch


def seconds_of(
    ways: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each way, round by round: a slow minute of the machine slows all of them.

    With ``warm_up`` each way runs once before the clock does.
    """
    for call in ways.values() if warm_up else ():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            seconds[name].append(time_of(call))
    return seconds


def time_of(call: Callable[[], object]) -> float:
    """Seconds of one call, until the GPU is done, too."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table_of(seconds: Mapping[str, list[float]], base: str) -> str:
    """Markdown: medians, and ratios to ``base`` within rounds (median, smallest, largest)."""
    lines = [f"| way | seconds | times *{base}* |", "|---|---:|---:|"]
    for name, times in seconds.items():
        ratios = sorted(mine / other for mine, other in zip(times, seconds[base]))
        middle = statistics.median(ratios)
        spread = "" if name == base else f" ({ratios[0]:.3g}–{ratios[-1]:.3g})"
        lines.append(f"| {name} | {statistics.median(times):.3g} | {middle:.3g}{spread} |")
    return "\n".join(lines)


def peak_growth(call: Callable[[], object]) -> float:
    """MB by which resident memory grew at its highest during ``call``; Linux or CUDA only."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # What earlier work freed and the process kept would hide as much of what this one takes.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the highest back to the present
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1e3


def peak_memory() -> float:
    """MB of resident memory at its highest since the process began."""
    return _status("VmHWM") / 1e3


def machine() -> str:
    """Class of machine and versions, as a line of Markdown."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    isa = torch.backends.cpu.get_cpu_capability()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformer-lens"))
    return (
        f"{torch.get_num_threads()} threads, {platform.machine()} {isa}, {card}; "
        f"Python {platform.python_version()}, {packages}"
    )


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")

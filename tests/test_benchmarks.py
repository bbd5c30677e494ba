"""Every benchmark still finds what it takes from the package."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_a_script_says_how_it_is_run(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    said = import_module(name).__doc__ or ""
    assert f"benchmarks/{name}.py" in said or not hasattr(sys.modules[name], "main")

"""What the package offers under its own name, and the files around it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tl_posheads as ph
from helpers.results_by_hand import KINDS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", sorted({*ph.__all__} - {"__version__"}))
def test_public_names_are_what_type_checkers_are_told(name):
    tree = ast.parse(Path(ph.__file__).read_text())
    told = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("tl_posheads")
        for alias in node.names
    }
    found = getattr(ph, name)
    home = getattr(found, "__module__", None)
    assert told[name] == (f"{home}.{found.__name__}" if home else found.__name__)


def test_version_and_what_it_costs():
    code = (
        "import sys, tl_posheads; print(tl_posheads.__version__); assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    assert run.stdout.strip() == ph.__version__ == cited


def test_lm_eval_waits_until_it_is_asked_for():
    code = (
        "import sys, tl_posheads as ph; ph.tasks.Passkey; assert 'lm_eval' not in sys.modules\n"
        "print(ph.tasks.lm_eval.evaluate.__module__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == "tl_posheads.tasks.lm_eval"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ph.tasks.nothing


def test_the_gallery_shows_every_figure_and_view():
    kinds = [type(make()) for make in KINDS.values()]
    figures = {
        getattr(kind, name).__qualname__
        for kind in kinds
        for name in dir(kind)
        if name.startswith("plot")
    }
    drawn = {f"views.{name}" for name in ph.views.__all__} | figures
    sections = (ROOT / "docs" / "gallery.md").read_text().split("\n### ")[1:]
    shown = {}
    for section in sections:
        for name in re.findall(r"^\[`([\w.]+)`\]\(#tl_posheads\.", section, re.M):
            shown[name] = section.split("```{code-cell}")[-1]
    assert shown.keys() == drawn - {"views.View", "Result.plot"}
    for name, code in shown.items():
        assert f".{name.split('.')[-1]}(" in code

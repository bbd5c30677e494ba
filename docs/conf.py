"""Sphinx: MyST pages and a reference made from docstrings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tl_posheads import __version__

project = "tl_posheads"
author = "The tl_posheads authors"
copyright = "2025, the tl_posheads authors"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "tl_posheads"
html_show_search_summary = False  # a page opened as a file may not fetch others
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # they are executed by the tests; here their committed outputs are shown
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_typehints = "none"  # shapes stand in the docstrings
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_use_rtype = False
napoleon_use_ivar = True

# Views and the report of the gallery, which its code writes; "make clean" takes them away.
html_static_path = ["_static"]
_here = Path(__file__).parent
shutil.rmtree(_here / "_static", ignore_errors=True)
(_here / "_static" / "gallery").mkdir(parents=True)

# Notebooks live beside the docs; a page is made from a copy.
shutil.rmtree(_here / "notebooks", ignore_errors=True)
shutil.copytree(_here.parent / "notebooks", _here / "notebooks")


def setup(app: Any) -> None:
    """The gallery shows what the code draws now: it is made with every build."""
    app.connect("env-get-outdated", lambda *_: ["gallery"])

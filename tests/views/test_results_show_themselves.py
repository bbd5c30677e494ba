"""What a notebook shows of every kind of result: the finding, the table's head, the figure."""

from __future__ import annotations

import base64
import re

import pytest

from helpers.results_by_hand import KINDS

NO_FIGURE = {"maps", "patching"}


@pytest.mark.parametrize("kind", KINDS)
def test_repr_is_short_and_names_the_kind(kind):
    result = KINDS[kind]()
    lines = repr(result).splitlines()
    assert lines[0].startswith(f"{type(result).__name__}(")
    assert 1 <= len(lines) <= 3
    assert not any("nan" in line.lower().split() for line in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_html_has_the_words_the_tables_head_and_the_figure(kind):
    result = KINDS[kind]()
    shown = result._repr_html_()
    table = result.to_pandas()
    assert shown.startswith(f"<pre>{type(result).__name__}(")
    assert shown.count("<tr") == 1 + min(8, len(table))
    assert all(f"<th>{name}</th>" in shown for name in table.columns)
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', shown)
    assert len(images) == (kind not in NO_FIGURE)
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)


def test_patching_comes_back_from_its_folder(tmp_path):
    made = KINDS["patching"]()
    made.save(tmp_path)
    found = type(made).load(tmp_path)
    assert found.effects.equals(made.effects)
    assert (found.clean, found.corrupted, found.provenance) == (3.0, 1.0, made.provenance)

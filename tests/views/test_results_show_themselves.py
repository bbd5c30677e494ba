"""What a notebook shows of every kind of result: the finding, the table's head, the figure."""

from __future__ import annotations

import base64
import dataclasses
import inspect
import re

import pytest
import torch

import tl_posheads as ph
from helpers import small_models
from helpers.results_by_hand import KINDS
from tl_posheads.views.report import render

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


PUBLIC = [ph, *(getattr(ph, name) for name in ph._PACKAGES)]
CLASSES = {x for home in PUBLIC for _, x in inspect.getmembers(home, inspect.isclass)}


@pytest.mark.parametrize("kind", sorted(filter(dataclasses.is_dataclass, CLASSES), key=repr))
def test_no_tensor_and_no_table_is_in_a_repr(kind):
    if hasattr(kind.__repr__, "__wrapped__"):  # as dataclasses make it
        shown = {field.name: str(field.type) for field in dataclasses.fields(kind) if field.repr}
        assert not [name for name, type_ in shown.items() if re.search("Tensor|DataFrame", type_)]


def test_what_is_public_is_looked_at():
    assert {ph.LayerGeometry, ph.tasks.Prompt, ph.extrapolation.EffectiveLengths} <= CLASSES


@pytest.mark.lens
def test_no_path_is_in_a_repr_or_a_title(monkeypatch):
    model = small_models.rotary_model("Llama")
    monkeypatch.setattr(model.cfg, "model_name", "/cache/models/tiny-llama")
    geometry = ph.RotaryGeometry.from_model(model)
    assert repr(geometry) == "RotaryGeometry(tiny-llama: 2 layers of 4 heads, 4 rotary pairs)"
    scores = ph.score_heads(model, torch.arange(3, 35).reshape(2, 16), progress=False)
    assert repr(scores).startswith("HeadScores(tiny-llama")
    assert scores.plot().axes[0].get_title("left") == "Positional scores of tiny-llama"
    assert "<h1>Positional Heads of <bdi>tiny-llama</bdi></h1>" in render(scores)

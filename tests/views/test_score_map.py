"""Heads outlined in the map of scores."""

from __future__ import annotations

import json

import pytest

import tl_posheads as ph
from helpers.browser import needs_browser, opened
from helpers.scores_by_hand import toy_scores
from tl_posheads import views


def test_heads_to_outline_are_read_and_checked():
    scores = toy_scores()
    shown = views.score_map(scores, highlight=["L2H1", (0, 3)]).html
    data = json.loads(shown.split('id="data">')[1].split("</script>")[0])
    assert data["highlight"] == [[2, 1], [0, 3]]
    assert "Outlined: L2H1, L0H3." in shown
    assert "Outlined" not in views.score_map(scores).html
    with pytest.raises(ph.PosheadsError, match="L99H0 was requested, but it has no score"):
        views.score_map(scores, highlight="L99H0")


@needs_browser
def test_only_highlighted_heads_are_outlined(tmp_path):
    scores = toy_scores()
    path = views.score_map(scores, highlight=["L2H1", (0, 3)]).save(tmp_path / "map.html")
    with opened(path) as found:
        outlined = found.page.evaluate(
            "[...document.querySelectorAll('td button')]"
            ".filter(b => getComputedStyle(b).outlineStyle !== 'none')"
            ".map(b => b.getAttribute('aria-label'))"
        )
        found.page.get_by_label("layer 2 head 1,").click()
        style = found.page.get_by_label("layer 2 head 1,").evaluate(
            "b => getComputedStyle(b).outlineStyle"
        )
        assert found.said == found.asked == []
    expected = [
        f"layer {layer} head {head}, score {float(scores.rho[layer, head]):.2f}"
        for layer, head in [(0, 3), (2, 1)]
    ]
    assert outlined == expected
    assert style == "solid"

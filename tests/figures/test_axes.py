"""Figures of one axes, drawn into the user's: the same content, and nothing beside it."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import tl_posheads as ph
from helpers.results_by_hand import KINDS
from helpers.scores_by_hand import toy_scores

SINGLE = [
    ("scores", "plot"),
    ("encodings", "plot"),
    ("curve", "plot"),
    ("curve", "plot_allocation"),
    ("profile", "plot"),
    ("atlas", "plot"),
]


def drawn(ax):
    """What stands in axes, as plain values."""
    bars = [
        np.asarray(p.get_path().vertices) @ p.get_patch_transform().get_matrix()[:2, :2].T
        for p in ax.patches
    ]
    return {
        "lines": [line.get_xydata() for line in ax.lines],
        "maps": [
            m.get_array().filled(-9.0)
            for m in [*ax.images, *ax.collections]
            if m.get_array() is not None
        ],
        "bars": bars,
        "words": [text.get_text() for text in ax.texts],
        "labels": [ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()],
        "range": [*ax.get_xlim(), *ax.get_ylim()],
    }


@pytest.mark.parametrize(("kind", "method"), SINGLE)
def test_the_users_axes_get_what_a_figure_of_its_own_shows(kind, method):
    draw = getattr(KINDS[kind](), method)
    alone = draw()
    assert isinstance(alone, Figure)
    figure = Figure(layout="constrained")
    other, ax = figure.subplots(1, 2)
    assert draw(ax=ax) is ax
    assert not other.has_data()
    assert len(figure.axes) == len(alone.axes) + 1
    mine, own = drawn(ax), drawn(alone.axes[0])
    assert any(len(mine[part]) for part in ("lines", "maps", "bars"))
    for part, values in own.items():
        assert len(mine[part]) == len(values)
        for found, expected in zip(mine[part], values, strict=True):
            np.testing.assert_array_equal(found, expected)
    with pytest.raises(ph.PosheadsError, match="ax is a ndarray; expected one matplotlib Axes"):
        draw(ax=figure.subplots(1, 2))


def test_the_users_axes_keep_the_users_colours():
    with matplotlib.rc_context({"text.color": "white", "axes.labelcolor": "yellow"}):
        before = dict(matplotlib.rcParams)
        ax = Figure().subplots()
        toy_scores().plot(highlight=(0, 0), ax=ax)
        assert dict(matplotlib.rcParams) == before
    assert {text.get_color() for text in ax.get_legend().get_texts()} == {"white"}
    assert ax.lines[-1].get_color() == ax.xaxis.label.get_color() == "yellow"


@pytest.mark.parametrize(
    ("highlight", "expected"),
    [
        ("L2H1", ["L2H1"]),
        ((2, 1), ["L2H1"]),
        (["L2H1", (0, 3), "2.1"], ["L0H3", "L2H1"]),
        ([], []),
    ],
)
def test_highlighted_heads_are_marked_where_they_score(highlight, expected):
    scores = toy_scores()
    plain, ax = (scores.plot(**more).axes[0] for more in ({}, {"highlight": highlight}))
    marks = {
        text.get_text(): line.get_xdata()
        for text, line in zip(ax.texts, ax.lines[len(plain.lines) :], strict=True)
    }
    assert sorted(marks) == expected
    for name, (left, right) in marks.items():
        assert left == right == float(scores.rho[int(name[1]), int(name[3])])


def test_heads_without_a_score_are_not_highlighted():
    scores = toy_scores()
    (bare,) = (~scores.rho.isfinite()).nonzero()[:1].tolist()
    for wrong in ("L99H0", tuple(bare)):
        with pytest.raises(ph.PosheadsError, match="to be highlighted, but it has no score"):
            scores.plot(highlight=wrong)
    with pytest.raises(ph.PosheadsError, match="names like 'L7H8'"):
        scores.plot(highlight="the best")

"""Views: their numbers against the model's own, and their pages in Chromium with hostile text."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from importlib.resources import files

import numpy as np
import pytest
import torch
from scipy import stats

import tl_posheads as ph
from helpers import small_models
from helpers.browser import HOSTILE, needs_browser, opened
from helpers.scores_by_hand import head_scores, toy_scores
from tl_posheads import views
from tl_posheads.scoring.maps import HeadMaps, _reduced
from tl_posheads.views import page as shown
from tl_posheads.views.page import page

HEADS = [(1, 2), (0, 3), (1, 0)]


@pytest.fixture(scope="module")
def llama():
    return small_models.rotary_model("Llama")


def tokens_of(n, seed=0):
    return torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(seed))


def test_maps_against_the_models_own_pattern(llama):
    tokens = tokens_of(12)
    maps = ph.head_maps(llama, tokens, HEADS, q_pos=[5, -1])
    with ph.rotary_hook_points(llama):
        _, cache = llama.run_with_cache(tokens[None])
    assert maps.heads == HEADS
    assert maps.step == 1
    assert maps.q_pos == [5, 11]
    for i, (layer, head) in enumerate(HEADS):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, head].double()
        torch.testing.assert_close(maps.pattern[i], pattern)
        geometry = ph.RotaryGeometry.from_model(llama)[layer]
        parts = ph.dimension_contributions(
            cache[f"blocks.{layer}.attn.hook_rot_q"][0],
            cache[f"blocks.{layer}.attn.hook_rot_k"][0],
            geometry,
        )
        for q in range(12):
            far = sum(float(pattern[q, k]) * (q - k) for k in range(q + 1))
            assert float(maps.distance[i, q]) == pytest.approx(far, abs=1e-6)
            for k in range(12):
                found = float(maps.dominant[i, q, k])
                if k >= q:
                    assert math.isnan(found)
                    continue
                true = float(ph.dominant_dimension(parts[head, q, k]))
                assert found == pytest.approx(true, abs=1e-5)
        weight = pattern[7, :7] / pattern[7, :7].sum()
        mean = (weight * maps.dominant[i, 7, :7]).sum()
        assert float(maps.dimension[i, 7]) == pytest.approx(float(mean), abs=1e-6)
        torch.testing.assert_close(maps.row_pattern[i], maps.pattern[i, [5, 11]])
        torch.testing.assert_close(maps.row_dominant[i], maps.dominant[i, [5, 11]], equal_nan=True)


def test_cells_are_means_of_what_they_hold():
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(7, 7, generator=generator).double().tril()
    dominant = torch.rand(7, 7, generator=generator).double()
    dominant = torch.where(torch.ones(7, 7).tril(-1) > 0, dominant, float("nan"))
    cells, mean, _, _ = _reduced(pattern, dominant, 3)
    assert cells.shape == mean.shape == (3, 3)
    for a in range(3):
        for b in range(3):
            queries, keys = range(3 * a, min(7, 3 * a + 3)), range(3 * b, min(7, 3 * b + 3))
            total = sum(float(pattern[q, k]) for q in queries for k in keys)
            assert float(cells[a, b]) == pytest.approx(total / len(queries))
            seen = [float(dominant[q, k]) for q in queries for k in keys if k < q]
            if seen:
                assert float(mean[a, b]) == pytest.approx(sum(seen) / len(seen))
            else:
                assert math.isnan(float(mean[a, b]))


def test_long_texts_are_put_together_and_say_so(llama):
    maps = ph.head_maps(llama, tokens_of(50), HEADS[:1], max_cells=20)
    assert maps.step == 3
    assert maps.pattern.shape == (1, 17, 17)
    torch.testing.assert_close(maps.pattern.sum(-1), torch.ones(1, 17).double(), atol=1e-5, rtol=0)
    assert "50 tokens; each cell merges 3 by 3 of them" in views.attention(maps).html


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(heads=[]), "at least one"),
        (dict(heads=[(0, 9)]), "layer 0 head 9"),
        (dict(q_pos=[12]), "positions are 0 to 11"),
        (dict(max_cells=1), "max_cells=1"),
    ],
)
def test_refusals(llama, change, said):
    with pytest.raises(ph.PosheadsError, match=said):
        ph.head_maps(llama, tokens_of(12), **{"heads": HEADS, **change})


def test_the_model_is_left_as_it_was(llama):
    before = llama(tokens_of(12)[None])
    ph.head_maps(llama, tokens_of(12), HEADS)
    assert torch.equal(before, llama(tokens_of(12)[None]))
    assert not any(point.fwd_hooks for point in llama.hook_dict.values())


def test_saved_maps_come_back_bit_for_bit(tmp_path):
    maps = hostile_maps()
    again = HeadMaps.load(maps.save(tmp_path / "maps"))
    for field in fields(HeadMaps):
        given, found = getattr(maps, field.name), getattr(again, field.name)
        assert torch.equal(given, found) if torch.is_tensor(given) else given == found
    (tmp_path / "maps" / "maps.safetensors").write_bytes(b"half")
    with pytest.raises(ph.PosheadsError, match="damaged"):
        HeadMaps.load(tmp_path / "maps")


def hostile_maps(n=13, heads=2):
    """Maps of a text made of the worst tokens."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(heads, n, n, generator=generator).double().tril()
    dominant = torch.rand(heads, n, n, generator=generator).double() * 5
    tokens = [HOSTILE[i % len(HOSTILE)] for i in range(n)]
    return HeadMaps(
        model=HOSTILE[0],
        heads=[(0, h) for h in range(heads)],
        tokens=tokens,
        step=1,
        pattern=pattern / pattern.sum(-1, keepdim=True),
        dominant=dominant,
        distance=pattern.sum(-1),
        dimension=dominant.mean(-1),
        q_pos=[n - 1],
        row_pattern=pattern[:, -1:],
        row_dominant=dominant[:, -1:],
        n_pairs=[6] * heads,
        wavelengths=(10.0 ** torch.arange(1, 7)).repeat(heads, 1),
    )


VIEWS = {
    "attention": lambda maps: views.attention(maps),
    "attention_distance": lambda maps: views.attention_distance(maps),
    "attention_from": lambda maps: views.attention_from(maps),
    "farthest_tokens": lambda maps: views.farthest_tokens(maps, k=2, around=20),
    "score_map": lambda maps: views.score_map(toy_scores(HOSTILE[0]), maps),
}


@needs_browser
@pytest.mark.parametrize("name", list(VIEWS))
def test_hostile_text_stays_text(tmp_path, name):
    path = VIEWS[name](hostile_maps()).save(tmp_path / "view.html")
    with opened(path) as found:
        if name == "score_map":
            found.page.click('button[aria-label^="layer 0 head 1"]')
            assert "Score" in found.page.inner_text("#head")
            assert "rotation alone" in found.page.inner_text("#head")
        found.page.wait_for_selector("#drawing0 > *")
        found.page.wait_for_timeout(300)
        assert found.page.evaluate("window.hacked") is None
        assert found.page.locator("main img").count() == 0
        assert found.page.locator("script").count() == 4
        assert HOSTILE[0] in found.page.text_content("h1")
        assert found.said == []
        assert found.asked == []


@needs_browser
@pytest.mark.parametrize("name", list(VIEWS))
def test_nothing_serious_for_those_who_cannot_see_it(tmp_path, name):
    from axe_playwright_python.sync_playwright import Axe

    path = VIEWS[name](hostile_maps()).save(tmp_path / "view.html")
    with opened(path, bypass_csp=True) as found:
        if name == "score_map":
            found.page.click('button[aria-label^="layer 0 head 1"]')
        found.page.wait_for_selector("#drawing0 > *")
        found.page.wait_for_timeout(300)
        wrong = Axe().run(found.page).response["violations"]
        assert [v["id"] for v in wrong if v["impact"] in ("serious", "critical")] == []


@needs_browser
@pytest.mark.parametrize("mended", [True, False])
def test_the_text_shown_is_the_text_given(tmp_path, mended, monkeypatch):
    if not mended:  # a circuitsvis whose script isn't known
        script = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text()
        monkeypatch.setattr(shown, "_circuitsvis", lambda: (script, False))
    else:
        assert shown._circuitsvis()[1]
    maps = hostile_maps()
    with opened(views.attention_distance(maps).save(tmp_path / "view.html")) as found:
        found.page.wait_for_selector("#drawing0 > *")
        assert found.page.evaluate("window.hacked") is None
        text = found.page.text_content("#drawing0").replace("\xa0", " ")
        if mended:  # as data it is what was given, one code point like the other
            points = found.page.evaluate(
                "data.shown.tokens.map(t => [...t].map(c => c.codePointAt(0)))"
            )
            assert points == [[ord(letter) for letter in token] for token in maps.tokens]
    for token in maps.tokens:
        # HTML knows no NUL, and white space is shown as spaces.
        assert re.sub(r"\s", " ", token.replace("\0", "\ufffd")) in text or "\0" in token, token


@needs_browser
def test_a_view_in_a_notebook_is_a_frame_of_its_own(tmp_path):
    view = views.attention_distance(hostile_maps())
    (tmp_path / "notebook.html").write_text(f"<html><body>{view._repr_html_()}</body></html>")
    with opened(tmp_path / "notebook.html") as found:
        frame = found.page.frame_locator("iframe")
        frame.locator("#drawing0 > *").first.wait_for()
        assert found.page.evaluate("window.hacked") is None
        assert [line for line in found.said if "sandbox" not in line] == []
        assert found.asked == []


def data_of(view):
    return json.loads(view.html.split('id="data">')[1].split("</script>")[0])


def narrow_maps():
    """Heads that move between pairs 18 and 20 of 32."""
    maps = hostile_maps(n=40)
    rng = torch.Generator().manual_seed(1)
    dominant = 18 + 2 * torch.rand(2, 40, 40, generator=rng).double()
    return replace(
        maps,
        dominant=dominant.masked_fill(torch.ones(40, 40).triu() > 0, float("nan")),
        dimension=dominant.mean(-1),
        row_dominant=dominant[:, -1:],
        n_pairs=[32, 32],
        wavelengths=(6.0 * 1e5 ** (torch.arange(32) / 32)).repeat(2, 1),
    )


def test_dimensions_are_shades_of_a_heads_own_range():
    maps = narrow_maps()
    attention, attention_distance, attention_from = (
        data_of(view(maps))
        for view in (views.attention, views.attention_distance, views.attention_from)
    )
    for i in range(2):
        places = [
            (maps.dominant[i], torch.tensor(attention["shown"]["attention"][2 * i + 1])),
            (maps.dimension[i], torch.tensor(attention_distance["shown"]["values"])[:, 2 * i + 1]),
            (
                maps.row_dominant[i, 0],
                torch.tensor(attention_from["shown"]["values"])[:, 2 * i + 1],
            ),
        ]
        bars = [
            found["bars"][i]["ticks"] for found in (attention, attention_distance, attention_from)
        ]
        for (values, shades), ticks in zip(places, bars, strict=True):
            low, high = np.nanpercentile(values.numpy(), [2, 98])
            expected = np.nan_to_num(np.clip((values.numpy() - low) / (high - low), 0, 1))
            np.testing.assert_allclose(shades.numpy(), expected, atol=1e-3)
            assert (shades.min(), shades.max()) == (0, 1)
            for tick, pair in zip(ticks, np.linspace(low, high, 5), strict=True):
                number, wave = re.fullmatch(r"pair (\S+): (\S+) tokens", tick).groups()
                assert float(number) == pytest.approx(pair, abs=0.006)
                turn = 6 * 1e5 ** (pair / 32)
                assert float(wave.replace(",", "")) == pytest.approx(turn, abs=0.6)


def test_a_pair_that_stands_still_has_no_wavelength():
    from tl_posheads.views.scales import pair_bar

    still = torch.tensor([10.0, 100.0, float("inf")])
    assert pair_bar("D", 0, 1, still)["ticks"][4] == "pair 1.00: 100 tokens"
    assert pair_bar("D", 1, 2, still)["ticks"][2] == "pair 1.50: no turn"
    assert pair_bar("D", 0, 0, torch.tensor([10.0]))["ticks"][0] == "pair 0.00: 10 tokens"


@needs_browser
def test_the_score_map_is_white_at_zero(tmp_path):
    scores = toy_scores()
    rho = scores.rho.numpy()
    limit = np.nanmax(np.abs(rho))
    with opened(views.score_map(scores).save(tmp_path / "view.html")) as found:
        ground = "b => getComputedStyle(b).backgroundColor"
        for i, j in np.argwhere(np.isfinite(rho)):
            button = found.page.locator(f'button[aria-label^="layer {i} head {j},"]')
            end = np.array([33, 102, 172] if rho[i, j] < 0 else [178, 24, 43])
            mixed = 255 + abs(rho[i, j]) / limit * (end - 255)
            seen = [int(c) for c in re.findall(r"\d+", button.evaluate(ground))]
            np.testing.assert_allclose(seen, mixed, atol=1)
        assert found.page.evaluate("diverging(0, 1)") == [255, 255, 255]
        bar = found.page.locator(".bar").get_attribute("aria-label")
        assert bar.startswith("colour bar of positional score: -")
        assert f"{limit:.2f}" in bar
        assert found.said == []


def test_size_and_policy():
    maps = hostile_maps(n=128, heads=4)
    maps = replace(maps, tokens=maps.tokens * 16, step=16)
    for make in VIEWS.values():
        view = make(maps)
        assert len(view.html.encode()) < 5_000_000
        assert "default-src 'none'; script-src 'sha256-" in view.html
        assert "http-equiv" in view.html


def test_data_that_ends_no_element_and_no_number_that_json_lacks():
    view = page("t", "n", {"a": ["</script>", "<!--", float("nan"), 0.123456789]}, "", height=9)
    data = view.html.split('id="data">')[1].split("</script>")[0]
    assert data == '{"a":["\\u003c/script\\u003e","\\u003c!--",null,0.1235]}'


def test_samples_lie_apart():
    maps = hostile_maps(n=13)
    maps = replace(maps, distance=torch.arange(26.0).view(2, 13))
    data = views.farthest_tokens(maps, k=3, around=2).html
    assert "among 13 tokens" in data
    with pytest.raises(ph.PosheadsError, match="k=0"):
        views.farthest_tokens(maps, k=0)
    with pytest.raises(ph.PosheadsError, match="start=13"):
        views.attention_distance(maps, start=13)
    with pytest.raises(ph.PosheadsError, match="q_pos=3"):
        views.attention_from(maps, 3)


@pytest.fixture(scope="module")
def curve(llama):
    heads = [(0, 0), (1, 1)]
    return ph.dominant_dimension_curve(llama, tokens_of(60)[None], heads=heads, progress=False)


def test_curve_figure_shows_the_means_it_was_given(curve):
    fig = curve.plot(trained=40)
    (ax,) = fig.axes
    lines = [line for line in ax.lines if len(line.get_xdata()) > 2]
    assert [line.get_label() for line in lines] == ["layer 0, head 0", "layer 1, head 1"]
    for i, line in enumerate(lines):
        # Up to distance 8 an eighth of an octave holds one distance or none.
        x, y = line.get_xdata(), line.get_ydata()
        for distance in range(1, 8):
            at = int(abs(x - distance).argmin())
            assert x[at] == pytest.approx(distance)
            assert y[at] == pytest.approx(float(curve.mean[i, distance - 1]))
    assert "tokens" in ax.get_xlabel()
    assert "rotary pair" in ax.get_ylabel()
    assert 40 in [line.get_xdata()[0] for line in ax.lines]


def test_allocation_figure_has_a_row_for_every_pair(curve):
    fig = curve.plot_allocation((1, 1))
    mesh = fig.axes[0].collections[0].get_array()
    assert mesh.shape[0] == curve.allocation.shape[1]
    assert mesh[:, 0].sum() == pytest.approx(1, abs=1e-6)
    assert mesh[2, 0] == pytest.approx(float(curve.allocation[1, 2, 0]))
    labels = [label.get_text() for label in fig.axes[-1].get_yticklabels()]
    assert labels[0] == f"{float(curve.wavelengths[1, 0]):,.0f}"
    with pytest.raises(ph.PosheadsError, match="the curve has"):
        curve.plot_allocation((5, 5))


def test_a_saved_curve_comes_back_bit_for_bit(curve, tmp_path):
    again = type(curve).load(curve.save(tmp_path / "curve"))
    assert again.heads == curve.heads
    assert again.levels == curve.levels
    for name in ("distance", "n_qk_pairs", "mean", "quantiles", "allocation", "wavelengths"):
        torch.testing.assert_close(
            getattr(again, name), getattr(curve, name), rtol=0, atol=0, equal_nan=True
        )
    (tmp_path / "curve" / "curve.safetensors").write_bytes(b"half")
    with pytest.raises(ph.PosheadsError, match="damaged"):
        type(curve).load(tmp_path / "curve")


def facts_of(scores):
    data = views.score_map(scores).html.split('id="data">')[1].split("</script>")[0]
    return json.loads(data)["facts"]


def test_a_heads_facts_in_the_map():
    scores = head_scores([[0.5, float("nan")]], n_documents=4)
    rows = scores.by_document("rho")[:, 0, 0].numpy()
    low, high = stats.t.interval(0.95, 3, rows.mean(), stats.sem(rows))
    ((said, blank),) = facts_of(scores)
    assert blank is None
    assert said == (
        f"Score 0.500, the mean over 4 documents, 95 % interval {low:.3f} to {high:.3f}, p "
        f"{stats.ttest_1samp(rows, 0.0).pvalue:.3g} corrected for the number of heads; rotation "
        "alone 0.300, content alone 0.150. Mean dominant dimension: 2.5 near, 3.5 far."
    )
    ((said, _),) = facts_of(head_scores([[0.5, float("nan")]], n_documents=1))
    assert said.startswith("Score 0.500; rotation alone 0.300")
    # FoPE that adds waves has no rotation to turn on.
    values = scores.values.clone()
    values[1:3] = float("nan")
    ((said, _),) = facts_of(replace(scores, values=values))
    assert "alone" not in said


def test_score_figure_counts_every_head_and_those_above_zero():
    scores = toy_scores()
    fig = scores.plot()
    (ax,) = fig.axes
    everything, above = ax.patches[:40], ax.patches[40:80]
    assert sum(patch.get_height() for patch in everything) == 20
    assert sum(patch.get_height() for patch in above) == len(scores.positional()) > 0
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [
        "all 20 heads",
        f"{len(scores.positional())} above zero (p < 0.05, corrected)",
        "rotation alone",
    ]
    edges = [patch.get_x() for patch in everything] + [everything[-1].get_x() + 1]
    counts = np.histogram(0.6 * scores.rho[scores.rho.isfinite()].numpy(), edges)[0]
    outline = ax.patches[80].get_xy()
    assert outline[:, 1].max() == counts.max()
    assert outline[outline[:, 1] > 0, 0].min() == pytest.approx(edges[int(counts.nonzero()[0][0])])
    assert ax.get_ylabel() == "heads"
    (ax,) = toy_scores(n_documents=1).plot().axes  # no test
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "all 20 heads",
        "rotation alone",
    ]
    scores.values[1:3] = float("nan")
    (ax,) = replace(scores).plot().axes
    assert "rotation alone" not in [text.get_text() for text in ax.get_legend().get_texts()]
    with pytest.raises(ph.PosheadsError, match="no head has a score"):
        toy_scores(scored=False).plot()


def test_the_users_style_is_left_alone_and_ours_is_kept():
    import matplotlib

    with matplotlib.rc_context({"axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        (ax,) = toy_scores().plot().axes
        assert dict(matplotlib.rcParams) == before
    assert ax.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert not ax.spines["top"].get_visible()

"""The page: opened in Chromium, with hostile names, without a network."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from helpers import results_by_hand, small_models
from helpers.browser import CHROMIUM, needs_browser
from helpers.browser import opened as watched
from helpers.scores_by_hand import toy_scores
from tl_posheads import AblationStudy, dominant_dimension_curve, head_maps
from tl_posheads.views.report import render, write_report
from tl_posheads.views.report_sections import (
    _positive_control,
    ablation_section,
    atlas_section,
)

HOSTILE = (
    "</script><script>document.title='hacked'</script>\"'&\u2028\u202e<img src=x onerror=alert(1)>"
)


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path):
    write_report(toy_scores(), tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert page.startswith(render(toy_scores()).split("<section")[0])
    assert "default-src 'none'" in page
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    ours = {"data:,", "https://arxiv.org/abs/2410.08703"}
    assert {x for x in addresses if not x.startswith("data:image/png;base64,")} <= ours
    best = toy_scores().top(1)[0]
    assert f"layer {best[0]} head {best[1]}" in page
    assert page.count('<td class="none">') == 4
    assert len(page) < 1_000_000


def test_a_page_without_scores_says_so():
    assert "No head has a score." in render(toy_scores(scored=False))


def cells_of(page):
    """The first row of the table of the best heads, by column."""
    table = page.split('aria-label="table: best heads"')[1]
    names = re.findall(r'<th scope="col">(.*?)</th>', table)
    row = table.split("<tbody>")[1].split("</tr>")[0]
    return dict(zip(names[1:], re.findall(r"<td>(.*?)</td>", row))), row


def test_the_table_shows_the_measures_of_the_best_head():
    found = toy_scores()
    layer, head = found.top(1)[0]
    cells, row = cells_of(render(found))
    # An independent computation: the head's documents, scipy's interval and test.
    rows = found.by_document("rho")[:, layer, head].numpy()
    low, high = stats.t.interval(0.95, 7, rows.mean(), stats.sem(rows))
    every = found.by_document("rho").flatten(1).numpy()
    every = every[:, ~np.isnan(every[0])]
    p = stats.ttest_1samp(every, 0.0).pvalue
    adjusted = dict(zip(every.mean(0), stats.false_discovery_control(p)))
    best = max(adjusted)
    p_shown = "&lt;0.001" if adjusted[best] < 0.001 else f"{adjusted[best]:.3f}"
    assert cells["rho"] == f"<b>{best:+.3f}</b>"
    assert cells["95% interval"] == f"{low:+.3f} to {high:+.3f}".replace("-", "\N{MINUS SIGN}")
    assert cells["p (adjusted)"] == p_shown
    assert cells["rotation"] == f"{0.6 * best:+.3f}"
    assert cells["content"] == f"{0.3 * best:+.3f}"
    assert cells["D near → far"] == f"{3 - best:.1f} → {3 + best:.1f}"
    assert cells["window"] == ("64" if layer % 2 else "–")
    # In the picture the ring and the square lie where these numbers lie on the axis of the dot.
    zero = float(re.search(r'class="zero" x1="(.*?)"', row)[1])
    dot = float(re.search(r'<circle cx="(.*?)"', row)[1])
    ring = float(re.search(r'<circle class="rotation" cx="(.*?)"', row)[1])
    square = float(re.search(r'<rect class="content" x="(.*?)"', row)[1]) + 3.5
    assert ring - zero == pytest.approx(0.6 * (dot - zero), abs=0.2)
    assert square - zero == pytest.approx(0.3 * (dot - zero), abs=0.2)


def test_the_first_line_counts_the_heads_above_zero_after_correction():
    found = toy_scores()
    every = found.by_document("rho").flatten(1).numpy()
    every = every[:, ~np.isnan(every[0])]
    adjusted = stats.false_discovery_control(stats.ttest_1samp(every, 0.0).pvalue)
    n = int(((adjusted < 0.05) & (every.mean(0) > 0)).sum())
    assert 0 < n < (every.mean(0) > 0).sum()
    lead = re.search(r'<p class="lead">(.*?)</p>', render(found))[1]
    assert f"{n} of 20 heads have a mean rho above zero" in lead
    assert "over 8 documents" in lead


def test_one_document_has_no_interval_and_the_page_says_what_to_give():
    page = render(toy_scores(n_documents=1))
    cells, row = cells_of(page)
    assert cells["95% interval"] == cells["p (adjusted)"] == "–"
    assert row.count("<line") == 1  # that of zero
    assert "give 8 or more shorter ones" in page


def opened(path, *options):
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--disable-dev-shm-usage",
            "--virtual-time-budget=3000",
            *options,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
@pytest.mark.parametrize("name", ["toy", HOSTILE])
def test_chromium_shows_the_page_without_a_word_on_its_console(tmp_path, name):
    write_report(toy_scores(name), tmp_path / "index.html")
    dom, console = opened(tmp_path / "index.html", "--dump-dom")
    assert console == []
    assert "hacked" not in re.findall(r"<title>(.*?)</title>", dom, re.S)[0].split("&lt;")[0]
    assert "<title>Positional Heads of" in dom
    assert dom.count("<img") == dom.count('<img class="figure" alt="') == 1
    # The script ran: it gives the map a single stop of the Tab key.
    assert dom.count('tabindex="-1"') == 19


STUDY = Path(__file__).parents[2] / "benchmarks" / "results" / "smollm2-ablation" / "sets"


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    """The page with a curve, attention, an atlas and an ablation study."""
    llama = small_models.rotary_model("Llama")
    tokens = torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    curve = dominant_dimension_curve(llama, tokens, heads=[(0, 1), (1, 0)], progress=False)
    maps = head_maps(llama, tokens[0], [(0, 1), (1, 0)])
    path = tmp_path_factory.mktemp("report") / "index.html"
    study = AblationStudy.load(STUDY)
    more = dict(curve=curve, maps=maps, atlas=results_by_hand.atlas(), ablation=study)
    write_report(toy_scores(HOSTILE), path, **more)
    return path, study


def test_other_results_bring_sections(full_page):
    path, study = full_page
    page = path.read_text()
    for verdict in study.verdict().values():
        assert escape(verdict) in page
    assert page.count('<img class="figure" alt="') == 7
    assert len(re.findall(r"<tr><td>(?:passkey|multi_key)</td>", page)) == len(study.to_pandas())
    assert path.stat().st_size < 10_000_000


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_for_those_who_cannot_see_it(full_page, scheme):
    from axe_playwright_python.sync_playwright import Axe

    # axe is a script of its own, which the page's policy would not let in.
    options = dict(color_scheme=scheme, bypass_csp=True, viewport={"width": 390, "height": 800})
    with watched(full_page[0], **options) as found:
        wrong = Axe().run(found.page).response["violations"]
        assert [v["id"] for v in wrong if v["impact"] in ("serious", "critical")] == []
        # Nothing is wider than a phone but what scrolls by itself.
        assert found.page.evaluate("document.documentElement.scrollWidth") == 390


@needs_browser
def test_the_map_by_keyboard_alone(full_page):
    with watched(full_page[0]) as found:
        for _ in range(8):
            found.page.keyboard.press("Tab")
            if found.page.evaluate("document.activeElement.dataset.i") is not None:
                break
        first = found.page.evaluate("document.activeElement.getAttribute('aria-label')")
        found.page.keyboard.press("ArrowRight")
        second = found.page.evaluate("document.activeElement.getAttribute('aria-label')")
        frame = found.page.frame_locator("iframe")
        frame.locator("#drawing0 canvas").first.wait_for()
        assert first.startswith("layer 0 head 0")
        assert second.startswith("layer 0 head 1")
        found.page.keyboard.press("Enter")
        told = found.page.inner_text("#detail")
        assert "Layer 0, head 1" in told
        for name in ("rho", "95% interval", "p (adjusted)", "rotation", "content", "D near → far"):
            assert name in told
        assert "documents 8" in told
        rho = float(toy_scores().rho[0, 1])
        assert f"rotation {0.6 * rho:+.3f}".replace("-", "\N{MINUS SIGN}") in told
        assert found.said == []
        assert found.asked == []


@needs_browser
def test_the_heads_of_an_atlas_unfold(full_page):
    with watched(full_page[0]) as found:
        section = found.page.locator("section[aria-labelledby=atlas-title]")
        table = section.locator("table")
        assert not table.is_visible()
        section.locator("summary").focus()
        found.page.keyboard.press("Enter")
        assert table.is_visible()
        assert table.locator("tbody tr").count() == 5
        first = results_by_hand.atlas().ranked().iloc[0]
        cells = table.locator("tbody tr").first.locator("td").all_inner_texts()
        assert cells[:3] == [f"{first[x]:.3g}" for x in ("layer", "head", "rho")]
        for image in section.locator("img").all():
            assert image.evaluate("x => x.naturalWidth") > 300
        assert found.said == []
        assert found.asked == []


def test_an_atlas_section_says_what_its_pictures_show():
    atlas = results_by_hand.atlas()
    section = atlas_section(atlas)
    best = atlas.heads().nlargest(2, "rho")
    said = re.findall(r'<img class="figure" alt="(.*?)"', section)
    assert len(said) == 3
    assert said[0].startswith("Share of usage in every rotary pair of 5 heads, by rho.")
    pairs = atlas.to_pandas()
    for alt, row in zip(said[1:], best.to_dict("records")):
        own = pairs[(pairs["layer"] == row["layer"]) & (pairs["head"] == row["head"])]
        most = own.nlargest(1, "usage_share").iloc[0]
        assert alt.startswith(f"Layer {row['layer']} head {row['head']}: usage")
        assert f"{most['usage_share']:.3g} of it, in the pair" in alt
        assert f"wavelength of {most['wavelength']:.0f} tokens" in alt
        assert f"highest at {row['preferred']:.0f} tokens" in alt
    assert "The 5 heads with the highest positional score</summary>" in section
    assert section.count("<tr><td>") == 5
    plain = atlas_section(dataclasses.replace(atlas, scores=None))
    assert "5 heads, by layer." in plain
    assert "with the highest share of usage in slow pairs" in plain
    assert ">rho</th>" not in plain


def test_an_ablation_section_tells_of_the_positive_control():
    section = ablation_section(results_by_hand.study())
    table = results_by_hand.study().positive_control()
    said = re.search(
        r"<p>Positive control, the model&#x27;s retrieval heads: (.*?)\.</p>", section
    )[1]
    assert len(said.split("; ")) == len(table) == 4
    first = table.iloc[0]
    assert said.startswith(
        f"passkey {first['effect']:+.2f} (p = {first['p_adjusted']:.3f}) without 1 heads"
    )
    study = results_by_hand.study()
    study.conditions["kind"] = study.conditions["kind"].replace("retrieval", "layer_matched")
    assert _positive_control(study).startswith("There is no positive control: no retrieval heads")

"""The page in a real browser: nothing is fetched, the console is quiet, the slider moves, charts are drawn."""

import pytest
from headless_browser import CHROMIUM, browser
from PIL import Image
from run_folder import write_run

from gdd_fast.report.report_page import write_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    one, other = write_run(folder / "one", layers=True), write_run(folder / "other", ticks=2, g_lr=0.5)
    write_page([one], folder / "one.html")
    write_page([one, other], folder / "two.html")
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


SHEET = 'document.querySelector("figure.after img")'


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_without_a_word_on_the_console(pages, tab, width, scheme, tmp_path):
    for name in ("one", "two"):
        tab.open(pages / f"{name}.html", width, scheme=scheme)
        assert tab.value("document.documentElement.scrollWidth") == width, "nothing sticks out"
        drawn, places = tab.value(
            '[...document.querySelectorAll(".chart")].map(c => c.querySelectorAll("canvas").length)'
            ".reduce(([a, b], n) => [a + n, b + 1], [0, 0])"
        )
        assert drawn == places > 5
        loaded = tab.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert loaded and tab.value("document.images.length") >= 3
    tab.screenshot(tmp_path / "page.png")
    paper = Image.open(tmp_path / "page.png").convert("L").getpixel((2, 2))
    assert paper > 200 if scheme == "light" else paper < 60
    assert tab.problems == []


def test_the_slider_moves_the_sheet(pages, tab):
    tab.open(pages / "one.html")
    shown = "[document.getElementById('at').textContent, document.querySelector('figcaption output').textContent]"
    last = tab.value(f"{SHEET}.src")
    assert tab.value(shown) == ["4,000 images", "4,000"]
    tab.value("document.getElementById('slider').focus()")
    tab.press("ArrowLeft")
    assert tab.value(shown) == ["3,000 images", "3,000"]
    before = tab.value(f"{SHEET}.src")
    assert before != last
    tab.press("Home")
    assert tab.value(shown) == ["0 images", "0"]
    assert tab.value(f"{SHEET}.src") not in (before, last)
    tab.press("End")
    assert tab.value(f"{SHEET}.src") == last
    assert tab.problems == []


def test_a_run_that_has_come_less_far_stays_at_its_last_sheet(pages, tab):
    tab.open(pages / "two.html")
    outputs = "[...document.querySelectorAll('figcaption output')].map(o => o.textContent)"
    assert tab.value(outputs) == ["4,000", "2,000"]
    tab.value("document.getElementById('slider').focus()")
    for _ in range(3):
        tab.press("ArrowLeft")
    assert tab.value(outputs) == ["1,000", "1,000"]


def test_the_play_button_runs_through_all_sheets_to_the_end(pages, tab):
    tab.open(pages / "one.html")
    at = "document.getElementById('at')"
    tab.value(
        f"seen = [], new MutationObserver(() => seen.push({at}.textContent)).observe({at}, {{childList: true}}), 1"
    )
    tab.click("#play")
    at_end = "if (seen.at(-1) === '4,000 images') { clearInterval(t); done(seen) }"
    seen = tab.value(f"new Promise(done => {{ const t = setInterval(() => {{ {at_end} }}) }})")
    assert seen == ["0 images", "1,000 images", "2,000 images", "3,000 images", "4,000 images"]


def test_axis_and_scale_of_the_charts(pages, tab):
    legend = "document.querySelector('.chart .u-legend').textContent"
    tab.open(pages / "one.html")
    assert tab.value(legend) == "images4000fid2"
    tab.click("[data-axis=minutes]")
    assert tab.value(legend) == "minutes2fid2", "the latest values, until the mouse asks for others"
    tab.open(pages / "one.html")
    assert tab.value(legend).startswith("minutes"), "a choice survives a reload"
    tab.click("[data-axis=images]")
    tab.click(".chart .log")
    assert tab.value("document.querySelector('.chart .log').getAttribute('aria-pressed')") == "true"
    tab.scheme("dark")
    tab.settle()
    assert tab.value("document.querySelectorAll('.chart canvas').length") > 5
    assert tab.problems == []


def test_only_the_settings_that_differ(pages, tab):
    tab.open(pages / "two.html")
    rows = "[...document.querySelectorAll('#settings tbody tr')].filter(r => r.offsetHeight).map(r => r.innerText)"
    assert len(tab.value(rows)) > 30
    tab.click("#only")
    assert [row.split("\t")[0].strip() for row in tab.value(rows)] == ["g_lr", "duration_mimg"]

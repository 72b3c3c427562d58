"""The report in a real browser: nothing leaves the page, nothing overflows, and its numbers are those of results.csv.

Needs Chromium (Debian's package `chromium`, or Playwright's own); without one these tests skip.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, Outputs, nine, read_csv

from ddim_lab.report import build

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
WIDTHS = (360, 1600)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    with sync_api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, names)), None) or playwright.chromium.executable_path
        if not Path(found).is_file():
            pytest.skip("no Chromium here: install it (Debian: apt-get install chromium) to test the page in it")
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])  # CI runs as root
        yield launched
        launched.close()


class Opened:
    """A page as it was opened: what it said on the console, what it asked for."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str = "light") -> None:
        self.said: list[str] = []
        self.asked_for: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.asked_for.append(request.url))
        self.page.goto(path.as_uri())
        charts = self.page.locator("[data-chart]").count()
        self.page.wait_for_function(f"document.querySelectorAll('[data-chart] svg.marks').length == {charts}")

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))

    def values(self) -> list[list[str]]:
        """(field, cell, value) of every number that the page shows."""
        found = "Array.from(document.querySelectorAll('data[data-field]'), "
        shown: list[list[str]] = self.page.evaluate(found + "d => [d.dataset.field, d.dataset.cell, d.value])")
        return shown


@pytest.mark.parametrize(("width", "scheme"), [(WIDTHS[0], "light"), (WIDTHS[1], "dark")])
def test_it_holds_and_keeps_to_itself(tmp_path: Path, browser: Any, width: int, scheme: str) -> None:
    sweep = nine(tmp_path, title=HOSTILE, notes=HOSTILE).done()
    opened = Opened(browser, build(sweep), width, scheme)
    assert opened.said == []
    assert [url for url in opened.asked_for if not url.startswith("data:")] == [(sweep / "report.html").as_uri()]
    assert opened.overflow() <= 0
    drawn = opened.page.locator("[data-chart] svg.marks")
    assert drawn.count() == 6
    assert all(200 < drawn.nth(i).bounding_box()["width"] <= width for i in range(6))
    dark = opened.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") == (scheme == "light")
    opened.page.emulate_media(media="print")
    assert opened.overflow() <= 0 or width == WIDTHS[0]  # paper is wider than a phone
    opened.context.close()


def test_its_numbers_are_those_of_the_file(tmp_path: Path, browser: Any) -> None:
    sweep = nine(tmp_path).done()
    opened = Opened(browser, build(sweep), 1000)
    table = read_csv(sweep)
    shown = opened.values()
    assert {(field, cell) for field, cell, _ in shown} >= {
        (field, str(n)) for n in range(9) for field in ("fd", "seconds_per_image", "sha256", "repeat_max_abs_diff")
    }
    for field, cell, value in shown:
        assert value == table[int(cell)][field]
    opened.context.close()


def test_it_answers_the_hand(tmp_path: Path, browser: Any) -> None:
    """A chart tells its values where the pointer is; a recipe is one click away."""
    sweep = nine(tmp_path).done()
    opened = Opened(browser, build(sweep), 1200)
    points = opened.page.locator("[data-chart=fd_against_steps] path[aria-roledescription=point]")
    points.nth(0).hover()
    tip = opened.page.locator("#vg-tooltip-element")
    tip.wait_for(state="visible")
    row = read_csv(sweep)[0]
    assert f"{float(row['fd']):.2f} ± {float(row['fd_se']):.2f}" in tip.inner_text()
    recipe = opened.page.locator("#recipes details").first
    assert not recipe.locator("pre").is_visible()
    recipe.locator("summary").click()
    assert row["cell"] in recipe.locator("pre").inner_text()
    opened.context.close()


def test_twenty_cells_are_small_and_quick(tmp_path: Path, browser: Any) -> None:
    """The report of Table 1's 20 cells: under 5 MB, built in under 10 s, first painted in under 1 s from disk."""
    outputs = Outputs(tmp_path)
    for eta in (0.0, 0.2, 0.5, 1.0):
        for steps in (10, 20, 50, 100):
            outputs.add(eta, steps, size=32)
    for steps in (10, 20, 50, 100):
        outputs.add(1.0, steps, variance="large", sampler="ddpm_large", size=32)
    started = time.process_time()
    path = build(outputs.done())
    assert time.process_time() - started < 10
    assert path.stat().st_size < 5_000_000
    paints = []
    for _ in range(3):
        opened = Opened(browser, path, 1400)
        paints.append(opened.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        opened.context.close()
    assert min(paints) < 1000

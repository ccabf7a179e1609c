"""The report and a widget's own file opened from disk: views work, are linked, obey the strict policy, and ask nobody."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.compare_examples import comparison_example, heads_example
from tests.support.families import family
from tests.support.widget_examples import example, make_relevance, make_run, spots
from tests.support.widget_page import CONTRAST, SETTLE, come_late
from widgets import PatchExplorer, report

ATTACK = "</script><img src=x onerror=window.attacked=1><!--<script>window.attacked=1</script>"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, comparison = comparison_example()
    path = tmp_path_factory.mktemp("report") / "report.html"
    return report.write(path, run, comparison=comparison, heads=heads_example(run)[1], versions={"llava-lab": "0.1.0"})


class Opened:
    """A file in a browser without a network, and what it asked for and complained of."""

    def __init__(self, browser: Browser, path: Path, **context: object) -> None:
        self.context = browser.new_context(viewport={"width": 1000, "height": 900}, offline=True, **context)  # type: ignore[arg-type]
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda line: self.wrong.append(line.text) if line.type in ("error", "warning") else None)
        come_late(self.page)
        self.page.goto(path.as_uri())

    def painted(self) -> Opened:
        """Once every view has its picture."""
        self.page.wait_for_function(
            "() => [...document.querySelectorAll('canvas.lab-canvas')].every((canvas) => canvas.width !== 300)"
        )
        self.settle()
        return self

    def settle(self) -> None:
        self.page.evaluate(SETTLE)

    @property
    def outside(self) -> list[str]:
        return [url for url in self.asked if not url.startswith(("file:", "blob:", "data:"))]


@pytest.fixture
def opened(chromium: Browser, file: Path) -> Iterator[Opened]:
    page = Opened(chromium, file).painted()
    yield page
    page.context.close()
    assert page.outside == []
    assert page.wrong == []


def test_all_three_views_are_there_under_their_headings(opened: Opened) -> None:
    page = opened.page
    assert page.title() == "What color is the car?"
    for view in (".lab-explorer", ".lab-compare", ".lab-heads"):
        assert page.locator(view).is_visible()
    headings = ["Point at a word", "Compare methods", "Look through the heads", "Scores", "The maps", "How it was made"]
    assert page.locator("h2").all_inner_texts() == headings
    assert page.locator(".lab-report-answer").inner_text() == "The car is red."
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 1000


def test_a_patch_selected_in_one_view_is_selected_in_all(opened: Opened) -> None:
    page = opened.page
    page.locator(".lab-heads canvas.lab-canvas").click(position={"x": 10, "y": 10})
    page.mouse.move(2, 2)
    opened.settle()
    assert page.locator(".lab-count").inner_text() == "1 patch of 144 selected"
    assert page.locator(".lab-matrix-head .lab-legend-title").inner_text().endswith("on the selected patch")
    assert all(line.endswith("in selection") for line in page.locator(".lab-tile-line").all_inner_texts())
    page.locator(".lab-explorer").get_by_role("button", name="Clear").click()
    opened.settle()
    assert page.locator(".lab-matrix-head .lab-legend-title").inner_text().endswith("on the picture")


def test_a_patch_pointed_at_in_one_view_is_read_in_all(opened: Opened) -> None:
    page = opened.page
    tile = page.locator(".lab-tile-canvas").nth(3)
    tile.scroll_into_view_if_needed()
    box = tile.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 2.5 / 12 * box["width"], box["y"] + 4.5 / 12 * box["height"], steps=2)
    opened.settle()
    assert page.locator(".lab-readout .lab-place").all_inner_texts() == ["row 4, column 2"] * 3
    page.mouse.move(2, 2)
    opened.settle()
    assert "row 4, column 2" not in page.locator(".lab-readout .lab-place").all_inner_texts()


def test_word_and_method_go_from_view_to_view(opened: Opened) -> None:
    page = opened.page
    page.locator(".lab-heads").get_by_role("radio", name="car, ").click()
    opened.settle()
    for view in (".lab-explorer", ".lab-compare"):
        assert page.locator(view).get_by_role("radio", name="car, ").get_attribute("aria-checked") == "true"
    page.locator(".lab-tile").filter(has_text="occlusion").click()
    opened.settle()
    checked = page.locator(".lab-explorer").get_by_role("radiogroup", name="Method").get_by_role("radio", checked=True)
    assert checked.inner_text() == "occlusion"
    page.locator(".lab-explorer").get_by_role("radio", name="whole answer").click()  # the heads have no map of that
    opened.settle()
    assert page.locator(".lab-compare").get_by_role("radio", name="whole answer").get_attribute("aria-checked") == "true"
    assert page.locator(".lab-heads").get_by_role("radio", name="car, ").get_attribute("aria-checked") == "true"


@pytest.mark.long
def test_maps_no_better_than_random_are_said_to_be_in_every_view(opened: Opened) -> None:
    page = opened.page
    page.locator(".lab-explorer").get_by_role("radio", name="gradcam").click()
    opened.settle()
    assert page.locator(".lab-fallback").inner_text() == "Grey: this map was not shown to beat random ones."
    assert page.locator(".lab-stage-verdict").inner_text() == "not shown to beat random"
    assert page.locator("#scores td.lab-report-grey").first.inner_text() == "gradcam"


@pytest.mark.long
def test_scores_options_and_versions_can_be_read(opened: Opened) -> None:
    page = opened.page
    _, comparison = comparison_example()
    first = page.locator("#scores details").first
    assert first.locator("tbody tr").count() == len(comparison.methods)
    cells = first.locator("tbody tr").first.locator("td").all_inner_texts()
    row = comparison.rows(0)[0]
    assert cells[:4] == [row["method"], "yes", f"{row['gain']:.3f}", f"{row['deletion']:.3f}"]
    assert page.locator("#methods tbody tr").first.locator("td").all_inner_texts()[:4] == [
        "rollout",
        "rollout",
        "layers None",
        "1 forward",
    ]
    made = page.locator("#made").inner_text()
    for said in ("fingerprint of its weights", "0" * 16, "288 × 288 px", "llava-lab", "0.1.0", "numpy"):
        assert said in made
    page.get_by_text("Scores of the maps of the whole answer").click()
    expect(page.locator("#scores details").last.locator("tbody")).to_be_visible()


def test_attack_strings_stay_text(chromium: Browser, tmp_path: Path) -> None:
    run = make_run(f"A {ATTACK.replace(' ', '/')} car", question=ATTACK, model=ATTACK)
    rel = make_relevance(run, spots(run), method=ATTACK, options={ATTACK: ATTACK}, notes=(ATTACK,))
    path = report.write(tmp_path / "a.html", run, maps={ATTACK: rel, "b": rel}, title=ATTACK, versions={ATTACK: ATTACK})
    opened = Opened(chromium, path).painted()
    assert opened.wrong == []
    assert opened.page.title() == ATTACK
    assert opened.page.locator("h1").inner_text() == ATTACK
    assert opened.page.locator("main img").count() == 0
    assert opened.page.evaluate("() => window.attacked") is None
    opened.context.close()


@pytest.mark.long
def test_the_policy_lets_no_other_script_run(chromium: Browser, file: Path, tmp_path: Path) -> None:
    text = file.read_text("utf-8")
    policy = re.search(r'content="(default-src[^"]*)"', text)
    assert policy is not None
    assert "unsafe" not in policy[1]
    assert "http" not in policy[1]
    path = tmp_path / "injected.html"
    path.write_text(text.replace("</main>", '</main><script>window.attacked = 1</script><img src="http://evil.test/x">'), "utf-8")
    opened = Opened(chromium, path).painted()
    assert opened.page.evaluate("() => window.attacked") is None
    assert sum("Content Security Policy" in line for line in opened.wrong) >= 2  # the script, and the picture elsewhere
    assert opened.page.locator("body > img").evaluate("(node) => node.naturalWidth") == 0
    opened.context.close()


def test_without_scripts_the_still_pictures_and_tables_are_there(chromium: Browser, file: Path) -> None:
    opened = Opened(chromium, file, java_script_enabled=False)
    assert opened.page.locator("noscript img").count() == 3
    assert opened.page.locator("noscript img").first.bounding_box()["width"] > 600  # type: ignore[index]
    assert opened.page.locator("#scores tbody tr").first.is_visible()
    opened.context.close()


@family("scheme", ["light", "dark"], quick=("light",))
def test_text_stands_out_from_its_ground(chromium: Browser, file: Path, scheme: str, tmp_path: Path) -> None:
    opened = Opened(chromium, file, color_scheme=scheme).painted()
    assert opened.page.locator("h1, h2, nav a, .lab-report-about, th, td, dt, dd").evaluate_all(CONTRAST, "html") >= 4.5
    opened.page.screenshot(path=tmp_path / f"report-{scheme}.png", full_page=True)
    opened.context.close()


def test_a_widget_s_own_file_works_from_disk(chromium: Browser, tmp_path: Path) -> None:
    widget = PatchExplorer(*example(), ask=lambda patches: ("x", None))
    widget.selected = [7]
    widget.to_html(tmp_path / "explorer.html")
    opened = Opened(chromium, tmp_path / "explorer.html").painted()
    page = opened.page
    assert page.title() == "What color is the car?"
    assert page.locator(".lab-count").text_content() == "1 patch of 144 selected"
    before = page.locator("canvas.lab-canvas").screenshot()
    page.get_by_role("radio", name="random, control").click()
    page.get_by_role("radio", name="The, ").hover()
    page.wait_for_function("() => document.querySelector('.lab-legend-title').textContent === 'random · “The”'")
    assert page.locator("canvas.lab-canvas").screenshot() != before
    assert page.get_by_role("button", name=re.compile("Ask again")).count() == 0
    with page.expect_download():
        page.get_by_role("button", name="Save as PNG").click()
    assert opened.outside == []
    assert opened.wrong == []
    opened.context.close()

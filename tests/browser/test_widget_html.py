"""The exported file, opened from disk: interactive under its own strict policy, and asking nobody."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests.support.widget_examples import example, make_relevance, make_run, spots
from widgets import PatchExplorer
from widgets.base import embed

ATTACK = "</script><img src=x onerror=window.attacked=1><!--<script>"


@pytest.fixture
def disk_page(chromium: Browser) -> Page:
    context = chromium.new_context(viewport={"width": 900, "height": 1000}, offline=True)
    page = context.new_page()
    page.set_default_timeout(10_000)
    return page


def opened(page: Page, path: Path) -> tuple[list[str], list[str]]:
    """Open a file; what it asked for, and what went wrong."""
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type in ("error", "warning") else None)
    page.goto(path.as_uri())
    page.wait_for_function("() => document.querySelector('canvas.lab-canvas')?.width > 300")
    return asked, wrong


def test_the_file_works_from_disk_and_asks_nobody(disk_page: Page, tmp_path: Path) -> None:
    path = tmp_path / "explorer.html"
    widget = PatchExplorer(*example(), ask=lambda patches: ("x", None))
    widget.selected = [7]
    widget.to_html(path)
    asked, wrong = opened(disk_page, path)
    assert disk_page.title() == "What color is the car?"
    assert disk_page.locator(".lab-count").text_content() == "1 patch of 144 selected"
    before = disk_page.locator("canvas.lab-canvas").screenshot()
    disk_page.get_by_role("radio", name="random, control").click()
    disk_page.get_by_role("radio", name="The, ").hover()
    disk_page.wait_for_function("() => document.querySelector('.lab-legend-title').textContent === 'random · “The”'")
    assert disk_page.locator("canvas.lab-canvas").screenshot() != before
    assert disk_page.get_by_role("button", name=re.compile("Ask again")).count() == 0
    with disk_page.expect_download():
        disk_page.get_by_role("button", name="Save as PNG").click()
    outside = [url for url in asked if not url.startswith(("file://" + str(path), "blob:", "data:"))]
    assert outside == []
    assert wrong == []


def test_attack_strings_stay_text_in_the_file(disk_page: Page, tmp_path: Path) -> None:
    run = make_run(f"A {ATTACK.replace(' ', '/')} car", question=ATTACK, model=ATTACK)
    widget = PatchExplorer(run, {ATTACK: make_relevance(run, spots(run), notes=(ATTACK,))})
    path = tmp_path / "attack.html"
    widget.to_html(path, title=ATTACK)
    _, wrong = opened(disk_page, path)
    assert wrong == []
    assert disk_page.title() == ATTACK
    assert disk_page.locator(".lab-question").text_content() == ATTACK
    assert disk_page.locator("img").count() == 0
    assert disk_page.evaluate("() => window.attacked") is None


def test_the_policy_lets_no_other_script_run(disk_page: Page, tmp_path: Path) -> None:
    text = PatchExplorer(*example()).to_html()
    policy = re.search(r'content="(default-src[^"]*)"', text)
    assert policy is not None
    assert "unsafe" not in policy[1]
    assert "http" not in policy[1]
    path = tmp_path / "injected.html"
    path.write_text(text.replace("</main>", "</main><script>window.attacked = 1</script>"), "utf-8")
    _, wrong = opened(disk_page, path)
    assert disk_page.evaluate("() => window.attacked") is None
    assert any("Content Security Policy" in line for line in wrong)


def test_embedded_json_cannot_close_its_script() -> None:
    value = {"a": ATTACK, "b": "\u2028 é"}
    assert "<" not in embed(value)
    assert json.loads(embed(value)) == value
    script = PatchExplorer(*example()).to_html().split('<script type="module">')[1]
    assert script.count("</script") == 1
    assert "<!--" not in script

"""The built page, opened from disk in Chromium: the model's own answers and maps, no request, keyboard, phone and desktop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

import llava_lab as ll
from llava_lab.cli import main as cli
from llava_lab.errors import DataError, LabError
from llava_lab.page import build
from llava_lab.page.build import as_object, cache_folder
from widgets import demo

SLOW = 240_000  # ms: the machine may be busy with other tests
PER_TOKEN = 60  # ms at the median, as promised


def test_a_package_of_other_bytes_and_a_machine_without_npm_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.tgz"
    other.write_bytes(b"not the package")
    with pytest.raises(DataError, match="is not onnxruntime-web"):
        build.runtime(other)
    monkeypatch.setenv("LLAVA_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert cache_folder() == tmp_path / "cache"
    with pytest.raises(LabError, match="no npm to fetch it"):
        build.tarball()


def test_a_module_becomes_one_object_with_what_it_exports() -> None:
    module = "const a=1,b=2;export{a as one,b as default,b as two};\n//# sourceMappingURL=x.map\n"
    assert as_object(module).splitlines()[-2:] == ["return { one: a, two: b };", "})();"]
    with pytest.raises(DataError, match="does not end with its exports"):
        as_object("const a=1;")


def test_graphs_that_answer_otherwise_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_lab.page.graphs import Agreement

    monkeypatch.setattr(build, "offered", lambda *given: demo.write)
    monkeypatch.setattr(build, "runtime", lambda package: {"script": "", "wasm": b"", "licence": ""})
    monkeypatch.setattr(build, "export", lambda lab: {})
    monkeypatch.setattr(build, "engine", lambda graphs: None)
    monkeypatch.setattr(build, "agreement", lambda lab, graphs: Agreement(2, 9, False, 3.0))
    with pytest.raises(LabError, match="other tokens and logits off by 3"):
        build.write_page(ll.load("tiny"), tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(build, "agreement", lambda lab, graphs: Agreement(2, 9, True, 1e-5))
    text = Path(build.write_page(ll.load("tiny"), tmp_path / "page.html").path).read_text("utf-8")
    assert ll.load("tiny").card.knows in text
    assert "https://" not in text.split("<script", 1)[0]


def test_the_command_wants_a_page_s_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["page", "--out", "page.txt"]) == 2
    assert "file ending in .html" in capsys.readouterr().err


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole page by the command itself; `run.py test --all` fetches its runtime before the suite starts."""
    assert (cache_folder() / f"{build.PACKAGE}-{build.VERSION}.tgz").is_file(), "`python3 run.py test --all` fetches it"
    path = tmp_path_factory.mktemp("page") / "demo.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "offered", lambda *given: demo.write)  # the checkout's own, whatever is installed
        assert cli.main(["page", "--model", "tiny", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def page(chromium: Browser, built: Path) -> Iterator[Page]:
    """The page from disk, its model open; anything it logs as an error, and any request but itself, fails the test."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.set_default_timeout(SLOW)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type in ("error", "warning") else None)
    page.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith(("blob:", built.as_uri())) else None)
    page.goto(built.as_uri())
    page.locator(".lab-state", has_text="Ready").wait_for()
    yield page
    context.close()
    assert wrong == []


def ask(page: Page, question: str) -> str:
    page.locator(".lab-input").fill(question)
    page.locator(".lab-input").press("Enter")
    page.locator(".lab-primary", has_text="Stop").first.wait_for()
    page.locator(".lab-form .lab-primary", has_text="Ask").wait_for()
    return page.locator(".lab-reply").inner_text()


@pytest.mark.long
def test_the_file_is_small_and_may_ask_nobody(built: Path) -> None:
    text = built.read_text("utf-8")
    assert len(text.encode()) < 20_000_000
    policy = text.split('Content-Security-Policy" content="')[1].split('"')[0]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy
    assert "connect-src" not in policy  # nothing, by default-src
    assert "Copyright (c) Microsoft Corporation" in text


@pytest.mark.long
def test_answers_about_own_pictures_are_the_model_s_and_quick(page: Page, tmp_path: Path) -> None:
    lab = ll.load("tiny")
    from llava_lab.worlds.picturebook import ask_about, scene

    milliseconds = []
    for index in range(7):
        drawn = scene("test", index)
        path = tmp_path / f"{index}.png"
        drawn.picture().save(path)
        page.locator(".lab-file").set_input_files(path)
        page.locator(".lab-photo").wait_for()
        for question in [*(one.text for one in ask_about(drawn, np.random.default_rng(index), 2)), "Describe the picture."]:
            run = lab.ask(np.asarray(drawn.picture()), question)
            assert ask(page, question) == run.answer.strip()
            shown = page.locator(".lab-explorer .lab-chips-item:not(.lab-other) .lab-word")
            expect(shown).to_have_text([word.text for word in run.words])
            milliseconds.append(float(page.locator(".lab-state").inner_text().split("then ")[1].split(" ms")[0]))
    print(f"median of {len(milliseconds)} answers' medians: {np.median(milliseconds):.0f} ms a token")
    assert np.median(milliseconds) < PER_TOKEN
    page.get_by_role("button", name="Back to the drawing").click()


@pytest.mark.long
def test_cutting_off_every_patch_gives_python_s_token_knockout(page: Page, tmp_path: Path) -> None:
    from llava_lab.worlds.picturebook import scene

    lab, picture = ll.load("tiny"), scene("test", 2).picture()
    picture.save(tmp_path / "two.png")
    page.locator(".lab-file").set_input_files(tmp_path / "two.png")
    page.locator(".lab-photo").wait_for()
    run = lab.ask(np.asarray(picture), "Describe the picture.")
    ask(page, run.question)
    page.get_by_role("button", name="Cut off each patch").click()
    page.locator(".lab-sweeps .lab-caption", has_text="144 patches in").wait_for()
    values = ll.attribute(lab, run, method="token_knockout", target="words").values
    word = max(range(len(run.words)), key=lambda i: np.abs(values[i]).max())
    page.locator(".lab-explorer .lab-chips-item").nth(word).click()
    page.locator(".lab-legend-title", has_text=f"token_knockout · “{run.words[word].text}”").wait_for()
    page.wait_for_timeout(200)  # the list beside it is written in the same frame
    strongest = np.argsort(-values[word].ravel(), kind="stable")[:3]
    places = page.locator(".lab-explorer .lab-top li:visible .lab-place").all_inner_texts()[:3]
    numbers = page.locator(".lab-explorer .lab-top li:visible .lab-value").all_inner_texts()[:3]
    assert places[0] == f"row {strongest[0] // 12}, column {strongest[0] % 12}"
    step = np.abs(values).max() / 127
    got = [float(number.replace("−", "-")) for number in numbers]
    np.testing.assert_allclose(got, values[word].ravel()[strongest], atol=float(step) + 1e-3)
    page.get_by_role("button", name="Back to the drawing").click()


@pytest.mark.long
def test_selecting_patches_measures_them_beside_random_ones_and_reads_one(page: Page) -> None:
    ask(page, page.locator(".lab-suggestion").first.inner_text())
    canvas = page.locator(".lab-explorer .lab-canvas")
    canvas.focus()
    for key in ("ArrowDown", "ArrowRight", "Space"):
        page.keyboard.press(key)
    page.locator(".lab-more .lab-caption", has_text="1 patch of 144").wait_for()
    cells = page.locator(".lab-more table").first.locator("tbody tr").last.locator("td").all_inner_texts()
    assert len(cells) == 5
    assert all(cell.endswith("%") for cell in cells)
    assert page.locator(".lab-lens-list tbody tr").count() == 7
    page.get_by_role("button", name="Ask again without these patches").click()
    page.locator(".lab-verdict", has_text="answer").wait_for()


@pytest.mark.long
def test_a_scene_is_drawn_with_the_keyboard_alone(page: Page) -> None:
    page.get_by_role("button", name="Clear", exact=True).first.click()
    expect(page.locator(".lab-thing")).to_have_count(0)
    page.get_by_role("button", name="Add a car").press("Enter")
    page.get_by_role("radio", name="blue").press("Enter")
    thing = page.locator(".lab-thing")
    expect(thing).to_have_attribute("aria-label", re.compile("^large blue car, middle"))
    thing.focus()
    for _ in range(8):
        page.keyboard.press("Shift+ArrowLeft")
    expect(thing).to_have_attribute("aria-label", re.compile("large blue car, left"))
    assert ask(page, "What color is the car?") == "The car is blue."
    assert ask(page, "Where is the car?") == "The car is on the left."
    thing.focus()
    page.keyboard.press("Delete")
    expect(page.locator(".lab-thing")).to_have_count(0)


@pytest.mark.long
def test_what_lies_outside_is_said(page: Page, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    page.locator(".lab-file").set_input_files(tmp_path / "noise.png")
    page.locator(".lab-photo").wait_for()
    ask(page, "whats the colour of the dog")
    run = ll.load("tiny").ask(noise, "whats the colour of the dog", max_new_tokens=1)
    page.locator(".lab-talk .lab-told li").first.wait_for()
    told = page.locator(".lab-talk .lab-told li").all_inner_texts()
    assert [line.split("(")[0].replace("“", "'").replace("”", "'") for line in told] == [
        line.split("(")[0] for line in run.notes if "cut at" not in line
    ]
    page.get_by_role("button", name="Back to the drawing").click()


@pytest.mark.long
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_the_window_and_every_control_has_a_name(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    ask(page, page.locator(".lab-suggestion").first.inner_text())
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    nameless = """() => [...document.querySelectorAll('button, input, canvas[tabindex]')].filter((node) => node.checkVisibility()
      && !(node.getAttribute('aria-label') || node.textContent.trim() || node.title)).map((node) => node.outerHTML)"""
    assert page.evaluate(nameless) == []

"""The parts of Explore in a real browser: a picture from the gallery, a file or a drop; code to copy; the whole page by Voila."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from llava_lab.cli import serve
from tests.support.all_widgets import ATTACK
from tests.support.widget_page import WidgetPage
from widgets.picture_picker import LONGEST, CodeBox, PicturePicker, read_upload

ROOT = Path(__file__).resolve().parents[2]
GALLERY = [("red", np.full((20, 30, 3), (200, 0, 0), np.uint8)), (ATTACK, np.zeros((20, 20, 3), np.uint8))]
BYTES = "() => [...new Uint8Array(window.test.values.picture.buffer)]"


def _file(width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (0, 90, 200)).save(buffer, kind)
    return buffer.getvalue()


def _given(page: WidgetPage) -> np.ndarray:
    page.page.wait_for_function("() => window.test.values.picture.byteLength > 0")
    return read_upload(bytes(page.page.evaluate(BYTES)))


def test_a_picture_is_chosen_from_the_gallery_by_mouse_and_keyboard(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(PicturePicker(GALLERY, on_pick=print), painted=False)
    radios = shown.get_by_role("radiogroup", name="Pictures to try").get_by_role("radio")
    radios.first.click()
    assert widget_page.get("chosen") == 0
    expect(radios.first).to_be_checked()
    radios.first.press("ArrowRight")
    assert widget_page.get("chosen") == 1
    assert widget_page.page.evaluate("() => window.attacked") is None
    expect(radios.nth(1)).to_contain_text("<img/src=x")


def test_a_large_file_is_made_smaller_before_it_is_sent(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(PicturePicker([], on_pick=print), painted=False)
    with widget_page.page.expect_file_chooser() as chooser:
        shown.get_by_role("button", name="Choose a file").click()
    chooser.value.set_files({"name": "big.jpg", "mimeType": "image/jpeg", "buffer": _file(3000, 1500, "JPEG")})
    picture = _given(widget_page)
    assert picture.shape == (LONGEST // 2, LONGEST, 3)
    assert abs(picture[0, 0].astype(int) - (0, 90, 200)).max() < 6
    assert widget_page.get("name") == "big.jpg"


def test_what_is_no_picture_is_said_and_not_sent(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(PicturePicker([], on_pick=print), painted=False)
    for name, kind, said in (
        ("a.pdf", "application/pdf", "not a picture that can be read"),
        ("b.png", "image/png", "cannot be read"),
    ):
        shown.locator("input[type=file]").set_input_files({"name": name, "mimeType": kind, "buffer": b"nothing"})
        expect(shown.get_by_role("alert")).to_contain_text(said)
    assert widget_page.page.evaluate("() => window.test.saves()") == 0


def test_a_dropped_picture_is_taken(widget_page: WidgetPage) -> None:
    shown = widget_page.mount(PicturePicker([], on_pick=print), painted=False)
    dropped = widget_page.page.evaluate_handle(
        """(bytes) => { const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], 'dropped.png', { type: 'image/png' })); return data; }""",
        list(_file(5, 7)),
    )
    shown.locator(".lab-drop").dispatch_event("drop", {"dataTransfer": dropped})
    assert _given(widget_page).shape == (7, 5, 3)
    assert widget_page.get("name") == "dropped.png"


def test_the_code_is_copied(widget_page: WidgetPage) -> None:
    widget_page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown = widget_page.mount(CodeBox("import llava_lab as ll\nll"), painted=False)
    shown.get_by_role("button", name="Copy the code of this").click()
    expect(shown.get_by_role("status")).to_have_text(re.compile(r"^(Copied\.|Marked; press Ctrl-C to copy\.)$"))


# -- the whole page ---------------------------------------------------------------------------

PATIENCE = 240_000  # milliseconds; a kernel starts, imports torch and loads a model


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of ``llava-lab app``."""
    command, environment = serve.prepare(tmp_path, "tiny", port := serve.free_port(), "secret")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(command, env=environment, stdout=sys.stderr, stderr=subprocess.STDOUT) as server:
        try:
            serve.wait_for(server, port)
            yield f"http://127.0.0.1:{port}/?token=secret"
        finally:
            server.terminate()


def _ask(page: Page, question: str) -> None:
    page.get_by_placeholder("Ask about the picture").fill(question)
    page.keyboard.press("Enter")


@pytest.mark.long
def test_somebody_asks_without_code_sees_a_map_and_takes_the_code(served: str, chromium: Browser) -> None:
    page = chromium.new_context(viewport={"width": 1440, "height": 900}).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(served)
    page.locator(".lab-gallery-item").nth(1).click()
    _ask(page, "what colour is the car")
    page.wait_for_selector("canvas.lab-canvas")
    expect(page.get_by_role("log")).to_contain_text("The car is green.")
    expect(page.get_by_role("log")).to_contain_text("Read as 'What color is the car?'.")
    expect(page.locator(".lab-code")).to_contain_text('picturebook.scene("lesson", 1)', timeout=PATIENCE)
    for scheme, low, high in (("dark", 0, 60), ("light", 220, 255)):  # as the reader's system is
        page.emulate_media(color_scheme=scheme)
        for part in ("body", ".lab-explorer .lab-card", ".lab-code-card"):
            ground = page.locator(part).first.evaluate(
                "(node) => getComputedStyle(node).backgroundColor.match(/\\d+/g).map(Number)"
            )
            assert all(low <= channel <= high for channel in ground[:3]), (scheme, part, ground)
    _ask(page, "Where is it?")
    expect(page.locator(".lab-code")).to_contain_text("history=", timeout=PATIENCE)
    page.locator("input[type=file]").set_input_files({"name": "noise.png", "mimeType": "image/png", "buffer": _noise()})
    page.wait_for_selector("img[alt='noise.png']")
    _ask(page, "Is there a red car?")
    expect(page.get_by_role("log")).to_contain_text("Unlike the pictures that tiny was trained on", timeout=PATIENCE)


def _noise() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()

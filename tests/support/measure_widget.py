"""How soon a new map is seen: the explorer against `interact` with matplotlib, in the same Lab page, one run.

From an input event's own time stamp to the frame that shows the change: requestAnimationFrame, then a
message that is delivered after painting. For matplotlib, showing the same (picture, map, colour bar,
title), the change is the new image, decoded. The floor is the same for pointing at text where nothing
changes: what the browser needs here and now, whatever the widget does. 64 words, 32 layers, 24x24
patches. `python -m tests.support.measure_widget` prints one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, sync_playwright

from llava_lab.doctor import find_chromium
from tests.support.lab_server import NO_BROWSER, LabPage, LabServer, open_browser
from tests.support.widget_page import WidgetPage

HOVERS, REDRAWS, WARM_UP = 60, 12, 3
EXPLORER_CELLS = [
    "from tests.support.widget_examples import many\nfrom widgets import PatchExplorer\nrun, maps = many()",
    "w = PatchExplorer(run, maps)\nw",
]
INTERACT_CELLS = [
    """%matplotlib inline
import matplotlib.pyplot as plt
import numpy as np
from ipywidgets import interact
from tests.support.widget_examples import many

run, maps = many()
values = np.stack([rel.values for _, rel in maps["rollout"]])
""",
    """@interact(word=(0, 63))
def show(word=0):
    plt.figure(figsize=(5, 5))
    plt.imshow(run.picture)
    plt.imshow(values[-1, word], alpha=0.6, extent=(0, 288, 288, 0), vmin=0, vmax=1)
    plt.colorbar(shrink=0.8)
    plt.title(run.words[word].text)
    plt.show()
""",
]
PROBE = """() => {
  window.times = [];
  window.painted = (start) => requestAnimationFrame(() => {
    const after = new MessageChannel();
    after.port1.onmessage = () => window.times.push(performance.now() - start);
    after.port2.postMessage(0);
  });
}"""
PROBE_HOVER = """() => {
  const names = '.lab-chips-item, .lab-question, .lab-about';
  const heard = (event) => {
    const at = event.target.closest(names);
    if (at && !at.contains(event.relatedTarget)) window.painted(event.timeStamp);
  };
  document.querySelector('.lab-card').addEventListener('pointerover', heard, { capture: true });
}"""
PROBE_FLOOR = """() => {
  const bare = document.createElement('div');
  bare.id = 'bare';
  bare.style.cssText = 'position: fixed; right: 0; bottom: 0; width: 20px; height: 20px';
  bare.addEventListener('pointermove', (event) => {
    bare.style.background = bare.style.background ? '' : 'grey';
    window.painted(event.timeStamp);
  });
  document.querySelector('#bare')?.remove();
  document.body.append(bare);
}"""
PROBE_MOVE = """(node) => {
  if (node.probed) return;
  node.probed = true;
  node.addEventListener('pointermove', (event) => window.painted(event.timeStamp), { capture: true });
}"""
PROBE_REDRAW = """() => {
  let start = 0;
  document.addEventListener('keydown', (event) => (start = event.timeStamp), { capture: true });
  new MutationObserver((records) => {
    for (const record of records) for (const node of record.addedNodes) {
      const image = node.querySelector?.('img') ?? (node.tagName === 'IMG' ? node : null);
      if (image && start) image.decode().then(() => { window.painted(start); start = 0; });
    }
  }).observe(document.querySelector('.jp-OutputArea'), { childList: true, subtree: true });
}"""
PAINT = """async (canvas) => {
  const box = canvas.getBoundingClientRect();
  const own = window.requestAnimationFrame;
  const times = [];
  window.requestAnimationFrame = (call) => own((now) => {
    const start = performance.now();
    call(now);
    document.body.offsetHeight;  // style and layout belong to it
    times.push(performance.now() - start);
  });
  for (let i = 0; i < 60; i++) {
    const [x, y] = [((i * 7) % 23 + 0.5) / 24, ((i * 5) % 23 + 0.5) / 24];
    const at = { clientX: box.left + x * box.width, clientY: box.top + y * box.height, bubbles: true };
    canvas.dispatchEvent(new PointerEvent('pointermove', at));
    await new Promise((done) => own(() => own(done)));
  }
  window.requestAnimationFrame = own;
  return times.slice(10);
}"""
HEAT = """(canvas) => {
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let sum = 0;
  for (let i = 0; i < data.length; i += 4001) sum = (sum * 31 + data[i]) % 1000003;
  return sum;
}"""


def measure(lab: LabPage) -> dict[str, Any]:
    """Both ways in one page: milliseconds from event to painted, and how many times sooner the explorer is."""
    floor, explorer = (_summary(times) for times in measure_hover(lab))
    interact = _summary(measure_interact(lab))
    rows = {"floor": floor, "explorer": explorer, "interact": interact}
    times = interact["median_ms"] / explorer["median_ms"]
    return {"words": 64, "layers": 32, "grid": [24, 24], **rows, "times_faster": round(times, 1)}


def measure_hover(lab: LabPage) -> tuple[list[float], list[float]]:
    """Pointing at text that does nothing; then at one word after another."""
    lab.open(EXPLORER_CELLS)
    lab.run_all()
    page = lab.page
    chips, canvas = page.locator(".lab-chips-item"), page.locator("canvas.lab-canvas")
    chips.nth(0).scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    page.evaluate(PROBE)
    page.evaluate(PROBE_HOVER)
    floor = _point(page, [page.locator(name).bounding_box() for name in (".lab-question", ".lab-about")], HOVERS // 2)
    before = canvas.evaluate(HEAT)
    times = _point(page, [chips.nth(i).bounding_box() for i in range(60)], HOVERS)
    assert canvas.evaluate(HEAT) != before, "hovering painted nothing new"
    return floor, times


def measure_interact(lab: LabPage) -> list[float]:
    """A slider moved by key, a figure drawn anew in the kernel."""
    lab.open(INTERACT_CELLS)
    lab.run_all()
    page = lab.page
    page.wait_for_selector(".jp-OutputArea img")
    page.evaluate(PROBE)
    page.evaluate(PROBE_REDRAW.replace(".jp-OutputArea", ".jp-Notebook"))
    page.locator(".noUi-handle").focus()
    for count in range(1, REDRAWS + WARM_UP + 1):
        page.keyboard.press("ArrowRight")
        _wait_for(page, count)
        page.wait_for_timeout(100)
    return page.evaluate("() => window.times")[WARM_UP:]


def hover_times(page: WidgetPage, over: Locator, count: int) -> dict[str, float]:
    """Milliseconds from moving the mouse over an element's patches, one after the other, to what that paints.

    `floor_ms` is the median of the same for a bare square in the same page that changes its colour, measured by turns:
    what the browser needs here and now for any change at all.
    """
    over.scroll_into_view_if_needed()
    page.page.evaluate(PROBE)
    page.page.evaluate(PROBE_FLOOR)
    over.evaluate(PROBE_MOVE)
    box, bare = over.bounding_box(), page.page.locator("#bare").bounding_box()
    assert box is not None
    assert bare is not None
    for done in range(1, count + WARM_UP + 1):
        x, y = (done * 7 % 23 + 0.5) / 24, (done * 5 % 23 + 0.5) / 24
        page.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        _wait_for(page.page, 2 * done - 1)
        page.page.wait_for_timeout(20)  # a hand is no faster
        page.page.mouse.move(bare["x"] + 4 + done % 9, bare["y"] + 4)
        _wait_for(page.page, 2 * done)
        page.page.wait_for_timeout(20)
    times = page.page.evaluate("() => window.times")[2 * WARM_UP :]
    return {**_summary(times[::2]), "floor_ms": _summary(times[1::2])["median_ms"]}


def paint_times(over: Locator) -> dict[str, float]:
    """Milliseconds that one hover costs, from its frame's start to the end of layout."""
    return _summary(over.evaluate(PAINT))


def _point(page: Page, boxes: Sequence[Any], count: int) -> list[float]:
    """The mouse from one box to the next, over and over; the times but for the first few."""
    page.evaluate("() => (window.times = [])")
    for done in range(1, count + WARM_UP + 1):
        box = boxes[done % len(boxes)]
        page.mouse.move(box["x"] + 9, box["y"] + 9)
        _wait_for(page, done)
        page.wait_for_timeout(20)  # a hand is no faster
    return page.evaluate("() => window.times")[WARM_UP:]


def _wait_for(page: Page, count: int) -> None:
    page.wait_for_function("(count) => window.times.length >= count", arg=count, timeout=20_000)


def _summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    rounded = {"median_ms": statistics.median(ordered), "p95_ms": ordered[int(0.95 * (len(ordered) - 1))], "min_ms": ordered[0]}
    return {"n": len(ordered), **{name: round(value, 2) for name, value in rounded.items()}}


def main() -> None:
    path = find_chromium()
    if path is None:
        raise SystemExit(NO_BROWSER)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright, open_browser(playwright, path) as browser:
        server = LabServer(Path(folder))
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            print(json.dumps({"cores": os.cpu_count(), "load": os.getloadavg()[0], **measure(LabPage(server, page))}))
        finally:
            server.close()


if __name__ == "__main__":
    main()

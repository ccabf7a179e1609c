"""A widget's own module in a bare page of a real Chromium, without Jupyter.

`WidgetPage` serves the module by request interception, mounts it with a stand-in for the kernel's
model that records what the module does, and reads back pixels. Pure helpers are called by name.
"""

from __future__ import annotations

import base64
import os
from typing import Any

from playwright.sync_api import Browser, Locator, Page, Route

from widgets import PatchExplorer
from widgets.base import LabWidget

ADDRESS = "http://widget.test/"
SIZE: Any = {"width": 900, "height": 1100}  # CSS pixels

MOUNT = """async ({ state, data, css }) => {
  const style = document.createElement('style');
  style.textContent = css;
  document.head.append(style);
  const values = { ...state };
  for (const [name, text] of Object.entries(data)) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    values[name] = new DataView(bytes.buffer);  // as the widget protocol hands bytes over
  }
  const heard = {};
  const sent = [];
  let saves = 0;
  const model = {
    get: (name) => values[name],
    set: (name, value) => { values[name] = value; for (const call of heard[`change:${name}`] ?? []) call(); },
    save_changes: () => { saves += 1; },
    send: (content) => sent.push(content),
    on: (name, call) => (heard[name] ??= new Set()).add(call),
    off: (name, call) => heard[name]?.delete(call),
  };
  const el = document.querySelector('main');
  const module = await import('/module.js');
  const close = module.default.render({ model, el });
  window.test = { model, values, sent, close, saves: () => saves,
    listeners: () => Object.values(heard).reduce((sum, calls) => sum + calls.size, 0) };
}"""
# A machine too busy to draw: with LAB_LATE_MS=80 in the environment frames come so many milliseconds late, and a test that reads
# before the redraw fails here as it would on a slow machine. `window.settled()` draws at once what waits.
LATE_MS = int(os.environ.get("LAB_LATE_MS", "0"))
LATE = """(ms) => {
  const [ask, drop] = [window.requestAnimationFrame.bind(window), window.cancelAnimationFrame.bind(window)];
  const waiting = new Map();
  const draw = (id, now) => { const call = waiting.get(id); if (waiting.delete(id)) call(now); };
  let last = 0;
  window.requestAnimationFrame = (call) => {
    const id = (last -= 1);
    waiting.set(id, call);
    setTimeout(() => ask((now) => draw(id, now)), ms);
    return id;
  };
  window.cancelAnimationFrame = (id) => (id < 0 ? waiting.delete(id) : drop(id));
  const frame = () => new Promise((done) => ask((now) => { [...waiting.keys()].forEach((id) => draw(id, now)); done(); }));
  window.settled = async () => {  // until two frames in turn drew nothing: a redraw may change a size, and be asked for again
    for (let left = 30, idle = 0; left > 0 && idle < 2; left--) {
      const drawn = waiting.size;
      await frame();
      idle = drawn ? 0 : idle + 1;
    }
  };
}"""
SETTLE = "() => window.settled?.() ?? new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
PIXELS = """(canvas, points) => {
  const ctx = canvas.getContext('2d');
  return points.map(([x, y]) => [...ctx.getImageData(x * canvas.width, y * canvas.height, 1, 1).data]);
}"""
CONTRAST = """(nodes, ground) => {
  const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((v) => (text.startsWith('color(') ? 255 * v : +v));
  const part = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = (text) => rgb(text).reduce((sum, v, i) => sum + part(v) * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = light(getComputedStyle(nodes[0].closest(ground)).backgroundColor);
  return Math.min(...nodes.map((node) => {
    const ink = light(getComputedStyle(node).color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  }));
}"""  # the least contrast of some elements' text with the ground of what they lie in


class WidgetPage:
    """One page; `mount` shows a widget in it."""

    def __init__(self, browser: Browser, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": SIZE, **context})
        self.page: Page = self.context.new_page()
        self.module = PatchExplorer._esm  # the one `mount` was given, or this for calls of pure helpers
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.set_default_timeout(int(os.environ.get("PW_MS", 10_000)))
        come_late(self.page)
        self.page.route("**/*", self._serve)
        self.page.goto(ADDRESS)

    def empty(self) -> None:
        """As a page just opened, for the next test: nothing shown, nothing pointed at, nothing noted."""
        self.page.mouse.move(0, 0)
        self.page.set_viewport_size(SIZE)
        self.page.goto(ADDRESS)
        self.module = PatchExplorer._esm
        self.errors.clear()
        self.outside.clear()

    def _serve(self, route: Route) -> None:
        name = route.request.url.removeprefix(ADDRESS)
        if name == "":
            route.fulfill(content_type="text/html", body="<!doctype html><title>widget</title><main></main>")
        elif name == "module.js":
            route.fulfill(content_type="text/javascript", body=self.module)
        else:
            self.outside.append(route.request.url)
            route.abort()

    def mount(self, widget: LabWidget, *, painted: bool = True) -> Locator:
        """Show the widget and wait until its picture is painted, if it is one with such a picture."""
        self.module = widget._esm
        view = LabWidget.view(widget)  # what the kernel syncs, not what a page without one gets
        data = {name: base64.b64encode(raw).decode("ascii") for name, raw in view.data.items()}
        self.page.evaluate(MOUNT, {"state": view.state, "data": data, "css": widget._css})
        if painted:
            self.page.wait_for_function("() => document.querySelector('canvas.lab-canvas').width !== 300")  # 300: not sized yet
        self.settle()
        return self.page.locator(".lab-widget")

    def settle(self) -> None:
        """Let what waits for the next frame be painted."""
        self.page.evaluate(SETTLE)

    def call(self, name: str, *args: Any) -> Any:
        """One of the module's pure helpers; arrays travel as lists."""
        code = """async ([name, args]) => {
          const plain = (value) => ArrayBuffer.isView(value) ? [...value] : value instanceof Set ? [...value] : value;
          return plain((await import('/module.js'))[name](...args));
        }"""
        return self.page.evaluate(code, [name, list(args)])

    def get(self, name: str) -> Any:
        """A value of the model as the kernel would see it."""
        return self.page.evaluate("(name) => window.test.values[name]", name)

    def set(self, name: str, value: Any) -> None:
        """What the kernel would do."""
        self.page.evaluate("([name, value]) => window.test.model.set(name, value)", [name, value])
        self.settle()

    def sent(self) -> list[dict]:
        return self.page.evaluate("() => window.test.sent")

    def pixels(self, points: list[tuple[float, float]], canvas: Locator | None = None) -> list[list[int]]:
        """RGBA at places given as shares of the large canvas, or of another (x, y), after the next frame."""
        self.settle()
        return (canvas or self.page.locator("canvas.lab-canvas")).evaluate(PIXELS, points)

    def at(self, x: float, y: float) -> dict:
        """A place on the canvas, given as shares, for clicks."""
        box = self.page.locator("canvas.lab-canvas").bounding_box()
        assert box is not None
        return {"x": x * box["width"], "y": y * box["height"]}

    def move(self, x: float, y: float) -> None:
        """The mouse to a place on the canvas."""
        box = self.page.locator("canvas.lab-canvas").bounding_box()
        assert box is not None
        self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=3)

    def close(self) -> None:
        self.context.close()


def come_late(page: Page) -> None:
    """Let a page's frames be late, where LAB_LATE_MS asks for that."""
    if LATE_MS:
        page.add_init_script(f"({LATE})({LATE_MS})")


def center(patch: int, cols: int = 12) -> tuple[float, float]:
    """The middle of a patch of a square picture, as shares of the canvas."""
    return (patch % cols + 0.5) / cols, (patch // cols + 0.5) / cols


def difference(a: list[int], b: list[int]) -> int:
    """How far apart two colours are, summed over channels."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))

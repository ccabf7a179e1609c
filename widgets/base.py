"""What every widget of the lab shares: one module from plain files, a file of its own, a picture for saved notebooks.

`LabWidget` joins the sources a widget names, and asks for a still picture. `RunWidget` shows one run and writes itself as one
HTML file; `PictureWidget` adds patches to select and point at. Above every constructor stands the guard of all public functions,
`llava_lab.checks.entry`.

anywidget loads one ES module from a string, where a relative import cannot work, so `bundle` joins the files. A page
of its own works from disk and asks nobody for anything: its content security policy names the module and the styles
by their hashes, so that no other script or address could be used even if one slipped in. Bytes that several views
share, such as the picture, are stored once. What is selected or pointed at in one view is so in all (``js/shared/page.js``).
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import anywidget
import numpy as np
import traitlets

from llava_lab.checks import entry
from llava_lab.errors import OptionError

if TYPE_CHECKING:
    import os

    from llava_lab.results import Run

HERE = Path(__file__).parent
JS = HERE / "js"
IMPORT = re.compile(r'^import \{[^}]*\} from "(\.[\w./]+\.js)";\n', re.MULTILINE)

BOOT = """
openPage(JSON.parse(document.getElementById("lab-state").textContent), {{ {entries} }});
"""

PAGE_CSS = """
html {{ background: #f4f5f7; }}
body {{ margin: 24px auto; padding: 0 16px; max-width: {width}px; }}
@media (prefers-color-scheme: dark) {{ html {{ background: #0d0f13; }} }}
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{head}<title>{title}</title>
<style>{css}</style>
</head>
<body>
{body}
<script type="module">{module}</script>
</body>
</html>
"""

Patch = tuple[int, int]  # row, column


# -- sources ----------------------------------------------------------------------------------


def sources(*scripts: str) -> list[Path]:
    """The files of ``widgets/js`` that some scripts need: each once, after those it imports, the scripts last."""
    files: dict[Path, None] = {}

    def visit(path: Path) -> None:
        if path in files:
            return
        for other in IMPORT.findall(path.read_text("utf-8")):
            visit((path.parent / other).resolve())
        files[path] = None

    for script in scripts:
        visit((JS / script).resolve())
    return list(files)


def bundle(*scripts: str, entry: str = "") -> str:
    """One ES module from scripts of ``widgets/js`` and all they import; `entry` names the function a host calls.

    The one rule: ``import { ... } from "./x.js";`` statements are dropped, because in the joined text
    every name is already in scope. Exports stay. A test asserts that no name is defined twice.
    """
    joined = "\n".join(IMPORT.sub("", path.read_text("utf-8")) for path in sources(*scripts))
    return f"{joined}\nexport default {{ render: {entry} }};\n" if entry else joined


def styles(*names: str) -> str:
    """Style sheets of this folder, one after the other."""
    return "\n".join((HERE / name).read_text("utf-8") for name in names)


# -- a page without a kernel ------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """One widget as a page holds it: the function that shows it, and the values of its model."""

    entry: str
    state: Mapping[str, Any]
    data: Mapping[str, bytes]


def place(index: int) -> str:
    """The id of the element that a page's view is shown in."""
    return f"lab-view-{index}"


def page(title: str, scripts: Sequence[str], css: str, views: Sequence[View], *, body: str = "", width: int = 900) -> str:
    """The file's text. `scripts` define the views' entries; `body` is finished HTML with an element of each `place`."""
    entries = ", ".join(sorted({view.entry for view in views}))
    script = "\n".join([bundle(*scripts, "shared/page.js"), BOOT.format(entries=entries)])
    sheet = css + PAGE_CSS.format(width=width)
    body = body or "".join(f'<div id="{place(index)}"></div>' for index in range(len(views)))
    state = f'<script type="application/json" id="lab-state">{embed(_stored(views))}</script>'
    return document(title, sheet, f"<main>{body}</main>\n{state}", script)


def document(title: str, css: str, body: str, module: str, *, head: str = "", allowed: str = "") -> str:
    """A page of one style sheet and one script; its policy names both by their hashes, and what else a script is `allowed`."""
    policy = (
        f"default-src 'none'; script-src '{_csp_hash(module)}'{allowed}; style-src '{_csp_hash(css)}'; "
        "img-src blob: data:; base-uri 'none'; form-action 'none'"
    )
    return PAGE.format(title=html.escape(title), policy=policy, head=head, css=css, body=body, module=module)


def write_page(path: str | os.PathLike, text: str) -> Path:
    """Write a page, whole or not at all."""
    from llava_lab.results import whole_file

    with whole_file(path) as temporary:
        temporary.write_text(text, "utf-8")
    return Path(path)


def embed(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _stored(views: Sequence[View]) -> dict[str, Any]:
    """Views with their bytes by name, each distinct run of bytes once."""
    names: dict[bytes, str] = {}
    stored = []
    for index, view in enumerate(views):
        data = {name: names.setdefault(bytes(raw), f"b{len(names)}") for name, raw in view.data.items()}
        stored.append({"entry": view.entry, "place": place(index), "state": dict(view.state), "data": data})
    blobs = {name: base64.b64encode(raw).decode("ascii") for raw, name in names.items()}
    return {"views": stored, "blobs": blobs}


def _csp_hash(text: str) -> str:
    """A script's or style sheet's text as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


# -- widgets ----------------------------------------------------------------------------------


class TraitRefused(OptionError, traitlets.TraitError):
    """A value that a widget cannot show; also an error of traitlets, which then keeps the value there was."""


class LabWidget(anywidget.AnyWidget):
    """A widget whose saved form is a PNG.

    A subclass names its script and the function in it that shows the widget; what the script imports is joined to it.
    """

    render: ClassVar[str]
    script: ClassVar[str]
    sheets: ClassVar[tuple[str, ...]]

    spec = traitlets.Dict().tag(sync=True)

    def __init_subclass__(cls, **options: Any) -> None:
        if "script" in cls.__dict__:
            cls._esm = bundle(cls.script, entry=cls.render)
            cls._css = styles(*cls.sheets)
        super().__init_subclass__(**options)

    def draw_png(self) -> bytes:
        """The widget as a still picture, for viewers that run no code."""
        raise TypeError(f"{type(self).__name__} must draw its own still picture")

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict] | None:
        bundle_ = super()._repr_mimebundle_(**kwargs)
        if bundle_ is not None:
            bundle_[0]["image/png"] = base64.b64encode(self.draw_png()).decode("ascii")
        return bundle_

    def view(self) -> View:
        """The widget as a page without a kernel holds it."""
        foreign = set(anywidget.AnyWidget.class_trait_names())
        names = [name for name in self.trait_names(sync=True) if name not in foreign and not name.startswith("_")]
        values = {name: getattr(self, name) for name in sorted(names)}
        data = {name: value for name, value in values.items() if isinstance(value, bytes)}
        return View(self.render, {name: value for name, value in values.items() if name not in data}, data)


class RunWidget(LabWidget):
    """A widget about one run, which can be written as a file of its own."""

    width: ClassVar[int] = 1080  # of its own page, pixels

    run: Run

    picture = traitlets.Bytes().tag(sync=True)

    @entry
    def to_html(self, path: str | os.PathLike | None = None, *, title: str | None = None) -> str:
        """One interactive HTML file that needs nothing else; written to `path` when given."""
        text = page(title or self.run.question, [self.script], self._css, [self.view()], width=self.width)
        if path is not None:
            write_page(path, text)
        return text


class PictureWidget(RunWidget):
    """A widget over the patches of one run's picture.

    `selected` holds flat patch indices; `pointed` is the patch under the pointer, which the page keeps to
    itself and to views linked with it (``ipywidgets.jslink((one, "pointed"), (other, "pointed"))``).
    """

    maps = traitlets.Bytes().tag(sync=True)
    scales = traitlets.Bytes().tag(sync=True)
    selected = traitlets.List(traitlets.Int()).tag(sync=True)
    pointed = traitlets.Int(-1).tag(sync=True)

    @property
    def patches(self) -> list[Patch]:
        """The selected patches as (row, column), row-major."""
        return [divmod(index, self.run.map.cols) for index in self.selected]

    @property
    def mask(self) -> np.ndarray:
        """The selection as bool (rows, cols)."""
        out = np.zeros(self.run.map.rows * self.run.map.cols, bool)
        out[self.selected] = True
        return out.reshape(self.run.map.rows, self.run.map.cols)

    @traitlets.validate("selected")
    def _valid_selection(self, proposal: dict) -> list[int]:
        cells = self.run.map.rows * self.run.map.cols
        wrong = [index for index in proposal["value"] if not 0 <= index < cells]
        if wrong:
            raise TraitRefused(f"selected patches must lie in 0..{cells - 1}, got {wrong[0]}")
        return sorted(set(proposal["value"]))


def within(name: str, value: int, count: int) -> int:
    """`value` if it is an index into `count` things. Raises TraitRefused."""
    if not 0 <= value < count:
        raise TraitRefused(f"{name} must lie in 0..{count - 1}, got {value}")
    return value


def checked_opacity(opacity: float) -> float:
    """`opacity` if a map can have it. Raises OptionError."""
    if not 0 <= opacity <= 1:
        raise OptionError(f"opacity must lie in 0..1, got {opacity}")
    return float(opacity)

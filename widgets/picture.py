"""What the widgets over one picture share: its patches to select and point at, and a file of its own.

`PictureWidget` holds the traits every view has and writes the self-contained HTML page. What is shown
is each widget's own business.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import anywidget
import numpy as np
import traitlets

from widgets.base import LabWidget
from widgets.html import View, page

if TYPE_CHECKING:
    import os

    from llava_lab.results import Run

Patch = tuple[int, int]  # row, column


class PictureWidget(LabWidget):
    """A widget over the patches of one run's picture.

    `selected` holds flat patch indices; `pointed` is the patch under the pointer, which the page keeps to
    itself and to views linked with it (``ipywidgets.jslink((one, "pointed"), (other, "pointed"))``).
    """

    entry: ClassVar[str]  # the function of the module that shows it
    modules: ClassVar[tuple[str, ...]]  # files of widgets/js, in order
    sheets: ClassVar[tuple[str, ...]]  # style sheets of widgets, in order
    width: ClassVar[int] = 900  # of its own page, pixels

    run: Run

    spec = traitlets.Dict().tag(sync=True)
    picture = traitlets.Bytes().tag(sync=True)
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

    def view(self) -> View:
        """The widget as a page without a kernel holds it."""
        known = set(anywidget.AnyWidget.class_trait_names())
        names = [name for name in self.trait_names(sync=True) if name not in known and not name.startswith("_")]
        values = {name: getattr(self, name) for name in sorted(names)}
        data = {name: value for name, value in values.items() if isinstance(value, bytes)}
        return View(self.entry, {name: value for name, value in values.items() if name not in data}, data)

    def to_html(self, path: str | os.PathLike | None = None, *, title: str | None = None) -> str:
        """One interactive HTML file that needs nothing else; written to `path` when given."""
        text = page(title or self.run.question, self._esm, self._css, [self.view()], width=self.width)
        if path is not None:
            Path(path).write_text(text, "utf-8")
        return text

    @traitlets.validate("selected")
    def _valid_selection(self, proposal: dict) -> list[int]:
        cells = self.run.map.rows * self.run.map.cols
        wrong = [index for index in proposal["value"] if not 0 <= index < cells]
        if wrong:
            raise traitlets.TraitError(f"selected patches must lie in 0..{cells - 1}, got {wrong[0]}")
        return sorted(set(proposal["value"]))


def within(name: str, value: int, count: int) -> int:
    """`value` if it is an index into `count` things, else a TraitError."""
    if not 0 <= value < count:
        raise traitlets.TraitError(f"{name} must lie in 0..{count - 1}, got {value}")
    return value

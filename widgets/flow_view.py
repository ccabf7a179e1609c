"""FlowView: where the answer's information flows, as seen by touching the model.

On the left what cutting each flow of attention costs, layer by layer; on the right what each place of the clean run
brings back when it is put into a corrupted one. Either may be missing. All numbers are in the page; Python hears of
`target`, `component` and `selected`. Computes nothing about models.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import anywidget
import traitlets

from widgets.base import LabWidget, bundle, styles
from widgets.flow_pack import KINDS, pack_flow
from widgets.flow_paint import draw_flow
from widgets.html import View, page
from widgets.picture import within

if TYPE_CHECKING:
    import os

    from llava_lab.results import FlowSweep, PatchGrid, Run

MODULES = (
    "maps.js",
    "grid.js",
    "canvas.js",
    "dom.js",
    "panel.js",
    "flow_data.js",
    "flow_plot.js",
    "flow_curves.js",
    "flow_grid.js",
    "flow_parts.js",
    "flow.js",
)


class FlowView(LabWidget):
    """What touching the model did; `sweep` is what `llava_lab.knockout_sweep` gives, `grid` what `llava_lab.patch` gives.

    `target` is what is shown first, by position among the targets of both or by text; `component` likewise of the grid's.
    `selected` is ``{"flow": [flow, window], "cell": [site, window]}``, positions in the results; what is not chosen is
    not in it.
    """

    entry: ClassVar[str] = "renderFlow"
    modules: ClassVar[tuple[str, ...]] = MODULES
    sheets: ClassVar[tuple[str, ...]] = ("base.css", "flow.css")
    width: ClassVar[int] = 1080
    _esm = bundle(*MODULES, entry=entry)
    _css = styles(*sheets)

    spec = traitlets.Dict().tag(sync=True)
    picture = traitlets.Bytes().tag(sync=True)
    data = traitlets.Bytes().tag(sync=True)
    target = traitlets.Int(0).tag(sync=True)
    component = traitlets.Int(0).tag(sync=True)
    selected = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        run: Run,
        sweep: FlowSweep | None = None,
        grid: PatchGrid | None = None,
        *,
        target: int | str = 0,
        component: int | str = 0,
        selected: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        self.refuse(unknown)
        packed = pack_flow(run, sweep, grid)
        self.run, self.sweep, self.grid, self.targets = run, sweep, grid, packed.targets
        names = [one.text for one in packed.targets]
        super().__init__(
            spec=packed.spec,
            picture=packed.picture,
            data=packed.data,
            target=_place("target", target, names),
            component=_place("component", component, list(grid.components) if grid else [""]),
            selected=selected or {},
        )

    def draw_png(self) -> bytes:
        """The curves and the heat map of the target and component shown, as PNG bytes."""
        shown = self.targets[self.target]
        return draw_flow(self.run, self.sweep, self.grid, shown, component=self.component, selected=self.selected)

    def __repr__(self) -> str:
        parts = []
        if self.sweep is not None:
            parts.append(f"{len(self.sweep.flows)} flows x {len(self.sweep.windows)} windows cut")
        if self.grid is not None:
            parts.append(f"{len(self.grid.sites)} sites x {len(self.grid.windows)} windows patched")
        said = ", ".join(repr(one.text) for one in self.targets)
        return f"FlowView({self.run.question!r} → {self.run.answer!r}; {'; '.join(parts)}; {said})"

    def view(self) -> View:
        """The widget as a page without a kernel holds it."""
        known = set(anywidget.AnyWidget.class_trait_names())
        names = [name for name in sorted(self.trait_names(sync=True)) if name not in known and not name.startswith("_")]
        values = {name: getattr(self, name) for name in names}
        data = {name: value for name, value in values.items() if isinstance(value, bytes)}
        return View(self.entry, {name: value for name, value in values.items() if name not in data}, data)

    def to_html(self, path: str | os.PathLike | None = None, *, title: str | None = None) -> str:
        """One interactive HTML file that needs nothing else; written to `path` when given."""
        text = page(title or self.run.question, self._esm, self._css, [self.view()], width=self.width)
        if path is not None:
            Path(path).write_text(text, "utf-8")
        return text

    # -- checks on what Python or the page sets ------------------------------------------------

    @traitlets.validate("target")
    def _valid_target(self, proposal: dict) -> int:
        return within("target", proposal["value"], len(self.targets))

    @traitlets.validate("component")
    def _valid_component(self, proposal: dict) -> int:
        return within("component", proposal["value"], len(self.grid.components) if self.grid else 1)

    @traitlets.validate("selected")
    def _valid_selected(self, proposal: dict) -> dict[str, list[int]]:
        sizes = {}
        if self.sweep is not None:
            sizes["flow"] = (len(self.sweep.flows), len(self.sweep.windows))
        if self.grid is not None:
            sizes["cell"] = (len(self.grid.sites), len(self.grid.windows))
        out = {}
        for name, value in proposal["value"].items():
            if name not in sizes:
                raise traitlets.TraitError(f"selected may hold {' and '.join(map(repr, sizes))} here, got {name!r}")
            if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(type(one) is int for one in value):
                raise traitlets.TraitError(
                    f"selected[{name!r}] must be [{KINDS[name]}, window], two whole numbers, got {value!r}"
                )
            rows = within(f"selected {KINDS[name]}", value[0], sizes[name][0])
            out[name] = [rows, within("selected window", value[1], sizes[name][1])]
        return out


def _place(option: str, given: int | str, names: list[str]) -> int:
    """A position, from itself or from the name there."""
    if not isinstance(given, str):
        return given
    if given not in names:
        raise ValueError(f"{option} must be one of {', '.join(repr(name) for name in names)}, got {given!r}")
    return names.index(given)

"""FlowView: where the answer's information flows, as seen by touching the model.

On the left what cutting each flow of attention costs, layer by layer; on the right what each place of the clean run
brings back when it is put into a corrupted one. Either may be missing. All numbers are in the page; Python hears of
`target`, `component` and `selected`.

The scores are few (a 7B sweep is 3 flows x 32 windows), so they travel as they are, float32, NaN where nothing was
measured. What was measured on another checkpoint or answer is refused, as are tables that do not fit their names.

    FlowView(run, ll.knockout_sweep(lab, run), ll.patch(lab, run, corrupt="grey"))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets

from llava_lab.checks import entry
from llava_lab.errors import OptionError
from widgets.base import RunWidget, TraitRefused, within
from widgets.pack import chip_of, encode_picture, head_of

if TYPE_CHECKING:
    from llava_lab.results import FlowSweep, PatchGrid, Run, Target

KINDS = {"flow": "flow", "cell": "site"}


class FlowView(RunWidget):
    """What touching the model did; `sweep` is what `llava_lab.knockout_sweep` gives, `grid` what `llava_lab.patch` gives.

    `target` is what is shown first, by position among the targets of both or by text; `component` likewise of the grid's.
    `selected` is ``{"flow": [flow, window], "cell": [site, window]}``, positions in the results; what is not chosen is
    not in it.

        >>> widget = FlowView(run, ll.knockout_sweep(lab, run))
        >>> widget.spec["sweep"]["flows"]
        ['image -> question', 'question -> last', 'image -> last']
    """

    render, script, sheets = "renderFlow", "flow.js", ("base.css", "flow.css")

    data = traitlets.Bytes().tag(sync=True)
    target = traitlets.Int(0).tag(sync=True)
    component = traitlets.Int(0).tag(sync=True)
    selected = traitlets.Dict().tag(sync=True)

    @entry
    def __init__(
        self,
        run: Run,
        sweep: FlowSweep | None = None,
        grid: PatchGrid | None = None,
        *,
        target: int | str = 0,
        component: int | str = 0,
        selected: dict[str, Any] | None = None,
    ) -> None:
        spec, data, self.targets = pack_flow(run, sweep, grid)
        self.run, self.sweep, self.grid = run, sweep, grid
        names = [own.text for own in self.targets]
        super().__init__(
            spec=spec,
            **data,
            target=_place("target", target, names),
            component=_place("component", component, list(grid.components) if grid else [""]),
            selected=selected or {},
        )

    def draw_png(self) -> bytes:
        """The curves and the heat map of the target and component shown, as PNG bytes."""
        from llava_lab.plots import stills

        shown = self.targets[self.target]
        notes = []
        if "flow" in self.selected and self.sweep is not None and shown in self.sweep.targets:
            notes.append(cut_sentence(self.sweep, shown, self.selected["flow"]))
        if "cell" in self.selected and self.grid is not None and shown in self.grid.targets:
            notes.append(patch_sentence(self.grid, shown, self.component, self.selected["cell"]))
        options: dict[str, Any] = {"component": self.component, "notes": notes}
        return stills.png(stills.flow_and_patching(self.run, self.sweep, self.grid, shown, **options))

    def __repr__(self) -> str:
        parts = []
        if self.sweep is not None:
            parts.append(f"{len(self.sweep.flows)} flows x {len(self.sweep.windows)} windows cut")
        if self.grid is not None:
            parts.append(f"{len(self.grid.sites)} sites x {len(self.grid.windows)} windows patched")
        targets = ", ".join(repr(target.text) for target in self.targets)
        return f"FlowView({self.run.question!r} → {self.run.answer_shown!r}; {'; '.join(parts)}; {targets})"

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
                raise TraitRefused(f"selected may hold {' and '.join(map(repr, sizes))} here, got {name!r}")
            if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(type(place) is int for place in value):
                raise TraitRefused(f"selected[{name!r}] must be [{KINDS[name]}, window], two whole numbers, got {value!r}")
            rows = within(f"selected {KINDS[name]}", value[0], sizes[name][0])
            out[name] = [rows, within("selected window", value[1], sizes[name][1])]
        return out


def _place(option: str, choice: int | str, names: list[str]) -> int:
    """A position, from itself or from the name there."""
    if not isinstance(choice, str):
        return choice
    if choice not in names:
        raise OptionError(f"{option} must be one of {', '.join(repr(name) for name in names)}, got {choice!r}")
    return names.index(choice)


# -- packing ----------------------------------------------------------------------------------


def pack_flow(
    run: Run, sweep: FlowSweep | None, grid: PatchGrid | None
) -> tuple[dict[str, Any], dict[str, bytes], tuple[Target, ...]]:
    """Check that both belong to the run, and pack them: the page's spec, its data, and the targets in its chooser's order.

    The targets are those of sweep and grid together. ``data`` is little-endian float32: sweep before, after; grid clean,
    corrupt, scores.
    """
    from llava_lab.plots import palette

    if sweep is None and grid is None:
        raise OptionError("there is nothing to show: give sweep (of ll.knockout_sweep), grid (of ll.patch), or both")
    if sweep is not None:
        check_result(run, "sweep", sweep, "flow sweep", "knockout_sweep")
        check_shapes("sweep", sweep_shapes(sweep))
    if grid is not None:
        check_result(run, "grid", grid, "patch grid", "patch")
        check_shapes("grid", grid_shapes(grid))
    targets = tuple(dict.fromkeys([*(sweep.targets if sweep else ()), *(grid.targets if grid else ())]))
    # what does not reach the noise floor is drawn as nothing
    tables = [sweep.before, sweep.before + sweep.drawn] if sweep else []
    if grid:
        tables += [grid.clean, grid.corrupt, np.where(np.abs(grid.change) < grid.floors, grid.corrupt, grid.scores)]
    picture, kind = encode_picture(run.picture)
    score = (sweep or grid).score  # type: ignore[union-attr]
    spec = {
        **head_of(run),
        "chips": [{**chip_of(run, own), "what": own.scored_as(score), "plain": has_chance(own, score)} for own in targets],
        "sweep": sweep and sweep_spec(sweep, targets),
        "grid": grid and grid_spec(grid, targets),
        "picture": kind,
        "diverging": palette.diverging().tobytes().hex(),
        "colors": list(palette.FLOWS),
    }
    data = b"".join(np.ascontiguousarray(table, "<f4").tobytes() for table in tables)
    return spec, {"picture": picture, "data": data}, targets


def check_result(run: Run, name: str, result: Any, kind: str, made_by: str) -> None:
    """Refuse what is no such result, what another checkpoint gave, and targets this run does not say."""
    if getattr(result, "KIND", None) != kind:
        raise OptionError(f"{name} must be what llava_lab.{made_by} gives, got {type(result).__name__}")
    if result.fingerprint != run.fingerprint:
        raise OptionError(
            f"{name} was measured on another checkpoint ({result.model}) than the run's ({run.model}); measure this run"
        )
    if not result.targets:
        raise OptionError(f"{name} has no target; there is nothing to show")
    for target in result.targets:
        tokens = [int(run.token_ids[at + 1]) if at + 1 < len(run.token_ids) else -1 for at in target.positions]
        if tuple(tokens) != target.token_ids:
            raise OptionError(f"{name} was measured for {target.text!r}, which this run does not say there; measure this run")


def check_shapes(name: str, tables: dict[str, tuple[np.ndarray, tuple[int, ...]]]) -> None:
    """Refuse a table that does not have one number for each of its names."""
    for field, (table, shape) in tables.items():
        if table.shape != shape:
            raise OptionError(f"{name}.{field} must have the shape {shape}, got {table.shape}")


def sweep_shapes(sweep: FlowSweep) -> dict[str, tuple[np.ndarray, tuple[int, ...]]]:
    flows, windows, targets = len(sweep.flows), len(sweep.windows), len(sweep.targets)
    return {
        "windows": (sweep.windows, (windows, 2)),
        "centres": (sweep.centres, (windows,)),
        "before": (sweep.before, (targets,)),
        "after": (sweep.after, (flows, windows, targets)),
    }


def grid_shapes(grid: PatchGrid) -> dict[str, tuple[np.ndarray, tuple[int, ...]]]:
    cells, targets = (len(grid.components), len(grid.sites), len(grid.windows)), len(grid.targets)
    return {
        "windows": (grid.windows, (len(grid.windows), 2)),
        "clean": (grid.clean, (targets,)),
        "corrupt": (grid.corrupt, (targets,)),
        "scores": (grid.scores, (*cells, targets)),
        "answers": (grid.answers, cells),
    }


def sweep_spec(sweep: FlowSweep, targets: tuple[Target, ...]) -> dict[str, Any]:
    return {
        "flows": list(sweep.flows),
        "windows": sweep.windows.tolist(),
        "centres": sweep.centres.tolist(),
        "count": len(sweep.targets),
        "targets": places(sweep.targets, targets),
        "logodds": sweep.score == "logodds",
        "floors": sweep.floors.tolist(),
        "notes": [*sweep.notes, *sweep.noise_notes()],
    }


def grid_spec(grid: PatchGrid, targets: tuple[Target, ...]) -> dict[str, Any]:
    return {
        "components": list(grid.components),
        "sites": list(grid.sites),
        "windows": grid.windows.tolist(),
        "count": len(grid.targets),
        "targets": places(grid.targets, targets),
        "corruption": grid.corruption,
        "floors": grid.floors.tolist(),
        "answers": grid.answers.tolist(),
        "clean": grid.clean_answer,
        "corrupt": grid.corrupt_answer,
        "notes": [*grid.notes, *grid.noise_notes()],
    }


def has_chance(target: Target, score: str) -> bool:
    """Whether a target's probability can be read from its score: not of a contrast, nor from log-odds summed over tokens."""
    return not target.against_ids and (score == "logprob" or len(target.token_ids) == 1)


def places(own: tuple[Target, ...], targets: tuple[Target, ...]) -> list[int]:
    """Of each target of the chooser, its place in a result's own; -1 where it was not measured."""
    return [own.index(target) if target in own else -1 for target in targets]


def window_name(window: Any) -> str:
    """Layers [start, stop) as people count them."""
    start, last = int(window[0]), int(window[1]) - 1
    return f"layer {start}" if last <= start else f"layers {start}-{last}"


# -- what is chosen, in words ------------------------------------------------------------------


def cut_sentence(sweep: FlowSweep, target: Target, spot: Sequence[int]) -> str:
    """What one cut did, in words."""
    at = sweep.targets.index(target)
    cut = f"Cutting {sweep.flows[spot[0]]} in {window_name(sweep.windows[spot[1]])}"
    after = float(sweep.after[spot[0], spot[1], at])
    if not np.isfinite(after):
        return f"{cut}: not measured."
    change = float(sweep.drawn[spot[0], spot[1], at])
    if change == 0 < sweep.floors[at]:
        return f"{cut} has a negligible effect on {target.scored_as(sweep.score)}: less than the noise floor."
    way = "lowers" if change < 0 else "raises"
    what = target.scored_as(sweep.score)
    return f"{cut} {way} {what} by {abs(change):.2f}, from {plain(float(sweep.before[at]))} to {plain(after)}."


def patch_sentence(grid: PatchGrid, target: Target, component: int, spot: Sequence[int]) -> str:
    """What one patched place brought back, in words."""
    at = (component, spot[0], spot[1], grid.targets.index(target))
    put = f"Clean {grid.components[component]} at {grid.sites[spot[0]]}, {window_name(grid.windows[spot[1]])}"
    if not np.isfinite(grid.values[at]):
        return f"{put}: not measured, or nothing to bring back."
    answer = f'the answer is "{grid.answers[at[:3]]}" (clean "{grid.clean_answer}", corrupted "{grid.corrupt_answer}")'
    lost = grid.drawn[at] == 0 < grid.floors[at[-1]]
    share = "a negligible part (less than the noise floor)" if lost else plain(float(grid.drawn[at]))
    return f"{put}, brings back {share} of what {target.scored_as(grid.score)} lost; {answer}."


def plain(value: float) -> str:
    """Two decimals, and no minus before nothing."""
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text

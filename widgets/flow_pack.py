"""What interventions measured, as the page holds it: exact scores in one buffer, names and answers as text.

The scores are few (a 7B sweep is 3 flows x 32 windows), so they travel as they are, float32, NaN where nothing was
measured. Refuses what was measured on another checkpoint or answer, and tables that do not fit their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from widgets.pack import chip_of, encode_picture, head_of
from widgets.palette import palettes

if TYPE_CHECKING:
    from llava_lab.results import FlowSweep, PatchGrid, Run, Target

KINDS = {"flow": "flow", "cell": "site"}
LEAST = 1e-6  # a smaller difference between clean and corrupt leaves nothing to bring back, as in `PatchGrid.values`


@dataclass(frozen=True)
class PackedFlow:
    """What the page is given; `targets` are those of sweep and grid together, in the order of the page's chooser."""

    spec: dict[str, Any]
    picture: bytes
    data: bytes  # little-endian float32: sweep before, after; grid clean, corrupt, scores
    targets: tuple[Target, ...]


def pack_flow(run: Run, sweep: FlowSweep | None, grid: PatchGrid | None) -> PackedFlow:
    """Check that both belong to the run, and pack them."""
    if sweep is None and grid is None:
        raise ValueError("there is nothing to show: give sweep (of llava_lab.knockout_sweep), grid (of llava_lab.patch), or both")
    if sweep is not None:
        check_result(run, "sweep", sweep, "flow sweep", "knockout_sweep")
        check_shapes("sweep", sweep_shapes(sweep))
    if grid is not None:
        check_result(run, "grid", grid, "patch grid", "patch")
        check_shapes("grid", grid_shapes(grid))
    targets = tuple(dict.fromkeys([*(sweep.targets if sweep else ()), *(grid.targets if grid else ())]))
    tables = [sweep.before, sweep.after] if sweep else []
    tables += [grid.clean, grid.corrupt, grid.scores] if grid else []
    picture, kind = encode_picture(run.picture)
    spec = {
        **head_of(run),
        "chips": [{**chip_of(run, one), "what": what_of(one), "plain": not one.against_ids} for one in targets],
        "sweep": sweep and sweep_spec(sweep, targets),
        "grid": grid and grid_spec(grid, targets),
        "picture": kind,
        "diverging": palettes()["diverging"].tobytes().hex(),
    }
    data = b"".join(np.ascontiguousarray(table, "<f4").tobytes() for table in tables)
    return PackedFlow(spec, picture, data, targets)


def check_result(run: Run, name: str, result: Any, kind: str, made_by: str) -> None:
    """Refuse what is no such result, what another checkpoint gave, and targets this run does not say."""
    if getattr(result, "KIND", None) != kind:
        raise TypeError(f"{name} must be what llava_lab.{made_by} gives, got {type(result).__name__}")
    if result.fingerprint != run.fingerprint:
        raise ValueError(
            f"{name} was measured on another checkpoint ({result.model}) than the run's ({run.model}); measure this run"
        )
    if not result.targets:
        raise ValueError(f"{name} has no target; there is nothing to show")
    for target in result.targets:
        said = [int(run.token_ids[at + 1]) if at + 1 < len(run.token_ids) else -1 for at in target.positions]
        if tuple(said) != target.token_ids:
            raise ValueError(f"{name} was measured for {target.text!r}, which this run does not say there; measure this run")


def check_shapes(name: str, tables: dict[str, tuple[np.ndarray, tuple[int, ...]]]) -> None:
    """Refuse a table that does not have one number for each of its names."""
    for field, (table, shape) in tables.items():
        if table.shape != shape:
            raise ValueError(f"{name}.{field} must have the shape {shape}, got {table.shape}")


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
        "notes": list(sweep.notes),
    }


def grid_spec(grid: PatchGrid, targets: tuple[Target, ...]) -> dict[str, Any]:
    return {
        "components": list(grid.components),
        "sites": list(grid.sites),
        "windows": grid.windows.tolist(),
        "count": len(grid.targets),
        "targets": places(grid.targets, targets),
        "corruption": grid.corruption,
        "answers": grid.answers.tolist(),
        "clean": grid.clean_answer,
        "corrupt": grid.corrupt_answer,
        "notes": list(grid.notes),
    }


def places(own: tuple[Target, ...], targets: tuple[Target, ...]) -> list[int]:
    """Of each target of the chooser, its place in a result's own; -1 where it was not measured."""
    return [own.index(one) if one in own else -1 for one in targets]


def what_of(target: Target) -> str:
    """What is scored, as the axis and the sentences name it."""
    if target.against_ids:
        return f"logit difference ({target.text})"
    return "log p(whole answer)" if target.kind == "answer" else f"log p({target.text})"


def window_name(window: Any) -> str:
    """Layers [start, stop) as people count them."""
    start, last = int(window[0]), int(window[1]) - 1
    return f"layer {start}" if last <= start else f"layers {start}-{last}"

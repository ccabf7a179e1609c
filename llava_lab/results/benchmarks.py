"""Scores of a benchmark: what a model reached, what a model that cannot see reaches, and what the paper printed.

scores.at("F1")["value"], scores.table()
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float64, Int64

from llava_lab.errors import DataError, OptionError
from llava_lab.results.save import Saved
from llava_lab.results.table import Table, figure, plain

DIGITS = 3  # of a number in to_dict


@dataclass(frozen=True)
class BenchmarkScores(Saved):
    """Measures of one benchmark in the paper's own units, each beside its controls and what was published."""

    KIND: ClassVar[str] = "benchmark scores"
    GAPS: ClassVar[tuple[str, ...]] = ("values", "intervals", "control_values", "control_intervals", "gap_intervals")

    benchmark: str
    measures: tuple[str, ...]  # what the paper prints comes first
    values: Float64[np.ndarray, " measures"]  # percent, points for MME; NaN where there is nothing to divide by
    intervals: Float64[np.ndarray, "measures 2"]  # 95%, pictures resampled
    counts: Int64[np.ndarray, " measures"]  # questions behind each
    controls: tuple[str, ...]
    control_values: Float64[np.ndarray, "controls measures"]
    control_intervals: Float64[np.ndarray, "controls measures 2"]
    gap_intervals: Float64[np.ndarray, "controls measures 2"]  # of value minus control, on the same resampled pictures
    published: dict[str, dict[str, float]]  # by model, by measure
    model: str
    fingerprint: str  # of the weights; empty where answers were read from a file
    about: dict[str, Any] = field(default_factory=dict)  # data, pictures, questions, prompt, judge
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises DataError for a result without a measure."""
        if not self.measures:
            raise DataError("benchmark scores have at least one measure")

    def at(self, measure: str, control: str | None = None) -> dict[str, Any]:
        """One number with its interval; of a control also the interval of the difference, value minus control."""
        column = _place("measure", measure, self.measures)
        if control is None:
            parts: dict[str, Any] = {"value": self.values[column], "interval": self.intervals[column]}
            parts["n"] = self.counts[column]
        else:
            row = _place("control", control, self.controls)
            parts = {"value": self.control_values[row, column], "interval": self.control_intervals[row, column]}
            parts["gap_interval"] = self.gap_intervals[row, column]
        return {name: part.tolist() for name, part in parts.items()}

    def table(self) -> Table:
        """A row for each measure: value, interval, each control, each published model."""
        about = self.about
        title = f"{self.benchmark}: {self.model or 'answers from a file'} on {about.get('data', '?')}, "
        title += f"{about.get('questions', '?')} questions about {about.get('pictures', '?')} pictures"
        rows = []
        for column, name in enumerate(self.measures):
            low, high = self.intervals[column]
            cells = [figure(self.values[column], ".1f"), f"[{figure(low, '.1f')}, {figure(high, '.1f')}]"]
            cells += [figure(control[column], ".1f") for control in self.control_values]
            cells += [figure(numbers.get(name, float("nan")), ".1f") for numbers in self.published.values()]
            rows.append((name, *cells, str(self.counts[column])))
        headings = ("measure", "value", "95%", *self.controls, *self.published, "n")
        return Table(headings, tuple(rows), title=title, notes=self.notes)

    def to_dict(self) -> dict[str, Any]:
        """What ``llava-lab evaluate --benchmark --json`` prints: a row per measure."""
        rows = []
        for name in self.measures:
            row = _rounded(self.at(name)) | {"measure": name}
            row["controls"] = {control: _rounded(self.at(name, control)) for control in self.controls}
            row["published"] = {model: numbers[name] for model, numbers in self.published.items() if name in numbers}
            rows.append(row)
        named = {"benchmark": self.benchmark, "model": self.model, "fingerprint": self.fingerprint}
        return plain(named | {"measures": rows, "about": self.about, "seconds": self.seconds, "notes": self.notes})


def _rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, int) else np.round(value, DIGITS).tolist() for name, value in numbers.items()}


def _place(kind: str, name: str, names: tuple[str, ...]) -> int:
    if name not in names:
        raise OptionError(f"no {kind} {name!r}; the {kind}s are {', '.join(names) or 'none'}")
    return names.index(name)

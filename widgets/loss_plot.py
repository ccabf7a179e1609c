"""LossPlot: the losses of a training as they come, with the time left and a button that stops and keeps the work.

`told` takes one dict per logged step, as ``train_stage(..., told=plot.told)`` gives them: ``step``, ``loss`` and
``seconds``; ``epoch`` says how far the schedule is where no `total` was given, ``ended`` that this step is the last. A
cell that trains keeps the kernel busy, so no click can be heard: there the plot shows no button and names the notebook's own (■),
which works either way. With `start` the training runs beside the kernel, and Stop is heard.

    plot = LossPlot(total=200)
    ll.train_stage(lab, "rows.json", "align", "out", told=plot.told)
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import traitlets

from llava_lab.checks import entry, shown
from llava_lab.errors import OptionError
from widgets.base import LabWidget

MOST_POINTS = 1000  # a curve's in the page; longer ones are averaged over equal runs of steps
EVERY = 0.2  # seconds between two messages to the page at least


class LossPlot(LabWidget):
    """A live plot of one or several losses; `name` is the first curve's, `total` its number of steps if known.

    `told` adds a point to the current curve, `curve` begins another. `stopped` is true once someone asked to stop.

        >>> plot = LossPlot("align", total=100)
        >>> plot.told({"step": 1, "loss": 2.5})
        >>> plot
        LossPlot(align: 2.500 at step 1)
    """

    render, script, sheets = "renderLoss", "loss.js", ("base.css", "loss.css")

    data = traitlets.Bytes().tag(sync=True)
    stopped = traitlets.Bool(False).tag(sync=True)
    selected = traitlets.List().tag(sync=True)
    pointed = traitlets.Int(-1).tag(sync=True)

    @entry
    def __init__(self, name: str = "loss", *, total: int | None = None, log: bool = False) -> None:
        self.logarithmic, self.curves = bool(log), {}
        self._totals: dict[str, int | None] = {}
        self._seconds: dict[str, float] = {}
        self._begun: dict[str, float] = {}
        self._sent, self.running = 0.0, False
        super().__init__()
        self.curve(name, total=total)

    curves: dict[str, list[tuple[int, float]]]  # steps and losses by name
    current: str  # the curve that is told
    state: str  # of the current curve: waiting, running, finished, stopped or failed

    @entry
    def curve(self, name: str, *, total: int | None = None) -> LossPlot:
        """Begin another curve, of another stage or connector; what is told next belongs to it."""
        if total is not None and total < 1:
            raise OptionError(f"total must be 1 or more steps, got {total}")
        if self.curves.get(name):
            raise OptionError(f"there is a curve {name!r} already; give this one another name")
        if self.curves and not self.curves[self.current]:
            del self.curves[self.current]  # never begun
        self.current = name
        self.curves[name], self._totals[name], self._seconds[name] = [], total, 0.0
        self.stopped, self._asked, self._given, self.state = False, False, total is not None, "waiting"
        self.publish()
        return self

    def told(self, row: Mapping[str, Any]) -> None:
        """Add a logged step. Raises KeyboardInterrupt once Stop was pressed: the training ends as at an interrupt."""
        if not isinstance(row, Mapping):
            raise OptionError(f"a logged step is a dictionary with 'step' and 'loss', got {shown(row)}")
        missing = [key for key in ("step", "loss") if key not in row]
        if missing:
            raise OptionError(f"a logged step needs 'step' and 'loss', got {', '.join(map(repr, row)) or 'nothing'}")
        name, step = self.current, int(row["step"])
        self.curves[name].append((step, float(row["loss"])))
        self._begun.setdefault(name, time.monotonic())
        self._seconds[name] = float(row.get("seconds", time.monotonic() - self._begun[name]))
        if not self._given and row.get("epoch"):
            self._totals[name] = max(step, round(step / float(row["epoch"])))
        ended = row.get("ended") or ("finished" if step == self._totals[name] else None)
        self.state = {None: "running", "finished": "finished"}.get(ended, "stopped")
        stop = self.stopped and not self._asked and ended is None
        if stop:
            self._asked = True  # a second interrupt would lose the checkpoint of the first
            self.state = "running" if self.running else "stopped"
        if time.monotonic() - self._sent >= EVERY or self.state != "running":
            self.publish()
        if stop:
            raise KeyboardInterrupt

    def left(self) -> float | None:
        """Seconds the current curve has to go, by its pace so far; None while that is not known."""
        rows, total = self.curves[self.current], self._totals[self.current]
        if not rows or total is None or not self._seconds[self.current]:
            return None
        done = rows[-1][0] - rows[0][0] + 1  # a resumed run begins late
        return max(0, total - rows[-1][0]) * self._seconds[self.current] / done

    def start(self, call: Callable[[], Any]) -> Future[Any]:
        """Run `call` beside the kernel, which then hears the Stop button; ``.result()`` waits for what it returns.

        A lab that trains beside the kernel refuses other work in one line until that has ended.
        """
        future: Future[Any] = Future()
        if not callable(call):
            raise OptionError(f"what is started must be a function without arguments, got {shown(call)}")
        if self.running:
            raise OptionError("a training is running already; stop it or wait for its result()")
        self.running, self.stopped, self._asked = True, False, False

        def run() -> None:
            try:
                value = call()
            except BaseException as error:
                self._end("failed")
                future.set_exception(error)
            else:
                self._end("stopped" if self._asked else "finished")
                future.set_result(value)

        self.publish()
        threading.Thread(target=run, name="training", daemon=True).start()
        return future

    def publish(self) -> None:
        """Send what is known now to the page."""
        from llava_lab.plots.palette import LINES

        self._sent = time.monotonic()
        shown = {name: thinned(rows) for name, rows in self.curves.items()}
        tables = [np.asarray(rows, "<f8").reshape(-1, 2) for rows in shown.values()]
        self.data = b"".join(table.astype("<f4").tobytes() for table in tables)
        self.spec = {
            "curves": [{"name": name, "count": len(rows), "total": self._totals[name]} for name, rows in shown.items()],
            "left": self.left(),
            "log": self.logarithmic,
            "colors": list(LINES),
            "state": self.state,
            "heard": self.running,
        }

    def draw_png(self) -> bytes:
        """The curves so far, as PNG bytes."""
        from llava_lab.plots import stills

        return stills.png(stills.losses(self.curves, log=self.logarithmic))

    def __repr__(self) -> str:
        curves = [
            f"{name}: {f'{rows[-1][1]:.3f} at step {rows[-1][0]}' if rows else 'no step yet'}"
            for name, rows in self.curves.items()
        ]
        return f"LossPlot({'; '.join(curves)})"

    def _end(self, how: str) -> None:
        self.running = False
        if self.state != "finished" or how == "failed":
            self.state = how
        self.publish()


def thinned(rows: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points: the mean step and loss of equal runs of rows; what is not finite stays a hole."""
    width = math.ceil(len(rows) / MOST_POINTS) or 1
    runs = [rows[at : at + width] for at in range(0, len(rows), width)]
    return [(float(np.mean([s for s, _ in run])), float(np.mean([v for _, v in run]))) for run in runs]

"""What a person sees of a run: one bar with the time left, one line of JSON a step, and a stop that keeps the work.

The bar is tqdm's own for terminal or notebook. The first interrupt (Ctrl-C, a notebook's stop button) ends
the run after the step under way, with a checkpoint; the second stops at once. Beside the main thread, where no
interrupt is heard, `told` may raise KeyboardInterrupt: it is the first interrupt, and the step under way is its own.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

log = logging.getLogger(__name__)

OnLog = Callable[[dict[str, Any]], None]


class Stop:
    """Whether someone asked to stop."""

    def __init__(self) -> None:
        self.asked = False


class Progress(TrainerCallback):
    """Bar, ``log.jsonl`` and `told` with every logged step; ends the run when `stop` was asked for."""

    def __init__(self, name: str, log_file: Path, stop: Stop, *, show: bool = True, told: OnLog | None = None) -> None:
        self.name, self.log_file, self.stop, self.show, self.told = name, log_file, stop, show, told
        self.bar: Any = None
        self.stepping = False  # within the optimiser's step weights are half new
        self.begin = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin = time.monotonic()
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", disable=not self.show)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stepping = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stepping = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        if self.stop.asked:
            control.should_training_stop = control.should_save = control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.bar is None or not logs or "loss" not in logs:
            return
        row = {"step": state.global_step, **logs, "seconds": round(time.monotonic() - self.begin, 2)}
        self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        with self.log_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if state.global_step >= state.max_steps or self.stop.asked:
            row["ended"] = "finished" if state.global_step >= state.max_steps else "interrupted"
        try:
            if self.told is not None:
                self.told(row)
        except KeyboardInterrupt:
            if self.stop.asked:
                raise
            self.stop.asked = control.should_training_stop = control.should_save = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away; also after an exception."""
        if self.bar is not None:
            self.bar.close()


@contextmanager
def stopping(stop: Stop) -> Iterator[None]:
    """Within it the first interrupt asks `stop`, the second raises KeyboardInterrupt; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def heard(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        log.warning("stopping after this step; interrupt again to stop at once")

    before = signal.signal(signal.SIGINT, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

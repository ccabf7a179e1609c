"""LossPlot as Python sees it: what is told, the time left, and the stop that ends a training as an interrupt does."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import llava_lab as ll
from llava_lab.training import LLAVA_15_7B, Running, Trained, train_stage
from llava_lab.training.trainer import last_checkpoint
from tests.support.families import family
from tests.support.training_rows import write_rows
from widgets import LossPlot
from widgets.loss_plot import MOST_POINTS, thinned


def feed(plot: LossPlot, steps: int, of: int = 10) -> None:
    for step in range(1, steps + 1):
        plot.told({"step": step, "loss": 4 / step, "epoch": step / of, "seconds": 2.0 * step})


def test_time_left_is_the_pace_so_far_times_the_steps_to_go() -> None:
    plot = LossPlot("align")
    assert plot.left() is None
    feed(plot, 4)
    assert plot.left() == 12.0  # 6 steps of 2 s
    plot.publish()
    assert plot.spec["curves"][0]["total"] == 10


def test_curves_follow_one_another_in_the_page() -> None:
    plot = LossPlot("align")
    feed(plot, 3)
    plot.curve("instruct", total=2)
    feed(plot, 2)
    plot.publish()
    assert [(one["name"], one["count"]) for one in plot.spec["curves"]] == [("align", 3), ("instruct", 2)]
    rows = np.frombuffer(plot.data, "<f4").reshape(-1, 2)
    np.testing.assert_allclose(rows, np.array([[1, 4], [2, 2], [3, 4 / 3], [1, 4], [2, 2]]), rtol=1e-6)
    with pytest.raises(ValueError, match="there is a curve 'align' already"):
        plot.curve("align")


def test_stop_ends_the_training_as_an_interrupt_does() -> None:
    plot = LossPlot()
    plot.stopped = True
    with pytest.raises(KeyboardInterrupt):
        feed(plot, 2)
    assert len(plot.curves["loss"]) == 1
    feed(plot, 2)  # asked once: a second interrupt would lose the checkpoint of the first
    assert len(plot.curves["loss"]) == 3


def test_stop_reaches_a_training_beside_the_kernel() -> None:
    plot = LossPlot()
    heard = []

    def train() -> int:
        try:
            feed(plot, 3)
            plot.stopped = True  # as the button does
            feed(plot, 3)
        except KeyboardInterrupt:
            heard.append(len(plot.curves["loss"]))
        return 7

    assert plot.start(train).result(timeout=5) == 7
    assert heard == [4]
    assert not plot.running
    assert plot.spec["state"] == "stopped"


def test_an_error_beside_the_kernel_comes_back() -> None:
    plot = LossPlot()
    with pytest.raises(ZeroDivisionError):
        plot.start(lambda: 1 / 0).result(timeout=5)
    assert plot.spec["state"] == "failed"


def test_the_page_hears_how_a_training_ended() -> None:
    plot = LossPlot("align", total=3)
    assert plot.spec["state"] == "waiting"
    feed(plot, 2)
    assert plot.state == "running"
    plot.told({"step": 3, "loss": 1.0})
    assert plot.spec["state"] == "finished"
    plot.stopped = True  # a click that came too late stops nothing
    assert plot.curve("instruct").spec["state"] == "waiting"
    plot.told({"step": 1, "loss": 1.0, "ended": "interrupted"})
    assert plot.spec["state"] == "stopped"


@pytest.fixture
def train(tiny_folder: Path, tmp_path: Path) -> Callable[..., Trained]:
    """Stage 2 of a small random model for six steps of four rows; `told` hears them."""
    write_rows(tmp_path)

    def run(name: str, *, resume: bool = False, **options: object) -> Trained:
        recipe = replace(LLAVA_15_7B.instruct, batch=4, rate=1e-3)
        given = {"recipe": recipe, "steps": 6, "running": Running(progress=False), "cache": tmp_path / "cache"} | options
        lab = ll.load(str(tiny_folder))
        return train_stage(lab, tmp_path / "mix.json", "instruct", tmp_path / name, resume=resume, **given)  # type: ignore[arg-type]

    return run


def weights(done: Trained) -> list[torch.Tensor]:
    return list(ll.load(done.folder).model.parameters())


def test_a_training_in_the_cell_fills_the_plot_and_is_finished(train: Callable[..., Trained]) -> None:
    plot = LossPlot("instruct")
    done = train("cell", told=plot.told)
    assert plot.curves["instruct"] == list(zip(done.logged, done.losses, strict=True))
    assert plot.spec["curves"][0] == {"name": "instruct", "count": 6, "total": 6}
    assert plot.spec["state"] == "finished"


@family("beside", [False, True], quick=(True,), ids=["in the cell", "beside the kernel"])
def test_a_stopped_training_leaves_a_model_and_goes_on_to_the_same_weights(
    train: Callable[..., Trained], tmp_path: Path, beside: bool
) -> None:
    plot = LossPlot("instruct")

    def told(row: dict) -> None:
        plot.stopped = row["step"] == 3  # as the button does
        plot.told(row)

    def call() -> Trained:
        return train("stopped", told=told)

    done = plot.start(call).result(timeout=60) if beside else call()
    assert (done.stopped, done.steps) == ("interrupted", 3)
    assert plot.spec["state"] == "stopped"
    assert last_checkpoint(tmp_path / "stopped/instruct").name == "checkpoint-3"  # type: ignore[union-attr]
    kept = weights(done)
    again, whole = train("stopped", resume=True), train("whole")
    assert again.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(whole), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept, weights(whole), strict=True))


def test_long_curves_are_averaged_and_short_ones_left_alone() -> None:
    rows = [(step, float(step)) for step in range(2 * MOST_POINTS)]
    assert thinned(rows)[:2] == [(0.5, 0.5), (2.5, 2.5)]
    assert len(thinned(rows)) == MOST_POINTS
    assert thinned([(1, 2.0)]) == [(1.0, 2.0)]


def test_the_still_picture_is_drawn_with_and_without_steps() -> None:
    plot = LossPlot(log=True)
    empty = plot.draw_png()
    feed(plot, 5)
    assert plot.draw_png() != empty
    assert Image.open(io.BytesIO(plot.draw_png())).width == 960


def test_a_row_without_a_loss_and_a_wrong_total_are_refused() -> None:
    with pytest.raises(ValueError, match="a logged step needs 'step' and 'loss', got 'step'"):
        LossPlot().told({"step": 1})
    with pytest.raises(ValueError, match="total must be 1 or more steps, got 0"):
        LossPlot(total=0)

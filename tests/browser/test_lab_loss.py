"""LossPlot in JupyterLab: the Stop button ends a real training that runs beside the kernel, and keeps its model."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.support.lab_server import LabPage
from tests.support.training_rows import write_rows

CELLS = (
    """
import time
from dataclasses import replace
import llava_lab as ll
from llava_lab.training import LLAVA_15_7B, Running
from widgets import LossPlot

lab = ll.load({folder!r})
recipe = replace(LLAVA_15_7B.instruct, batch=2, rate=1e-4)
plot = LossPlot("instruct")


def told(row):
    plot.told(row)
    time.sleep(0.05)


def train():
    options = {{"recipe": recipe, "steps": 4000, "cache": {cache!r}, "running": Running(progress=False)}}
    return ll.train_stage(lab, {data!r}, "instruct", {out!r}, told=told, **options)
""",
    "plot",
)


@pytest.fixture
def cells(tiny_folder: Path, tmp_path: Path) -> list[str]:
    data = write_rows(tmp_path)
    names = {"folder": str(tiny_folder), "data": str(data), "cache": str(tmp_path / "cache"), "out": str(tmp_path / "run")}
    return [CELLS[0].format(**names), CELLS[1], "future = plot.start(train)"]


def test_stop_in_the_notebook_ends_the_training_and_keeps_the_model(lab: LabPage, cells: list[str], tmp_path: Path) -> None:
    lab.open(cells)
    lab.run_all()
    shown = lab.page.locator(".lab-loss")
    status = shown.locator(".lab-loss-status")
    expect(status).to_contain_text(" left", timeout=60_000)
    shown.get_by_role("button", name="Stop").click()
    expect(status).to_contain_text("the model is kept", timeout=60_000)
    stopped, steps = lab.python("[future.result(timeout=60).stopped, future.result().steps]")
    assert stopped == "interrupted"
    expect(status).to_have_text(f"stopped at step {steps}, the model is kept")
    assert (tmp_path / f"run/instruct/checkpoint-{steps}").is_dir()
    assert lab.python("ll.load(future.result().folder).fingerprint == lab.fingerprint") is True

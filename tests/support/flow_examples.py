"""A knockout sweep and a patch grid made by hand, for the tests of FlowView: numbers that can be read off, two holes."""

from __future__ import annotations

import numpy as np

from llava_lab.results import FlowSweep, PatchGrid, Run, Target
from tests.support.widget_examples import make_run

WINDOWS = np.array([[0, 2], [1, 3], [2, 4], [3, 4]], np.int64)
CHANGE = np.array([[0.0, -1.3, -0.4, 0.0], [0.0, -0.2, -3.0, -0.5], [0.1, 0.0, -0.6, np.nan]], np.float32)
RESIDUAL = np.array([[1.0, 0.75, 0.5, 0.0], [0.0, 0.0, 1.5, 0.25], [-0.5, 0.0, 0.5, 1.0]], np.float32)
MLP = np.array([[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, np.nan]], np.float32)


def two_targets(run: Run) -> tuple[Target, Target]:
    """The word "red." and its contrast with "blue"."""
    word = run.target("red.")
    return word, Target("contrast", "red, not blue", word.positions, word.token_ids, (7,))


def sweep_example(run: Run) -> FlowSweep:
    before = np.array([-0.2, 4.0], np.float32)
    after = before + np.stack([CHANGE, 2 * np.nan_to_num(CHANGE)], -1)
    return FlowSweep(
        flows=("image -> question", "question -> last", "image -> last"),
        windows=WINDOWS,
        centres=np.arange(4),
        targets=two_targets(run),
        before=before,
        after=after.astype(np.float32),
        proof={},
        model=run.model,
        fingerprint=run.fingerprint,
        passes={"forward": 15},
        seconds=0.5,
        notes=("A cell cuts 2 layers around its centre.",),
    )


def grid_example(run: Run) -> PatchGrid:
    clean, corrupt = np.array([-0.2, 4.0], np.float32), np.array([-4.2, -4.0], np.float32)
    shares = np.stack([RESIDUAL, MLP])
    both = np.stack([shares, np.nan_to_num(shares)], -1)
    return PatchGrid(
        components=("residual", "mlp"),
        sites=("image", "question", "last"),
        windows=np.stack([np.arange(4), np.arange(1, 5)], 1),
        targets=two_targets(run),
        corruption="another picture",
        clean=clean,
        corrupt=corrupt,
        scores=(corrupt + both * (clean - corrupt)).astype(np.float32),
        answers=np.where(np.isnan(shares), "", np.where(shares > 0.5, "red.", "blue.")),
        clean_answer="red.",
        corrupt_answer="blue.",
        proof={},
        model=run.model,
        fingerprint=run.fingerprint,
        passes={"forward": 27},
        seconds=0.5,
        notes=("An answer is the likeliest token.",),
    )


def two() -> tuple[Run, FlowSweep, PatchGrid]:
    """The run with both."""
    run = make_run()
    return run, sweep_example(run), grid_example(run)

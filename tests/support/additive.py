"""A model that is a sum over patches, so that the right scores are known by hand; and maps written by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llava_lab.attribution  # noqa: F401  so that the module below is there
from llava_lab.judging.faithfulness import Judge
from llava_lab.models import Lab
from llava_lab.results import Relevance, Run

HOME = sys.modules["llava_lab.judging.faithfulness"]  # the package's attribute of this name is the function
QUICK: dict[str, Any] = {"steps": 4, "seeds": 2}

Install = Callable[[np.ndarray], None]


def additive_model(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Given weights (targets, rows, cols), the score of a target is their sum over the patches left as they were."""

    def install(weights: np.ndarray) -> None:
        def scoring(lab: Lab, run: Run, targets: Any, read: Any) -> Any:
            pixels = lab.inputs(run)["pixel_values"]
            side = pixels.shape[-1] // run.map.rows

            def score(batch: Tensor) -> Tensor:
                same = (batch == pixels).all(1).float()  # B, Y, X
                kept = torch.nn.functional.avg_pool2d(same[:, None], side)[:, 0] == 1
                read.floors = torch.zeros(len(batch), len(targets))
                return torch.einsum("byx,nyx->bn", kept.float(), torch.from_numpy(weights).float())

            return pixels, score

        monkeypatch.setattr("llava_lab.replay.alter.target_score", scoring)

    return install


def everything_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves of a random model too: it may not care about the picture, or like a grey one more."""
    monkeypatch.setattr(HOME, "MATTERS", {"probability": -9.0, "logprob": -np.inf, "logodds": -np.inf})


def map_by_hand(run: Run, values: np.ndarray, target: Any = "blue", **changes: Any) -> Relevance:
    """Values (targets, rows, cols) as a map of `target`; None is one map per word."""
    targets = run.word_targets()[: len(values)] if target is None else (run.target(target),)
    known: dict[str, Any] = {"map": run.map, "model": run.model, "fingerprint": run.fingerprint}
    rel = Relevance(values.astype(np.float32), targets, "by hand", {}, seconds=0.0, passes={}, **known)
    return replace(rel, **changes)


def judge_of(lab: Lab, run: Run, fills: tuple[str, ...] = ("grey", "mean"), target: Any = "blue", **options: Any) -> Judge:
    """A judge that is ready to score maps of one target."""
    judge = Judge(lab, run, (run.target(target),), fills, **{**QUICK, **options})
    judge.choose_fills(len(fills))
    judge.measure_controls()
    return judge

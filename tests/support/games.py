"""A game with a known answer: a picture of numbers whose score is a formula, in the place of a model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_lab.attribution.shapley import Game
from llava_lab.replay.alter import Level


def formula_level(grid: tuple[int, int], formula: Callable[[Tensor], Tensor]) -> Level:
    """A level that shows ones and hides with zeros; `formula` scores a batch of such pictures, (B, rows, cols) -> (B, N)."""
    whole = torch.ones(1, 1, *grid)
    return Level("projector", grid, 1, whole, torch.zeros_like(whole), lambda shown: formula(shown[:, 0]), lambda shown: shown)


def formula_game(labels: np.ndarray, formula: Callable[[Tensor], Tensor], **options: Any) -> Game:
    """The game over `labels`; `formula` sees each region as shown (1) or hidden (0), (B, n) -> (B, N)."""
    first = [int(np.flatnonzero(labels.ravel() == region)[0]) for region in range(int(labels.max()) + 1)]
    rows, cols = labels.shape
    return Game(formula_level((rows, cols), lambda shown: formula(shown.flatten(1)[:, first])), labels, **options)

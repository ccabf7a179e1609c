"""A game with a known answer: a picture of numbers whose score is a formula, in the place of a model's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from llava_lab.attribution.shapley import RegionGame
from llava_lab.replay.alter import Altered


class Formula(Altered):
    """A picture of ones that is hidden with zeros; `formula` scores a batch of such pictures, (B, rows, cols) -> (B, N)."""

    patch = 1

    def __init__(self, grid: tuple[int, int], formula: Callable[[Tensor], Tensor], batch: int = 8) -> None:
        super().__init__(grid, at="projector", fill="mean", batch=batch)
        self.frame, self._formula = grid, formula

    def _score(self, shown: Tensor, fill: str) -> Tensor:
        return self._formula(shown)


def formula_game(labels: np.ndarray, formula: Callable[[Tensor], Tensor], batch: int = 8) -> RegionGame:
    """The game over `labels`; `formula` sees each region as shown (1) or hidden (0), (B, n) -> (B, N)."""
    first = [int(np.flatnonzero(labels.ravel() == region)[0]) for region in range(int(labels.max()) + 1)]
    rows, cols = labels.shape
    return RegionGame(Formula((rows, cols), lambda shown: formula(shown.flatten(1)[:, first]), batch), labels)

"""One picture scored with any of its patches filled, in batches, each covering run only once.

The same coverings come back: nothing and everything filled, random rankings shared by all methods, a map
and its reverse, methods that agree. What was scored is remembered, so asking again costs nothing. It
knows nothing of maps or methods; `llava_lab.attribution.faithfulness` decides what to cover.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.scoring import Score
from llava_lab.geometry import PictureMap


class Perturbed:
    """The scores (targets,) of a picture under coverings; call inside `capture.undisturbed`."""

    def __init__(
        self,
        pixels: Float[Tensor, "1 3 Y X"],
        fills: Mapping[str, Float[Tensor, "1 3 Y X"]],
        score: Score,
        where: PictureMap,
        *,
        batch: int = 16,
    ) -> None:
        self.pixels, self.fills, self.score, self.map, self.batch = pixels, fills, score, where, batch
        self.patches = np.flatnonzero(where.coverage().ravel() > 0)  # padding is never ranked nor filled
        self.forwards = 0
        self._known: dict[tuple[str, bytes], np.ndarray] = {}

    @property
    def whole(self) -> np.ndarray:
        """Score of the picture as it is, float64 (targets,)."""
        return self.covered("", np.zeros((1, len(self.patches)), bool))[0]

    def filled(self, fill: str) -> np.ndarray:
        """Score with every patch filled, float64 (targets,)."""
        return self.covered(fill, np.ones((1, len(self.patches)), bool))[0]

    def covered(self, fill: str, gone: np.ndarray) -> np.ndarray:
        """Scores float64 (B, targets) where `gone`, bool (B, patches), says which of `patches` are filled."""
        keys = [(fill if row.any() else "", np.packbits(row).tobytes()) for row in gone]
        new = {key: row for key, row in zip(keys, gone, strict=True) if key not in self._known}
        rows, names = list(new.values()), list(new)
        for start in range(0, len(rows), self.batch):
            masks = np.stack([self._on_pixels(row) for row in rows[start : start + self.batch]])
            for key, scores in zip(names[start:], self.pixels_covered(fill, masks), strict=False):
                self._known[key] = scores
        return np.stack([self._known[key] for key in keys])

    def pixels_covered(self, fill: str, masks: np.ndarray) -> np.ndarray:
        """Scores float64 (B, targets) with the pixels in `masks`, bool (B, Y, X), filled; not remembered."""
        source = self.fills[fill] if masks.any() else self.pixels
        found = []
        for start in range(0, len(masks), self.batch):
            now = torch.from_numpy(masks[start : start + self.batch, None]).to(self.pixels.device)
            found.append(self.score(torch.where(now, source, self.pixels)).double().cpu().numpy())
            self.forwards += len(now)
        return np.concatenate(found)

    def _on_pixels(self, gone: np.ndarray) -> np.ndarray:
        """Patches (patches,) -> the model's pixels (Y, X)."""
        grid = np.zeros(self.map.rows * self.map.cols, bool)
        grid[self.patches] = gone
        height, width = self.pixels.shape[-2:]
        y = np.arange(height) * self.map.rows // height
        x = np.arange(width) * self.map.cols // width
        return grid.reshape(self.map.rows, self.map.cols)[y][:, x]

"""A picture under veils: what is altered is the picture itself, before any model sees it.

Methods that hide patches work on a *veil* instead of pixels: how much of each place is shown, and which fill stands where
it is not. `Veiled.altered` turns a veil into the picture to show. Where a model's own way with pictures is not known (a
server), or where it looks at them several times (tiles), this is what occlusion and faithfulness can touch.

It decides nothing about what to hide and scores nothing; `scores` is its children's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.attribution.base import Outside, Targets
from llava_lab.attribution.fills import BLUR, blur_fill, inpaint, mean_fill, noise_fill
from llava_lab.attribution.occlusion_levels import LEVELS, Level, _no_tokens
from llava_lab.errors import OptionError
from llava_lab.results import Run

GREY = 128.0


class Veiled(Outside):
    """One run's picture, altered from outside. `KIND` says why there is no other place to alter."""

    KIND: ClassVar[str]

    def __init__(self, run: Run, picture: np.ndarray, *, name: str, fingerprint: str) -> None:
        self.run, self.picture, self.name, self.fingerprint, self.model = run, picture, name, fingerprint, nn.Module()
        self._fills: list[tuple[str, int]] = []  # name, seed; a veil holds the number in this list
        self._filled: dict[int, np.ndarray] = {}

    @abstractmethod
    def scores(self, veils: Float[Tensor, "B 3 Y X"], targets: Targets) -> Float[Tensor, "B N"]:
        """Each target's score when the picture is shown through each veil."""

    def open_level(self, targets: Targets, *, at: str, fill: str, seed: int, fills: tuple[str, ...]) -> Level:
        """The veil as a `Level`: whole cells of equal side, shown or filled."""
        if at != LEVELS[0]:
            raise OptionError(f"at must be {LEVELS[0]!r}: {self.name!r} {self.KIND}, which leaves no other place, got {at!r}")
        (height, width), (rows, cols) = self.picture.shape[:2], (self.run.map.rows, self.run.map.cols)
        side = -(-max(height * cols, width * rows) // (rows * cols))
        whole = self._veil(rows * side, cols * side, 1.0, self._number(fill, seed))
        hidden = self._veil(rows * side, cols * side, 0.0, self._number(fill, seed))
        return Level(at, (rows, cols), side, whole, hidden, self.target_score(targets)[1], _no_tokens)

    def target_score(self, targets: Targets) -> tuple[Float[Tensor, "1 3 S S"], Callable[[Tensor], Tensor]]:
        """The picture unveiled, on the map's square, and a function from veils to each target's score."""
        return self._veil(self.run.map.size, self.run.map.size, 1.0, 0), lambda veils: self.scores(veils, targets)

    def fill_pixels(self, pixels: Tensor, fill: str, *, seed: int) -> Tensor:
        return self._veil(pixels.shape[-2], pixels.shape[-1], 0.0, self._number(fill, seed))

    def altered(self, shown: np.ndarray, number: int) -> np.ndarray:
        """The picture as sent, uint8 (height, width, 3), through a veil (Y, X) from 0 (filled) to 1 (shown)."""
        if shown.all() and shown.min() == 1:
            return self.picture
        (height, width), (tall, wide) = self.picture.shape[:2], shown.shape
        y = ((np.arange(height) + 0.5) * tall / height).astype(int)
        x = ((np.arange(width) + 0.5) * wide / width).astype(int)
        share = shown[y][:, x][..., None]
        filled = self._fill(number, share[..., 0] < 0.5)
        return (filled + (self.picture - filled) * share).round().clip(0, 255).astype(np.uint8)

    def _number(self, fill: str, seed: int) -> int:
        if (fill, seed) not in self._fills:
            self._fills.append((fill, seed))
        return self._fills.index((fill, seed))

    def _veil(self, height: int, width: int, shown: float, number: int) -> Float[Tensor, "1 3 Y X"]:
        """Channels: how much is shown, which fill takes its place, nothing."""
        veil = torch.zeros(1, 3, height, width)
        veil[:, 0], veil[:, 1] = shown, number
        return veil

    def _fill(self, number: int, hidden: np.ndarray) -> np.ndarray:
        """What takes the place of the picture, float (height, width, 3), 0 to 255."""
        name, seed = self._fills[number]
        if number not in self._filled:
            pixels = torch.from_numpy(self.picture.astype(np.float32)).permute(2, 0, 1)[None]
            if name == "neighbours":  # anew for each hole
                return _picture(inpaint(pixels, torch.from_numpy(hidden)[None]))
            everywhere = torch.ones(pixels.shape[-2:], dtype=torch.bool)
            made = {
                "grey": lambda: torch.full_like(pixels, GREY),
                "mean": lambda: mean_fill(pixels, everywhere),
                "blur": lambda: blur_fill(pixels, BLUR * max(pixels.shape[-2:])),
                "noise": lambda: noise_fill(pixels, everywhere, seed=seed),
            }
            self._filled[number] = _picture(made[name]())
        return self._filled[number]


def _picture(pixels: Float[Tensor, "1 3 Y X"]) -> np.ndarray:
    return pixels[0].permute(1, 2, 0).numpy()

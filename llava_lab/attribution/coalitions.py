"""The picture as a game: regions are players, a coalition is what may be seen, its worth is the target's score.

Every coalition is looked at once, however often a method asks for it, and a batch at a time; all targets are
read in the same passes. Shapley values, their regression and the greedy search all play this game.

It decides nothing about which coalitions to ask for. Padding is always shown: it is not part of the picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llava_lab.attribution.base import Targets, whole_number
from llava_lab.attribution.fills import FILLS
from llava_lab.attribution.occlusion_levels import LEVELS, Level, open_level
from llava_lab.attribution.superpixels import SHAPES, superpixels
from llava_lab.results import Run, Target

if TYPE_CHECKING:
    from llava_lab.models import Lab

# Options of every method that plays the game; each adds its own.
OPTIONS: dict[str, Any] = {"regions": 16, "shape": SHAPES[0], "fill": FILLS[0], "at": LEVELS[0], "batch": 8}


class Game:
    """Scores of the picture with some regions shown and the rest filled."""

    def __init__(self, level: Level, labels: np.ndarray, *, batch: int = 8) -> None:
        self.labels = labels
        self.players = int(labels.max()) + 1
        self._level, self._batch = level, batch
        self._known: dict[bytes, Tensor] = {}
        self._labels = torch.from_numpy(labels).to(level.whole.device)

    @property
    def forwards(self) -> int:
        """Pictures the model has been given."""
        return len(self._known) + self._level.passes

    def worth(self, shown: Bool[Tensor, "B n"]) -> Float[Tensor, "B N"]:
        """Each target's score for each coalition; what was asked before is not computed again."""
        keys = [row.numpy().tobytes() for row in shown.cpu()]
        first: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            if key not in self._known:
                first.setdefault(key, i)
        new = list(first.values())
        for start in range(0, len(new), self._batch):
            now = new[start : start + self._batch]
            scores = self._level.score(self._level.hide(self._hidden(shown[now])))
            self._known.update((keys[i], score) for i, score in zip(now, scores, strict=True))
        return torch.stack([self._known[key] for key in keys])

    def everyone(self) -> Float[Tensor, " N"]:
        """The whole picture's score."""
        return self.worth(torch.ones(1, self.players, dtype=torch.bool))[0]

    def nobody(self) -> Float[Tensor, " N"]:
        """The score with every region filled."""
        return self.worth(torch.zeros(1, self.players, dtype=torch.bool))[0]

    def shared_out(self, values: np.ndarray) -> np.ndarray:
        """Each region's value spread evenly over its patches, (N, rows, cols); sums stay what they were."""
        return self.painted(values / np.bincount(self.labels[self.labels >= 0], minlength=self.players))

    def painted(self, values: np.ndarray) -> np.ndarray:
        """Each region's value (N, n) at each of its patches, float32 (N, rows, cols); 0 on padding."""
        return np.where(self.labels >= 0, values[:, self.labels], 0).astype(np.float32)

    def _hidden(self, shown: Bool[Tensor, "B n"]) -> Bool[Tensor, "B rows cols"]:
        return (~shown).to(self._labels.device)[:, self._labels.clamp_min(0)] & (self._labels >= 0)


def open_game(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Game:
    """The game for a method's options (`OPTIONS` and ``seed``). Call it inside `capture.undisturbed`."""
    labels = superpixels(run, whole_number("regions", options["regions"], least=2), shape=options["shape"])
    batch = whole_number("batch", options["batch"], least=1)
    seed = whole_number("seed", options["seed"])
    return Game(open_level(lab, run, targets, at=options["at"], fill=options["fill"], seed=seed), labels, batch=batch)


def token_targets(targets: Targets) -> tuple[Targets, list[slice]]:
    """Each token of each target as a target of its own, and which of them belong to which; a contrast stays whole."""
    every: list[Target] = []
    parts = []
    for target in targets:
        start = len(every)
        if target.against_ids:
            every.append(target)
        else:
            each = zip(target.positions, target.token_ids, strict=True)
            every += [Target("token", target.text, (position,), (token,)) for position, token in each]
        parts.append(slice(start, len(every)))
    return tuple(every), parts

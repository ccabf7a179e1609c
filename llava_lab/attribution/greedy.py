"""Greedy search for the few regions that carry the answer: enough by themselves, and missed when they are gone.

Regions are added one by one. Each time the one is taken that makes ``insight + necessity`` largest:
insight is the target's probability when only the chosen regions are shown, necessity one minus its
probability when only the chosen ones are hidden. All candidates of a step go through in batches, and what
several targets ask for is looked at once.

A region's value is the sum of the steps (in size) from its own to the last, so the first region chosen has
the largest value and the map keeps the order. It says in which order to look, not how large an effect is.
This search optimises what deletion and insertion scores measure, with this very fill; judge it with another.

Source: the objective of EAGLE (RuoyuChen10/EAGLE @ f498953 ``interpretation/submodular_vision.py``), which
takes probabilities per token and their mean. That a value is a sum of steps is ours, to keep the order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.attribution.base import Maps, Method, Targets, whole_number
from llava_lab.attribution.coalitions import OPTIONS, Game, open_game, token_targets
from llava_lab.attribution.occlusion_levels import PATIENCE, PLACES
from llava_lab.capture import undisturbed
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab


@dataclass
class _Path:
    """One target's search so far."""

    part: slice  # its tokens among the scores
    contrast: bool
    chosen: list[int] = field(default_factory=list)
    insight: list[float] = field(default_factory=list)  # after each step
    necessity: list[float] = field(default_factory=list)
    before: float = 0.0  # the objective with nothing chosen

    def probability(self, scores: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
        """Mean probability of the target's tokens; for a contrast, of the word said against the other alone."""
        own = scores[:, self.part]
        return own.sigmoid().mean(1) if self.contrast else own.exp().mean(1)

    def candidates(self, players: int) -> Bool[Tensor, "C n"]:
        """What is chosen with each of the others added."""
        rest = [one for one in range(players) if one not in self.chosen]
        shown = torch.zeros(len(rest), players, dtype=torch.bool)
        shown[:, self.chosen] = True
        shown[torch.arange(len(rest)), rest] = True
        return shown

    def take(self, game: Game) -> None:
        """The best next region; the scores are known by now. Of equals, the first in reading order."""
        shown = self.candidates(game.players)
        insight, without = (self.probability(game.worth(which)) for which in (shown, ~shown))
        best = int((insight + 1 - without).argmax())
        rest = [one for one in range(game.players) if one not in self.chosen]
        self.chosen.append(rest[best])
        self.insight.append(float(insight[best]))
        self.necessity.append(float(1 - without[best]))

    def values(self, players: int) -> np.ndarray:
        """Of every region: the sizes of the steps from its own to the last; 0 if it was not chosen."""
        objective = np.array([self.before, *(i + n for i, n in zip(self.insight, self.necessity, strict=True))])
        steps = np.abs(np.diff(objective))
        values = np.zeros(players)
        values[self.chosen] = steps[::-1].cumsum()[::-1]
        return values


def _compute(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    steps = None if options["steps"] is None else whole_number("steps", options["steps"], least=1)
    every, parts = token_targets(targets)
    paths = [_Path(part, bool(target.against_ids)) for part, target in zip(parts, targets, strict=True)]
    with undisturbed(lab.model):
        game = open_game(lab, run, every, options)
        wanted = game.players if steps is None else min(steps, game.players)
        _search(game, paths, wanted)
    done = len(paths[0].chosen)
    values = game.painted(np.stack([path.values(game.players) for path in paths]))
    notes = [
        f"Regions in the order of a greedy search for insight and necessity, filled with {options['fill']} at "
        f"{PLACES[options['at']]}; a value is the sum of the steps from its region to the last, in probability."
    ]
    if done < wanted:
        notes.append(f"Interrupted after {done} of {wanted} steps; regions not reached are 0.")
    elif wanted < game.players:
        notes.append(f"The first {wanted} of {game.players} regions; the others are 0.")
    extras = {
        "order": [path.chosen for path in paths],
        "insight": [path.insight for path in paths],
        "necessity": [path.necessity for path in paths],
        "regions": game.labels.tolist(),
    }
    return Maps(values, {"forward": game.forwards}, tuple(notes), extras)


def _search(game: Game, paths: list[_Path], steps: int) -> None:
    """Let every path take its steps together; Ctrl-C keeps the finished ones, and is raised before the first."""
    full, empty = game.everyone()[None], game.nobody()[None]
    for path in paths:
        path.before = float(path.probability(empty) + 1 - path.probability(full))
    try:
        for _ in tqdm(range(steps), desc="greedy", unit="step", delay=PATIENCE, leave=False):
            shown = torch.cat([path.candidates(game.players) for path in paths])
            game.worth(torch.cat([shown, ~shown]))  # all at once, in full batches; kept for `take`
            for path in paths:
                path.take(game)
    except KeyboardInterrupt:
        if not paths[0].chosen:
            raise
        fewest = min(len(path.chosen) for path in paths)
        for path in paths:
            del path.chosen[fewest:], path.insight[fewest:], path.necessity[fewest:]


GREEDY = Method(
    name="greedy",
    truth="Regions in the order in which they best make the answer likely alone and unlikely when they are gone.",
    source="the objective of EAGLE (RuoyuChen10/EAGLE), insight and necessity over superpixels",
    cost="about as many forwards as the number of regions squared, for each target",
    blind_to="anything finer than a region, and combinations that no single step leads to",
    options={"steps": None, **OPTIONS, "seed": 0},
    compute=_compute,
)

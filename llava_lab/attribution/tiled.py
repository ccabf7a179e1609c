"""Altered pictures for a model that looks several times: the picture itself is altered, so every view sees the change.

Hiding one cell of one view would leave the same thing to be seen in another. So occlusion, RISE, Shapley values and
faithfulness cover cells of the overview's grid in the picture, and the model's own preprocessing makes the views anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.base import Targets, predicting_rows
from llava_lab.attribution.scoring import read_scores
from llava_lab.attribution.veil import Veiled
from llava_lab.capture import undisturbed
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab


class TiledLooks(Veiled):
    """One run's picture, altered before it is cut into views; scored by teacher forcing, exactly."""

    KIND = "looks at the picture whole and in tiles"

    def __init__(self, lab: Lab, run: Run) -> None:
        super().__init__(run, run.picture, name=lab.name, fingerprint=lab.fingerprint)
        self.lab = lab
        given = lab.inputs(run, tiles=True)  # once: it also checks that the run is this model's
        self._text = {name: given[name] for name in ("input_ids", "attention_mask")}

    def scores(self, veils: Float[Tensor, "B 3 Y X"], targets: Targets) -> Float[Tensor, "B N"]:
        at = predicting_rows(targets)
        shown, numbers = veils[:, 0].cpu().numpy(), veils[:, 1].flatten(1).amax(1).int().tolist()
        given = [self.lab.shown(self.altered(one, number)) for one, number in zip(shown, numbers, strict=True)]
        together = {name: torch.cat([one[name] for one in given]) for name in given[0]}
        together |= {name: value.expand(len(given), -1) for name, value in self._text.items()}
        keep = torch.tensor(at, device=together["input_ids"].device)
        with undisturbed(self.lab.model):
            logits = self.lab.model(**together, logits_to_keep=keep, use_cache=False).logits
        return read_scores(logits, at, targets).cpu()

"""Score one sequence again and again without computing what no intervention can change.

Positions before the first one touched stay what they were in a causal model. They are computed once and their keys
and values kept; each variant computes the rest behind them and is taken off again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.base import Targets, predicting_rows
from llava_lab.attribution.occlusion_levels import embedded
from llava_lab.attribution.scoring import read_scores
from llava_lab.models.layout import projector
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab


class Tail:
    """The finished sequence from `start` to its last predicting position, behind a kept beginning.

    Make it outside the intervention and inside `capture.undisturbed`; then call `score` inside the intervention.
    """

    def __init__(self, lab: Lab, run: Run, targets: Targets, start: int, tokens: Float[Tensor, "1 P D"] | None = None) -> None:
        self._model: Any = lab.model
        self._targets = targets
        self.at = predicting_rows(targets)
        self.start, self.stop = min(start, self.at[0]), self.at[-1] + 1
        if (getattr(lab.model.config.text_config, "sliding_window", None) or self.stop) < self.stop:
            self.start = 0  # a sliding cache forgets its beginning and cannot be taken back
        picture = image_tokens(lab, run) if tokens is None else tokens
        self.sequence = embedded(lab, run, picture)[:, : self.stop]
        self.passes = 0
        self._cache: Any = None
        if self.start:
            out = self._model(inputs_embeds=self.sequence[:, : self.start], use_cache=True, logits_to_keep=1)
            self._cache = out.past_key_values

    def logits(self) -> Float[Tensor, "R V"]:
        """Logits at the predicting positions, of the sequence as the model now is."""
        keep = torch.tensor(self.at, device=self.sequence.device) - self.start
        positions = torch.arange(self.start, self.stop, device=self.sequence.device)[None]
        inputs = {"inputs_embeds": self.sequence[:, self.start :], "position_ids": positions, "logits_to_keep": keep}
        self.passes += 1
        if self._cache is None:
            return self._model(**inputs, use_cache=False).logits[0]
        logits = self._model(**inputs, past_key_values=self._cache, use_cache=True).logits[0]
        self._cache.crop(self.start - self.stop)
        return logits

    def score(self) -> Float[Tensor, " N"]:
        """Each target's score, float32."""
        return read_scores(self.logits()[None], self.at, self._targets)[0]


def image_tokens(lab: Lab, run: Run, pixels: Tensor | None = None) -> Float[Tensor, "1 P D"]:
    """What the projector makes of the run's picture, or of `pixels`; the language model does not run."""
    found: list[Tensor] = []
    config = lab.model.config
    handle = projector(lab.model).register_forward_hook(lambda module, args, output: found.append(output))
    try:
        lab.model.get_image_features(
            pixel_values=lab.inputs(run)["pixel_values"] if pixels is None else pixels,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
    finally:
        handle.remove()
    return found[0]

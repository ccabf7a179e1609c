"""Grad-CAM on the vision tower: which channels the logit wants more of, and where the tower has them.

The layer is the one LLaVA uses (the states its projector reads), patches only: the class token is dropped
there. Each channel is weighed by its gradient, averaged over the whole picture, so that a channel counts for
what it does everywhere; a map shows where the wanted channels are, not which patch the answer used.

Source: Selvaraju et al. 2017 (arXiv 1610.02391), equations 1 and 2, with patches for pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llava_lab.attribution.base import Maps, Method, Targets, choose
from llava_lab.attribution.differentiable import gradients, open_point, refuse_quantised
from llava_lab.capture import undisturbed
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab


def _compute(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    refuse_quantised(lab, "gradcam")
    positive = choose("positive", options["positive"], (True, False))
    with undisturbed(lab.model):
        here = open_point(lab, run, targets, at="vision")
        with torch.enable_grad():
            features = here.value.clone().requires_grad_()  # 1 C rows cols
            scores = here.scores(features)
            found = gradients(scores, features)[0]  # N C rows cols
    channels = found.mean((2, 3), keepdim=True)
    values = here.to_patches(channels * here.value, (run.map.rows, run.map.cols))
    hidden = (values < 0).float().mean((1, 2)).tolist()
    notes = ["Channels of the tower's used layer, weighed by the mean gradient of the logit (for a contrast, of the difference)."]
    if positive:
        values = values.clamp_min(0)
        notes.append(f"Negative values are cut to 0, as in the paper; they were {sum(hidden) / len(hidden):.0%} of the patches.")
    extras = {"score": scores[0].tolist(), "negative_share": hidden}
    return Maps(values.cpu().numpy(), {"forward": 1, "backward": 1}, tuple(notes), extras)


GRADCAM = Method(
    name="gradcam",
    truth="Where the vision tower holds the features that, over the whole picture, raise the target's logit.",
    source="Selvaraju et al. 2017, on the tower layer that LLaVA reads",
    cost="1 forward, 1 backward (each further target adds its own reverse pass over the same graph)",
    blind_to="which patches the language model looked at: a channel's weight is the same everywhere",
    options={"positive": True},
    compute=_compute,
)

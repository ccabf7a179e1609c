"""Gradient times input: what each patch would add to the logit if the model were the straight line it is just here.

With a fill, ``gradient x (value - fill)`` is the first-order answer to "what would be lost if this patch were filled":
every patch's occlusion at once for one forward and one backward, right as far as the model is linear over that step.
Without one the step goes all the way to zero, which no picture is.

At the projector a patch is its image token, into which the vision tower has already mixed its neighbours; at the
pixels it is what was in the picture there, and the mixing is part of what is explained.

Sources: Shrikumar et al. 2016 (arXiv 1605.01713) for gradient times input; Simonyan et al. 2013 (arXiv 1312.6034).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llava_lab.attribution.base import Maps, Method, Targets, choose
from llava_lab.attribution.differentiable import AT, WORDS, gradients, open_point, refuse_quantised
from llava_lab.attribution.fills import FILLS
from llava_lab.capture import undisturbed
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab


def _compute(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    refuse_quantised(lab, "gradient_input")
    at = choose("at", options["at"], AT)
    fill = choose("fill", options["fill"], (None, *FILLS))
    with undisturbed(lab.model):
        here = open_point(lab, run, targets, at=at, fill=fill)
        with torch.enable_grad():
            value = here.value.clone().requires_grad_()
            scores = here.scores(value)
            found = gradients(scores, value)[0]  # N, as `value`
    values = here.to_patches(found * (here.value - here.fill), (run.map.rows, run.map.cols))
    step = "the whole value, as if zero were near" if fill is None else f"its distance to the {fill} fill"
    notes = (
        f"Gradient of the target's logit (summed over its tokens; for a contrast, of the difference) at {WORDS[at]}, "
        f"times {step}, summed over each patch. First order only.",
    )
    extras = {"score": scores[0].tolist(), "attributed": values.sum((1, 2)).tolist()}
    return Maps(values.cpu().numpy(), {"forward": 1 + here.passes, "backward": 1}, notes, extras)


GRADIENT_INPUT = Method(
    name="gradient_input",
    truth="How much the target's logit would lose if a patch were taken away and the model were linear.",
    source="Shrikumar et al. 2016; with a fill, the first-order form of occlusion",
    cost="1 forward, 1 backward (each further target adds its own reverse pass over the same graph)",
    blind_to="everything beyond first order: saturation, and patches that stand in for one another",
    options={"at": AT[0], "fill": None},
    compute=_compute,
)

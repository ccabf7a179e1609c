"""What the vision tower looks at whatever is asked: a control that has seen the picture and not the question.

Rollout through the tower's attention, averaged over the patch rows that LLaVA passes on (never the class
token's, which it drops). A map of an answer that does no better than this one has shown what is striking
in the picture, not what the answer came from.

Source: Abnar & Zuidema 2020 (arXiv 2005.00928) on the tower alone; as a baseline, our own choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from llava_lab.attribution.base import Maps, Method, Targets, choose
from llava_lab.attribution.flow import Flow, whole_rows
from llava_lab.capture import FUSIONS, LayerByLayer, Norms, undisturbed, watch_attention
from llava_lab.errors import LabError
from llava_lab.models.layout import require_patch_tokens, used_vision_layers, vision_tower
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

RESIDUAL = 0.5  # Abnar & Zuidema's


def _compute(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    fusion = choose("fusion", options["fusion"], FUSIONS)
    require_patch_tokens(lab.model, "method 'vision'")
    flows: list[Flow] = []

    def fold(layer: int, attention: Tensor, norms: Norms | None) -> None:
        if not flows:
            flows.append(Flow(len(attention), causal=False, device=attention.device))
        flows[0].step(whole_rows(attention) if fusion == "min" else attention, RESIDUAL)

    layers = used_vision_layers(lab.model)
    with undisturbed(lab.model), watch_attention(layers, LayerByLayer(fold, fusion=fusion)):
        vision_tower(lab.model)(lab.inputs(run)["pixel_values"])
    total, patches = flows[0].total, run.map.rows * run.map.cols
    first = len(total) - patches  # 1 with a class token, 0 without
    if first not in (0, 1):
        raise LabError(f"expected {patches} patches and at most one CLS token in the vision tower, got {len(total)} positions")
    seen = total[first:].mean(0)
    values = seen[first:].cpu().numpy().reshape(run.map.rows, run.map.cols)
    notes = ("The vision tower alone, before any question: a control, not an explanation.",)
    extras = {"lost_to_cls": float(seen[:first].sum())}
    return Maps(np.repeat(values[None], len(targets), 0), {"forward": 1}, notes, extras)


VISION = Method(
    name="vision",
    truth="What the vision tower's patches are mixed from, the same for every question and every word.",
    source="control (rollout after Abnar & Zuidema 2020)",
    cost="1 forward of the vision tower alone",
    blind_to="the question and the answer",
    options={"fusion": "mean"},
    compute=_compute,
)

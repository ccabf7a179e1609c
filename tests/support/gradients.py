"""What the tests of gradient methods share: a method without the registry, and everything it could leave changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_lab.attribution import METHODS, Maps
from llava_lab.models import Lab
from llava_lab.models.layout import connector_of
from llava_lab.replay import resolve_targets
from llava_lab.results import Run, Target
from tests.support.planted import scripted_run

ANSWER = "Yes, the car is blue."
PLACES = ("projector", "vision", "pixels")


def noise_run(lab: Lab, answer: str = ANSWER, **options: Any) -> Run:
    """A wide picture of noise, and `answer` put in the model's mouth."""
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(lab, wide, answer, **options)


def compute(lab: Lab, run: Run, method: str, target: Any = None, **options: Any) -> Maps:
    return METHODS[method].compute(lab, run, resolve_targets(lab, run, target), options)


def logit(lab: Any, run: Run, target: Target, *, at: str, value: Tensor) -> Tensor:
    """A target's logit by the model's own forward, with `value` for the pixels, the tower's output or the image tokens."""
    inputs = lab.inputs(run)
    connector, handle = connector_of(lab.model), None
    if at == "pixels":
        inputs["pixel_values"] = value
    elif at == "vision":
        handle = connector.register_forward_pre_hook(lambda *args: (value,))
    else:
        handle = connector.register_forward_hook(lambda *args: value)
    try:
        logits = lab.model(**inputs).logits[0]
    finally:
        if handle:
            handle.remove()
    said = logits[list(target.positions), list(target.token_ids)].sum()
    return said - logits[list(target.positions), list(target.against_ids)].sum() if target.against_ids else said


def stands_at(lab: Any, at: str, pixels: Tensor) -> Tensor:
    """What `pixels` become at a place: themselves, or (1, P, D) before or after the connector."""
    if at == "pixels":
        return pixels
    seen: list[Tensor] = []
    connector = connector_of(lab.model)
    handle = connector.register_forward_hook(lambda module, args, output: seen.append(args[0] if at == "vision" else output))
    with torch.no_grad():
        lab.model.get_image_features(pixel_values=pixels)
    handle.remove()
    return seen[0]

"""Raw attention: where the predicting positions look, averaged over layers and heads.

It says where information could be fetched from at those positions, not what was used. It ignores
what earlier positions had already collected (`rollout` follows that) and every value vector.

Source: the head mean that most viewers draw, e.g. zjysteven/VLM-Visualizer; interpretation after
Jain & Wallace 2019 (attention is not explanation).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from llava_lab.attribution.base import (
    Maps,
    Method,
    Targets,
    choose,
    image_values,
    layer_window,
    predicting_rows,
    refuse_contrast,
    segment_mass,
    target_rows,
)
from llava_lab.capture import FUSIONS, PickedRows, undisturbed, watch_attention
from llava_lab.errors import OptionError
from llava_lab.models.layout import language_layers
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab


def _compute(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    refuse_contrast("attention", targets)
    layers = language_layers(lab.model)
    start, stop = layer_window(options["layers"], len(layers))
    fusion = choose("fusion", options["fusion"], FUSIONS)
    heads = _chosen_heads(options["heads"], layers[0].self_attn.config.num_attention_heads)
    at = predicting_rows(targets)
    with undisturbed(lab.model), watch_attention(layers[start:stop], PickedRows(at, fusion=fusion, heads=heads)) as kept:
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    by_layer = torch.stack([kept.layers[i][0] for i in range(stop - start)])  # L Q K
    rows = target_rows(by_layer.mean(0), at, targets)
    image = slice(*run.segments["image"])
    extras = {
        "mass": segment_mass(rows, run),
        "image_share": rows[:, image].sum(1).tolist(),
        "image_share_by_layer": [target_rows(one, at, targets)[:, image].sum(1).tolist() for one in by_layer],
    }
    which = "all heads" if heads is None else "heads " + ", ".join(map(str, heads))
    notes = (f"Attention of the predicting positions, {fusion} over {which}, mean over layers {start} to {stop - 1}.",)
    return Maps(image_values(rows, run), {"forward": 1}, notes, extras)


def _chosen_heads(heads: Any, count: int) -> tuple[int, ...] | None:
    if heads is None:
        return None
    chosen = (heads,) if isinstance(heads, Integral) else heads
    fine = isinstance(chosen, Sequence) and len(chosen) > 0 and all(isinstance(head, Integral) for head in chosen)
    if not fine or not all(0 <= int(head) < count for head in chosen):
        raise OptionError(f"heads must be numbers from 0 to {count - 1}, or None for all; got {heads!r}")
    return tuple(int(head) for head in chosen)


ATTENTION = Method(
    name="attention",
    truth="How much the positions that predict the target attend to each image token, averaged over layers and heads.",
    source="the usual head mean (Vaswani et al. 2017 weights; drawn by most viewers)",
    cost="1 forward",
    blind_to="what the values carry, and everything that reached the answer through other positions",
    options={"layers": None, "heads": None, "fusion": "mean"},
    compute=_compute,
)

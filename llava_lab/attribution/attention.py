"""Raw attention: where the predicting positions look, averaged over layers and heads, or with chosen heads.

It says where information could be fetched from at those positions, not what was used. It ignores
what earlier positions had already collected (`rollout` follows that) and every value vector
(`value_attention` weighs those).

Source: the head mean that most viewers draw, e.g. zjysteven/VLM-Visualizer; interpretation after
Jain & Wallace 2019 (attention is not explanation).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_lab.attribution.base import (
    Maps,
    Method,
    Targets,
    choose,
    image_values,
    predicting_rows,
    refuse_contrast,
    segment_mass,
    target_rows,
    view_values,
)
from llava_lab.attribution.heads import choose_heads, read_rows
from llava_lab.capture import FUSIONS
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab


def _compute(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    refuse_contrast("attention", targets)
    chosen = choose_heads(lab, options["layers"], options["heads"])
    fusion = choose("fusion", options["fusion"], FUSIONS)
    at = predicting_rows(targets)
    seen = read_rows(lab, lab.inputs(run, tiles=True), at, chosen, fusion)
    rows = target_rows(seen.fused, at, targets)
    image = slice(*run.segments["image"])
    shares = [target_rows(one, at, targets)[:, image].sum(1).tolist() for one in seen.parts]
    extras: dict[str, Any] = {"mass": segment_mass(rows, run), "image_share": rows[:, image].sum(1).tolist()}
    if chosen.pairs:
        named = zip(chosen.pairs, shares, strict=True)
        extras["image_share_by_head"] = [{"layer": layer, "head": head, "share": share} for (layer, head), share in named]
        notes = (f"Attention of the predicting positions, {fusion} over {chosen.which}.",)
    else:
        extras["image_share_by_layer"] = shares
        notes = (f"Attention of the predicting positions, {fusion} over {chosen.which}, mean over {chosen.window}.",)
    return Maps(image_values(rows, run), {"forward": 1}, notes, extras, view_values(rows, run))


ATTENTION = Method(
    name="attention",
    truth="How much the positions that predict the target attend to each image token, averaged over layers and heads.",
    source="the usual head mean (Vaswani et al. 2017 weights; drawn by most viewers)",
    cost="1 forward",
    blind_to="what the values carry, and everything that reached the answer through other positions",
    options={"layers": None, "heads": None, "fusion": "mean"},
    compute=_compute,
)

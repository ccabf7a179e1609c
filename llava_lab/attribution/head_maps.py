"""Every head's map of every answer word: the raw material of the layer x head view, kept small while it is made.

One forward; of each layer only the predicting rows and the image columns are kept, averaged over a word's
tokens: in float16 1.2 MB per word at LLaVA-1.5-7B, where the whole attention is 1.6 GB. It says where each head
looks, not what it moves from there (`value_attention`) nor whether the answer depends on it (`knockout`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.base import Targets, predicting_rows, refuse_contrast
from llava_lab.attribution.targets import Wanted, resolve_targets
from llava_lab.capture import HeadRows, undisturbed, watch_attention
from llava_lab.errors import CheckpointError
from llava_lab.models.layout import language_layers
from llava_lab.results import HeadMaps, Run

if TYPE_CHECKING:
    from llava_lab.models import Lab


def head_maps(lab: Lab, run: Run, *, target: Wanted = "words") -> HeadMaps:
    """The attention of every language-model head to every patch, a map per target, layer and head.

    `target` as in `attribute`, but without contrasts: attention is the same for every word predicted at a
    position. Values are shares of a head's whole attention, so each map sums to the head's share on the picture.

    Raises TargetError (not in the answer, a contrast), CheckpointError (the run was made by another checkpoint).
    """
    weights = lab.fingerprint
    if run.fingerprint != weights:
        raise CheckpointError(f"expected a run made by {lab.name!r}, got one by {run.model!r} with other weights; ask again")
    targets = resolve_targets(lab, run, target)
    refuse_contrast("head_maps", targets)
    start = time.perf_counter()
    layers = language_layers(lab.model)
    rows = predicting_rows(targets)
    reducer = HeadRows(rows, columns=slice(*run.segments["image"]), mix=_means(targets, rows))
    with undisturbed(lab.model), watch_attention(layers, reducer) as kept:
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    values = np.stack([kept.layers[i][0].half().cpu().numpy() for i in range(len(layers))])  # L H N P
    values = values.transpose(2, 0, 1, 3).reshape(len(targets), *values.shape[:2], run.map.rows, run.map.cols)
    notes = ("Attention of the positions that predict each word, mean over its tokens; head by head, nothing weighed in.",)
    return HeadMaps(
        values=np.ascontiguousarray(values),
        targets=targets,
        map=run.map,
        model=lab.name,
        fingerprint=weights,
        seconds=time.perf_counter() - start,
        notes=notes,
    )


def _means(targets: Targets, rows: tuple[int, ...]) -> Float[Tensor, "N Q"]:
    """Weights that turn the kept rows into one mean per target."""
    mix = torch.zeros(len(targets), len(rows))
    for i, target in enumerate(targets):
        for position in target.positions:
            mix[i, rows.index(position)] += 1 / len(target.positions)
    return mix

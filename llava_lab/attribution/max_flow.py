"""Attention flow: how much could pass from an image token to the predicting position, were attention a network of pipes.

The layers' attentions (with half residual) are capacities of a layered graph; the flow from one
position to one image token is a maximum flow, so bottlenecks count where rollout multiplies through them.
Each patch has a maximum of its own: the values do not share anything out and do not sum to 1. A rollout
entry is one feasible flow, so no value here is below it.

Exact, by Dinic's algorithm on whole-number capacities: every weight is rounded to a multiple of `UNIT`.
That is one maximum flow per position and patch, so graphs over `LIMIT` are refused before anything runs.
Only positions between the patch and the predicting one can carry anything on a causal decoder, and only
they enter the graph.

Source: Abnar & Zuidema 2020 (arXiv 2005.00928), section 4; ``scipy.sparse.csgraph.maximum_flow``.

    attribute(lab, run, method="attention_flow", target="red", layers=(0, 4))
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llava_lab.attribution.heads import target_mix
from llava_lab.attribution.method import Fusion, Maps, Window, method
from llava_lab.attribution.rollout import whole_rows
from llava_lab.capture import LayerByLayer, Norms, undisturbed, watch_attention
from llava_lab.checks import Sweep, layer_window
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.replay.targets import Targets, predicting_rows
from llava_lab.results import Run

UNIT = 2.0**-30  # of capacity; a row of weights stays below the solver's largest whole number, 2^31 - 1
LIMIT = 200_000_000  # edges over all flows; some minutes on one core


@method(
    truth="The most that could flow from each image token to the predicting positions if attention weights were pipes.",
    source="Abnar & Zuidema 2020, attention flow",
    equation=r"\mathrm{maxflow}(j\to p)\ \mathrm{with\ capacities}\ \bar A^{l}",
    paper="https://arxiv.org/abs/2005.00928",
    cost="1 forward, then one maximum flow per patch and position on the processor",
    blind_to="values, feed-forward layers, how patches compete for the same pipes, and which word is predicted",
    contrast=False,
)
def attention_flow(lab: Lab, run: Run, targets: Targets, *, layers: Window = None, fusion: Fusion = "mean") -> Maps:
    decoder = language_layers(lab.model)
    start, stop = layer_window(layers, len(decoder))
    at = predicting_rows(targets)
    image = range(*run.segments["image"])
    refuse_too_large(stop - start, at, image)
    units = _capacities_of(lab, run, decoder[start:stop], fusion)
    flows = np.zeros((len(at), len(image)))
    with Sweep("attention flow", total=len(image), unit="patch") as done:
        for patch, sink in enumerate(image):
            flows[:, patch] = [max_flow(units, source, sink) for source in at]
            done.step()
    values = (target_mix(at, targets).numpy() @ flows).reshape(len(targets), run.map.rows, run.map.cols)
    bound = edges(stop - start, at[-1] - image[0] + 1) * UNIT / 2
    notes = [
        f"Greatest flow each patch could send by itself, residual weight 0.5, {fusion} over heads, layers {start} to {stop - 1}; "
        "the values share nothing out and do not sum to 1.",
        f"Exact but for capacities rounded to multiples of 2^-30, which moves a flow by at most {bound:.0e}.",
    ]
    if done.interrupted:
        notes.append(f"Interrupted after {done.count} of {len(image)} patches; patches not reached are 0.")
    extras = {"flows": done.count * len(at), "rounding": bound}
    return Maps(values, {"forward": 1}, tuple(notes), extras, interrupted=done.interrupted)


def refuse_too_large(layers: int, at: Sequence[int], image: range) -> None:
    """Raise OptionError where the graphs would have more than `LIMIT` edges in all."""
    work = sum(edges(layers, source - sink + 1) for source in at for sink in image)
    if work > LIMIT:
        raise OptionError(
            f"exact attention flow of {len(image)} patches to {len(at)} positions through {layers} layers means {work:,} edges, "
            f"and the limit is {LIMIT:,}; explain one word, give fewer layers=(start, stop), or use method='rollout'"
        )


def _capacities_of(lab: Lab, run: Run, layers: Sequence[torch.nn.Module], fusion: str) -> np.ndarray:
    """Capacities of every layer, int32 (layers, S, S): small, because larger ones were refused."""
    size = len(run.token_ids)
    units = np.zeros((len(layers), size, size), np.int32)
    itself = torch.eye(size, device=lab.device)

    def fold(layer: int, attention: Tensor, norms: Norms | None) -> None:
        whole = whole_rows(attention) if fusion == "min" else attention
        units[layer] = capacities((0.5 * whole + 0.5 * itself).cpu().numpy())

    with undisturbed(lab.model), watch_attention(layers, LayerByLayer(fold, fusion=fusion)):
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    return units


def edges(layers: int, size: int) -> int:
    """Edges of the graph between two positions that are `size` - 1 apart, both ends counted in `size`."""
    return 1 if layers == 1 else 2 * size + (layers - 2) * size * (size + 1) // 2


def capacities(attention: np.ndarray) -> np.ndarray:
    """Weights in whole units, int32, each off by at most half of one."""
    with np.errstate(invalid="ignore"):  # the forward under way refuses NaN at its end
        return np.rint(attention.astype(np.float64) / UNIT).astype(np.int32)


def max_flow(units: np.ndarray, source: int, sink: int) -> float:
    """Greatest flow from position `source` above the last layer to position `sink` below the first, 0 to 1.

    `units` (layers, S, S) are `capacities` of lower triangular matrices, the first layer first.
    """
    from scipy.sparse import csr_array  # only where it is used
    from scipy.sparse.csgraph import maximum_flow

    if sink > source:
        return 0.0
    layers, between = len(units), slice(sink, source + 1)
    size = source - sink + 1
    if layers == 1:
        return float(units[0, source, sink]) * UNIT
    row, column = np.tril_indices(size)
    # nodes: the sink, then `size` positions above each layer but the last, then the source
    starts = [np.full(size, 1 + (layers - 1) * size)]
    ends = [1 + (layers - 2) * size + np.arange(size)]
    weights = [units[-1, source, between]]
    for layer in range(layers - 2, 0, -1):
        starts.append(1 + layer * size + row)
        ends.append(1 + (layer - 1) * size + column)
        weights.append(units[layer, between, between][row, column])
    starts.append(1 + np.arange(size))
    ends.append(np.zeros(size, np.int64))
    weights.append(units[0, between, sink])
    count = 2 + (layers - 1) * size
    pipes = csr_array((np.concatenate(weights), (np.concatenate(starts), np.concatenate(ends))), shape=(count, count))
    pipes.eliminate_zeros()
    return float(maximum_flow(pipes, count - 1, 0).flow_value) * UNIT

"""Attention at the predicting positions: as it stands, weighed by what it fetches, or beside a neutral instruction.

- ``attention`` is the mean over layers and heads, or chosen heads. It says where information could be fetched from at
  those positions, not what was used, and ignores what earlier positions had already collected (`rollout` follows that).
- ``value_attention`` multiplies each weight by the length of the vector it moves into the residual stream, ``|a v W_O|``:
  a head that attends strongly to a position whose value is nearly zero (a sink) fetches nothing. With ``join="vectors"``
  the heads' vectors are added before the length is taken, so that heads which cancel count as cancelling. It measures
  how much is written, not whether what is written speaks for the target; a bias of the output projection belongs to no
  position and is left out.
- ``relative_attention`` divides the map for this question by the map for an instruction that asks for nothing special:
  what draws attention whatever is asked is in both and cancels. For the neutral side the authors read the position that
  predicts the answer's first token, and so does ``beside="cue"``; ``"answer"`` lets the model repeat this run's answer
  after the neutral instruction and reads the very same words there. Where attention is sharp, most patches have next to
  none on either side, and the ratio of two such numbers is noise that outshines everything; so both sides are first
  raised by `floor`: None is what each token would get from uniform attention, and 0 is the authors' plain ratio.

Sources: the head mean that most viewers draw, e.g. zjysteven/VLM-Visualizer; interpretation after Jain & Wallace 2019
(attention is not explanation). Kobayashi et al. 2020 (arXiv 2004.10102), norm-based analysis, with the layer norm before
the attention counted as part of the value. Zhang et al. 2025 (arXiv 2502.17422; saccharomycetes/mllms_know,
``rel_attention_llava``), which uses the fifteenth of 32 layers, here ``layers=(14, 15)``, and the words "Write a general
description of the image."

    attribute(lab, run, method="attention", target="red", heads=((14, 24), (14, 13)))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.attribution.heads import Chosen, choose_heads, read_rows
from llava_lab.attribution.method import Fusion, Heads, Maps, Window, at_least, method
from llava_lab.capture import CHUNK, undisturbed, watch_attention
from llava_lab.capture.reducers import Collected
from llava_lab.capture.watch import attention_module
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.replay.targets import Targets, image_values, predicting_rows, segment_mass, target_rows, view_values
from llava_lab.results import Run, Target

NEUTRAL = "Describe the picture."
OUT_PATHS = ("o_proj", "out_proj")  # Llama and most decoders; CLIP and OPT
TINY = 1e-12  # far below any attention that can matter: keeps a share of nothing, and a ratio of nothing, a number


@method(
    truth="How much the positions that predict the target attend to each image token, averaged over layers and heads.",
    source="the usual head mean (Vaswani et al. 2017 weights; drawn by most viewers)",
    equation=r"\frac{1}{LH}\sum_{l,h}A^{lh}_{pj}",
    paper="https://arxiv.org/abs/1706.03762",
    cost="1 forward",
    blind_to="what the values carry, and everything that reached the answer through other positions",
    reach="tokens",
    contrast=False,
    mass={},
    streams={"heads": None},
)
def attention(
    lab: Lab, run: Run, targets: Targets, *, layers: Window = None, heads: Heads = None, fusion: Fusion = "mean"
) -> Maps:
    chosen = choose_heads(lab, layers, heads)
    at = predicting_rows(targets)
    seen = read_rows(lab, lab.inputs(run, tiles=True), at, chosen, fusion)
    rows = target_rows(seen.fused, at, targets)
    image = slice(*run.segments["image"])
    shares = [target_rows(part, at, targets)[:, image].sum(1).tolist() for part in seen.parts]
    extras: dict[str, Any] = {"mass": segment_mass(rows, run), "image_share": rows[:, image].sum(1).tolist()}
    if chosen.pairs:
        pairs = zip(chosen.pairs, shares, strict=True)
        extras["image_share_by_head"] = [{"layer": layer, "head": head, "share": share} for (layer, head), share in pairs]
    else:
        extras["image_share_by_layer"] = shares
    return Maps(image_values(rows, run), {"forward": 1}, attention_notes(chosen, fusion), extras, view_values(rows, run))


def attention_notes(chosen: Chosen, fusion: str) -> tuple[str]:
    """What an attention map was made of."""
    window = "" if chosen.pairs else f", mean over {chosen.window}"
    return (f"Attention of the predicting positions, {fusion} over {chosen.which}{window}.",)


@method(
    truth="How large a vector the positions that predict the target fetch from each image token: attention times value norm.",
    source="Kobayashi et al. 2020, norm-based analysis",
    equation=r"\sum_{l,h}A^{lh}_{pj}\,\lVert v^{lh}_j\rVert",
    paper="https://arxiv.org/abs/2004.10102",
    cost="1 forward",
    blind_to="whether what was fetched speaks for the target, and everything that reached it through other positions",
    needs="plain weights",
    reach="tokens",
    contrast=False,
)
def value_attention(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    layers: Window = None,
    heads: Heads = None,
    join: Literal["norms", "vectors"] = "norms",
    scale: Literal["share", "raw"] = "share",
) -> Maps:
    chosen = choose_heads(lab, layers, heads)
    at = predicting_rows(targets)
    decoder = language_layers(lab.model)
    watched = [decoder[layer] for layer in chosen.layers]
    with undisturbed(lab.model), watch_attention(watched, ValueRows(at, watched, chosen, join=join)) as kept:
        lab.model(**lab.inputs(run, tiles=True), use_cache=False, logits_to_keep=1)
    by_layer = torch.stack([kept.layers[i] for i in range(len(watched))])  # L Q K
    if scale == "share":
        by_layer = by_layer / by_layer.sum(-1, keepdim=True).clamp_min(TINY)
    rows = target_rows(by_layer.mean(0), at, targets)
    image = slice(*run.segments["image"])
    total = rows.sum(1).clamp_min(TINY)
    extras = {"mass": segment_mass(rows, run), "image_share": (rows[:, image].sum(1) / total).tolist()}
    how = "mean length of the heads' vectors" if join == "norms" else "length of the heads' summed vector"
    unit = "as a share of its row, mean over layers" if scale == "share" else "in the model's own units, mean over layers"
    notes = (f"What the predicting positions fetch through {chosen}: {how}, {unit}.",)
    return Maps(image_values(rows, run), {"forward": 1}, notes, extras, view_values(rows, run))


class ValueRows(Collected):
    """Norm-weighted attention of a few rows, joined over the chosen heads, ``layers x Q x K``.

    Beside that one layer's output projection in float32 (67 MB at LLaVA-1.5-7B) and the projected values
    of `CHUNK` keys (34 MB) exist at a time. Batch size 1.
    """

    def __init__(self, rows: Sequence[int], layers: Sequence[nn.Module], chosen: Chosen, *, join: str) -> None:
        super().__init__()
        self.rows = tuple(rows)
        self.layers: dict[int, Float[Tensor, "Q K"]] = {}
        self._projections = [output_projection(layer) for layer in layers]
        self._heads = [chosen.of(layer) for layer in chosen.layers]
        self._join = join
        self._weights: Tensor | None = None  # H K lengths, or K H H products of the heads' vectors

    def values(self, layer: int, value: Float[Tensor, "B G K d"]) -> None:
        assert len(value) == 1, f"one sequence at a time, got {len(value)}"
        weight = head_weights(self._projections[layer], value)  # H d D
        shared = value[0].repeat_interleave(len(weight) // value.shape[1], 0)  # H K d; a group's heads lie side by side
        chosen = self._heads[layer]
        if chosen is not None:
            weight, shared = weight[list(chosen)], shared[list(chosen)]
        parts = []
        for start in range(0, self._keys, CHUNK):
            moved = shared[:, start : start + CHUNK].float() @ weight  # H k D
            parts.append(moved.norm(dim=-1) if self._join == "norms" else torch.einsum("hkd,gkd->khg", moved, moved))
        self._weights = torch.cat(parts, 1 if self._join == "norms" else 0)

    def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
        assert self._weights is not None
        chosen, keys = self._heads[layer], attention.shape[-1]
        part = attention[0] if chosen is None else attention[0, list(chosen)]
        if self._join == "norms":
            joined = (part * self._weights[:, None, :keys]).mean(0)
        else:  # the length of a sum, from the products of its terms
            squared = torch.einsum("hqk,khg,gqk->qk", part, self._weights[:keys], part)
            joined = squared.clamp_min(0).sqrt()
        self._parts.append(self._whole(joined))

    def close(self, layer: int, norms: object) -> None:
        self.layers[layer] = torch.cat(self._parts)


def output_projection(layer: nn.Module) -> nn.Module:
    """The linear map that takes the heads' mixed values to the residual stream."""
    attention = attention_module(layer)
    modules = (getattr(attention, path, None) for path in OUT_PATHS)
    projection = next((module for module in modules if isinstance(module, nn.Module)), None)
    if projection is None:
        raise LabError(f"expected an output projection named {' or '.join(OUT_PATHS)}, got {type(attention).__name__} without")
    return projection


def head_weights(projection: nn.Module, value: Float[Tensor, "B G K d"]) -> Float[Tensor, "H d D"]:
    """The projection cut into one map per head, float32, for values of the width at hand.

    Packed (quantised) weights are read by projecting the unit vectors.
    """
    width = value.shape[-1]
    weight = getattr(projection, "weight", None)
    inputs = int(getattr(projection, "in_features", 0))
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2 and weight.shape[1] == inputs:
        return weight.detach().float().T.reshape(-1, width, weight.shape[0])
    if not inputs:
        raise LabError(f"expected a linear output projection, got {type(projection).__name__}")
    unit = torch.eye(inputs, dtype=value.dtype, device=value.device)
    through = projection(unit).float() - projection(torch.zeros_like(unit[:1])).float()
    return through.reshape(-1, width, through.shape[1])


@method(
    truth="How much more the target's positions attend to each image token than they would under a neutral instruction.",
    source="Zhang et al. 2025, relative attention (mllms_know)",
    equation=r"\bar A_{pj}\,/\,\bar A^{\mathrm{neutral}}_{pj}",
    paper="https://arxiv.org/abs/2502.17422",
    cost="2 forwards",
    blind_to="what any instruction would look at, what the values carry, and which word is predicted at a position",
    contrast=False,
)
def relative_attention(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    neutral: str = NEUTRAL,
    layers: Window = None,
    heads: Heads = None,
    fusion: Fusion = "mean",
    beside: Literal["cue", "answer"] = "cue",
    floor: Annotated[float, at_least(0)] | None = None,
    scale: Literal["ratio", "log"] = "ratio",
) -> Maps:
    chosen = choose_heads(lab, layers, heads)
    floor = 1 / len(run.token_ids) if floor is None else floor
    other = ask_instead(lab, run, neutral)
    at = predicting_rows(targets)
    rows = target_rows(read_rows(lab, lab.inputs(run), at, chosen, fusion).fused, at, targets)
    moved = tuple(_moved(target, run, other, beside) for target in targets)
    there = predicting_rows(moved)
    neutral_rows = target_rows(read_rows(lab, lab.inputs(other), there, chosen, fusion).fused, there, moved)
    values = ratio(rows[:, slice(*run.segments["image"])], neutral_rows[:, slice(*other.segments["image"])], floor)
    if scale == "log":
        values = torch.log(values)
    extras = {"mass": segment_mass(rows, run), "neutral_mass": segment_mass(neutral_rows, other), "neutral": other.question}
    unit = "natural log of the ratio, 0 is" if scale == "log" else "ratio, 1 is"
    where = "the same words of the answer" if beside == "answer" else "the first word of an answer"
    notes = (
        f"Attention of the predicting positions to {chosen}, {fusion} over heads, divided by the attention that predicts "
        f"{where} to {other.question!r}; {unit} no difference.",
        f"Both sides are raised by {floor:.1g} first, so that two patches nobody looks at do not make a ratio."
        if floor
        else "A patch that neither side looks at can have any ratio.",
    )
    return Maps(values.cpu().numpy().reshape(len(targets), run.map.rows, run.map.cols), {"forward": 2}, notes, extras)


def ask_instead(lab: Lab, run: Run, neutral: str) -> Run:
    """`run` as if `neutral` had been asked and the same answer given; nothing is generated.

    For `Lab.inputs`: ids and segments are those of the new prompt, token texts and words stay the old ones.
    """
    if not isinstance(neutral, str) or not neutral.strip():
        raise OptionError(f"neutral must be an instruction in words, for example {NEUTRAL!r}; got {neutral!r}")
    neutral = neutral.strip()
    sequence = lab.asked_instead(run, neutral)
    first = len(sequence.token_ids)
    answer = run.token_ids[slice(*run.segments["answer"])]
    token_ids = np.concatenate([sequence.token_ids, answer])
    segments = {**sequence.segments, "answer": (first, len(token_ids))}
    return replace(run, question=neutral, prompt=sequence.text, token_ids=token_ids, segments=segments)


def ratio(rows: Float[Tensor, "N P"], beside: Float[Tensor, "N P"], floor: float) -> Float[Tensor, "N P"]:
    """One map over the other, both raised by `floor`, and safe where nobody looks."""
    return (rows + floor + TINY) / (beside + floor + TINY)


def _moved(target: Target, run: Run, other: Run, beside: str) -> Target:
    """The target's place in the neutral sequence."""
    first = other.segments["answer"][0]
    if beside == "cue":
        return replace(target, positions=(first - 1,))
    shift = first - run.segments["answer"][0]
    return replace(target, positions=tuple(position + shift for position in target.positions))

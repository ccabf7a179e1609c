"""A logit taken apart: what every head wrote from every position, and all the rest, as one exact sum.

The state that predicts a word is a sum: its own embedding, what every attention head added in every layer, and
what every feed-forward layer added. With the final norm's scale held at the value it had, the logit is linear in
that sum, and a head's addition is in turn a sum over the positions it looked at: weight times value.

One forward fills the books. Beside it, for one layer at a time, stand its values in float32 (11 MB at LLaVA-1.5-7B)
and a few tables (readings x heads x positions) of 3 MB for 32 readings; kept are (readings x image positions) and
(readings x layers x heads), 0.2 MB. It knows positions and token ids, not targets or words.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.attribution.heads import Chosen
from llava_lab.attribution.unembed import final_norm, norm_gain, norm_scale, output_head, word_rows
from llava_lab.capture import undisturbed, watch_attention
from llava_lab.capture.values import HeadSources, joined_by, seen_by_heads, watch_outputs, watch_stream
from llava_lab.errors import LabError
from llava_lab.models.layout import language_layers
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

LEFT_OVER = {torch.float32: 1e-3, torch.float64: 1e-6}  # share of the parts' sizes that rounding may explain
LEFT_OVER_16 = 5e-2  # the same for 16-bit types
VOCABULARY = 4096  # rows of the output head at a time


class Reading(NamedTuple):
    """One number to take apart: the logit of a token at a position, or its difference from another's."""

    position: int
    said: int
    against: int | None = None


@dataclass(frozen=True)
class Split:
    """The parts of each reading, float32 on the CPU. ``image.sum(1)`` and all of `parts` and `rounding` make `logit`."""

    image: Float[Tensor, "N P"]  # through the chosen heads
    by_head: Float[Tensor, "N L H"]  # image positions through every head of every layer
    parts: dict[str, Tensor]  # name -> (N,): image_left_out, each text segment, mlp, embedding, bias
    logit: Float[Tensor, " N"]  # as the model itself gave it
    rounding: Float[Tensor, " N"]


def split_logits(lab: Lab, run: Run, readings: Sequence[Reading], chosen: Chosen, *, centre: bool = False) -> Split:
    """Take the readings apart in one forward. `centre` measures logits from the vocabulary's mean logit.

    Raises LabError when the model is not made of parts that add up (another norm, parallel or scaled branches,
    quantised output projections).
    """
    layers = language_layers(lab.model)
    at = sorted({reading.position for reading in readings})
    row = torch.tensor([at.index(reading.position) for reading in readings])
    with undisturbed(lab.model):
        rows, offsets = _directions(lab, readings, centre)
        norm = final_norm(lab)
        books = _Books(rows * norm_gain(norm, rows.shape[1]).to(rows.device), row, run.segments, chosen, len(layers))
    keep = torch.tensor(at, device=lab.device)
    with (
        undisturbed(lab.model),
        watch_stream(layers, lambda number, state: books.stream(number, state[0, at])),
        watch_outputs(_feed_forward(layers), lambda _, output: books.wrote("mlp", output[0, at])),
        watch_attention(layers, HeadSources(at, lambda number, *found: books.heads_wrote(number, layers[number], *found))),
    ):
        logits = lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=keep).logits[0].float().cpu()
    assert books.last is not None
    with undisturbed(lab.model):
        scale = norm_scale(norm, books.last).cpu()[row]
    return books.closed(scale, _said(logits[row], readings, centre), offsets.cpu(), books.last.dtype)


class _Books:
    """Contributions of one forward to each reading, before the norm's scale."""

    def __init__(
        self, directions: Float[Tensor, "N W"], row: Tensor, segments: dict[str, tuple[int, int]], chosen: Chosen, layers: int
    ) -> None:
        self.directions, self.row, self.segments, self.chosen, self.count = directions, row, segments, chosen, layers
        readings, (start, stop) = len(directions), segments["image"]
        self.image = torch.zeros(readings, stop - start)
        self.by_head: list[Tensor] = []
        names = ("image_left_out", *(name for name in segments if name != "image"), "mlp", "embedding", "bias")
        self.parts = {name: torch.zeros(readings) for name in names}
        self.last: Tensor | None = None  # the wanted rows of the stream before the final norm

    def stream(self, number: int, state: Float[Tensor, "Q W"]) -> None:
        if number == 0:
            self.wrote("embedding", state)
        elif number == self.count:
            self.last = state

    def wrote(self, part: str, output: Float[Tensor, "Q W"]) -> None:
        """Add what a part of the model put into the stream at each reading's position."""
        self.parts[part] += (output.float().cpu()[self.row] * self.directions.cpu()).sum(-1)

    def heads_wrote(self, number: int, layer: nn.Module, weights: Float[Tensor, "H Q K"], values: Float[Tensor, "H K D"]) -> None:
        """Add one layer's attention: weight times (value . direction, seen through the head's output)."""
        seen = seen_by_heads(layer, self.directions).to(values.device)  # N H D
        carried = torch.einsum("nhd,hkd->nhk", seen, values.float())
        carried = (carried * weights[:, self.row.to(weights.device)].transpose(0, 1)).cpu()
        image = carried[:, :, slice(*self.segments["image"])]
        self.by_head.append(image.sum(-1))
        shown = torch.zeros(image.shape[1])
        if number in self.chosen.layers:
            wanted = self.chosen.of(number)
            shown[slice(None) if wanted is None else list(wanted)] = 1.0
        self.image += torch.einsum("h,nhp->np", shown, image)
        self.parts["image_left_out"] += self.by_head[-1] @ (1 - shown)
        for name, (start, stop) in self.segments.items():
            if name != "image":
                self.parts[name] += carried[:, :, start:stop].sum((1, 2))
        bias = joined_by(layer).bias
        if bias is not None:
            self.parts["bias"] += self.directions.cpu() @ bias.detach().float().cpu()

    def closed(self, scale: Float[Tensor, " N"], logit: Float[Tensor, " N"], offsets: Tensor, dtype: torch.dtype) -> Split:
        """Everything times the norm's scale, checked against the model's own logits."""
        image, parts = self.image * scale[:, None], {name: part * scale for name, part in self.parts.items()}
        parts["bias"] = parts["bias"] + offsets
        everything = torch.stack([image.sum(1), *parts.values()])
        rounding = logit - everything.sum(0)
        if bool((rounding.abs() > LEFT_OVER.get(dtype, LEFT_OVER_16) * everything.abs().sum(0) + 1e-5).any()):
            raise LabError(
                f"expected parts that add up to the logit, {float(rounding.abs().max()):.3g} is missing; this model's layers "
                "do more than add attention and feed-forward outputs, so its logits cannot be split"
            )
        return Split(image, torch.stack(self.by_head, 1) * scale[:, None, None], parts, logit, rounding)


def _directions(lab: Lab, readings: Sequence[Reading], centre: bool) -> tuple[Float[Tensor, "N W"], Float[Tensor, " N"]]:
    """The direction of the normed state that each reading reads, and the output head's bias in it."""
    rows, offsets = word_rows(lab, [reading.said for reading in readings])
    pairs = [(i, reading.against) for i, reading in enumerate(readings) if reading.against is not None]
    if pairs:
        where, against = [i for i, _ in pairs], [token for _, token in pairs]
        less, less_offset = word_rows(lab, against)
        rows[where] -= less
        offsets[where] -= less_offset
    plain = [i for i, reading in enumerate(readings) if reading.against is None]
    if centre and plain:
        head = output_head(lab)
        total = torch.stack([part.float().sum(0) for part in head.weight.detach().split(VOCABULARY)]).sum(0)
        rows[plain] -= total / len(head.weight)
        offsets[plain] -= 0.0 if head.bias is None else head.bias.detach().float().mean()
    return rows, offsets


def _said(logits: Float[Tensor, "N V"], readings: Sequence[Reading], centre: bool) -> Float[Tensor, " N"]:
    """The model's own numbers that the parts must add up to."""
    return torch.stack(
        [
            row[reading.said] - (row[reading.against] if reading.against is not None else row.mean() if centre else 0.0)
            for row, reading in zip(logits, readings, strict=True)
        ]
    )


def _feed_forward(layers: Sequence[nn.Module]) -> list[nn.Module]:
    found = [part for layer in layers if isinstance(part := getattr(layer, "mlp", None), nn.Module)]
    if len(found) != len(layers):
        raise LabError(f"expected layers with attention and an mlp, got {type(layers[0]).__name__}; its logits cannot be split")
    return found

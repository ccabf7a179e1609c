"""Direct logit attribution by patch: the target's logit as an exact sum, and the share each image token wrote into it.

The map adds up, over all layers and heads, what heads at the predicting position carried from each image position
into the target's logit. Everything else is the remainder and stands in the extras: text positions by segment,
feed-forward layers, the embedding, biases, heads left out by the options, and rounding. All parts together are
the model's logit, summed over the target's tokens; for a contrast, the difference of the two logits.

Direct means the last step only. An image position's value at layer l already holds what it read from others, and
what travels through text positions or feed-forward layers is in the remainder, not in the map. A logit has no
natural zero; ``centre=True`` measures it from the mean logit of the vocabulary (a contrast needs no such choice).

One forward; about 25 MB beside it at LLaVA-1.5-7B for 32 tokens explained (see `logit_split`); at that width the peak
of the process does not rise above a plain forward's.

Sources: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; direct logit attribution as in
Wang et al. 2022 (arXiv 2211.00593).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.base import Maps, Method, Targets, choose
from llava_lab.attribution.heads import Chosen, choose_heads
from llava_lab.attribution.logit_split import Reading, split_logits
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

TOP_HEADS = 8  # named in the extras


def _compute(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    chosen = choose_heads(lab, options["layers"], options["heads"])
    centre = choose("centre", options["centre"], (False, True))
    readings, owners = [], []
    for number, target in enumerate(targets):
        against: Sequence[int | None] = target.against_ids or (None,) * len(target.token_ids)
        readings += [Reading(*one) for one in zip(target.positions, target.token_ids, against, strict=True)]
        owners += [number] * len(target.positions)
    split = split_logits(lab, run, readings, chosen, centre=centre)

    def summed(values: Tensor) -> Tensor:  # over each target's tokens
        return torch.zeros(len(targets), *values.shape[1:]).index_add_(0, torch.tensor(owners), values)

    values = summed(split.image)
    parts = {"image": values.sum(1), **{name: summed(part) for name, part in split.parts.items()}}
    parts["rounding"] = summed(split.rounding)
    listed = {name: part.tolist() for name, part in parts.items()}
    by_head = summed(split.by_head)
    extras = {
        "logit": summed(split.logit).tolist(),
        "parts": [{name: part[i] for name, part in listed.items()} for i in range(len(targets))],
        "image_by_layer": by_head.sum(-1).tolist(),
        "top_heads": [_strongest(table) for table in by_head],
    }
    shape = (len(targets), run.map.rows, run.map.cols)
    return Maps(values.numpy().reshape(shape), {"forward": 1}, _notes(centre, chosen, options, extras["parts"]), extras)


def _strongest(table: Float[Tensor, "L H"]) -> list[dict[str, float]]:
    heads = table.shape[1]
    order = table.abs().flatten().argsort(descending=True, stable=True)[:TOP_HEADS].tolist()
    return [{"layer": i // heads, "head": i % heads, "value": float(table[i // heads, i % heads])} for i in order]


def _notes(centre: bool, chosen: Chosen, options: dict[str, Any], parts: list[dict[str, float]]) -> tuple[str, ...]:
    what = "logit above the vocabulary's mean logit" if centre else "logit"
    image = sum(abs(value) for part in parts for name, value in part.items() if name.startswith("image"))
    everything = sum(abs(value) for part in parts for value in part.values())
    notes = [
        f"What each image token wrote directly into the target's {what} (for a contrast: the difference of two logits), "
        "the final norm's scale held fixed; negative spoke against the word.",
        f"Image tokens make up {image / everything if everything else 0:.0%} of the parts' absolute sizes; "
        "the remainder (text, feed-forward layers, embedding, biases) is in the extras.",
    ]
    if options["layers"] is not None or options["heads"] is not None:
        notes.append(f"The map holds {chosen}; the other heads are 'image_left_out' in the extras.")
    return tuple(notes)


DIRECT_LOGIT = Method(
    name="direct_logit",
    truth="How much each image token wrote, through attention heads, directly into the target's logit.",
    source="direct logit attribution (Elhage et al. 2021; Wang et al. 2022, arXiv 2211.00593), split by source position",
    cost="1 forward",
    blind_to="what image tokens said by way of text positions, other image tokens or feed-forward layers",
    options={"layers": None, "heads": None, "centre": False},
    compute=_compute,
)

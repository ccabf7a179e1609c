"""Which heads a method looks at, and their attention at the predicting positions, in one forward.

``heads`` has the same three forms everywhere: None is all of them, numbers are these heads of every
layer in the window, and pairs ``((14, 24), (14, 13))`` are exactly these (layer, head). It keeps rows,
never whole matrices, and gives them no meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.base import Targets, layer_window
from llava_lab.capture import HeadRows, PickedRows, fuse_heads, undisturbed, watch_attention
from llava_lab.capture.watch import attention_module
from llava_lab.errors import OptionError
from llava_lab.models.layout import language_layers

if TYPE_CHECKING:
    from llava_lab.models import Lab

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Chosen:
    """Layers to look at and heads to look with, checked against the model."""

    layers: tuple[int, ...]
    heads: tuple[int, ...] | None = None  # the same of every layer; None is all
    pairs: Pairs = ()  # or exactly these, and `layers` are theirs

    def of(self, layer: int) -> tuple[int, ...] | None:
        """The heads wanted of one layer, None for all."""
        return tuple(head for at, head in self.pairs if at == layer) if self.pairs else self.heads

    @property
    def which(self) -> str:
        if self.pairs:
            return "the heads " + ", ".join(f"L{layer}H{head}" for layer, head in self.pairs)
        return "all heads" if self.heads is None else "heads " + ", ".join(map(str, self.heads))

    @property
    def window(self) -> str:
        return f"layers {self.layers[0]} to {self.layers[-1]}"

    def __str__(self) -> str:
        return self.which if self.pairs else f"{self.which} of {self.window}"


@dataclass(frozen=True)
class Rows:
    """Attention of some query rows: fused over everything chosen, and one by one."""

    fused: Float[Tensor, "Q K"]
    parts: Float[Tensor, "M Q K"]  # a layer each, or a (layer, head) pair each, in the order chosen


def choose_heads(lab: Lab, layers: Any, heads: Any) -> Chosen:
    """The options `layers` and `heads` as what they mean for this model. Raises OptionError."""
    decoder = language_layers(lab.model)
    each: Any = attention_module(decoder[0]).config
    count = int(each.num_attention_heads)
    if not _are_pairs(heads):
        window = range(*layer_window(layers, len(decoder)))
        return Chosen(tuple(window), _numbers(heads, count, len(decoder)))
    if layers is not None:
        raise OptionError(f"(layer, head) pairs name their layers already; leave layers=None, got {layers!r}")
    pairs = tuple(dict.fromkeys((int(layer), int(head)) for layer, head in heads))
    if not all(0 <= layer < len(decoder) and 0 <= head < count for layer, head in pairs):
        raise OptionError(_forms(count, len(decoder), heads))
    return Chosen(tuple(sorted({layer for layer, _ in pairs})), None, pairs)


def read_rows(lab: Lab, inputs: dict[str, Tensor], at: Sequence[int], chosen: Chosen, fusion: str = "mean") -> Rows:
    """One forward of `inputs`: attention of the rows `at` (ascending), heads fused; layers, or pairs, averaged.

    ``max`` and ``min`` are taken over each layer's heads, and over all pairs when pairs are given.
    """
    decoder = language_layers(lab.model)
    watched = [decoder[layer] for layer in chosen.layers]
    reducer: HeadRows | PickedRows = HeadRows(at) if chosen.pairs else PickedRows(at, fusion=fusion, heads=chosen.heads)
    with undisturbed(lab.model), watch_attention(watched, reducer):
        lab.model(**inputs, use_cache=False, logits_to_keep=1)
    if isinstance(reducer, PickedRows):
        parts = torch.stack([reducer.layers[i][0] for i in range(len(watched))])
        return Rows(parts.mean(0), parts)
    parts = torch.stack([reducer.layers[chosen.layers.index(layer)][0, head] for layer, head in chosen.pairs])
    return Rows(fuse_heads(parts[None], fusion)[0], parts)


def target_mix(at: Sequence[int], targets: Targets, device: torch.device | str = "cpu") -> Float[Tensor, "N Q"]:
    """Weights that turn rows `at` (ascending) into one mean row per target."""
    where = {position: i for i, position in enumerate(at)}
    mix = torch.zeros(len(targets), len(at), device=device)
    for n, target in enumerate(targets):
        for position in target.positions:
            mix[n, where[position]] += 1 / len(target.positions)
    return mix


def _are_pairs(heads: Any) -> bool:
    return _listed(heads) and all(_listed(pair) and len(pair) == 2 and all(_whole(end) for end in pair) for pair in heads)


def _numbers(heads: Any, count: int, layers: int) -> tuple[int, ...] | None:
    if heads is None:
        return None
    chosen = (heads,) if _whole(heads) else heads
    if not _listed(chosen) or not all(_whole(head) and 0 <= head < count for head in chosen):
        raise OptionError(_forms(count, layers, heads))
    return tuple(int(head) for head in chosen)


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _forms(heads: int, layers: int, got: Any) -> str:
    return (
        f"heads must be numbers from 0 to {heads - 1}, or None for all, or (layer, head) pairs like "
        f"((0, 1), (2, 3)) with layers from 0 to {layers - 1}; got {got!r}"
    )

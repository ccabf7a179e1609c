"""Cut attention edges and prove that they are gone, under sdpa and eager, in prefill and while decoding.

A cut is laid on the mask that each layer's attention is given, in the form it already has: boolean, additive, or
none at all. Rows and columns are positions of the sequence, counted from what the cache holds, so one cut serves a
whole forward and every later step. Weights are masked before softmax: what is left of a row still sums to one.

Sources: Geva et al. 2023 (arXiv 2304.14767), attention knockout; transformers 5.x ``LlamaAttention``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from llava_lab.capture import Reducer, watch_attention
from llava_lab.capture.watch import attention_module
from llava_lab.errors import LabError, OptionError
from llava_lab.interventions.places import Spots
from llava_lab.models.layout import language_layers

if TYPE_CHECKING:
    from llava_lab.models import Lab

SUMS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}  # how far a row may be from one
KNOWN = ("sdpa", "eager")


@dataclass(frozen=True)
class Cut:
    """`target` may not attend to `source`; with `keep_self` a position always sees itself."""

    source: Spots
    target: Spots
    keep_self: bool = True

    def blocked(self, rows: Tensor, keys: int) -> Bool[Tensor, "Q K"]:
        """Which of the columns 0 .. keys-1 each row (a position) may not read, of those the causal mask leaves it."""
        columns = torch.arange(keys, device=rows.device)
        seen = columns < rows[:, None] if self.keep_self else columns <= rows[:, None]
        return self.target.holds(rows)[:, None] & self.source.holds(columns)[None] & seen

    def check(self) -> int:
        """How many edges it cuts. Raises OptionError when some position would be left with nothing to attend to."""
        length = self.target.length + 1  # one more: the first position generated later
        rows = torch.arange(length)
        blocked = self.blocked(rows, length)
        empty = (blocked.sum(1) == rows + 1).nonzero().flatten()
        if len(empty):
            raise OptionError(
                f"expected every position to keep something to attend to, got position {int(empty[0])} with every key "
                f"blocked ({self.source.name} -> {self.target.name}); leave keep_self=True or spare a source"
            )
        return int(blocked[:-1].sum())


@contextmanager
def cutting(lab: Lab, cut: Cut, window: tuple[int, int]) -> Iterator[None]:
    """Cut in the layers [start, stop) for every forward inside the block; no hook remains on leaving."""
    check_attention(lab)

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        states = args[0] if args else kwargs["hidden_states"]
        first, rows = first_position(module, kwargs), states.shape[1]
        blocked = cut.blocked(torch.arange(first, first + rows, device=states.device), first + rows)
        if not bool(blocked.any()):
            return None  # nothing to cut: the very kernel that would have run
        return args, {**kwargs, "attention_mask": _masked(kwargs.get("attention_mask"), blocked, states)}

    handles: list[Any] = []
    try:
        for layer in language_layers(lab.model)[slice(*window)]:
            handles.append(attention_module(layer).register_forward_pre_hook(before, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def proving(lab: Lab, cut: Cut, window: tuple[int, int], proof: dict[str, float]) -> Iterator[None]:
    """Look at the attention of the one forward inside; raise LabError unless the cut entries are exactly 0 and rows sum to 1.

    Adds to `proof`: ``edges`` (entries looked at, over layers), ``largest`` (their largest weight) and ``row_error``.
    """
    layers = language_layers(lab.model)[slice(*window)]
    seen = _Seen(cut, lab.dtype if _name(lab) == "eager" else torch.float32)
    if _name(lab) == "eager":
        handles = [attention_module(layer).register_forward_hook(seen.after) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
    else:
        with watch_attention(layers, seen):
            yield
    if seen.layers != len(layers):
        raise LabError(f"expected the attention of {len(layers)} layers to prove the cut, got {seen.layers}; run one forward")
    proof["edges"] = proof.get("edges", 0.0) + seen.edges
    proof["largest"] = max(proof.get("largest", 0.0), seen.largest)
    proof["row_error"] = max(proof.get("row_error", 0.0), seen.row_error)


class _Seen(Reducer):
    """What the attention really was at the cut entries."""

    def __init__(self, cut: Cut, dtype: torch.dtype) -> None:
        self.cut, self.limit = cut, SUMS.get(dtype, 1e-4)
        self.layers, self.edges, self.largest, self.row_error = 0, 0.0, 0.0, 0.0

    def open(self, layer: int, keys: int) -> None:
        self.layers += 1

    def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
        at = torch.arange(rows.start, rows.stop, device=attention.device) if isinstance(rows, slice) else rows
        blocked = self.cut.blocked(at, attention.shape[-1])
        touched = blocked.any(1)
        if not bool(touched.any()):
            return
        weights = attention[:, :, touched].float()
        largest = float((weights * blocked[touched]).max())
        error = float((weights.sum(-1) - 1).abs().max())
        if largest != 0 or not error <= self.limit:
            raise LabError(
                f"expected attention 0 where it was cut and rows that sum to 1, got {largest:.3g} and a row off by {error:.3g}; "
                "this model's attention does not follow its mask: load it with sdpa or eager attention"
            )
        self.edges += float(blocked.sum())
        self.row_error = max(self.row_error, error)

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            raise LabError("expected eager attention to give its weights, got none; load the model with sdpa")
        self.open(0, weights.shape[-1])
        self.add(0, slice(weights.shape[-1] - weights.shape[-2], weights.shape[-1]), weights)


def check_attention(lab: Lab) -> None:
    """Raise LabError for an attention whose mask is not known here."""
    from llava_lab.capture.watch import NAME

    if _name(lab) not in (*KNOWN, NAME):
        raise LabError(f"expected attention by {' or '.join(KNOWN)}, got {_name(lab)!r}; load the model with one of them")


def first_position(module: Any, kwargs: dict[str, Any]) -> int:
    """The position of a call's first row: how much the cache held for this layer before it."""
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length(module.layer_idx))


def _name(lab: Lab) -> str:
    config: Any = attention_module(language_layers(lab.model)[0]).config
    return str(config._attn_implementation)


def _masked(mask: Tensor | None, blocked: Bool[Tensor, "Q K"], like: Tensor) -> Tensor:
    """`mask` with the blocked entries closed, in its own form; without one, causal and additive."""
    least = torch.finfo(like.dtype).min
    if mask is None:
        rows, keys = blocked.shape
        future = torch.ones(rows, keys, dtype=torch.bool, device=like.device).triu(keys - rows + 1)
        return torch.zeros(1, 1, rows, keys, dtype=like.dtype, device=like.device).masked_fill_(blocked | future, least)
    spare = mask.shape[-1] - blocked.shape[-1]
    blocked = nn.functional.pad(blocked, (0, spare)) if spare else blocked
    return mask & ~blocked if mask.dtype == torch.bool else mask.masked_fill(blocked, least)


def windows_around(count: int, width: int, centres: Sequence[int]) -> list[tuple[int, int]]:
    """`width` layers around each centre, cut off at both ends of a model with `count` layers."""
    return [(max(0, one - width // 2), min(count, one - width // 2 + width)) for one in centres]

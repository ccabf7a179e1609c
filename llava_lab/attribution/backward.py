"""The gradient through one attention, a few query rows at a time, and relevance carried down beside it.

With ``P = A * dA`` (attention weights times their gradient) rule 5 of Chefer et al. is ``mean over heads of P^+``, and
P is also what the softmax' own gradient needs: so the relevance costs nothing that the gradient has not
already paid for. Rule 6, ``R <- R + A-bar R`` from the first layer up, is only ever read in a few rows, and
one row of it can be carried from the last layer down, ``r <- r + r A-bar``, in step with the gradient. No
``S x S`` matrix is kept.

It knows one opened layer and no model. Sources: Chefer, Gur & Wolf 2021 (arXiv 2103.15679), rules 5 and 6; the
rows at a time are flash attention's idea (Dao et al. 2022, arXiv 2205.14135) in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.capture.halves import OpenLayer
from llava_lab.capture.watch import attention_rows

STREAMS = 8  # gradients taken through a layer together; more need more memory and win nothing
IN_CACHE = 2**18  # numbers worked on at once (1 MB), so that the passes over them stay in the processor's cache

Rows = slice | Tensor
Seen = Callable[[slice, Rows, Float[Tensor, "N H q k"]], None]  # streams, query rows, attention times its gradient


@dataclass
class Descent:
    """What is carried down a tower: N gradients, and beside each the M rows of relevance that go with it.

    `own_from`: rows from this position on were made one token at a time, each by its own gradient, with all
    earlier positions fixed (a step of generation on a cache); None: every gradient reaches back everywhere.
    """

    gradient: Float[Tensor, "N S D"]
    relevance: Float[Tensor, "N M S"]
    own_from: int | None = None

    def through(self, layer: OpenLayer, *, further: bool = True) -> None:
        """Go below `layer`. Without ``further`` the gradient at its input is not wanted, and is not made."""
        before = self.relevance
        after = before.clone()
        for first in range(0, len(before), STREAMS):
            streams = slice(first, first + STREAMS)
            attended, x = layer.from_out(self.gradient[streams])
            add = _Rows(before[streams], after[streams]).add
            inner = attention_backward(layer, attended, add, further=further, own_from=self.own_from)
            if inner is not None:
                self.gradient[streams] = x + layer.from_attention(*inner)
        self.relevance = after


@dataclass(frozen=True)
class _Rows:
    """Relevance rows before a layer, and after it as far as its blocks have been seen: ``new = old + old A-bar``."""

    old: Float[Tensor, "N M S"]
    new: Float[Tensor, "N M S"]

    def add(self, some: slice, rows: Rows, product: Float[Tensor, "N H q k"]) -> None:
        self.new[some, :, : product.shape[-1]] += self.old[some][:, :, rows] @ product.clamp_min(0).mean(1)


def attention_backward(
    layer: OpenLayer, gradient: Float[Tensor, "N S H E"], seen: Seen, *, further: bool = True, own_from: int | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """N gradients at the attention's output -> at query (N, H, S, E), key and value (N, G, S, E); float32.

    `seen` is shown each block of attention weights times their gradient. Without ``further`` nothing else is done.
    """
    query, key, value = (part.detach().float() for part in (layer.query, layer.key, layer.value))
    groups = key.shape[1]
    scaled_query, scaled_key = query * layer.scaling, key * layer.scaling
    at_query = gradient.new_zeros(len(gradient), *query.shape[1:]) if further else None
    at_key, at_value = (gradient.new_zeros(len(gradient), *key.shape[1:]) if further else None for _ in range(2))
    out = gradient.transpose(1, 2)  # N H S E
    blocks = attention_rows(query, key, layer.mask, layer.scaling, causal=layer.causal, rows=_busy_rows(gradient))
    for rows, weights in blocks:
        stop = weights.shape[-1]
        kept = None if own_from is None else _own_only(rows, stop, own_from, weights.device)
        for some in _slices(len(gradient), weights.numel()):
            part = out[some][:, :, rows]
            product = _shared(_grouped(part, groups) @ value[:, :, :stop].transpose(2, 3), part).mul_(weights)
            seen(some, rows, product)
            if at_query is None or at_key is None or at_value is None:
                continue
            scores = torch.addcmul(product, weights, product.sum(-1, keepdim=True), value=-1)  # before the scaling
            at_query[some, :, rows] = _shared(_grouped(scores, groups) @ scaled_key[:, :, :stop], part)
            mixed = weights
            if kept is not None:
                scores, mixed = scores * kept, weights * kept
            at_key[some, :, :stop] += _grouped(scores, groups).transpose(2, 3) @ _grouped(scaled_query[:, :, rows], groups)
            at_value[some, :, :stop] += _grouped(mixed, groups).transpose(2, 3) @ _grouped(part, groups)
    if at_query is None or at_key is None or at_value is None:
        return None
    return at_query, at_key, at_value


def _grouped(part: Float[Tensor, "N H q w"], groups: int) -> Float[Tensor, "N G r w"]:
    """Heads that share a key lie side by side."""
    return part.reshape(len(part), groups, -1, part.shape[-1])


def _shared(part: Float[Tensor, "N G r w"], like: Float[Tensor, "N H q e"]) -> Float[Tensor, "N H q w"]:
    """Back from groups to the heads of `like`."""
    return part.reshape(*like.shape[:3], part.shape[-1])


def _busy_rows(gradient: Float[Tensor, "N S H E"]) -> tuple[int, ...] | None:
    """The query rows that any gradient reaches, when they are few (the last layer's are)."""
    busy = (gradient != 0).flatten(2).any(-1).any(0)
    rows = torch.nonzero(busy)[:, 0]
    return tuple(rows.tolist()) if 2 * len(rows) < len(busy) else None


def _own_only(rows: Rows, stop: int, own_from: int, device: torch.device) -> Float[Tensor, "q k"]:
    """1 where a gradient may pass to a key: rows made in one go pass it to all, later ones only to themselves."""
    at = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
    columns = torch.arange(stop, device=device)
    return ((at[:, None] < own_from) | (at[:, None] == columns)).float()


def _slices(count: int, numbers: int) -> Iterator[slice]:
    step = max(1, IN_CACHE // max(numbers, 1))
    for start in range(0, count, step):
        yield slice(start, start + step)

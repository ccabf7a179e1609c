"""Reducers: what is kept of each layer's attention while a forward runs.

Each keeps exactly what its name says and states its size. They know nothing about words or
pictures; `llava_lab.attribution` gives their numbers a meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.capture.watch import Norms, Reducer
from llava_lab.errors import OptionError

FUSIONS = ("mean", "max", "min")


def fuse_heads(
    attention: Float[Tensor, "B H Q K"], fusion: str = "mean", heads: Sequence[int] | None = None
) -> Float[Tensor, "B Q K"]:
    """One matrix from the (chosen) heads. ``max`` and ``min`` rows are re-normalised to sum to 1.

    A ``min`` row where no key is wanted by every head is left zero.
    """
    if heads is not None:
        attention = attention[:, list(heads)]
    if fusion == "mean":
        return attention.mean(1)
    if fusion not in FUSIONS:
        raise OptionError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
    fused = attention.amax(1) if fusion == "max" else attention.amin(1)
    return fused / fused.sum(-1, keepdim=True).clamp_min(torch.finfo(fused.dtype).tiny)


class Full(Reducer):
    """Everything: ``layers x B x H x S x S``. For small models and for tests; 1.6 GB at LLaVA-1.5-7B."""

    norms = True

    def __init__(self) -> None:
        self.attention: dict[int, Float[Tensor, "B H Q K"]] = {}
        self.layer_norms: dict[int, Norms] = {}
        self._parts: list[Tensor] = []
        self._keys = 0

    def open(self, layer: int, keys: int) -> None:
        self._parts, self._keys = [], keys

    def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
        self._parts.append(torch.nn.functional.pad(attention, (0, self._keys - attention.shape[-1])))

    def close(self, layer: int, norms: Norms | None) -> None:
        self.attention[layer] = torch.cat(self._parts, 2)
        assert norms is not None
        self.layer_norms[layer] = norms


class PickedRows(Reducer):
    """Head-fused attention of a few query rows, ``L x B x rows x K``: 50 kB a row at LLaVA-1.5-7B."""

    def __init__(self, rows: Sequence[int], *, fusion: str = "mean", heads: Sequence[int] | None = None) -> None:
        self.rows = tuple(sorted(set(rows)))
        self.layers: dict[int, Float[Tensor, "B Q K"]] = {}
        self._fusion, self._heads = fusion, heads
        self._parts: list[Tensor] = []
        self._keys = 0

    def open(self, layer: int, keys: int) -> None:
        self._parts, self._keys = [], keys

    def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
        fused = fuse_heads(attention, self._fusion, self._heads)
        self._parts.append(torch.nn.functional.pad(fused, (0, self._keys - fused.shape[-1])))

    def close(self, layer: int, norms: Norms | None) -> None:
        self.layers[layer] = torch.cat(self._parts, 1)


class HeadRows(Reducer):
    """Every head's attention of a few query rows over some columns, ``L x B x H x N x columns``.

    `mix` (N, rows) replaces the rows by N weighted sums of them, for example one mean per target: 2.4 MB
    each at LLaVA-1.5-7B over its image tokens. Without it each row is kept, in ascending order.
    """

    def __init__(self, rows: Sequence[int], *, columns: slice | None = None, mix: Float[Tensor, "N Q"] | None = None) -> None:
        self.rows = tuple(sorted(set(rows)))
        self.layers: dict[int, Float[Tensor, "B H N K"]] = {}
        self._columns, self._mix = columns or slice(None), mix
        self._sum: Tensor | None = None
        self._parts: list[Tensor] = []
        self._keys = self._seen = 0

    def open(self, layer: int, keys: int) -> None:
        self._parts, self._sum, self._keys, self._seen = [], None, keys, 0

    def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
        part = torch.nn.functional.pad(attention, (0, self._keys - attention.shape[-1]))[..., self._columns]
        if self._mix is None:
            self._parts.append(part.clone())
            return
        weights = self._mix[:, self._seen : self._seen + part.shape[2]].to(part)
        self._seen += part.shape[2]
        mixed = torch.einsum("nq,bhqk->bhnk", weights, part)
        self._sum = mixed if self._sum is None else self._sum + mixed

    def close(self, layer: int, norms: Norms | None) -> None:
        kept = torch.cat(self._parts, 2) if self._mix is None else self._sum
        assert kept is not None
        self.layers[layer] = kept


class LayerByLayer(Reducer):
    """One head-fused ``S x S`` matrix at a time, handed to `fold` and overwritten by the next layer.

    ``fold(layer, attention, norms)`` must not keep the matrix. Batch size 1.
    """

    def __init__(
        self,
        fold: Callable[[int, Float[Tensor, "S S"], Norms | None], None],
        *,
        fusion: str = "mean",
        heads: Sequence[int] | None = None,
        norms: bool = False,
    ) -> None:
        self.norms = norms
        self._fold, self._fusion, self._heads = fold, fusion, heads
        self._matrix: Tensor | None = None
        self._keys = 0

    def open(self, layer: int, keys: int) -> None:
        self._keys = keys

    def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
        fused = fuse_heads(attention, self._fusion, self._heads)
        if len(fused) != 1:
            raise OptionError(f"expected one sequence at a time, got a batch of {len(fused)}")
        if self._matrix is None or len(self._matrix) != self._keys:
            self._matrix = attention.new_zeros(self._keys, self._keys)
        self._matrix[rows, : fused.shape[-1]] = fused[0]

    def close(self, layer: int, norms: Norms | None) -> None:
        assert self._matrix is not None
        self._fold(layer, self._matrix, norms)

"""Reducers: what is kept of each layer's attention while a forward runs. Each states its size.

`AnswerRows` watches an answer being made, token by token, for next to nothing: a new token's attention is one row per head,
so it is worked out beside the step's own and its head mean is kept, a few kB. On request the prompt's attention is handed over
layer by layer while the first forward runs, as one head-fused ``S x S`` matrix that is dropped before the next. Memory is taken
for `ROOM` rows at a time and no key is held on to: the cache makes new tensors every step, and small ones that stay between
them, or old ones that stay a moment longer, leave holes larger than all the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llava_lab.capture.watch import Norms, Reducer, attention_rows
from llava_lab.errors import LabError, OptionError

FUSIONS = ("mean", "max", "min")


def fuse_heads(
    attention: Float[Tensor, "B H Q K"], fusion: str = "mean", heads: Sequence[int] | None = None
) -> Float[Tensor, "B Q K"]:
    """One matrix from the (chosen) heads. ``max`` and ``min`` rows are re-normalised to sum to 1.

    A ``min`` row where no key is wanted by every head is left zero.

    >>> import torch
    >>> from llava_lab.capture import fuse_heads
    >>> fuse_heads(torch.tensor([[[[0.5, 0.5]], [[1.0, 0.0]]]])).tolist()
    [[[0.75, 0.25]]]
    """
    if heads is not None:
        attention = attention[:, list(heads)]
    if fusion == "mean":
        return attention.mean(1)
    if fusion not in FUSIONS:
        raise OptionError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
    fused = attention.amax(1) if fusion == "max" else attention.amin(1)
    return fused / fused.sum(-1, keepdim=True).clamp_min(torch.finfo(fused.dtype).tiny)


class _Collected(Reducer):
    """Blocks of rows, filled up to every column, until the layer closes."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._keys = 0

    def open(self, layer: int, keys: int) -> None:
        self._parts, self._keys = [], keys

    def _whole(self, part: Float[Tensor, "... k"]) -> Float[Tensor, "... K"]:
        return torch.nn.functional.pad(part, (0, self._keys - part.shape[-1]))


class Full(_Collected):
    """Everything: ``layers x B x H x S x S``. For small models and for tests; 1.6 GB at LLaVA-1.5-7B."""

    norms = True

    def __init__(self) -> None:
        super().__init__()
        self.attention: dict[int, Float[Tensor, "B H Q K"]] = {}
        self.layer_norms: dict[int, Norms] = {}

    def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
        self._parts.append(self._whole(attention))

    def close(self, layer: int, norms: Norms | None) -> None:
        self.attention[layer] = torch.cat(self._parts, 2)
        assert norms is not None
        self.layer_norms[layer] = norms


class PickedRows(_Collected):
    """Head-fused attention of a few query rows, ``L x B x rows x K``: 50 kB a row at LLaVA-1.5-7B."""

    def __init__(self, rows: Sequence[int], *, fusion: str = "mean", heads: Sequence[int] | None = None) -> None:
        super().__init__()
        self.rows = tuple(sorted(set(rows)))
        self.layers: dict[int, Float[Tensor, "B Q K"]] = {}
        self._fusion, self._heads = fusion, heads

    def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
        self._parts.append(self._whole(fuse_heads(attention, self._fusion, self._heads)))

    def close(self, layer: int, norms: Norms | None) -> None:
        self.layers[layer] = torch.cat(self._parts, 1)


class HeadRows(_Collected):
    """Every head's attention of a few query rows over some columns, ``L x B x H x N x columns``.

    `mix` (N, rows) replaces the rows by N weighted sums of them, for example one mean per target: 2.4 MB
    each at LLaVA-1.5-7B over its image tokens. Without it each row is kept, in ascending order.
    """

    def __init__(self, rows: Sequence[int], *, columns: slice | None = None, mix: Float[Tensor, "N Q"] | None = None) -> None:
        super().__init__()
        self.rows = tuple(sorted(set(rows)))
        self.layers: dict[int, Float[Tensor, "B H N K"]] = {}
        self._columns, self._mix = columns or slice(None), mix
        self._sum: Tensor | None = None
        self._seen = 0

    def open(self, layer: int, keys: int) -> None:
        super().open(layer, keys)
        self._sum, self._seen = None, 0

    def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
        part = self._whole(attention)[..., self._columns]
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

    ``fold(layer, attention, norms)`` must not keep the matrix. Batch size 1. While it runs, `allowed` says where rows may look,
    bool (S, S), in a layer whose mask is not the plain causal one (a sliding window), and is None otherwise.
    """

    allowed: Bool[Tensor, "S S"] | None = None

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

    def take(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, causal: bool) -> bool:
        self.allowed = None
        if mask is not None:
            part = mask[0, 0, :, : key.shape[2]]
            seen = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
            self.allowed = None if torch.equal(seen, torch.ones_like(seen).tril()) else seen
        return False

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


ROOM = 64  # rows
Fold = Callable[[int, Float[Tensor, "S S"], Norms | None], None]


class AnswerRows(Reducer):
    """Head-fused attention of the prompt's last position and of every new token, ``L x count x K``. Batch size 1.

    Watch with ``calls=None`` around a whole generation whose prompt has `prompt` positions. ``fold(layer,
    attention, norms)`` gets the prompt's matrix and must not keep it. With ``norms`` the new tokens' are kept too.
    """

    def __init__(
        self, prompt: int, *, fusion: str = "mean", heads: Sequence[int] | None = None, fold: Fold | None = None,
        norms: bool = False,
    ) -> None:  # fmt: skip
        self.norms = norms
        self.first = prompt - 1  # the position that predicts the first token
        self._fusion, self._heads, self._fold = fusion, heads, fold
        self._rows: dict[int, list[Float[Tensor, "R K"]]] = {}  # in blocks; beyond its own position a row holds anything
        self._count: dict[int, int] = {}
        self._norms: dict[int, list[Float[Tensor, "R 2"]]] = {}
        self._matrix: Tensor | None = None

    def take(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, causal: bool) -> bool:
        """Keep the last row; fold the prompt's."""
        at = self._count.get(layer, 0)
        prompt = at == 0
        queries, keys = query.shape[2], key.shape[2]
        expected = (self.first + 1,) * 2 if prompt else (1, self.first + 1 + at)
        if (queries, keys) != expected or len(query) != 1 or mask is not None or not causal:
            raise LabError(
                f"expected {expected[0]} query and {expected[1]} keys of one sequence, causal, without a mask, got {queries} and "
                f"{keys} in a batch of {len(query)}{', with a mask' * (mask is not None)}; watch a forward of the finished answer"
            )
        if prompt and self._fold is not None:
            self._matrix = query.new_zeros(queries, queries, dtype=torch.float32)
            for rows, attention in attention_rows(query, key, None, scaling, causal=True):
                self._matrix[rows, : attention.shape[-1]] = fuse_heads(attention, self._fusion, self._heads)[0]
            last = self._matrix[-1]
        else:
            (part,) = (part for _, part in attention_rows(query[:, :, -1:], key, None, scaling, causal=False))
            last = fuse_heads(part, self._fusion, self._heads)[0, 0]
        blocks = self._rows.setdefault(layer, [])
        if at % ROOM == 0:
            blocks.append(last.new_empty(ROOM, keys + ROOM))
        blocks[-1][at % ROOM, :keys] = last
        self._count[layer] = at + 1
        return True

    def close(self, layer: int, norms: Norms | None) -> None:
        if norms is not None:
            blocks, at = self._norms.setdefault(layer, []), self._count[layer] - 1
            if at % ROOM == 0:
                blocks.append(norms.branch.new_empty(ROOM, 2))
            blocks[-1][at % ROOM, 0], blocks[-1][at % ROOM, 1] = norms.branch[0, -1], norms.stream[0, -1]
        if self._matrix is not None:
            assert self._fold is not None
            matrix, self._matrix = self._matrix, None
            self._fold(layer, matrix, norms)

    def count(self, layers: int) -> int:
        """Rows that all `layers` have; a forward that was interrupted leaves some layers one more."""
        return min((self._count.get(layer, 0) for layer in range(layers)), default=0)

    def picked(self, layer: int, count: int) -> Float[Tensor, "N K"]:
        """The first `count` rows of a layer, float32, over every position up to the last of them."""
        out = self._rows[layer][0].new_zeros(count, self.first + count)
        for at in range(count):
            stop = self.first + 1 + at
            out[at, :stop] = self._rows[layer][at // ROOM][at % ROOM, :stop]
        return out

    def row_norms(self, layer: int, count: int) -> Norms:
        """The norms of the same rows, ``1 x count``."""
        branch, stream = torch.cat(self._norms[layer])[:count].T
        return Norms(branch[None], stream[None])

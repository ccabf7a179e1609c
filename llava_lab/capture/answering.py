"""Watch an answer being made, token by token, for next to nothing.

A new token's attention is one row per head, so `AnswerRows` works it out beside the step's own and keeps its head
mean, a few kB. On request the prompt's attention is handed over layer by layer while the first forward runs, as one
head-fused ``S x S`` matrix that is dropped before the next.

Memory is taken for `ROOM` rows at a time and no key is held on to: the cache makes new tensors every step, and
small ones that stay between them, or old ones that stay a moment longer, leave holes larger than all the rows.

It knows nothing of LLaVA, words or pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.capture.reducers import fuse_heads
from llava_lab.capture.watch import Norms, Reducer, attention_rows
from llava_lab.errors import LabError

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

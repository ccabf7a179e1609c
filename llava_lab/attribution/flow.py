"""Attention rollout as arithmetic: the running product of attention matrices, one layer at a time.

``R = A~_L ... A~_1`` with ``A~ = (1 - residual) A + residual I``: row i of R says how the state at
position i is mixed from the inputs, if values and feed-forward layers are ignored. Rows sum to 1.

It knows matrices only, no model. `UniformFlow` is the same product when every layer attends
uniformly to what it may see: what a rollout map looks like when attention says nothing. On a
causal decoder that is not flat at all (early positions win), which is why it is worth dividing by.

Sources: Abnar & Zuidema 2020 (arXiv 2005.00928) for the product with half residual.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 64  # rows at a time; a causal block only needs the rows above it

Weight = float | Float[Tensor, " S"]  # of the identity, for all positions or for each


class Flow:
    """The running product, starting from the identity. One ``S x S`` float32 matrix.

    `causal` promises that attention is lower triangular, which halves the work and more.
    """

    def __init__(self, size: int, *, causal: bool, device: torch.device | str = "cpu") -> None:
        self.total: Float[Tensor, "S S"] = torch.eye(size, device=device)
        self.causal = causal

    def step(self, attention: Float[Tensor, "S S"], residual: Weight) -> None:
        """Put one more layer on top: ``total = ((1 - residual) attention + residual I) total``."""
        keep = _column(residual, attention)
        if not self.causal:
            self.total = torch.lerp(attention @ self.total, self.total, keep)
            return
        # A causal row only needs rows at or above it, so going from the last block up works in place.
        for start in reversed(range(0, len(attention), BLOCK)):
            stop = min(start + BLOCK, len(attention))
            rows = slice(start, stop)
            mixed = attention[rows, :stop] @ self.total[:stop, :stop]
            self.total[rows, :stop] = torch.lerp(mixed, self.total[rows, :stop], keep[rows])


class UniformFlow:
    """The same product under uniform attention, in ``S x S`` time per layer instead of ``S x S x S``.

    Each row attends equally to every column it may see, those in `removed` left out.
    """

    def __init__(self, size: int, *, causal: bool, removed: Sequence[int] = (), device: torch.device | str = "cpu") -> None:
        self.total: Float[Tensor, "S S"] = torch.eye(size, device=device)
        self.causal = causal
        kept = torch.ones(size, 1, device=device)
        kept[list(removed)] = 0.0
        self._kept = kept if removed else None
        self._count = kept.cumsum(0) if causal else kept.sum().expand(size, 1)  # columns each row may look at

    def step(self, residual: Weight) -> None:
        """Put one more uniform layer on top."""
        offered = self.total if self._kept is None else self._kept * self.total
        if self.causal:
            mixed = offered.cumsum(0).div_(self._count.clamp_min(1.0))
            if self._kept is not None:  # nothing left to look at: the position keeps itself
                mixed = torch.where(self._count > 0, mixed, self.total)
        else:
            mixed = (offered.sum(0) / self._count.clamp_min(1.0)).expand_as(offered)
        self.total = torch.lerp(mixed, self.total, _column(residual, self.total))


def remove_columns(attention: Float[Tensor, "S S"], columns: Sequence[int]) -> Float[Tensor, "S S"]:
    """Take `columns` out and let each row sum to 1 again; a row with nothing left attends to itself."""
    left = attention.clone()
    left[:, list(columns)] = 0.0
    return whole_rows(left)


def whole_rows(attention: Float[Tensor, "S S"]) -> Float[Tensor, "S S"]:
    """Each row scaled to sum to 1; an empty row attends to itself."""
    total = attention.sum(-1, keepdim=True)
    itself = torch.eye(len(attention), device=attention.device)
    return torch.where(total > 0, attention / total.clamp_min(torch.finfo(attention.dtype).tiny), itself)


def _column(residual: Weight, like: Tensor) -> Float[Tensor, "S 1"]:
    if isinstance(residual, Tensor):
        return residual.to(like)[:, None]
    return torch.full((len(like), 1), float(residual), device=like.device)

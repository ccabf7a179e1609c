"""Rollout while the answer is made: the prompt's products during its one forward, each new token's row on top.

`flow.Flow` carries a whole ``S x S`` product through the layers and needs the finished sequence. Here the product
has only the columns that are asked for, the image's and one for each other segment of the prompt, and each layer's
is kept for the rows of the answer, which come later: below the diagonal only, 0.7 MB a layer at 576 image tokens. For
prompts over `EXACT` positions it is kept in half precision, 8.5 MB a layer at 2,916; that rounding reaches an answer's
map once, so each number is right to one part in 2,000. The running product itself is always float32.

It knows matrices and spans only, no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.flow import BLOCK, Weight, _column
from llava_lab.results import Span

EXACT = 1024  # positions of a prompt up to which what is kept is float32
SCALE = 2.0**15  # shares are at most 1, half precision ends at 65,504 and loses digits below 6e-5


class StreamedRollout:
    """Feed it the prompt's layers in order (`step`), then the answer's rows of every layer (`rows`)."""

    def __init__(self, prompt: int, segments: Mapping[str, Span], *, null: bool, device: torch.device | str = "cpu") -> None:
        self.prompt, self._image = prompt, segments["image"]
        self.others = [name for name in segments if name not in ("image", "answer")]
        start, stop = self._image
        columns = torch.zeros(prompt, len(self.others) + stop - start, device=device)
        for number, name in enumerate(self.others):
            columns[slice(*segments[name]), number] = 1.0
        columns[range(start, stop), range(len(self.others), columns.shape[1])] = 1.0
        self._spans = [segments[name] for name in self.others]
        self.total: Float[Tensor, "S C"] = columns
        self.uniform: Float[Tensor, "S C"] | None = columns.clone() if null else None
        self._kept: list[list[tuple[slice, Tensor]]] = []  # a layer's input product, in blocks of rows; not the first's
        self._sums: list[Float[Tensor, " C"]] = []  # column sums of the uniform product, a layer's input
        self._precision = torch.float32 if prompt <= EXACT else torch.float16
        self._layers = 0

    def step(self, attention: Float[Tensor, "S S"], residual: Weight) -> None:
        """Put one more layer on top of the prompt's rows."""
        keep = _column(residual, attention)
        kept = []
        for start in reversed(range(0, self.prompt, BLOCK)):  # a causal row only needs rows at or above it
            stop = min(start + BLOCK, self.prompt)
            rows, columns = slice(start, stop), self._columns(stop)
            if self._layers:
                kept.append((rows, (self.total[rows, :columns] * SCALE).to(self._precision)))
            mixed = attention[rows, :stop] @ self.total[:stop, :columns]
            self.total[rows, :columns] = torch.lerp(mixed, self.total[rows, :columns], keep[rows])
        self._kept.append(kept)
        if self.uniform is not None:
            self._sums.append(self.uniform.sum(0))
            above = torch.zeros_like(self.uniform[0])
            for start in range(0, self.prompt, BLOCK):
                rows = slice(start, min(start + BLOCK, self.prompt))
                part = self.uniform[rows]
                mixed = part.cumsum(0).add_(above)
                above = mixed[-1].clone()
                count = torch.arange(start + 1, rows.stop + 1, device=part.device)[:, None]
                self.uniform[rows] = torch.lerp(mixed.div_(count), part, keep[rows])
        self._layers += 1

    def rows(
        self, count: int, attention: Callable[[int], Float[Tensor, "N K"]], residual: Callable[[int], Weight]
    ) -> tuple[Float[Tensor, "N E"], Float[Tensor, "N E"] | None]:
        """Rollout of the prompt's last position and of the `count` - 1 after it, and of uniform attention.

        ``attention(layer)`` and ``residual(layer)`` speak of those `count` rows. The last of their E columns is the answer's.
        """
        new = count - 1
        seen = torch.zeros(new, self.total.shape[1] + 1, device=self.total.device)
        seen[:, -1] = 1.0
        even = seen.clone()
        for layer in range(self._layers):
            weights = attention(layer)[1:]
            keep = _column(residual(layer), seen.new_empty(count))[1:]
            mixed = weights[:, self.prompt :] @ seen
            mixed[:, :-1] += self._through_prompt(layer, weights[:, : self.prompt])
            seen = torch.lerp(mixed, seen, keep)
            if self.uniform is not None:
                mixed = even.cumsum(0)
                mixed[:, :-1] += self._sums[layer]
                at = torch.arange(self.prompt + 1, self.prompt + count, device=even.device)[:, None]
                even = torch.lerp(mixed / at, even, keep)
        first = torch.nn.functional.pad(self.total[-1:], (0, 1))
        if self.uniform is None:
            return torch.cat([first, seen]), None
        return torch.cat([first, seen]), torch.cat([torch.nn.functional.pad(self.uniform[-1:], (0, 1)), even])

    def image(self, rows: Float[Tensor, "N E"]) -> Float[Tensor, "N P"]:
        return rows[:, len(self.others) : -1]

    def mass(self, rows: Float[Tensor, "N E"]) -> list[dict[str, float]]:
        """Each row's share on each segment."""
        shares = {name: rows[:, number] for number, name in enumerate(self.others)}
        shares |= {"image": self.image(rows).sum(1), "answer": rows[:, -1]}
        return [{name: float(column[row]) for name, column in shares.items()} for row in range(len(rows))]

    def _columns(self, stop: int) -> int:
        """How many columns rows before `stop` can have anything in: image columns follow the diagonal."""
        start, end = self._image
        return len(self.others) + min(max(stop - start, 0), end - start)

    def _through_prompt(self, layer: int, weights: Float[Tensor, "N S"]) -> Float[Tensor, "N C"]:
        out = weights.new_zeros(len(weights), self.total.shape[1])
        if layer == 0:  # its input product is the identity
            for number, span in enumerate(self._spans):
                out[:, number] = weights[:, slice(*span)].sum(1)
            out[:, len(self.others) :] = weights[:, slice(*self._image)]
            return out
        for rows, block in self._kept[layer]:
            out[:, : block.shape[1]] += weights[:, rows] @ (block.float() / SCALE)
        return out

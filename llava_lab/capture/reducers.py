"""Reducers: what is kept of each layer's attention while a forward runs. Each states its size.

`AnswerRows` watches an answer being made, token by token, for next to nothing: a new token's attention is one row per head,
so only its query is kept, a few kB, and the newest keys, which the model's cache holds anyway. The rows of `ROOM` tokens are
worked out together: at each step of its own a row would cost more in calls than in numbers.

    with undisturbed(model), watch_attention(layers, LayerByLayer(fold)):
        model(**inputs)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llava_lab.capture.watch import Attention, Norms, Reducer, attention_rows
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


class Collected(Reducer):
    """Blocks of rows, filled up to every column, until the layer closes."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._keys = 0

    def open(self, layer: int, keys: int) -> None:
        self._parts, self._keys = [], keys

    def _whole(self, part: Float[Tensor, "... k"]) -> Float[Tensor, "... K"]:
        return torch.nn.functional.pad(part, (0, self._keys - part.shape[-1]))


class Full(Collected):
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


class PickedRows(Collected):
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


class HeadRows(Collected):
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
        self, fold: Callable[[int, Float[Tensor, "S S"], Norms | None], None], *, fusion: str = "mean", norms: bool = False
    ) -> None:
        self.norms = norms
        self._fold, self._fusion = fold, fusion
        self._matrix: Tensor | None = None
        self._keys = 0

    def take(self, layer: int, call: Attention) -> bool:
        self.allowed = None
        if call.mask is not None:
            part = call.mask[0, 0, :, : call.key.shape[2]]
            seen = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
            self.allowed = None if torch.equal(seen, torch.ones_like(seen).tril()) else seen
        return False

    def open(self, layer: int, keys: int) -> None:
        self._keys = keys

    def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
        fused = fuse_heads(attention, self._fusion)
        if len(fused) != 1:
            raise OptionError(f"expected one sequence at a time, got a batch of {len(fused)}")
        if self._matrix is None or len(self._matrix) != self._keys:
            self._matrix = attention.new_zeros(self._keys, self._keys)
        self._matrix[rows, : fused.shape[-1]] = fused[0]

    def close(self, layer: int, norms: Norms | None) -> None:
        assert self._matrix is not None
        self._fold(layer, self._matrix, norms)


ROOM = 32  # rows that are worked out together
EXACT = 1024  # positions of a prompt up to which what is kept of it is float32
SCALE = 2.0**15  # attention is at most 1, half precision ends at 65,504 and loses digits below 6e-5


class AnswerRows(Reducer):
    """Head-fused attention of the prompt's last position and of every new token, ``L x count x K``. Batch size 1.

    Watch with ``calls=None`` around a whole generation whose prompt has `prompt` positions. With ``whole`` the prompt's own
    rows are kept too, below the diagonal only: 0.9 MB a layer at 576 image tokens, and for prompts over `EXACT` positions in
    half precision, 9 MB a layer at 2,916. With ``norms`` the norms at all of these are kept.
    """

    def __init__(self, prompt: int, *, fusion: str = "mean", whole: bool = False, norms: bool = False) -> None:
        self.norms, self.mixes = norms, whole
        self.first = prompt - 1  # the position that predicts the first token
        self._fusion, self._whole = fusion, whole
        self._scaling = 1.0
        self._waiting: dict[int, list[Float[Tensor, "1 H 1 D"]]] = {}  # queries of the newest tokens
        self._keys: dict[int, Float[Tensor, "1 G K D"]] = {}  # of the newest token and all before it
        self._rows: dict[int, list[Float[Tensor, "R K"]]] = {}
        self._count: dict[int, int] = {}
        self._norms: dict[int, list[Norms]] = {}  # of the prompt, then of each new token
        self._prompt: dict[int, list[tuple[slice, Float[Tensor, "R K"]]]] = {}

    def take(self, layer: int, call: Attention) -> bool:
        """Keep the last position's query, and the newest keys until there are queries enough."""
        at = self._count.get(layer, 0)
        queries, keys = call.query.shape[2], call.key.shape[2]
        expected = (self.first + 1,) * 2 if at == 0 else (1, self.first + 1 + at)
        if (queries, keys) != expected or len(call.query) != 1 or call.mask is not None or not call.causal:
            raise LabError(
                f"expected {expected[0]} query and {expected[1]} keys of one sequence, causal, without a mask, got {queries} and "
                f"{keys} in a batch of {len(call.query)}{', with a mask' * (call.mask is not None)}; watch a forward of the "
                "finished answer"
            )
        waiting = self._waiting.setdefault(layer, [])
        if len(waiting) == ROOM:
            self._rows.setdefault(layer, []).append(self._worked_out(layer))
            waiting.clear()
        waiting.append(call.query[:, :, -1:].clone() if at == 0 else call.query)  # of the prompt's not more than that
        self._keys[layer], self._scaling = call.key, call.scaling
        self._count[layer] = at + 1
        return at > 0 or not self._whole

    def open(self, layer: int, keys: int) -> None:
        self._prompt[layer] = []

    def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
        """The prompt's rows, with ``whole``."""
        assert isinstance(rows, slice)
        kept = fuse_heads(attention, self._fusion)[0]
        self._prompt[layer].append((rows, kept if self.first < EXACT else kept.mul_(SCALE).half()))

    def close(self, layer: int, norms: Norms | None) -> None:
        if norms is not None:
            self._norms.setdefault(layer, []).append(norms)

    @torch.no_grad()
    def _worked_out(self, layer: int) -> Float[Tensor, "R K"]:
        """The rows that wait."""
        query = torch.cat(self._waiting[layer], 2)
        ((_, attention),) = attention_rows(query, self._keys[layer], None, self._scaling, causal=True, newest=True)
        return fuse_heads(attention, self._fusion)[0]

    def count(self, layers: int) -> int:
        """Rows that all `layers` have; a forward that was interrupted leaves some layers one more."""
        return min((self._count.get(layer, 0) for layer in range(layers)), default=0)

    def picked(self, layer: int, count: int) -> Float[Tensor, "N K"]:
        """The first `count` rows of a layer, float32, over every position up to the last of them."""
        parts = [*self._rows.get(layer, []), self._worked_out(layer)]
        size = self.first + count
        return torch.cat([torch.nn.functional.pad(part, (0, size - part.shape[1])) for part in parts])[:count]

    def prompt(self, layer: int) -> Iterator[tuple[slice, Float[Tensor, "R k"]]]:
        """The prompt's rows in blocks, float32, without the columns after the last of a block; with ``whole``."""
        for rows, kept in self._prompt[layer]:
            yield rows, kept if kept.dtype == torch.float32 else kept.float() / SCALE

    def row_norms(self, layer: int, count: int) -> Norms:
        """The norms at the prompt's positions and at those of the `count` - 1 tokens after it, ``1 x positions``."""
        kept, stop = self._norms[layer], self.first + count
        return Norms(torch.cat([one.branch for one in kept], 1)[:, :stop], torch.cat([one.stream for one in kept], 1)[:, :stop])

"""Score many variants of a picture's tokens without computing anything twice that cannot have changed.

In a causal model a changed token changes nothing before itself. So the whole sequence is computed once,
its keys and values are kept, and a variant only computes what comes after its first changed token. Taken
from the last patch to the first, each variant may write over what it does not need any more: one cache is
all the memory there is. Variants that begin late are short; several are packed into one pass, each seeing
the shared beginning and itself. In the last layer only the positions that predict go through the
feed-forward part, because nobody reads the others.

The numbers are those of full forwards (tested to 1e-5). It is checked in each sweep, not trusted: the whole
picture is packed among the variants and must score what a plain forward gives it.

Source of the idea: prefix caching as in serving systems; its use for occlusion is ours.

Score one sequence again and again without computing what no intervention can change.

Positions before the first one touched stay what they were in a causal model. They are computed once and their keys
and values kept; each variant computes the rest behind them and is taken off again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from llava_lab.capture import hooked
from llava_lab.errors import LabError
from llava_lab.models.layout import language_layers, read_connector
from llava_lab.replay.score import read_scores
from llava_lab.replay.targets import Targets, predicting_rows
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

ROWS = 256  # positions in one pass: enough to keep the matmuls busy, few enough to stay small
AGREE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}  # packed and plain scores, relative above 1


class _Layer(DynamicLayer):
    """Keys and values of one layer in one buffer; a pass writes behind the shared beginning, over what was there."""

    def __init__(self, cache: Branches) -> None:
        super().__init__()
        self.keys: Any = None
        self.values: Any = None
        self._of = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None:
            self.keys, self.values = (
                one.new_empty(*one.shape[:2], self._of.room, one.shape[3]) for one in (key_states, value_states)
            )
            self.is_initialized = True
        start, stop = self._of.shared, self._of.shared + key_states.shape[2]
        self.keys[:, :, start:stop] = key_states
        self.values[:, :, start:stop] = value_states
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        return self._of.shared


class Branches:
    """One sequence computed once, and variants of its end scored behind it.

    `room` is the longest pass in positions, the shared beginning included. Variants must come with beginnings
    that never grow, since each pass writes over the rest.
    """

    def __init__(self, lab: Lab, run: Run, targets: Targets, tokens: Float[Tensor, "1 P D"], *, room: int) -> None:
        self._model = lab.model
        self._targets = targets
        self.at = predicting_rows(targets)
        self.stop = self.at[-1] + 1  # nothing after the last predicting position matters
        self.sequence = embedded(lab, run, tokens)[:, : self.stop]
        self.room = max(room, self.stop)
        self.shared = 0  # positions every variant of the current pass begins with
        self.rows = 0  # positions computed so far, of all passes
        layers = language_layers(lab.model)
        self._layers = [_Layer(self) for _ in layers]
        self._cache = Cache(layers=list(self._layers))
        self._last = getattr(layers[-1], "mlp", None)
        self.whole = self.score(self.sequence, 0)[0]
        self.shared = self.stop

    def score(
        self, tails: Float[Tensor, "K n D"], start: int, blocked: Bool[Tensor, "K start"] | None = None
    ) -> Float[Tensor, "K N"]:
        """Each target's score when the sequence goes on with `tails` from position `start`, up to the last that predicts.

        `blocked` names positions before `start` that the rows of a variant may not look at.
        """
        count, length = tails.shape[:2]
        assert length == self.stop - start, f"a variant of another length than {self.stop - start}: {length}"
        assert start <= self.shared or not self.rows, f"what came before {start} has been written over from {self.shared} on"
        self.shared = start
        keep = torch.tensor([position - start for position in self.at], device=tails.device)
        assert int(keep[0]) >= 0, "a variant must begin at or before the first position that predicts"
        keep = (torch.arange(count, device=tails.device)[:, None] * length + keep).flatten()
        positions = torch.arange(start, self.stop, device=tails.device).repeat(count)[None]
        with _rows_only(self._last, keep):
            logits = self._model(
                inputs_embeds=tails.reshape(1, count * length, -1),
                attention_mask=self._mask(count, length, start, blocked, tails),
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits
        self.rows += count * length
        rows = logits.reshape(count, len(self.at), -1)
        return torch.cat(
            [read_scores(part, self.at, self._targets) for part in rows.split(8)]
        )  # a large vocabulary, a few at a time

    @contextmanager
    def poisoned(self, position: int) -> Iterator[None]:
        """Absurd keys and values at one position of the shared beginning, put right afterwards."""
        kept = [(layer.keys[:, :, position].clone(), layer.values[:, :, position].clone()) for layer in self._layers]
        try:
            for layer in self._layers:
                layer.keys[:, :, position].mul_(-3).add_(1)
                layer.values[:, :, position].mul_(-30).add_(10)
            yield
        finally:
            for layer, (keys, values) in zip(self._layers, kept, strict=True):
                layer.keys[:, :, position] = keys
                layer.values[:, :, position] = values

    def _mask(self, count: int, length: int, start: int, blocked: Tensor | None, like: Tensor) -> Float[Tensor, "1 1 Q K"]:
        """Zero where a row may look: the shared beginning but for what is blocked, and its own variant up to itself."""
        hidden = torch.ones(count, length, count, length, dtype=torch.bool, device=like.device)
        future = torch.ones(length, length, dtype=torch.bool, device=like.device).triu(1)
        for one in range(count):
            hidden[one, :, one] = future
        before = torch.zeros(count, length, start, dtype=torch.bool, device=like.device)
        if blocked is not None:
            before |= blocked[:, None]
        both = torch.cat([before.reshape(count * length, start), hidden.reshape(count * length, count * length)], 1)
        mask = torch.zeros(both.shape, dtype=like.dtype, device=like.device)
        return mask.masked_fill_(both, torch.finfo(like.dtype).min)[None, None]


def agree(packed: Float[Tensor, " N"], plain: Float[Tensor, " N"], dtype: torch.dtype) -> None:
    """Raise LabError where the shortcut does not give the plain forward's score."""
    limit = AGREE.get(dtype, 1e-3) * plain.abs().clamp_min(1)
    if bool(((packed - plain).abs() > limit).any()):
        raise LabError(
            f"expected the same score with and without the kept keys and values, got {packed.tolist()} and {plain.tolist()}; "
            "this language model does not keep a plain causal cache: use at='pixels'"
        )


@contextmanager
def _rows_only(part: nn.Module | None, rows: Tensor) -> Iterator[None]:
    """Let `part`, which treats each position by itself, see only `rows`; the others come out as zero."""
    if part is None:
        yield
        return
    length: list[int] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        length.append(args[0].shape[1])
        return (args[0][:, rows], *args[1:])

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        full = output.new_zeros(output.shape[0], length.pop(), output.shape[2])
        full[:, rows] = output
        return full

    with hooked(part, before=before, after=after):
        yield


class Tail:
    """The finished sequence from `start` to its last predicting position, behind a kept beginning.

    Make it outside the intervention and inside `capture.undisturbed`; then call `score` inside the intervention.
    """

    def __init__(self, lab: Lab, run: Run, targets: Targets, start: int, tokens: Float[Tensor, "1 P D"] | None = None) -> None:
        self._model: Any = lab.model
        self._targets = targets
        self.at = predicting_rows(targets)
        self.start, self.stop = min(start, self.at[0]), self.at[-1] + 1
        if (getattr(lab.model.config.text_config, "sliding_window", None) or self.stop) < self.stop:
            self.start = 0  # a sliding cache forgets its beginning and cannot be taken back
        picture = image_tokens(lab, run) if tokens is None else tokens
        self.sequence = embedded(lab, run, picture)[:, : self.stop]
        self.passes = 0
        self._cache: Any = None
        if self.start:
            out = self._model(inputs_embeds=self.sequence[:, : self.start], use_cache=True, logits_to_keep=1)
            self._cache = out.past_key_values

    def logits(self) -> Float[Tensor, "R V"]:
        """Logits at the predicting positions, of the sequence as the model now is."""
        keep = torch.tensor(self.at, device=self.sequence.device) - self.start
        positions = torch.arange(self.start, self.stop, device=self.sequence.device)[None]
        inputs = {"inputs_embeds": self.sequence[:, self.start :], "position_ids": positions, "logits_to_keep": keep}
        self.passes += 1
        if self._cache is None:
            return self._model(**inputs, use_cache=False).logits[0]
        logits = self._model(**inputs, past_key_values=self._cache, use_cache=True).logits[0]
        self._cache.crop(self.start - self.stop)
        return logits

    def score(self) -> Float[Tensor, " N"]:
        """Each target's score, float32."""
        return read_scores(self.logits()[None], self.at, self._targets)[0]


def embedded(lab: Lab, run: Run, tokens: Float[Tensor, "B P D"]) -> Float[Tensor, "B S D"]:
    """The finished sequence as the language model reads it, with `tokens` for the picture."""
    ids = torch.from_numpy(run.token_ids)[None].to(tokens.device)
    text = lab.model.get_input_embeddings()(ids)
    start, stop = run.segments["image"]
    sequence = text.expand(len(tokens), -1, -1).clone()
    sequence[:, start:stop] = tokens.to(sequence.dtype)
    return sequence


def image_tokens(lab: Lab, run: Run, pixels: Tensor | None = None) -> Float[Tensor, "1 P D"]:
    """What the connector makes of the run's picture, or of `pixels`; the language model does not run."""
    return read_connector(lab.model, lab.inputs(run)["pixel_values"] if pixels is None else pixels)[1]

"""One prefix computed once, and whatever comes after it as often as wanted.

In a causal model a change at one position changes nothing before it. So the beginning of a run's finished sequence is
computed once and its keys and values are kept (`Prefix`). What follows is computed behind them in two ways:

- `Prefix.score` gives the run's own rest, as the model now is: interventions change the model from some position on.
- `Prefix.branch` gives several other rests in one pass, each of which sees the kept beginning and itself: occlusion
  behind the vision tower changes tokens, token knockout changes who may look where. The whole sequence is kept then.
  Taken from the last first change to the first, each pass may write over what none after it needs: one cache is all the
  memory there is. In the last layer only the positions that predict go through the feed-forward part, because nobody
  reads the others.

The numbers are those of full forwards. Who uses `branch` checks it in each run (`agree`) and does not trust it.

    prefix = Prefix(lab, run, targets, start=100)
    before = prefix.score()

Source of the idea: prefix caching as in serving systems; its use for occlusion is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from llava_lab.capture import hooked
from llava_lab.errors import LabError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers, read_connector
from llava_lab.replay.score import LOGPROB, Reader
from llava_lab.replay.targets import Targets
from llava_lab.results import Run

ROWS = 256  # positions in one pass: enough to keep the matmuls busy, few enough to stay small
# Noise floors by which packed and plain scores may differ. Measured on `tiny`: at most 0.41 in float32, float16 and bfloat16;
# a cache that forgets half of the picture is off by 2.3 or more in bfloat16, by 18 in float16, by 38,000 in float32.
AGREE = 2


class _Layer(DynamicLayer):
    """Keys and values of one layer in one buffer; a pass writes behind what is kept, over what was there."""

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        self.keys: Any = None
        self.values: Any = None
        self._prefix = prefix

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None:
            self.keys, self.values = (
                states.new_empty(*states.shape[:2], self._prefix.room, states.shape[3]) for states in (key_states, value_states)
            )
            self.is_initialized = True
        start, stop = self._prefix.kept, self._prefix.kept + key_states.shape[2]
        self.keys[:, :, start:stop] = key_states
        self.values[:, :, start:stop] = value_states
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        return self._prefix.kept


class Prefix:
    """A run's sequence up to its last predicting position, with the beginning kept. Make it inside `capture.undisturbed`.

    With `start` what comes before it is kept, and `score` computes the rest. Without, all of it is kept, `whole` is its
    score, and `branch` computes other rests. `room` is the longest pass in positions, what is kept included.
    """

    whole: Float[Tensor, " N"]

    def __init__(
        self,
        lab: Lab,
        run: Run,
        targets: Targets,
        start: int | None = None,
        *,
        tokens: Float[Tensor, "1 P D"] | None = None,
        room: int = 0,
        score: str = LOGPROB,
    ) -> None:
        self._model: Any = lab.model
        self.read = Reader(targets, score)
        self.at = self.read.at
        self.stop = self.at[-1] + 1  # nothing after the last predicting position matters
        picture = image_tokens(lab, run) if tokens is None else tokens
        self.sequence = embedded(lab, run, picture)[:, : self.stop]
        self.room = max(room, self.stop)
        self.kept = 0  # positions whose keys and values stand in the cache and are seen by the next pass
        self.positions = 0  # computed so far by `branch`
        self.passes = 0  # of `score` and `logits`
        layers = language_layers(lab.model)
        self._layers = [_Layer(self) for _ in layers]
        self._cache = Cache(layers=list(self._layers))
        self._last = getattr(layers[-1], "mlp", None)
        if start is None:
            self.start = self.stop
            self.whole = self.branch(self.sequence, 0)[0]
        else:
            self.start = min(start, self.at[0])
            if (getattr(lab.model.config.text_config, "sliding_window", None) or self.stop) < self.stop:
                self.start = 0  # a sliding cache forgets its beginning
            if self.start:
                inputs = {"inputs_embeds": self.sequence[:, : self.start], "logits_to_keep": 1}
                self._model(**inputs, past_key_values=self._cache, use_cache=True)
        self.kept = self.start

    def logits(self) -> Float[Tensor, "R V"]:
        """Logits at the predicting positions, of the run's own sequence as the model now is."""
        keep = torch.tensor(self.at, device=self.sequence.device) - self.start
        positions = torch.arange(self.start, self.stop, device=self.sequence.device)[None]
        inputs = {"inputs_embeds": self.sequence[:, self.start :], "position_ids": positions, "logits_to_keep": keep}
        self.passes += 1
        cache: dict[str, Any] = {"past_key_values": self._cache, "use_cache": True} if self.start else {"use_cache": False}
        return self._model(**inputs, **cache).logits[0]

    def score(self) -> Float[Tensor, " N"]:
        """Each target's score, float32, as the model now is."""
        return self.read(self.logits()[None])[0]

    def branch(
        self, rests: Float[Tensor, "K n D"], start: int, blocked: Bool[Tensor, "K start"] | None = None
    ) -> Float[Tensor, "K N"]:
        """Each target's score when the sequence goes on with `rests` from position `start`, up to the last that predicts.

        `blocked` names positions before `start` that the rows of a rest may not look at. Beginnings must never grow from
        one call to the next, since each pass writes over what comes after.
        """
        count, length = rests.shape[:2]
        assert length == self.stop - start, f"a rest of another length than {self.stop - start}: {length}"
        assert start <= self.kept or not self.positions, f"what came before {start} has been written over from {self.kept} on"
        self.kept = start
        keep = torch.tensor([position - start for position in self.at], device=rests.device)
        assert int(keep[0]) >= 0, "a rest must begin at or before the first position that predicts"
        keep = (torch.arange(count, device=rests.device)[:, None] * length + keep).flatten()
        with _rows_only(self._last, keep):
            logits = self._model(
                inputs_embeds=rests.reshape(1, count * length, -1),
                attention_mask=self._mask(count, length, start, blocked, rests),
                position_ids=torch.arange(start, self.stop, device=rests.device).repeat(count)[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits
        self.positions += count * length
        rows = logits.reshape(count, len(self.at), -1)
        # a large vocabulary, a few at a time
        return torch.cat([self.read(part) for part in rows.split(8)])

    @contextmanager
    def poisoned(self, position: int) -> Iterator[None]:
        """Absurd keys and values at one kept position, put right afterwards."""
        saved = [(layer.keys[:, :, position].clone(), layer.values[:, :, position].clone()) for layer in self._layers]
        try:
            for layer in self._layers:
                layer.keys[:, :, position].mul_(-3).add_(1)
                layer.values[:, :, position].mul_(-30).add_(10)
            yield
        finally:
            for layer, (keys, values) in zip(self._layers, saved, strict=True):
                layer.keys[:, :, position] = keys
                layer.values[:, :, position] = values

    def _mask(self, count: int, length: int, start: int, blocked: Tensor | None, like: Tensor) -> Float[Tensor, "1 1 Q K"]:
        """Zero where a row may look: what is kept but for what is blocked, and its own rest up to itself."""
        hidden = torch.ones(count, length, count, length, dtype=torch.bool, device=like.device)
        future = torch.ones(length, length, dtype=torch.bool, device=like.device).triu(1)
        for rest in range(count):
            hidden[rest, :, rest] = future
        before = torch.zeros(count, length, start, dtype=torch.bool, device=like.device)
        if blocked is not None:
            before |= blocked[:, None]
        both = torch.cat([before.reshape(count * length, start), hidden.reshape(count * length, count * length)], 1)
        mask = torch.zeros(both.shape, dtype=like.dtype, device=like.device)
        return mask.masked_fill_(both, torch.finfo(like.dtype).min)[None, None]


def agree(packed: Float[Tensor, " N"], plain: Float[Tensor, " N"], floor: Float[Tensor, " N"]) -> None:
    """Raise LabError where the shortcut does not give the plain forward's score, to `AGREE` times its noise floor."""
    error, limit = (packed.cpu() - plain.cpu()).abs(), AGREE * floor.cpu()
    if not bool((error <= limit).all()):
        raise LabError(
            f"expected the same score with and without the kept keys and values, got {packed.tolist()} and {plain.tolist()}, "
            f"where rounding explains {limit.tolist()}; this language model does not keep a plain causal cache: use at='pixels'"
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

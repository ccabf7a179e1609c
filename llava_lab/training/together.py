"""Several connectors trained for stage 1 at once: one order of data, one set of features, one frozen language model.

Each connector has its own optimiser, rate and loss, and learns exactly what it would learn alone: nothing passes from
one to the other. What they share is read or computed once: the rows, what the frozen tower saw of their pictures
(`features`: once for every connector, epoch and seed) and what stands before the pictures.

`LeanStep` is the loss of a connector beside a frozen language model, without the work that changes nothing in its
gradients. Three things are left out of the stock forward and backward. What stands before every picture is the same for
all rows, and a frozen model gives it the same keys and values always: they are computed once. Nothing reads the last
layer where there is no label: there it gives keys and values only. The vocabulary is scored at labelled places only.
What is left are stock modules. A stock forward with a cache of the prefix would leave out the first and the last only,
and it needs a mask, which the causal attention kernel does without. A language model that is not built as Llama is goes
through its own forward, whole. Padding stands at the end, where causal attention never looks from a labelled place, so
that no mask is needed.

    connectors = {kind: ll.new_connector(lab, kind) for kind in ("linear", "mlp2x_gelu")}
    train_connectors(lab, connectors, "captions.json", rates={"linear": 2e-3}, steps=200)

The loop is not `loop.train`: AdamW and its schedule are those of `train_stage`, which is what one of these connectors is
compared with. Source of the layers: transformers 5.23 ``modeling_llama.py``.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import get_cosine_schedule_with_warmup
from transformers.models.llama.modeling_llama import rotate_half

from llava_lab.capture import random_states_kept
from llava_lab.checks import Sweep, entry
from llava_lab.errors import OptionError
from llava_lab.models import connectors as architectures
from llava_lab.models import layout
from llava_lab.training.features import tower_features
from llava_lab.training.loop import Diverged, refuse_diverged, restored
from llava_lab.training.recipe import LLAVA_15_7B, LlavaStage
from llava_lab.training.rows import Problems, Source, Text, as_sources
from llava_lab.training.stages import open_rows, order_of
from llava_lab.training.text import IGNORE

if TYPE_CHECKING:
    from llava_lab.models import Lab

log = logging.getLogger(__name__)

LIKE_LLAMA = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")

OnStep = Callable[[int, dict[str, float]], None]  # step from 1, each connector's loss
Pair = tuple[Tensor, Tensor]

# -- training ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedTrained:
    """What one connector did beside the others; the connector given now has its trained weights."""

    name: str
    rate: float  # AdamW's peak
    losses: tuple[float, ...]  # of every step, before its update; nats per labelled token
    steps: int  # done; fewer than asked for after an interrupt, or where it diverged
    seconds: float  # of the whole call, for all connectors together
    skipped: tuple[str, ...] = ()  # file, row and reason
    stopped: str = "finished"  # or interrupted, or diverged: a loss or gradient was not finite, and that step was not taken


@entry
def train_connectors(
    lab: Lab,
    connectors: Mapping[str, nn.Module],
    data: str | os.PathLike | Source | Sequence[Source],
    *,
    recipe: LlavaStage | None = None,
    rates: Mapping[str, float] | None = None,
    steps: int | None = None,
    seed: int = 0,
    bf16: bool = False,
    device_batch: int | None = None,
    cache: str | os.PathLike | bool = True,
    skip_bad: bool = False,
    told: OnStep | None = None,
    progress: bool = True,
) -> dict[str, SharedTrained]:
    """Train connectors in place for stage 1 on the same batches; the lab, also its own connector, stays as it is.

    `connectors` by name, from `llava_lab.new_connector`; their token counts may differ. `rates` gives some another peak
    than the recipe's (default: LLaVA-1.5's). `bf16` runs a copy of the language model in bfloat16; connectors, their
    gradients and optimisers keep their own precision. `device_batch`: rows at a time; the batch is the recipe's still.
    `cache`, `steps` and `skip_bad` are `train_stage`'s. `told` is called after each step. Interrupting keeps what is
    trained; a connector that diverges ends before that step, and the others go on.
    Raises OptionError for what does not fit, DataError for bad data, before the first step.

    >>> from dataclasses import replace
    >>> from llava_lab.training import LLAVA_15_7B, train_connectors
    >>> from llava_lab.worlds import picturebook
    >>> rows = picturebook.write_dataset(tmp / "captions", n=4, progress=False)
    >>> connectors = {"linear": ll.new_connector(lab, "linear")}
    >>> recipe = replace(LLAVA_15_7B.align, batch=2)
    >>> trained = train_connectors(lab, connectors, rows, recipe=recipe, steps=1, cache=tmp, progress=False)
    >>> trained["linear"].steps
    1
    """
    recipe, begin = recipe or LLAVA_15_7B.align, time.monotonic()
    _check(lab, connectors, recipe, rates, steps, device_batch)
    problems = Problems(skip=skip_bad)
    # one image id for each picture, checked against the context that the longest connector leaves
    longest = max(_tokens(lab, connector) for connector in connectors.values())
    text = Text(lab.tokenizer, lab.image_id, 1, lab.context - longest + 1, "align")
    losses: dict[str, list[float]] = {name: [] for name in connectors}
    with ExitStack() as stack:
        stack.enter_context(lab.turn.taken(training=True))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(random_states_kept())
        stack.enter_context(training(lab.model, connectors.values()))
        options: dict[str, Any] = {"cache": cache, "fit": recipe.fit, "first": True, "show": progress}
        rows, features = open_rows(lab, as_sources(data), text, Path(folder), problems, **options)
        order = order_of(rows, recipe, steps, batch=recipe.batch, chunks=1, seed=seed)
        steps, places = order.total // recipe.batch, iter(order)
        step_of = LeanStep(lab.model, dtype=torch.bfloat16 if bf16 else None)
        peaks = {name: (rates or {}).get(name, recipe.rate) for name in connectors}
        updates = {name: _updates(connector, peaks[name], recipe, steps) for name, connector in connectors.items()}
        with Sweep("connectors", total=steps, least=0, show=progress) as done:
            for number in range(1, steps + 1):
                batch = [rows[next(places)] for _ in range(recipe.batch)]
                parts = list(_parts(lab, batch, device_batch or recipe.batch, cached=features is not None))
                count = sum(words.count for words, _ in parts)
                if not count:
                    raise OptionError(f"step {number} has no labelled token; use a larger batch than {recipe.batch}")
                for name in list(updates):
                    connector, (optimiser, schedule) = connectors[name], updates[name]
                    loss = _backward(step_of, connector, parts, count)
                    norm = float(torch.nn.utils.clip_grad_norm_(connector.parameters(), recipe.clip))
                    try:
                        refuse_diverged(f"connector {name!r}", number, (loss,), rate=schedule.get_last_lr()[0], norm=norm)
                    except Diverged as error:  # the others go on
                        log.warning("%s", error)
                        del updates[name]
                        continue
                    losses[name].append(loss)
                    optimiser.step()
                    optimiser.zero_grad(set_to_none=True)
                    schedule.step()
                if not updates:
                    break
                done.step()
                if told is not None:
                    told(number, {name: losses[name][-1] for name in updates})
    seconds, skipped = time.monotonic() - begin, tuple(problems.named)
    ended = "interrupted" if done.interrupted else "finished"
    return {
        name: SharedTrained(
            name, peaks[name], tuple(losses[name]), len(losses[name]), seconds, skipped, ended if name in updates else "diverged"
        )
        for name in connectors
    }


def _updates(connector: nn.Module, peak: float, recipe: LlavaStage, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """The optimiser and the schedule that `train_stage` uses."""
    optimiser = torch.optim.AdamW(connector.parameters(), lr=peak, weight_decay=recipe.decay)
    return optimiser, get_cosine_schedule_with_warmup(optimiser, math.ceil(recipe.warmup * steps), steps)


def _backward(step_of: LeanStep, connector: nn.Module, parts: Sequence[tuple[Texts, Tensor | None]], count: int) -> float:
    """Gradients of the mean loss over a batch's `count` labelled tokens, part by part; gives that loss."""
    total = 0.0
    for words, features in parts:
        loss = step_of.loss(connector, words, features) / count
        if loss.requires_grad:  # not where no row of the part has a picture
            loss.backward()
        total += loss.item()
    return total


def _parts(lab: Lab, batch: Sequence[Mapping[str, Any]], size: int, *, cached: bool) -> Iterator[tuple[Texts, Tensor | None]]:
    """A batch in parts of `size` rows: their words, and the features of their pictures, computed here without a cache."""
    for start in range(0, len(batch), size):
        rows = batch[start : start + size]
        pictures = [torch.as_tensor(row["picture"]) for row in rows if row["picture"] is not None]
        features = torch.stack(pictures).to(lab.device) if pictures else None
        if features is not None and not cached:
            features = tower_features(lab.model, features)
        yield texts([(row["ids"], row["labels"]) for row in rows], lab.image_id), features


def _tokens(lab: Lab, connector: Any) -> int:
    """Image tokens a connector makes."""
    kind = getattr(connector, "kind", None)
    if kind is None or not (entry := architectures.architecture(kind)).mixes:
        return layout.vision_tokens(lab.model)[1]
    rows, cols = entry.tokens(architectures.sizes_of(lab.model.config), connector.options)
    return rows * cols


def _check(
    lab: Lab,
    connectors: Mapping[str, nn.Module],
    recipe: LlavaStage,
    rates: Mapping[str, float] | None,
    steps: int | None,
    device_batch: int | None,
) -> None:
    """Raises OptionError for what does not fit."""
    if not connectors:
        raise OptionError("no connectors: give at least one by name, for example from llava_lab.new_connector")
    if recipe.name != "align":
        raise OptionError(f"connectors are trained together in stage 'align' only, the recipe is for {recipe.name!r}")
    if steps is not None and steps < 1:
        raise OptionError(f"steps must be 1 or more, got {steps}")
    if device_batch is not None and device_batch < 1:
        raise OptionError(f"device_batch must be 1 or more, got {device_batch}")
    if unknown := sorted(set(rates or {}) - set(connectors)):
        raise OptionError(f"rates name {', '.join(unknown)}, the connectors are {', '.join(connectors)}")
    if len({id(connector) for connector in connectors.values()}) < len(connectors):
        raise OptionError("two names share one connector; each needs its own")
    expected = architectures.sizes_of(lab.model.config)
    for name, connector in connectors.items():
        if not any(True for _ in connector.parameters()):
            raise OptionError(f"connector {name!r} has no parameters, so nothing to train")
        sizes = getattr(connector, "sizes", expected)
        if replace(sizes, bias=True) != replace(expected, bias=True):
            raise OptionError(f"connector {name!r} is made for {sizes}, the model needs {expected}")


@contextmanager
def training(model: Any, connectors: Iterable[nn.Module]) -> Iterator[None]:
    """Within it the connectors train and nothing of the model does; flags and modes are put back afterwards."""
    own = list(connectors)
    with restored(model, *own):
        model.requires_grad_(False).eval()
        for connector in own:
            connector.requires_grad_(True).train()
        yield


# -- the loss beside a frozen language model -----------------------------------------------


@dataclass(frozen=True)
class Texts:
    """The words of one batch, before any connector: what all rows share, and each row's own around its picture."""

    prefix: np.ndarray  # int64 (P,), the same in every row, with no picture and nothing to predict
    before: tuple[np.ndarray, ...]  # each row's ids between the prefix and its picture, or its end
    after: tuple[np.ndarray | None, ...]  # each row's ids after its picture, None without one
    labels: tuple[np.ndarray, ...]  # each row's next tokens from the prefix on, the picture counting as one token

    @property
    def count(self) -> int:
        """Labelled tokens."""
        return sum(int((row != IGNORE).sum()) for row in self.labels)


def texts(rows: Sequence[tuple[np.ndarray, np.ndarray]], image_id: int) -> Texts:
    """Rows of (ids, labels), int64 (T,) with one image id for a picture, as `Texts`. A row's last id is no input."""
    ends, places = [], []
    for ids, labels in rows:
        at = np.flatnonzero(ids[:-1] == image_id)
        if len(at) > 1:
            raise OptionError(f"a row has {len(at)} pictures, expected one at most")
        places.append(int(at[0]) if len(at) else None)
        learned = np.flatnonzero(labels[1:] != IGNORE)
        ends.append(min(len(ids) - 1, int(at[0]) if len(at) else len(ids), int(learned[0]) if len(learned) else len(ids)))
    shared = 0
    while shared < min(ends) and len({int(ids[shared]) for ids, _ in rows}) == 1:
        shared += 1
    before, after, nexts = [], [], []
    for (ids, labels), place in zip(rows, places, strict=True):
        before.append(ids[shared : len(ids) - 1 if place is None else place])
        after.append(None if place is None else ids[place + 1 : -1])
        nexts.append(labels[shared + 1 :])
    return Texts(rows[0][0][:shared], tuple(before), tuple(after), tuple(nexts))


class LeanStep:
    """Losses of connectors beside one frozen model. Keep it for a whole run: it holds the prefixes' keys and values.

    `dtype` other than the model's makes a copy of the language model in it; connectors keep theirs, and so do their
    gradients. The model itself is only read; that its parameters ask for no gradients is the caller's business.
    """

    def __init__(self, model: Any, *, dtype: torch.dtype | None = None) -> None:
        language, head = layout.language_model(model), model.get_output_embeddings()
        self.rotary = getattr(language, "rotary_emb", None)  # in its own precision: positions do not fit 16 bits
        if dtype not in (None, next(language.parameters()).dtype):
            language, head = (copy.deepcopy(part).to(dtype).requires_grad_(False) for part in (language, head))
        self.language, self.head = language, head
        self.layers: list[Any] = list(language.layers)
        self.lean = like_llama(language)
        self._prefixes: dict[bytes, list[Pair | None]] = {}

    def loss(self, connector: nn.Module, words: Texts, features: Tensor | None) -> Tensor:
        """Sum of the cross-entropies of `words.count` labelled tokens, a scalar with a graph to the connector.

        `features` (pictures, K, W) are what the tower gave for the rows with a picture, in their order; None without any.
        """
        sequence, picked, wanted = self._sequence(connector, words, features)
        hidden = self._hidden(words.prefix, sequence, picked)
        return F.cross_entropy(self.head(hidden).float(), wanted, reduction="sum")

    def _sequence(self, connector: nn.Module, words: Texts, features: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """Embeddings after the prefix (B, T, D), each row's labelled places, and their labels, row after row."""
        embed: Any = self.language.embed_tokens
        device, dtype = embed.weight.device, embed.weight.dtype
        pictures = iter(()) if features is None else iter(projected(connector, features).to(dtype))
        rows, picked, wanted = [], [], []
        for before, after, labels in zip(words.before, words.after, words.labels, strict=True):
            parts = [embed(torch.from_numpy(before).to(device))]
            if after is not None:
                parts += [next(pictures), embed(torch.from_numpy(after).to(device))]
                fill = np.full(len(parts[1]) - 1, IGNORE)
                labels = np.concatenate([labels[: len(before)], fill, labels[len(before) :]])
            rows.append(torch.cat(parts))
            where = np.flatnonzero(labels != IGNORE)
            picked.append(torch.from_numpy(where).to(device))
            wanted.append(torch.from_numpy(labels[where]).to(device))
        return pad_sequence(rows, batch_first=True), picked, torch.cat(wanted)

    def _hidden(self, prefix: np.ndarray, sequence: Tensor, picked: list[Tensor]) -> Tensor:
        """Normed last states at the picked places, (labelled, D)."""
        if not self.lean:
            ids = torch.from_numpy(prefix).to(sequence.device)
            first = self.language.embed_tokens(ids)[None].expand(len(sequence), -1, -1)
            states = self.language(inputs_embeds=torch.cat([first, sequence], 1), use_cache=False).last_hidden_state
            return torch.cat([row[len(prefix) + where] for row, where in zip(states, picked, strict=True)])
        shared = self._prefix(prefix, sequence)
        rotation = self._rotation(len(prefix), sequence.shape[1], sequence)
        for layer, before in zip(self.layers[:-1], shared[:-1], strict=True):
            sequence, _ = _through(layer, sequence, rotation, before)
        rows = pad_sequence(picked, batch_first=True)  # (B, R); what fills up points at the first place and is dropped
        states, _ = _through(self.layers[-1], sequence, rotation, shared[-1], rows)
        return self.language.norm(torch.cat([row[: len(where)] for row, where in zip(states, picked, strict=True)]))

    def _prefix(self, prefix: np.ndarray, like: Tensor) -> list[Pair | None]:
        """Keys and values of the shared tokens in every layer, (1, H, P, d) each; computed once. None without such tokens."""
        key = prefix.tobytes()
        if not len(prefix):
            return [None] * len(self.layers)
        if key not in self._prefixes:
            pairs: list[Pair | None] = []
            with torch.no_grad():
                states = self.language.embed_tokens(torch.from_numpy(prefix).to(like.device))[None]
                rotation = self._rotation(0, len(prefix), like)
                for layer in self.layers:
                    states, pair = _through(layer, states, rotation, None)
                    pairs.append(pair)
            self._prefixes[key] = pairs
        return self._prefixes[key]

    def _rotation(self, start: int, count: int, like: Tensor) -> Pair:
        positions = torch.arange(start, start + count, device=like.device)[None]
        assert self.rotary is not None
        cos, sin = self.rotary(torch.empty(0, device=like.device), position_ids=positions)
        return cos[:, None].to(like.dtype), sin[:, None].to(like.dtype)


def _through(layer: Any, hidden: Tensor, rotation: Pair, before: Pair | None, rows: Tensor | None = None) -> tuple[Tensor, Pair]:
    """One layer over what stands behind a prefix, (B, T, D), given the prefix's keys and values; also gives its own.

    With `rows` (B, R) only those places go through, (B, R, D); every place still gives its keys and values.
    """
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    k, v = _rotated(_heads(attention, attention.k_proj, normed), rotation), _heads(attention, attention.v_proj, normed)
    if rows is not None:
        at = rows[..., None].expand(-1, -1, hidden.shape[-1])
        hidden, normed = hidden.gather(1, at), normed.gather(1, at)
        cos, sin = (part[0, 0][rows][:, None] for part in rotation)
        rotation = cos, sin
    q = _rotated(_heads(attention, attention.q_proj, normed), rotation)
    keys, values = k, v
    if before is not None:
        keys, values = (torch.cat([part.expand(len(k), -1, -1, -1), own], 2) for part, own in zip(before, (k, v), strict=True))
    mask = None
    if rows is not None:
        start = keys.shape[2] - k.shape[2]
        mask = (torch.arange(keys.shape[2], device=rows.device) <= (start + rows)[..., None])[:, None]
    hidden = hidden + attention.o_proj(_attend(q, keys, values, mask))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), (k, v)


def _heads(attention: Any, project: nn.Module, normed: Tensor) -> Tensor:
    return project(normed).view(*normed.shape[:2], -1, attention.head_dim).transpose(1, 2)


def _rotated(states: Tensor, rotation: Pair) -> Tensor:
    cos, sin = rotation
    return states * cos + rotate_half(states) * sin


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, T, H * d). Causal without a mask; queries of the prefix are made up, so that the triangle fits, and dropped."""
    missing = 0 if mask is not None else k.shape[2] - q.shape[2]
    if missing:
        q = F.pad(q, (0, 0, missing, 0))
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return mixed[:, :, missing:].transpose(1, 2).flatten(2)


def projected(connector: nn.Module, features: Tensor) -> Tensor:
    """Image tokens (pictures, K', D) of features (pictures, K, W), in the connector's precision."""
    weight = next(connector.parameters(), None)
    return connector(features if weight is None else features.to(weight.device, weight.dtype))


def like_llama(language: Any) -> bool:
    """Whether a language model's layers are Llama's, with plain causal attention and rotations that know no length."""
    config = language.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    windows = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    known = all(type(layer).__name__ in LIKE_LLAMA for layer in language.layers)
    return known and not windows and rope in ("default", "linear", "llama3")

"""The loss of a connector beside a frozen language model, without the work that changes nothing in its gradients.

Three things are left out of the stock forward and backward. What stands before every picture is the same for all rows,
and a frozen model gives it the same keys and values always: they are computed once. Nothing reads the last layer where
there is no label: there it gives keys and values only. The vocabulary is scored at labelled places only. What is left
are stock modules. A language model that is not built as Llama is goes through its own forward, whole.

Padding stands at the end, where causal attention never looks from a labelled place, so that no mask is needed.
Source of the layers: transformers 5.23 ``modeling_llama.py``.

Several connectors trained for stage 1 at once: one order of data, one set of features, one frozen language model.

Each connector has its own optimiser, rate and loss, and learns exactly what it would learn alone: nothing passes from
one to the other. What they share is read or computed once: the rows, what the frozen tower saw of their pictures
(`feature_cache`: once for every connector, epoch and seed) and what stands before the pictures (`lean_step`).
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers.models.llama.modeling_llama import rotate_half

from llava_lab.errors import OptionError
from llava_lab.models import connectors as architectures
from llava_lab.models import layout
from llava_lab.training.features import tower_features
from llava_lab.training.recipe import LLAVA_15_7B, LlavaStage
from llava_lab.training.rows import LlavaData, Order, Problems, Source, Text, samples_per_epoch
from llava_lab.training.stages import _rows
from llava_lab.training.text import IGNORE

if TYPE_CHECKING:
    from llava_lab.models import Lab

LIKE_LLAMA = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")

Pair = tuple[Tensor, Tensor]


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
        self._held: dict[bytes, list[Pair]] = {}

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
        held, shared = self._prefix(prefix, sequence), len(prefix)
        rotation = self._rotation(shared, sequence.shape[1], sequence)
        for layer, pair in zip(self.layers[:-1], held[:-1], strict=True):
            q, k, v = _project(layer, sequence, rotation)
            sequence = _finish(layer, sequence, _attend(q, *_joined(pair, k, v)))
        rows = pad_sequence(picked, batch_first=True)  # (B, R); what fills up points at the first place and is dropped
        states = _last(self.layers[-1], sequence, rotation, held[-1], rows)
        return self.language.norm(torch.cat([row[: len(where)] for row, where in zip(states, picked, strict=True)]))

    def _prefix(self, prefix: np.ndarray, like: Tensor) -> list[Pair]:
        """Keys and values of the shared tokens in every layer, (1, H, P, d) each; computed once."""
        key = prefix.tobytes()
        if key not in self._held:
            found = []
            with torch.no_grad():
                states = self.language.embed_tokens(torch.from_numpy(prefix).to(like.device))[None]
                rotation = self._rotation(0, len(prefix), like)
                for layer in self.layers:
                    q, k, v = _project(layer, states, rotation)
                    found.append((k, v))
                    states = _finish(layer, states, _attend(q, k, v)) if len(prefix) else states
            self._held[key] = found
        return self._held[key]

    def _rotation(self, start: int, count: int, like: Tensor) -> Pair:
        positions = torch.arange(start, start + count, device=like.device)[None]
        assert self.rotary is not None
        cos, sin = self.rotary(torch.empty(0, device=like.device), position_ids=positions)
        return cos[:, None].to(like.dtype), sin[:, None].to(like.dtype)


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


def _project(layer: Any, hidden: Tensor, rotation: Pair) -> tuple[Tensor, Tensor, Tensor]:
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    q, k, v = (_heads(attention, project, normed) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    return _rotated(q, rotation), _rotated(k, rotation), v


def _heads(attention: Any, project: nn.Module, normed: Tensor) -> Tensor:
    return project(normed).view(*normed.shape[:2], -1, attention.head_dim).transpose(1, 2)


def _rotated(states: Tensor, rotation: Pair) -> Tensor:
    cos, sin = rotation
    return states * cos + rotate_half(states) * sin


def _joined(held: Pair, k: Tensor, v: Tensor) -> Pair:
    """The prefix's keys and values before the row's own."""
    if not held[0].shape[2]:
        return k, v
    first, second = (part.expand(len(k), -1, -1, -1) for part in held)
    return torch.cat([first, k], 2), torch.cat([second, v], 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, T, H * d). Causal without a mask; queries of the prefix are made up, so that the triangle fits, and dropped."""
    missing = 0 if mask is not None else k.shape[2] - q.shape[2]
    if missing:
        q = F.pad(q, (0, 0, missing, 0))
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    heard = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return heard[:, :, missing:].transpose(1, 2).flatten(2)


def _last(layer: Any, hidden: Tensor, rotation: Pair, held: Pair, rows: Tensor) -> Tensor:
    """The last layer at `rows` (B, R) only; every place still gives its keys and values. (B, R, D)."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    at = rows[..., None].expand(-1, -1, hidden.shape[-1])
    k, v = (_heads(attention, project, normed) for project in (attention.k_proj, attention.v_proj))
    cos, sin = (part[0, 0][rows][:, None] for part in rotation)
    q = _rotated(_heads(attention, attention.q_proj, normed.gather(1, at)), (cos, sin))
    shared = held[0].shape[2]
    keys, values = _joined(held, _rotated(k, rotation), v)
    seen = torch.arange(keys.shape[2], device=rows.device) <= (shared + rows)[..., None]
    return _finish(layer, hidden.gather(1, at), _attend(q, keys, values, seen[:, None]))


def _finish(layer: Any, hidden: Tensor, heard: Tensor) -> Tensor:
    hidden = hidden + layer.self_attn.o_proj(heard)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


OnStep = Callable[[int, dict[str, float]], None]  # step from 1, each connector's loss


@dataclass(frozen=True)
class SharedTrained:
    """What one connector did beside the others; the connector given now has its trained weights."""

    name: str
    rate: float  # AdamW's peak
    losses: tuple[float, ...]  # of every step, before its update; nats per labelled token
    steps: int  # done; fewer than asked for after an interrupt
    seconds: float  # of the whole call, for all connectors together
    skipped: tuple[str, ...] = ()  # file, row and reason


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
    `cache`, `steps` and `skip_bad` are `train_stage`'s. Interrupting keeps what is trained.
    Raises OptionError for what does not fit, DataError for bad data, before the first step.
    """
    recipe, begin = recipe or LLAVA_15_7B.align, time.monotonic()
    chosen = _check(lab, connectors, recipe, rates, steps, device_batch)
    sources = [data] if isinstance(data, Source) else [Source(data)] if isinstance(data, (str, os.PathLike)) else list(data)
    problems = Problems(skip=skip_bad)
    with tempfile.TemporaryDirectory() as folder:
        rows = _one_token_rows(lab, connectors, sources, Path(folder), problems, cache=cache, fit=recipe.fit, show=progress)
        if steps is None:
            weights = [source.weight for source in rows.sources]
            steps = math.ceil(samples_per_epoch(rows.sizes, weights) * recipe.epochs / recipe.batch)
        with training(lab.model, connectors.values()):
            losses = _run(
                lab,
                connectors,
                rows,
                recipe,
                chosen,
                steps,
                seed=seed,
                bf16=bf16,
                rows_at_once=device_batch or recipe.batch,
                cached=bool(cache),
                told=told,
                progress=progress,
            )
    seconds, skipped = time.monotonic() - begin, tuple(problems.named)
    return {
        name: SharedTrained(name, chosen[name], tuple(losses[name]), len(losses[name]), seconds, skipped) for name in connectors
    }


def _run(
    lab: Lab,
    connectors: Mapping[str, nn.Module],
    rows: LlavaData,
    recipe: LlavaStage,
    rates: Mapping[str, float],
    steps: int,
    *,
    seed: int,
    bf16: bool,
    rows_at_once: int,
    cached: bool,
    told: OnStep | None,
    progress: bool,
) -> dict[str, list[float]]:
    """Each connector's losses; all connectors take a step before the next batch is read."""
    from transformers import get_cosine_schedule_with_warmup

    step_of = LeanStep(lab.model, dtype=torch.bfloat16 if bf16 else None)
    optimizers, schedules = {}, {}
    for name, connector in connectors.items():
        optimizers[name] = torch.optim.AdamW(connector.parameters(), lr=rates[name], weight_decay=recipe.decay)
        schedules[name] = get_cosine_schedule_with_warmup(optimizers[name], math.ceil(recipe.warmup * steps), steps)
    weights = [source.weight for source in rows.sources]
    order = Order(
        rows.words, rows.sizes, weights, total=steps * recipe.batch, batch=recipe.batch, chunks=1, group=recipe.group, seed=seed
    )
    losses: dict[str, list[float]] = {name: [] for name in connectors}
    places = iter(order)
    try:
        for number in tqdm(range(1, steps + 1), desc="connectors", unit="step", disable=not progress):
            batch = [rows[next(places)] for _ in range(recipe.batch)]
            parts = list(_parts(lab, batch, rows_at_once, cached=cached))
            count = sum(words.count for words, _ in parts)
            if not count:
                raise OptionError(f"step {number} has no labelled token; use a larger batch than {recipe.batch}")
            for name, connector in connectors.items():
                total = 0.0
                for words, features in parts:
                    loss = step_of.loss(connector, words, features) / count
                    if loss.requires_grad:
                        loss.backward()
                    total += loss.item()
                torch.nn.utils.clip_grad_norm_(connector.parameters(), recipe.clip)
                optimizers[name].step()
                optimizers[name].zero_grad(set_to_none=True)
                schedules[name].step()
                losses[name].append(total)
            if told is not None:
                told(number, {name: found[-1] for name, found in losses.items()})
    except KeyboardInterrupt:
        pass
    return losses


def _parts(lab: Lab, batch: Sequence[Mapping[str, Any]], size: int, *, cached: bool) -> Iterator[tuple[Any, Tensor | None]]:
    """A batch in parts of `size` rows: their words, and the features of their pictures, computed here without a cache."""
    for start in range(0, len(batch), size):
        rows = batch[start : start + size]
        seen = [torch.as_tensor(row["picture"]) for row in rows if row["picture"] is not None]
        features = torch.stack(seen).to(lab.device) if seen else None
        if features is not None and not cached:
            features = tower_features(lab.model, features)
        yield texts([(row["ids"], row["labels"]) for row in rows], lab.image_id), features


def _one_token_rows(
    lab: Lab,
    connectors: Mapping[str, nn.Module],
    sources: Sequence[Source],
    folder: Path,
    problems: Problems,
    *,
    cache: str | os.PathLike | bool,
    fit: str | None,
    show: bool,
) -> LlavaData:
    """The rows with one image id for each picture, checked against the context that the longest connector leaves."""
    longest = max(_tokens(lab, connector) for connector in connectors.values())
    text = Text(lab.tokenizer, lab.image_id, 1, lab.context - longest + 1, "align")
    rows, _ = _rows(lab, list(sources), text, folder, problems, cache=cache, fit=fit, first=True, show=show)
    problems.refuse()
    return rows


def _tokens(lab: Lab, connector: Any) -> int:
    """Image tokens a connector makes."""
    kind = getattr(connector, "kind", None)
    if kind is None or not (entry := architectures.architecture(kind)).mixes:
        config: Any = lab.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        return side * side + (config.vision_feature_select_strategy != "default" and layout.has_class_token(lab.model))
    rows, cols = entry.tokens(architectures.sizes_of(lab.model.config), connector.options)
    return rows * cols


def _check(
    lab: Lab,
    connectors: Mapping[str, nn.Module],
    recipe: LlavaStage,
    rates: Mapping[str, float] | None,
    steps: int | None,
    device_batch: int | None,
) -> dict[str, float]:
    """Each connector's peak rate, when everything fits."""
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
    return {name: (rates or {}).get(name, recipe.rate) for name in connectors}


@contextmanager
def training(model: Any, connectors: Any) -> Iterator[None]:
    """Within it the connectors train and nothing of the model does; flags and modes are put back afterwards."""
    own = list(connectors)
    parts = [model, *own]
    flags = [(parameter, parameter.requires_grad) for part in parts for parameter in part.parameters()]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    try:
        model.requires_grad_(False).eval()
        for connector in own:
            connector.requires_grad_(True).train()
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode

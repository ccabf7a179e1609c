"""The loss of a connector beside a frozen language model, without the work that changes nothing in its gradients.

Three things are left out of the stock forward and backward. What stands before every picture is the same for all rows,
and a frozen model gives it the same keys and values always: they are computed once. Nothing reads the last layer where
there is no label: there it gives keys and values only. The vocabulary is scored at labelled places only. What is left
are stock modules. A language model that is not built as Llama is goes through its own forward, whole.

Padding stands at the end, where causal attention never looks from a labelled place, so that no mask is needed.
Source of the layers: transformers 5.23 ``modeling_llama.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.models.llama.modeling_llama import rotate_half

from llava_lab.errors import OptionError
from llava_lab.models import layout
from llava_lab.training.masks import IGNORE

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

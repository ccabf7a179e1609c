"""From rows to a batch, and the model made to take it: padded ids, labels where they count, pictures as features.

Logits are computed only at positions some row learns from (`logits_to_keep`), with the labels already moved
one place. `reading_features` lets a stock LLaVA take cached features in place of pixels and keeps the tower
out of every graph. A batch without pictures still goes through the connector, which gets zero gradients:
processes that train together must all reduce the same parameters.

Source of the empty picture: haotian-liu/LLaVA @ c121f04 ``llava/train/train.py`` (a zero image for text-only
samples) and ``llava_arch.py`` (features ``[0:0]``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_lab.models import layout
from llava_lab.training.feature_cache import tower_features
from llava_lab.training.masks import IGNORE


@dataclass(frozen=True)
class Collate:
    """Rows of `LlavaData` as one batch; `empty` is the shape of one picture, features (K, W) or pixels (3, S, S)."""

    pad_id: int
    empty: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The model's keywords: ``input_ids``, ``attention_mask`` (B, T), ``pixel_values`` (pictures, *empty), ``labels`` (B, K),
        ``logits_to_keep`` (K,) positions. Without a picture in any row ``pixel_values`` is one of zeros, which meets no token.
        """
        longest = max(len(row["ids"]) for row in rows)
        ids = np.full((len(rows), longest), self.pad_id, np.int64)
        mask = np.zeros((len(rows), longest), np.int64)
        next_label = np.full((len(rows), longest), IGNORE, np.int64)  # what the position before it should say
        for i, row in enumerate(rows):
            size = len(row["ids"])
            ids[i, :size], mask[i, :size] = row["ids"], 1
            next_label[i, : size - 1] = row["labels"][1:]
        keep = np.flatnonzero((next_label != IGNORE).any(0))
        seen = [torch.as_tensor(row["picture"]) for row in rows if row["picture"] is not None]
        pixels = torch.stack(seen) if seen else torch.zeros(1, *self.empty, dtype=self.dtype)
        found = torch.from_numpy(np.ascontiguousarray(next_label[:, keep]))
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "pixel_values": pixels,
            "labels": found,
            "shift_labels": found,
            "logits_to_keep": torch.from_numpy(keep),
        }


@contextmanager
def reading_features(model: Any, *, cached: bool) -> Iterator[None]:
    """Within it the model's pictures are cached features (B, K, W), or pixels through the tower without a graph.

    A batch's only picture may be of zeros and belong to no row: it passes the connector and then is no token.
    """
    inner = model.model
    projector, image_id = layout.projector(model), int(model.config.image_token_index)
    expected = {"tokens": True}

    def seen(pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        features = pixel_values if cached else tower_features(model, pixel_values)
        weight = next(projector.parameters(), None)
        projected = projector(features if weight is None else features.to(weight.dtype)).flatten(0, 1)
        return BaseModelOutputWithPooling(pooler_output=[projected if expected["tokens"] else projected[:0]])

    def look(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        ids = options["input_ids"] if "input_ids" in options else args[0]
        expected["tokens"] = bool((ids == image_id).any())

    hook = inner.register_forward_pre_hook(look, with_kwargs=True)
    inner.get_image_features = seen
    try:
        yield
    finally:
        del inner.get_image_features
        hook.remove()

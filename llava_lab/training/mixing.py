"""The order of samples: several sources with weights, grouped by modality and length as LLaVA groups them.

The order is a function of the seed, the epoch and the sizes, never of what ran before: every process
and every resumed run computes the same one. It costs eight bytes a row.

Source of the grouping: haotian-liu/LLaVA @ c121f04 ``llava/train/llava_trainer.py``
(get_modality_length_grouped_indices). Differences: sources may have weights, and the last batch is
filled from the next epoch, so that every step has the same number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from llava_lab.errors import OptionError

GROUPINGS = ("none", "modality")


def epoch_rows(sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int) -> np.ndarray:
    """Rows of one epoch in random order, int64; source s's rows are numbered after those of the sources before it.

    A weight says how many times an epoch goes through its source: 2 twice, 0.5 half of it, and the other
    half in the next epoch. LLaVA joins its sources with equal weights, 1.
    """
    parts, first = [], 0
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        count = round(size * weight)
        turns = np.arange(epoch * count, (epoch + 1) * count, dtype=np.int64)
        fixed = np.random.default_rng((seed, 61, source)).permutation(size)  # the same in every epoch: its parts differ
        parts.append(first + fixed[turns % max(size, 1)])
        first += size
    rows = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return np.random.default_rng((seed, 62, epoch)).permutation(rows)


def group_by_modality(words: np.ndarray, *, batch: int, chunks: int, rng: np.random.Generator) -> np.ndarray:
    """Positions 0..n-1 such that a global batch has one modality and samples of like length, int64 (n,).

    `words` int (n,) counts each sample's words, negative for text without a picture. `chunks` is processes
    times accumulated batches: a global batch is `chunks` batches of about equal length. Nothing is dropped:
    the last global batch of each modality goes to the end, joined.
    """
    seen, text = np.flatnonzero(words > 0), np.flatnonzero(words <= 0)
    if not len(seen) or not len(text):
        both = _group_by_length(np.abs(words), batch=batch, chunks=chunks, rng=rng)
        return np.concatenate(both) if both else np.zeros(0, np.int64)
    groups = [
        [part[found] for found in _group_by_length(np.abs(words[part]), batch=batch, chunks=chunks, rng=rng)]
        for part in (seen, text)
    ]
    whole = groups[0][:-1] + groups[1][:-1]
    shuffled = [whole[i] for i in rng.permutation(len(whole))]
    return np.concatenate([*shuffled, np.sort(np.concatenate([groups[0][-1], groups[1][-1]]))])


def _group_by_length(lengths: np.ndarray, *, batch: int, chunks: int, rng: np.random.Generator) -> list[np.ndarray]:
    order, whole = rng.permutation(len(lengths)), batch * chunks
    found = []
    for start in range(0, len(order), whole):
        part = order[start : start + whole]
        part = part[np.argsort(-lengths[part], kind="stable")]
        found.append(_even(part, lengths, chunks))
    return found


def _even(part: np.ndarray, lengths: np.ndarray, chunks: int) -> np.ndarray:
    """A global batch split into equally many samples of about equal total length, one chunk after the other."""
    if chunks == 1 or len(part) % chunks:
        return np.concatenate([part[i::chunks] for i in range(chunks)])
    held: list[list[int]] = [[] for _ in range(chunks)]
    total = np.zeros(chunks)
    for index in part:
        shortest = int(np.argmin(total))
        held[shortest].append(int(index))
        total[shortest] += lengths[index] if len(held[shortest]) < len(part) // chunks else math.inf
    return np.array([index for chunk in held for index in chunk], np.int64)


class Order(Sampler[int]):
    """Rows for the `total` samples of a whole run, epoch after epoch; the last epoch may be cut short."""

    def __init__(
        self,
        words: np.ndarray,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        total: int,
        batch: int,
        chunks: int,
        group: str,
        seed: int,
    ) -> None:
        if group not in GROUPINGS:
            raise OptionError(f"group must be one of {', '.join(GROUPINGS)}, got {group!r}")
        if not all(0 <= weight < math.inf for weight in weights) or not samples_per_epoch(sizes, weights):
            raise OptionError(f"weights must be 0 or more and leave some rows; got {list(weights)} for {list(sizes)} rows")
        self.words, self.sizes, self.weights = words, list(sizes), list(weights)
        self.total, self.batch, self.chunks, self.group, self.seed = total, batch, chunks, group, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        given, epoch = 0, 0
        while given < self.total:
            for row in self.epoch(epoch)[: self.total - given]:
                yield int(row)
                given += 1
            epoch += 1

    def epoch(self, number: int) -> np.ndarray:
        """The rows of one epoch in the order they are used, int64."""
        rows = epoch_rows(self.sizes, self.weights, seed=self.seed, epoch=number)
        if self.group == "none":
            return rows
        rng = np.random.default_rng((self.seed, 63, number))
        return rows[group_by_modality(np.asarray(self.words[rows]), batch=self.batch, chunks=self.chunks, rng=rng)]


def samples_per_epoch(sizes: Sequence[int], weights: Sequence[float]) -> int:
    """How many samples one epoch has."""
    return sum(round(size * weight) for size, weight in zip(sizes, weights, strict=True))

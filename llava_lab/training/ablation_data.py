"""What every run of a comparison reads and is asked: frozen features computed once, and questions encoded once.

A pool whose pictures are features instead of pixels goes through the recipe's own `AlignData` and `InstructData`
unchanged, so that batches, their order and their words are the recipe's. Exams are the questions `llava-lab evaluate`
asks of a split; an answer is right when every token of it, end mark included, is the most likely one, which is greedy
exact match as long as the tokenizer spells an answer in one way.
"""

from __future__ import annotations

import logging
import os
import shutil
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from llava_lab.errors import DataError, OptionError
from llava_lab.evaluation.items import load_items
from llava_lab.models import layout
from llava_lab.training.ablation_start import Start
from llava_lab.training.feature_cache import SPARE, tower_features
from llava_lab.training.masks import IGNORE
from llava_lab.training.pool import Pool, default_workers, make_pool
from llava_lab.training.tower import normalise
from llava_lab.training.turns import Apart, Joined, apart, apart_loss, joined_loss

log = logging.getLogger(__name__)

CHUNK = 32  # pictures through the tower, or through an exam, at a time

Item = tuple[str, Apart | Joined, Tensor]  # form, words, features (B, K, W)


@dataclass(frozen=True)
class Exam:
    """Questions about the first pictures of a pool, in batches."""

    split: str
    pool: Pool  # pictures are features
    batches: tuple[tuple[np.ndarray, Apart], ...]  # pictures' numbers and their questions
    asked: tuple[tuple[int, ...], ...]  # questions of each picture of a batch
    types: tuple[str, ...]  # (Q,)
    picture: np.ndarray  # int64 (Q,), number in the pool


def feature_pool(start: Start, folder: Path, split: str, n: int, *, seed: int, progress: bool = True) -> Pool:
    """`n` drawn pictures of a split as what the frozen tower sees of them: (n, K, W) float32, memory-mapped.

    Named by the tower's fingerprint, so that every connector, seed and comparison in this folder shares it.
    """
    config: Any = start.lab.model.config
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    grid = side // patch
    if side % patch:
        raise OptionError(f"connectors are compared on whole patches, got {side} pixels and patches of {patch}")
    pool = make_pool(folder / "pictures", n=n, side=side, grid=grid, split=split, seed=seed, workers=default_workers())
    path = folder / "features" / f"{split}-{seed}-{n}-{start.fingerprints['vision']}.npy"
    if not path.exists():
        width = config.vision_config.hidden_size * len(layout.feature_layers(config))
        _compute(start.lab.model, pool, path, (n, grid * grid, width), progress)
    return replace(pool, pictures=np.load(path, mmap_mode="r"))


def _compute(model: Any, pool: Pool, path: Path, shape: tuple[int, int, int], progress: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = 4 * int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if needed + SPARE > free:
        raise OptionError(
            f"features of {shape[0]:,} pictures need {needed / 1e9:.1f} GB in {path.parent}, {free / 1e9:.1f} GB are free; "
            "take fewer pictures or another folder"
        )
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        found = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        with tqdm(total=shape[0], desc=f"vision features, {pool.split}", unit="picture", disable=not progress) as bar:
            for first in range(0, shape[0], CHUNK):
                seen = tower_features(model, normalise(pool.pictures[first : first + CHUNK]))
                found[first : first + len(seen)] = seen.numpy()
                bar.update(len(seen))
        found.flush()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def make_exam(tokenizer: PreTrainedTokenizerFast, pool: Pool, *, seed: int) -> Exam:
    """The questions `llava-lab evaluate` asks about these pictures. Raises DataError when there is none."""
    items = load_items("picturebook", split=pool.split, n=len(pool), seed=seed)
    if not items:
        raise DataError(f"{len(pool)} pictures of split {pool.split} gave no questions; ask for more pictures")
    numbers = {pool.scene(i).name: i for i in range(len(pool))}
    turns: dict[int, list[tuple[str, str]]] = {}
    for item in items:
        turns.setdefault(numbers[item.picture], []).append((item.question, item.answer))
    chosen = list(turns)
    batches, asked = [], []
    for first in range(0, len(chosen), CHUNK):
        rows = chosen[first : first + CHUNK]
        batches.append((np.array(rows), apart(tokenizer, [turns[row] for row in rows], system=True)))
        asked.append(tuple(len(turns[row]) for row in rows))
    picture = np.array([numbers[item.picture] for item in items])
    return Exam(pool.split, pool, tuple(batches), tuple(asked), tuple(item.type for item in items), picture)


@torch.no_grad()
def sit(model: nn.Module, connector: nn.Module, exam: Exam, image_id: int) -> tuple[np.ndarray, float]:
    """Which answers are right, bool (Q,), and the mean loss per labelled token, nats. Float32 throughout."""
    right: list[bool] = []
    total = count = 0.0
    for (rows, words), asked in zip(exam.batches, exam.asked, strict=True):
        seen = torch.from_numpy(np.array(exam.pool.pictures[rows]))
        loss, hits = apart_loss(model, words, connector(seen), image_id)
        labelled = int((words.labels != IGNORE).sum())
        total, count = total + float(loss) * labelled, count + labelled
        for row, many in zip(hits.tolist(), asked, strict=True):
            right += row[:many]
    return np.array(right), total / count


def loss_of(model: nn.Module, connector: nn.Module, item: Item, image_id: int) -> Tensor:
    """Mean loss over a training batch's labelled tokens, from features."""
    _, words, features = item
    tokens = connector(features)
    if isinstance(words, Joined):
        return joined_loss(model, words, tokens, image_id)
    return apart_loss(model, words, tokens, image_id)[0]


def stamp(item: Item) -> int:
    """A number for exactly this batch, words and pictures: two runs that read the same have the same stamps."""
    _, words, features = item
    found = zlib.crc32(features[:, 0].contiguous().numpy().tobytes())
    for name in ("prefix", "ids", "labels"):
        part = getattr(words, name, None)
        if part is not None:
            found = zlib.crc32(part.numpy().tobytes(), found)
    return found

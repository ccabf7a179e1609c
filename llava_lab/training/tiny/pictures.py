"""A pool of drawn pictures with patch-level truth, made once and shared by every stage; and scenes retold.

Pictures are drawn at the size users see and reduced exactly as the image processor reduces them, then kept as uint8 on
disk beside the truth each patch is taught: which thing covers it.

`retold` puts a scene in other words: things and colours that the pictures never show. A language model has read of far
more than its pictures will hold. Reading scenes retold with these words, stage 0b cannot get by on which colour goes with
which thing in the picture book; it has to look each one up, and so it also reads pairs right that it never met.

    pool = make_pool(Path("runs/tiny/pool"), n=1000, side=96, grid=12)
    pool.pictures[0], pool.owners[0], pool.scene(0)
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.std import tqdm

from llava_lab.results.save import as_written, whole_file, write_hashes
from llava_lab.worlds.scenes import COLOR_NAMES, HELD_OUT, KIND_NAMES, MAX_THINGS, Scene, scene

log = logging.getLogger(__name__)

NOTHING = 255  # patch label: paper
COVERED = 0.18  # share of a patch a thing must cover to own it
CHUNK = 250  # pictures a worker draws at a time


Job = tuple[str, int, int, int, int, int]  # split, seed, first index, one past the last, side, grid


@dataclass(frozen=True)
class Pool:
    """Pictures (N, side, side, 3) uint8, owners (N, grid*grid) uint8, things (N, 4, 6) float32.

    A thing's row is kind, colour, large (0/1), x, y, side; unused rows are -1.
    """

    pictures: np.ndarray
    owners: np.ndarray
    things: np.ndarray
    split: str
    seed: int

    def __len__(self) -> int:
        return len(self.pictures)

    def scene(self, index: int) -> Scene:
        return scene(self.split, index, seed=self.seed)


def make_pool(folder: Path, *, n: int, side: int, grid: int, split: str = "train", seed: int = 0, workers: int = 2) -> Pool:
    """Draw `n` pictures into `folder`, or map them from there when they are already drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{split}-{seed}-{n}x{side}x{grid}"
    done = stem.with_suffix(".done")
    paths = [stem.with_suffix(f".{name}.npy") for name in ("pictures", "owners", "things")]
    if not as_written(done, paths):
        log.info("drawing %d pictures of split %s", n, split)
        shapes = ((n, side, side, 3), (n, grid * grid), (n, MAX_THINGS, 6))
        types = (np.uint8, np.uint8, np.float32)
        with ExitStack() as files:
            arrays = [
                np.lib.format.open_memmap(files.enter_context(whole_file(path)), mode="w+", dtype=dtype, shape=shape)
                for path, dtype, shape in zip(paths, types, shapes, strict=True)
            ]
            jobs = [(split, seed, start, min(start + CHUNK, n), side, grid) for start in range(0, n, CHUNK)]
            chunks = tqdm(_drawn(jobs, workers), total=len(jobs), desc="pictures", unit="chunk", disable=len(jobs) < 9)
            for start, stop, chunk in chunks:
                for array, part in zip(arrays, chunk, strict=True):
                    array[start:stop] = part
            for array in arrays:
                array.flush()
        write_hashes(done, paths)
    pictures, owners, things = (np.load(path, mmap_mode="r") for path in paths)
    return Pool(pictures, owners, things, split, seed)


def _drawn(jobs: list[Job], workers: int) -> Iterator[tuple[int, int, tuple[np.ndarray, ...]]]:
    """Chunks in any order; a handful is drawn here, more by `workers` processes."""
    if len(jobs) < 9 or workers < 2:
        yield from map(_draw, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(_draw, jobs)


def _draw(job: Job) -> tuple[int, int, tuple[np.ndarray, ...]]:
    split, seed, start, stop, side, grid = job
    drawn = [truth_of(scene(split, index, seed=seed), side, grid) for index in range(start, stop)]
    return start, stop, tuple(np.stack(part) for part in zip(*drawn, strict=True))


def truth_of(drawn: Scene, side: int, grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One scene as the model will see it, the owner of each patch, and its table of things."""
    picture = np.asarray(drawn.picture().resize((side, side), Image.Resampling.BICUBIC))
    cell = side // grid
    shares = drawn.masks(side).reshape(len(drawn.things), grid, cell, grid, cell).mean((2, 4)).reshape(len(drawn.things), -1)
    owners = np.where(shares.max(0) >= COVERED, shares.argmax(0), NOTHING).astype(np.uint8)
    table = np.full((MAX_THINGS, 6), -1, np.float32)
    for i, thing in enumerate(drawn.things):
        owners[int(thing.y * grid) * grid + int(thing.x * grid)] = i  # the centre patch always belongs to its thing
        large = float(thing.size == "large")
        table[i] = KIND_NAMES.index(thing.kind), COLOR_NAMES.index(thing.color), large, thing.x, thing.y, thing.side
    return picture, owners, table


def patch_places(owners: np.ndarray, things: np.ndarray, grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What covers each patch and where, from a pool's owners (N, P) and things (N, 4, 6).

    The covering thing's row (N, P, 6), whether there is none, bool (N, P), and float32 (N, P, 5): the patch's own x and y
    from -1 to 1, three times the offset of the thing's centre (a large thing reaches about half a unit), and whether that
    centre lies in the patch; the last three are 0 on paper.
    """
    empty = owners == NOTHING
    rows = np.take_along_axis(things, np.where(empty, 0, owners)[:, :, None].astype(np.int64), axis=1)
    cells = (np.stack(np.meshgrid(np.arange(grid), np.arange(grid), indexing="xy"), -1).reshape(-1, 2) + 0.5) / grid
    offset = (rows[:, :, 3:5] - cells) * 3 * ~empty[:, :, None]
    here = (np.abs(rows[:, :, 3:5] - cells).max(-1) <= 0.5 / grid) & ~empty
    own = np.broadcast_to(cells * 2 - 1, offset.shape)
    return rows, empty, np.concatenate([own, offset, here[:, :, None]], -1).astype(np.float32)


def default_workers() -> int:
    return max(1, os.cpu_count() or 1)


OTHER_KINDS = ("ball", "bell", "bird", "book", "chair", "clock", "crown", "drum", "hat", "key", "lamp", "spoon")
OTHER_COLORS = ("black", "white", "gray", "golden", "silver", "violet")
ALL_KINDS, ALL_COLORS = KIND_NAMES + OTHER_KINDS, COLOR_NAMES + OTHER_COLORS


def retold(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with every kind and every colour renamed, one to one; never a held-out pair."""
    while True:
        kinds = dict(zip(KIND_NAMES, (ALL_KINDS[i] for i in rng.permutation(len(ALL_KINDS))), strict=False))
        colors = dict(zip(COLOR_NAMES, (ALL_COLORS[i] for i in rng.permutation(len(ALL_COLORS))), strict=False))
        things = tuple(replace(t, kind=kinds[t.kind], color=colors[t.color]) for t in scene.things)
        if not any((t.color, t.kind) in HELD_OUT for t in things):
            return replace(scene, things=things, kinds=tuple(kinds.values()), colors=tuple(colors.values()))

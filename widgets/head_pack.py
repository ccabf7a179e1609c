"""Every head's maps as the page holds them: one byte per value, so that 7B's 32 x 32 heads take 0.6 MB per word.

A level is the square root of a value beside its map's peak: ``value = peak * (level / 255) ** 2``. Attention has
high peaks on low ground; under a linear scale the ground would be all zeros. The heads' shares on the whole
picture travel exactly. Where there is no room for all words, those that look at the picture most are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from widgets.pack import LEVELS, check_fits, chip_of, encode_picture, head_of
from widgets.palette import palettes

if TYPE_CHECKING:
    from llava_lab.results import HeadMaps, Run

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class PackedHeads:
    """What the page is given, and which of the targets are in it."""

    spec: dict[str, Any]
    picture: bytes
    maps: bytes  # uint8 (words, layers, heads, patches)
    scales: bytes  # little-endian float32: (words, layers, heads) peaks, then as many shares
    kept: tuple[int, ...]


def pack_heads(run: Run, maps: HeadMaps, *, megabytes: float) -> PackedHeads:
    """Check that the maps belong to the run, choose the words there is room for, and pack them."""
    check_fits(run, "head maps", maps)
    shares = maps.image_share
    kept = roomy(maps.values[0].size, shares, megabytes)
    levels, peaks = square_root_levels(maps.values[list(kept)])
    picture, kind = encode_picture(run.picture)
    chips = [chip_of(run, target) for target in maps.targets]
    left = [chips[i]["text"] for i in range(len(chips)) if i not in kept]
    spec = {
        **head_of(run),
        "chips": [chips[i] for i in kept],
        "layers": maps.values.shape[1],
        "heads": maps.values.shape[2],
        "notes": [*maps.notes, *_left_out(left)],
        "picture": kind,
        "palettes": {name: colors.tobytes().hex() for name, colors in palettes().items()},
    }
    scales = np.concatenate([peaks.ravel(), shares[list(kept)].ravel()]).astype("<f4")
    return PackedHeads(spec, picture, levels.tobytes(), scales.tobytes(), kept)


def roomy(size: int, shares: np.ndarray, megabytes: float) -> tuple[int, ...]:
    """Which words to keep, in reading order: all, or those whose heads look at the picture most.

    `size` is one word's number of values, `shares` (words, layers, heads). One word is always kept.
    """
    room = max(1, int(megabytes * MEGABYTE // size))
    best = np.argsort(-shares.mean((1, 2)), kind="stable")[:room]
    return tuple(int(i) for i in np.sort(best))


def square_root_levels(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 levels of the shape of `values` (words, layers, heads, rows, cols), and each map's peak, float32."""
    peaks = values.max((-2, -1)).astype(np.float32)
    safe = np.where(peaks > 0, peaks, 1)[..., None, None]
    return np.rint(LEVELS * np.sqrt(values.astype(np.float32) / safe)).astype(np.uint8), peaks


def _left_out(words: Sequence[str]) -> list[str]:
    if not words:
        return []
    return [f"Left out for want of room: {', '.join(words)}; the words kept are those whose heads look at the picture most."]

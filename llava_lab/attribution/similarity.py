"""How alike maps are, several at a time, and maps that are alike by chance only. Numpy only.

Sources: Wang et al. 2004 for structural similarity (SSIM), here with a square window.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llava_lab.attribution.ranking import spearman, top_overlap

WINDOW = 7  # side of the SSIM window, less on smaller grids
STEADY = (0.01**2, 0.03**2)  # SSIM's constants for values from 0 to 1


def rank_likeness(first: np.ndarray, maps: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Spearman correlation of each map (M, targets, rows, cols) with `first` (targets, rows, cols), float32 (M, targets).

    Only patches where `seen` (rows, cols) count. 0 where a map is flat.
    """
    return _each(first, maps, lambda a, b: float(np.nan_to_num(spearman(a[seen], b[seen]))))


def top_likeness(first: np.ndarray, maps: np.ndarray, seen: np.ndarray, top: int) -> np.ndarray:
    """Share of the `top` strongest patches in common, float32 (M, targets)."""
    return _each(first, maps, lambda a, b: top_overlap(a[seen], b[seen], top))


def structure_likeness(first: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Structural similarity of whole grids, each scaled to 0..1 by its own range, float32 (M, targets)."""
    return _each(first, maps, ssim)


def ssim(one: np.ndarray, two: np.ndarray) -> float:
    """Mean structural similarity of two grids after each is scaled to 0..1; 1 for equal maps, 0 when just one is flat."""
    a, b = (_unit(values) for values in (one, two))
    if not np.ptp(a) or not np.ptp(b):
        return float(np.ptp(a) == np.ptp(b))
    side = min(WINDOW, *one.shape)
    views = [np.lib.stride_tricks.sliding_window_view(values, (side, side)) for values in (a, b, a * a, b * b, a * b)]
    mean_a, mean_b, square_a, square_b, product = (view.mean((2, 3)) for view in views)
    varied_a, varied_b, together = square_a - mean_a**2, square_b - mean_b**2, product - mean_a * mean_b
    light = (2 * mean_a * mean_b + STEADY[0]) / (mean_a**2 + mean_b**2 + STEADY[0])
    return float((light * (2 * together + STEADY[1]) / (varied_a + varied_b + STEADY[1])).mean())


def moved(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The map (rows, cols) rolled by a random offset other than none, mirrored and turned at random: as smooth, elsewhere."""
    rows, cols = values.shape
    down, right = divmod(int(rng.integers(1, max(rows * cols, 2))), cols)
    found = np.roll(values, (down, right), (0, 1))
    if rng.random() < 0.5:
        found = found[::-1]
    if rng.random() < 0.5:
        found = found[:, ::-1]
    return found.T if rows == cols and rng.random() < 0.5 else found


def _each(first: np.ndarray, maps: np.ndarray, measure: Callable[[np.ndarray, np.ndarray], float]) -> np.ndarray:
    found = [[measure(a, b) for a, b in zip(first, one, strict=True)] for one in maps]
    return np.array(found, np.float32).reshape(len(maps), len(first))


def _unit(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    return (values.astype(np.float64) - low) / (high - low) if high > low else np.zeros(values.shape)

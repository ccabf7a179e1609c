"""Cut the picture into connected regions of whole patches, each about one colour: superpixels on the patch grid.

Regions are grown by merging: every patch starts alone, and the two neighbours whose union is least mixed
(in colour and place) become one, until the wanted number is left. No randomness, always connected, always
the number asked for. ``"grid"`` gives plain rectangles instead, a control that knows nothing of colour.

Patches that hold only padding belong to no region (-1). It runs no model and knows no method.

Sources: Ward 1963 for the merging rule; the mix of colour and place after SLIC (Achanta et al. 2012).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from llava_lab.attribution.base import choose
from llava_lab.errors import OptionError
from llava_lab.results import Run

SHAPES = ("color", "grid")
PLACE = 0.5  # weight of a whole side of the grid beside a colour channel of the range 0 to 1


def superpixels(run: Run, regions: int, *, shape: str = SHAPES[0]) -> np.ndarray:
    """Region of each patch, int (rows, cols): 0 to n - 1 in reading order, -1 where there is only padding.

    A picture of fewer patches than `regions` gets one region per patch; ``"grid"`` gives about as many as asked for.
    """
    choose("shape", shape, SHAPES)
    if regions < 2:
        raise OptionError(f"regions must be a whole number of at least 2, got {regions}")
    covered = run.map.coverage() > 0
    labels = _rectangles(covered, regions) if shape == "grid" else _merged(_features(run), covered, regions)
    return _in_reading_order(labels)


def _features(run: Run) -> np.ndarray:
    """Mean colour (0 to 1) of each patch, taken over the picture alone, and its place, (rows, cols, 5)."""
    where = run.map
    weight = where.mask_to_patches(np.ones((where.height, where.width), np.float32))
    colors = np.stack([where.mask_to_patches(run.picture[..., i].astype(np.float64) / 255) for i in range(3)], -1)
    colors = colors / np.maximum(weight, 1e-6)[..., None]
    y, x = np.mgrid[: where.rows, : where.cols]
    side = max(where.rows, where.cols)
    return np.concatenate([colors, PLACE * y[..., None] / side, PLACE * x[..., None] / side], -1)


def _merged(features: np.ndarray, covered: np.ndarray, regions: int) -> np.ndarray:
    """Merge neighbours by Ward's rule until `regions` are left, or until what is left does not touch."""
    rows, cols = covered.shape
    name = np.arange(rows * cols).reshape(rows, cols)
    means = {int(i): features.reshape(-1, features.shape[-1])[i] for i in name[covered]}
    sizes = dict.fromkeys(means, 1)
    members = {i: [i] for i in means}
    beside: dict[int, set[int]] = {i: set() for i in means}
    for one, two in _touching(name, covered):
        beside[one].add(two)
        beside[two].add(one)

    def price(one: int, two: int) -> float:
        return sizes[one] * sizes[two] / (sizes[one] + sizes[two]) * float(((means[one] - means[two]) ** 2).sum())

    heap = [(price(one, two), one, two) for one in beside for two in beside[one] if one < two]
    heapq.heapify(heap)
    new = rows * cols
    while len(means) > regions and heap:
        _, one, two = heapq.heappop(heap)
        if one not in means or two not in means:  # merged into something else meanwhile
            continue
        sizes[new] = sizes[one] + sizes[two]
        means[new] = (sizes[one] * means[one] + sizes[two] * means[two]) / sizes[new]
        members[new] = members.pop(one) + members.pop(two)
        beside[new] = (beside.pop(one) | beside.pop(two)) - {one, two}
        for other in beside[new]:
            beside[other] = (beside[other] - {one, two}) | {new}
        for gone in (one, two):
            del means[gone], sizes[gone]
        for other in sorted(beside[new]):
            heapq.heappush(heap, (price(other, new), other, new))
        new += 1
    labels = np.full(rows * cols, -1)
    for region, patches in enumerate(members.values()):
        labels[patches] = region
    return labels.reshape(rows, cols)


def _touching(name: np.ndarray, covered: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of patches that share an edge, both on the picture."""
    pairs = ((name[:, :-1], name[:, 1:], covered[:, :-1] & covered[:, 1:]), (name[:-1], name[1:], covered[:-1] & covered[1:]))
    for one, two, both in pairs:
        yield from zip(one[both].tolist(), two[both].tolist(), strict=True)


def _rectangles(covered: np.ndarray, regions: int) -> np.ndarray:
    """About `regions` equal rectangles over the part of the grid that is on the picture."""
    ys, xs = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    height, width = len(ys), len(xs)
    down = min(max(round((regions * height / width) ** 0.5), 1), height)
    across = min(max(round(regions / down), 1), width)
    labels = np.full(covered.shape, -1)
    y = np.arange(height) * down // height
    x = np.arange(width) * across // width
    labels[np.ix_(ys, xs)] = y[:, None] * across + x[None]
    return np.where(covered, labels, -1)


def _in_reading_order(labels: np.ndarray) -> np.ndarray:
    """The same regions, numbered by their first patch."""
    flat = labels.ravel()
    order = list(dict.fromkeys(flat[flat >= 0].tolist()))
    names = {old: new for new, old in enumerate(order)}
    return np.array([names.get(one, -1) for one in flat.tolist()]).reshape(labels.shape)

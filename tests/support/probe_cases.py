"""Cases for the probes: pictures with one red patch, and a model whose patches say loudly where they stand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from llava_lab.models import Lab, load
from tests.support.planted import RED


def red_squares(count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Grey pictures with one red 8x8 patch each, and which patch it is, (count, 4, 4)."""
    rng = np.random.default_rng(1)
    pictures, labels = [], np.zeros((count, 4, 4), np.int64)
    for number in range(count):
        pixels = rng.integers(90, 160, (32, 32, 3), dtype=np.uint8)
        row, col = rng.integers(0, 4, 2)
        pixels[row * 8 : row * 8 + 8, col * 8 : col * 8 + 8] = RED
        labels[number, row, col] = 1
        pictures.append(pixels)
    return pictures, labels


def placed_lab(folder: Path) -> Lab:
    """A random model whose patches say where they stand, which is all that a label of place needs."""
    lab = load(str(folder))
    with torch.no_grad():
        next(one for name, one in lab.model.named_parameters() if "position_embedding" in name).mul_(30)
    return lab

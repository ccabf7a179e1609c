"""The two scales of maps: one for each kind everywhere, and both can be read without full colour vision."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from llava_lab.plots import palette

ROOT = Path(palette.__file__).parents[2]
# What people see who lack one kind of cone, on linear RGB: Machado, Oliveira & Fernandes 2009, table 1 (severity 1.0).
SEEN_BY = {
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
TO_XYZ = np.array(((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)))
WHITE = TO_XYZ.sum(1)
TOLD_APART = 20.0  # CIE76; about 2.3 is just noticeable


def as_seen(colors: np.ndarray, eyes: str) -> np.ndarray:
    """CIELAB of uint8 colours (n, 3+), as people with those eyes see them."""
    rgb = colors[:, :3] / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    seen = np.clip(linear @ np.array(SEEN_BY.get(eyes, np.eye(3))).T, 0, 1) @ TO_XYZ.T / WHITE
    root = np.where(seen > (6 / 29) ** 3, np.cbrt(seen), seen * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])], axis=1)


every_eye = pytest.mark.parametrize("eyes", ["all", *SEEN_BY])


@every_eye
def test_more_is_lighter_on_the_unsigned_scale(eyes: str) -> None:
    lightness = as_seen(palette.colors_of(signed=False), eyes)[::16, 0]
    assert (np.diff(lightness) > 0).all()


@every_eye
def test_more_and_less_are_told_apart_on_the_signed_scale(eyes: str) -> None:
    seen = as_seen(palette.colors_of(signed=True), eyes)
    strength = np.abs(np.linspace(-1, 1, palette.COLORS))
    apart = np.linalg.norm(seen - seen[::-1], axis=1)  # a value and the same below zero
    assert (apart[strength > 0.25] > TOLD_APART).all()


def test_a_scale_of_red_and_green_would_fail() -> None:
    colors = (matplotlib.colormaps["RdYlGn"](np.linspace(0, 1, 256)) * 255).astype(np.uint8)
    seen = as_seen(colors, "deutan")
    assert np.linalg.norm(seen - seen[::-1], axis=1)[: 256 * 3 // 8].min() < TOLD_APART


def test_figures_take_their_scales_from_here_alone() -> None:
    named = re.compile(r"""cmap=["']|colormaps\[["']|RdBu|coolwarm|["']Blues["']""")
    files = [*(ROOT / "llava_lab").rglob("*.py"), *(ROOT / "widgets").glob("*.py")]
    assert [file.name for file in files if named.search(file.read_text("utf-8"))] == []


def test_letters_can_be_read_on_every_colour() -> None:
    for signed in (False, True):
        for ground in palette.colors_of(signed)[:, :3] / 255.0:
            white = palette.ink_on(ground) == palette.PAPER
            assert white == (float(ground @ palette.LUMINANCE) < palette.DARK)

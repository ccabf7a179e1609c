"""Every colour that figures, stills and pages use: two scales for maps, and the colours of lines, verdicts and segments.

A scale is 256 RGBA colours, with the alpha part of the scale: the picture shows through where a map
says little. There is one for each kind of map, the same in figures, stills, widgets, tables and the
report: sequential, for what is never negative, is viridis; diverging runs from blue through nothing
to orange. Both can be read without full colour vision (`tests/plots/test_palette.py`). The two
lights are shades instead of colours: the picture itself, dark where the map is low. The two greys
are for maps that were not shown to beat random ones.

    from llava_lab.plots import palette

    colors = palette.colors_of(signed=False)  # uint8 (256, 4)

Source: matplotlib's viridis (CC0), 33 samples; the colours of flows are Okabe and Ito's. The diverging scale is our own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.colors import Colormap

COLORS = 256
FAINTEST = 0.1  # alpha of the lowest sequential value, before the reader's opacity

# -- lines, verdicts and words --------------------------------------------------------------

INK, SOFT, PAPER, WASH = "#16181d", "#5b6270", "#ffffff", "#f1f2f4"
RULE = "#e3e5e9"  # of a grid

# Blue is better, red is worse, grey not told apart; a band is where random maps lie.
BLUE, GREY, BAND, RED, ORANGE = "#2b6cb0", "#a0a4aa", "#d5d8dc", "#b04a5a", "#c05621"
VERDICTS = {1: BLUE, -1: RED, 0: GREY}
LINES = (BLUE, ORANGE, "#2f855a", "#805ad5", "#d69e2e", "#97266d", "#00838f", "#4a5568")
MARKERS = "osD^vPX*"  # lines are told apart by these as well
FLOWS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

SEGMENTS = {
    "system": "#9aa5b1",
    "image": "#3b7dd8",
    "history": "#8a7fb8",
    "question": "#e0a030",
    "cue": "#c9b28f",
    "answer": RED,
}
OTHER = "#dddddd"  # positions in no segment

LUMINANCE = np.array([0.3, 0.59, 0.11])  # of red, green and blue
DARK = 0.55  # of a ground: below it letters are white

# -- scales of maps -------------------------------------------------------------------------

_VIRIDIS = (
    "440154470d6048186a482374472d7b4537814240863e49893b528b375b8d33638d2f6b8e2c728e297a8e26828e23898e21918c"
    "1f988b1fa08822a78528ae8032b67a3fbc734ec36b5ec96270cf5784d44b98d83eaddc30c2df23d8e219ece51bfde725"
)
_BLUE_ORANGE = "06308f0f4fd64b8bf08fbdf7cfe0f7f2f2f2ffe2bdfdbb6bf98a1ee05a02a33400"
_NIGHT = "0b0d14" * 2
_LIGHT_TO_DARK = "e7e8eb36393e"


def sequential() -> np.ndarray:
    """Viridis, low values fainter; uint8 (256, 4)."""
    alpha = FAINTEST + (1 - FAINTEST) * np.linspace(0, 1, COLORS)
    return _with_alpha(_VIRIDIS, alpha)


def diverging() -> np.ndarray:
    """Blue below zero, orange above, clear at zero; uint8 (256, 4)."""
    # rises fast: small effects stay visible
    alpha = np.abs(np.linspace(-1, 1, COLORS)) ** 0.6
    return _with_alpha(_BLUE_ORANGE, alpha)


def light(signed: bool) -> np.ndarray:
    """Darkness that lifts as the value rises, from the low end or from zero; uint8 (256, 4)."""
    value = np.linspace(-1 if signed else 0, 1, COLORS)
    return _with_alpha(_NIGHT, 0.94 * (1 - np.clip(value, 0, 1)))


def grey(signed: bool) -> np.ndarray:
    """Light to dark without colour, clear where `sequential` or `diverging` is; uint8 (256, 4)."""
    colors = _with_alpha(_LIGHT_TO_DARK, np.zeros(COLORS))
    colors[:, 3] = (diverging() if signed else sequential())[:, 3]
    return colors


def palettes() -> dict[str, np.ndarray]:
    """All scales by the names the pages use."""
    colors = {"sequential": sequential(), "diverging": diverging()}
    greys = {"grey": grey(False), "grey-diverging": grey(True)}
    return {**colors, **greys, "light": light(False), "light-diverging": light(True)}


def colors_of(signed: bool, *, doubtful: bool = False) -> np.ndarray:
    """The colours of a map; grey where it is known not to beat random ones."""
    return grey(signed) if doubtful else diverging() if signed else sequential()


def colormap(signed: bool) -> Colormap:
    """The scale of `colors_of` without its alpha, for tables and colour bars; white where there is no number."""
    from matplotlib.colors import ListedColormap

    return ListedColormap(colors_of(signed)[:, :3] / 255.0).with_extremes(bad=PAPER)


def ink_on(ground: Any) -> str:
    """The colour of letters on a ground, RGB from 0 to 1."""
    return PAPER if float(np.dot(ground[:3], LUMINANCE)) < DARK else INK


def _with_alpha(samples: str, alpha: np.ndarray) -> np.ndarray:
    known = np.frombuffer(bytes.fromhex(samples), np.uint8).reshape(-1, 3).astype(np.float64)
    at = np.linspace(0, len(known) - 1, COLORS)
    rgb = np.stack([np.interp(at, np.arange(len(known)), known[:, channel]) for channel in range(3)], axis=1)
    return np.concatenate([rgb, alpha[:, None] * 255], axis=1).round().astype(np.uint8)

"""Ask again without some patches: cover them in the picture itself and let the model answer anew.

Where `occlusion` gives the model its own words back and reads one number, this lets it say something
else. The picture of the new run is the covered one, so what you see is what was asked about. Patches
are covered in the picture's pixels; the resize that follows blurs their edges by less than a pixel of
the model's square.

    without = ask_without(lab, run, [(4, 2), (4, 3)])
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFilter

from llava_lab.checks import entry, one_of, same_model
from llava_lab.errors import OptionError
from llava_lab.interventions.plan import read_patches
from llava_lab.replay.fills import BLUR, FILLS
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab
    from llava_lab.remote import BlackBox

GREY = 128
ASKED = ("max_new_tokens", "temperature", "prompt", "fit")  # a run's options that are arguments of `Lab.ask`

Patches = Iterable[tuple[int, int]]


@entry
def ask_without(lab: Lab | BlackBox, run: Run, patches: Patches, *, fill: str = FILLS[0], history: Any = ()) -> Run:
    """The same question, asked the same way, about the run's picture with `patches` (row, col) covered.

    `fill`: ``grey``, ``mean`` (the picture's own mean colour) or ``blur``. A run that came with earlier turns
    needs them again as `history`. Raises OptionError (no patch, one outside the grid, missing turns),
    CheckpointError (the run was made by another checkpoint).

    >>> everything = [(row, col) for row in range(12) for col in range(12)]
    >>> ll.ask_without(lab, run, everything).answer == run.answer
    False
    """
    same_model(lab, run)
    if "history" in run.segments and not history:
        raise OptionError("this run had earlier turns, which it keeps only as prompt text; give them again as history=")
    options = {name: run.options[name] for name in ASKED if name in run.options}
    covered = cover(run, patches, fill=fill)
    if not run.others:
        return lab.ask(covered, run.question, seed=run.seed, history=history, **options)
    shown = [covered if own is run.picture else own for own in run.pictures]
    return lab.ask(shown, run.question, seed=run.seed, history=history, **options).about(run.number)


def cover(run: Run, patches: Patches, *, fill: str = FILLS[0]) -> np.ndarray:
    """The run's picture, uint8 (height, width, 3), with `patches` filled; a new array."""
    one_of("fill", fill, FILLS)
    rows, cols = run.map.rows, run.map.cols
    grid = np.zeros((rows, cols), np.float32)
    for cell in read_patches(run, patches):
        grid[cell] = 1
    covered = run.map.project(grid) == 1  # not a number, so never equal, where the model does not look
    if fill == "blur":
        radius = BLUR * max(run.picture.shape[:2])
        filling = np.asarray(Image.fromarray(run.picture).filter(ImageFilter.GaussianBlur(radius)))
    else:
        filling = (np.full(3, GREY) if fill == "grey" else run.picture.mean((0, 1)).round()).astype(np.uint8)
    return np.where(covered[:, :, None], filling, run.picture)

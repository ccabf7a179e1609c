"""What each patch of a picture-book scene shows, as labels for `linear_probe`: object or background, kind, colour.

The scene knows every pixel of every thing, and the picture's own map takes them to patches. A patch is labelled when
one thing covers most of it, or when nothing touches it; the rest, edges and corners, are left out. It runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llava_lab.attribution.base import choose, number
from llava_lab.errors import OptionError
from llava_lab.probes.linear import LEFT_OUT
from llava_lab.worlds.scenes import COLOR_NAMES, KIND_NAMES, SIZE, Scene

if TYPE_CHECKING:
    from llava_lab.models import Lab

PATCH_LABELS: dict[str, tuple[str, ...]] = {  # what a patch may be asked, and what its numbers mean
    "object": ("background", "object"),
    "kind": KIND_NAMES,
    "color": COLOR_NAMES,
}


def patch_labels(lab: Lab, scenes: Sequence[Scene], what: str = "object", *, most: float = 0.5) -> np.ndarray:
    """Labels of every patch, int32 (scenes, rows, cols): positions in ``PATCH_LABELS[what]``, or -1 for left out.

    "kind" and "color" label the patches that one thing covers by more than `most`, a share from 0.5 to below 1; "object"
    calls those 1 and the patches that no thing touches 0. The scenes must be shown as `Scene.picture` draws them.
    Raises OptionError: another `what`, a share out of range, no scenes.
    """
    choose("what", what, tuple(PATCH_LABELS))
    if not 0.5 <= number("most", most) < 1:
        raise OptionError(f"most must be a share from 0.5 to below 1, so that one thing covers most of a patch; got {most}")
    if not len(scenes):
        raise OptionError("expected scenes to label, got none")
    way = lab.preprocessing.map(SIZE, SIZE)
    labels = np.full((len(scenes), *lab.grid), LEFT_OUT, np.int32)
    for one, scene in zip(labels, scenes, strict=True):
        touched = np.zeros(lab.grid, bool)
        for thing, mask in zip(scene.things, scene.masks(), strict=True):
            covered = way.mask_to_patches(mask)
            touched |= covered > 0
            one[covered > most] = 1 if what == "object" else PATCH_LABELS[what].index(getattr(thing, what))
        if what == "object":
            one[~touched] = 0
    return labels

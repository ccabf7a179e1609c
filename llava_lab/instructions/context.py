"""What a text-only language model is told of a picture: captions, and boxes of what is where.

A `Context` is put in words as LLaVA's authors did: the captions, one a line, an empty line, then one line per box,
``car: [0.120, 0.300, 0.480, 0.710]``, left, top, right, bottom as shares of the picture. The boxes can be left out, since
LLaVA's conversations were made from captions alone.

A context from a world of our own also holds the scene, which no teacher of ours that is a model ever reads; the truth check
(`llava_lab.instructions.truth`) and the rule teacher do.

    context = Context(("A red car in front of a house.",), (Box("car", 0.1, 0.3, 0.5, 0.7),))
    print(context.text(boxes=True))

Source: arXiv 2304.08485 section 3 and Table 13; haotian-liu/LLaVA @ c121f04 ``playground/data/prompts`` (``*_caps.txt``).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace

from llava_lab.checks import shown
from llava_lab.errors import DataError
from llava_lab.worlds import picturebook

MOST = 1000  # captions, and boxes, of one picture
LONGEST = 2000  # characters of a caption
SLACK = 0.002  # by how much a rounded box may stand over the picture's edge


@dataclass(frozen=True)
class Box:
    """One thing: its name, and left, top, right, bottom as shares of the picture. `crowd`: a group that nobody counted."""

    name: str
    left: float
    top: float
    right: float
    bottom: float
    crowd: bool = False

    @property
    def center(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


@dataclass(frozen=True)
class Context:
    """Captions and boxes of one picture.

    `id` names it in the data set and `image` is its file, relative to the folder of pictures. `complete` are the names of
    things that would have a box if they were in the picture: only of these a missing box says that there is none.
    Raises DataError for what no picture can have.
    """

    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()
    id: str = ""
    image: str = ""
    complete: tuple[str, ...] = ()
    scene: picturebook.Scene | None = None

    def __post_init__(self) -> None:
        if not any(caption.strip() for caption in self.captions) and not self.boxes:
            raise DataError("a context needs a caption or a box, got neither")
        if max(len(self.captions), len(self.boxes)) > MOST:
            raise DataError(
                f"at most {MOST} captions and boxes of a picture are read, got {len(self.captions)}, {len(self.boxes)}"
            )
        for caption in self.captions:
            if len(caption) > LONGEST:
                raise DataError(f"a caption has {len(caption):,} characters, at most {LONGEST:,} are read")
        for box in self.boxes:
            sides = (box.left, box.top, box.right, box.bottom)
            fine = all(math.isfinite(side) and -SLACK <= side <= 1 + SLACK for side in sides)
            if not box.name.strip() or not fine or box.left > box.right or box.top > box.bottom:
                said = f"{shown(box.name)} {[round(side, 4) for side in sides]}"
                raise DataError(f"a box is a name and left <= right, top <= bottom as shares of the picture (0 to 1), got {said}")

    def text(self, *, boxes: bool) -> str:
        """What the teacher reads: captions one a line, and with `boxes` an empty line and one line per box."""
        lines = [" ".join(caption.split()) for caption in self.captions]
        if boxes and self.boxes:
            lines.append("")
            for box in self.boxes:
                sides = (f"{min(max(side, 0.0), 1.0):.3f}" for side in (box.left, box.top, box.right, box.bottom))
                lines.append(f"{box.name}: [{', '.join(sides)}]")
        return "\n".join(lines).strip()

    @property
    def hash(self) -> str:
        """The name of what is known of this picture, 16 hexadecimal digits."""
        known = [self.id, self.image, self.text(boxes=True), list(self.complete)]
        return hashlib.blake2b(json.dumps(known).encode(), digest_size=8).hexdigest()


def of_scene(scene: picturebook.Scene) -> Context:
    """A picture of the picture book as captions and boxes; the scene goes with it.

    >>> from llava_lab.instructions.context import of_scene
    >>> from llava_lab.worlds import picturebook
    >>> print(of_scene(picturebook.scene("train", 4)).text(boxes=True))
    A small pink star.
    <BLANKLINE>
    star: [...]
    """
    boxes = tuple(Box(thing.kind, *thing.box(1)) for thing in (scene.things[i] for i in scene.left_to_right))
    image = f"images/{scene.name}.png"
    return Context((picturebook.caption(scene),), boxes, scene.name, image, tuple(scene.kinds), scene)


def without_scene(context: Context) -> Context:
    """The same context as a teacher's model may see it: what the world knows beyond captions and boxes is gone."""
    return replace(context, scene=None)

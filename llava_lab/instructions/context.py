"""What a text-only language model is given: a picture in words, and the kind of row it is to write about it.

A `Context` is put in words as LLaVA's authors did: the captions, one a line, an empty line, then one line per box,
``car: [0.120, 0.300, 0.480, 0.710]``, left, top, right, bottom as shares of the picture. The boxes can be left out, since
LLaVA's conversations were made from captions alone.

A context from a world of our own also holds the scene, which no teacher of ours that is a model ever reads; the truth check
(`llava_lab.instructions.claims`) and the rule teacher do.

    context = Context(("A red car in front of a house.",), (Box("car", 0.1, 0.3, 0.5, 0.7),))
    print(context.text(boxes=True))

A `Kind` is files that anybody can edit: system text, hand-written examples, questions to draw from. Three kinds are written by a
teacher, as LLaVA's were: *conversation* (from captions alone), *detail* (captions and boxes, an answer only, its question drawn
from sixteen) and *reasoning* (captions and boxes, one question and answer). A fourth, *brief*, needs no teacher: a caption after
one of eleven requests, which is what LLaVA's first stage reads. Every text in ``kinds/`` is in words of our own. A kind is a
folder:

- ``kind.json``: ``boxes`` (are they shown), ``form`` (``turns``, ``turn``, ``answer`` or ``caption``), ``words`` (fewest and
  most of an answer), ``tokens`` (that an answer may take);
- ``system.txt`` and ``shots.json`` (captions, boxes, answer of each example), unless the form is ``caption``;
- ``questions.txt``, one a line, for the forms ``answer`` and ``caption``.

    kind = read_kinds(["detail"])["detail"]
    kind.messages(Context(("A red car.",)))  # system, three examples, the picture's context

Source: arXiv 2304.08485 section 3, appendix and Table 13; haotian-liu/LLaVA @ c121f04 ``playground/data/prompts``
(``*_caps.txt``).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_lab.checks import known, shown
from llava_lab.errors import DataError, OptionError, one_line
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


# -- kinds of rows --------------------------------------------------------------------------

FOLDER = Path(__file__).resolve().parent / "kinds"
KINDS = ("conversation", "detail", "reasoning", "brief")
TAUGHT = KINDS[:3]  # by a teacher
FORMS = ("turns", "turn", "answer", "caption")

Message = dict[str, str]


@dataclass(frozen=True)
class Kind:
    """One kind of row; `hash` is the name of everything in its files, 16 hexadecimal digits."""

    name: str
    form: str  # turns: several questions and answers; turn: one; answer: the answer alone; caption: no teacher
    boxes: bool
    words: tuple[int, int]  # of an answer, fewest and most
    tokens: int  # an answer of the teacher may take
    system: str
    shots: tuple[tuple[Context, str], ...]
    questions: tuple[str, ...]
    hash: str

    def messages(self, context: Context) -> list[Message]:
        """What a teacher is sent: the system text, each example as asked and answered, and the picture's context."""
        told = [{"role": "system", "content": self.system}] if self.system else []
        for example, answer in self.shots:
            told += [{"role": "user", "content": example.text(boxes=self.boxes)}, {"role": "assistant", "content": answer}]
        return [*told, {"role": "user", "content": context.text(boxes=self.boxes)}]


def read_kinds(names: Sequence[str] = TAUGHT, folder: str | os.PathLike | None = None) -> dict[str, Kind]:
    """The kinds called `names` from `folder`, by default the package's own; a copy of ``kinds/`` with other words will do.

    Raises OptionError for a kind that is not there, DataError naming the file for one that cannot be used.
    """
    root = FOLDER if folder is None else Path(folder)
    there = sorted(path.parent.name for path in root.glob("*/kind.json")) if root.is_dir() else []
    if not there:
        raise DataError(f"no kinds in {root}; expected folders with a kind.json, as in {FOLDER}")
    if not names:
        raise OptionError(f"give at least one kind of {', '.join(there)}")
    return {known("kind", name, there): _read(root / name) for name in names}


def _read(folder: Path) -> Kind:
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")}
    digest = hashlib.blake2b(digest_size=8)
    for name, path in files.items():
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    about = _json(folder / "kind.json", dict)
    form = about.get("form")
    words, tokens, boxes = about.get("words"), about.get("tokens", 0), about.get("boxes")
    if form not in FORMS or not isinstance(boxes, bool) or not isinstance(tokens, int):
        raise DataError(f"{folder / 'kind.json'}: expected form of {', '.join(FORMS)}, boxes true or false and whole tokens")
    if not (isinstance(words, list) and len(words) == 2 and all(isinstance(n, int) for n in words) and 0 < words[0] <= words[1]):
        raise DataError(f"{folder / 'kind.json'}: words must be [fewest, most] of an answer, got {words!r}")
    taught = form != "caption"
    if missing := [
        name for name in ("system.txt",) * taught + ("questions.txt",) * (form in ("answer", "caption")) if name not in files
    ]:
        raise DataError(f"{folder} lacks {missing[0]}, which a kind of form {form!r} needs")
    questions = _text(files["questions.txt"]).splitlines() if "questions.txt" in files else []
    shots = _json(files["shots.json"], list) if taught and "shots.json" in files else []
    return Kind(
        name=folder.name,
        form=form,
        boxes=boxes,
        words=(words[0], words[1]),
        tokens=tokens,
        system=_text(files["system.txt"]) if taught else "",
        shots=tuple(_shot(shot, number, files["shots.json"]) for number, shot in enumerate(shots)),
        questions=tuple(line.strip() for line in questions if line.strip()),
        hash=digest.hexdigest(),
    )


def _shot(shot: Any, number: int, path: Path) -> tuple[Context, str]:
    try:
        boxes = tuple(Box(name, *sides) for name, *sides in shot["boxes"])
        return Context(tuple(shot["captions"]), boxes), str(shot["answer"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} example {number}: expected captions, boxes and answer ({one_line(error)})") from None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({one_line(error)})") from None


def _json(path: Path, kind: type) -> Any:
    try:
        data = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({one_line(error)})") from None
    if not isinstance(data, kind):
        raise DataError(f"{path}: expected a {kind.__name__}, got {type(data).__name__}")
    return data

"""easy-VQA: 5,000 small pictures of one shape each with 48,248 questions, real data no one here made.

An adapter for the package ``easy-vqa`` (MIT, Victor Zhou), which holds the pictures; install it with
``pip install 'llava-lab[easy-vqa]'``. The official split is kept: 4,000 pictures and 38,575 questions to
train on, 1,000 and 9,673 to test on; nothing of ours moves a question from one to the other. A validation
part, for choosing rates and lengths, is cut from the training pictures, every tenth.

    write_dataset("runs/easy", split="train", stage="instruct")

Source: https://github.com/vzhou842/easy-VQA, package version 1.0.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llava_lab.errors import DataError
from llava_lab.results.save import whole_file
from llava_lab.worlds.questions import SHORT

SPLITS = ("train", "validation", "test")
VALIDATION_EVERY = 10  # of the training pictures
PER_ROW = 12  # most questions in one conversation
SIZES = {"train": (4000, 38_575), "test": (1000, 9673)}  # pictures and questions, as published


@dataclass(frozen=True)
class EasyQuestion:
    """One question about one picture, with its one-word answer."""

    picture: Path
    text: str
    answer: str

    @property
    def type(self) -> str:
        """yes/no, color or shape."""
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "shape" if self.answer in ("circle", "rectangle", "triangle") else "color"


def questions(split: str = "test", *, whole_train: bool = False) -> list[EasyQuestion]:
    """Every question of a split in the package's order. `whole_train` leaves the validation pictures in ``train``.

    Raises DataError for an unknown split, a missing package, or files that are not the published ones.
    """
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    part = "test" if split == "test" else "train"
    folder = _folder() / part
    try:
        rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"easy-vqa's questions cannot be read ({error}); install it again") from None
    pictures, count = SIZES[part]
    if len(rows) != count or len({row[2] for row in rows}) > pictures:
        raise DataError(f"easy-vqa's {part} has {len(rows):,} questions, published are {count:,}; install version 1.0")
    asked = []
    for text, answer, number in rows:
        held_out = number % VALIDATION_EVERY == 0
        if split == "test" or whole_train or held_out == (split == "validation"):
            asked.append(EasyQuestion(folder / "images" / f"{number}.png", text, answer))
    return asked


def write_dataset(out: str | os.PathLike, *, split: str = "train", stage: str = "instruct", whole_train: bool = False) -> Path:
    """Write a split in LLaVA's format, ``out/{split}-{stage}.json``; pictures stay where the package has them.

    ``instruct``: conversations of up to `PER_ROW` questions, the response format after the first. ``align``: one
    sentence that says colour and shape, for pictures whose questions tell both. Same arguments, same bytes.
    Raises DataError as `questions` does, for an unknown stage, and when the file is there already.
    """
    if stage not in ("align", "instruct"):
        raise DataError(f"stage must be align or instruct, got {stage!r}")
    target = Path(out) / f"{split}-{stage}.json"
    if target.exists():
        raise DataError(f"{target} exists; give another folder or remove it first")
    asked: dict[Path, list[EasyQuestion]] = {}
    for question in questions(split, whole_train=whole_train):
        asked.setdefault(question.picture, []).append(question)
    rows = []
    for picture, about in sorted(asked.items(), key=lambda item: int(item[0].stem)):
        if stage == "align":
            if caption := _caption(about):
                rows.append(_row(f"{picture.stem}", picture, [("Describe the picture.", caption)]))
            continue
        for start in range(0, len(about), PER_ROW):
            turns = [(question.text, question.answer) for question in about[start : start + PER_ROW]]
            turns[0] = (f"{turns[0][0]}\n{SHORT}", turns[0][1])
            rows.append(_row(f"{picture.stem}-{start}", picture, turns))
    with whole_file(target) as temporary:
        temporary.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return target


def _caption(about: list[EasyQuestion]) -> str | None:
    """Colour and shape where the questions themselves say them; nothing is read from the picture."""
    answers = {question.type: question.answer for question in about}
    return f"A {answers['color']} {answers['shape']}." if {"color", "shape"} <= answers.keys() else None


def _row(name: str, picture: Path, turns: list[tuple[str, str]]) -> dict:
    conversation = []
    for number, (question, answer) in enumerate(turns):
        conversation.append({"from": "human", "value": f"<image>\n{question}" if number == 0 else question})
        conversation.append({"from": "gpt", "value": answer})
    return {"id": name, "image": str(picture), "conversations": conversation}


def _folder() -> Path:
    spec = find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise DataError("the package easy-vqa is not installed; `pip install 'llava-lab[easy-vqa]'` brings it")
    return Path(spec.origin).parent / "data"

"""Yes or no: POPE by F1 on three samplings of absent things, MME by single answers and by both answers about a picture.

POPE as LLaVA's ``eval_pope.py`` reads it: of the first sentence, without commas, any of the words No, not and no makes a no;
everything else is a yes, an empty answer too. The ratio of yes is of the model's answers (lmms-eval prints the truth's).

MME as its authors' ``calculation.py``: yes and no are looked for in the first four characters, in lower case; a subtask is
100 times the share of right answers plus 100 times the share of pictures with both right. Perception adds ten subtasks
(2,000 at most), cognition four (800); the paper prints perception.

Sources: haotian-liu/LLaVA @ c121f04 ``llava/eval/eval_pope.py``; Li et al. 2023 (POPE); Fu et al. 2023 (MME) and its eval tool.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_lab.errors import DataError, WriteError
from llava_lab.evaluation.benchmarks.benchmark import SW, Measure, Question, Tally, added, divide, question
from llava_lab.evaluation.benchmarks.files import Pictures, Row, read_lines
from llava_lab.results import whole_file

SPLITS = ("random", "popular", "adversarial")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_OR_NO = "Please answer yes or no."

# -- POPE -----------------------------------------------------------------------------------


def read_pope(data: Path) -> list[Question]:
    """``coco_pope_random.json``, ``_popular`` and ``_adversarial`` (or one of them), with COCO's ``val2014`` beside."""
    files = sorted(data.glob("*pope_*.json")) if data.is_dir() else [data]
    if not files:
        raise DataError(f"{data} holds no coco_pope_{{{','.join(SPLITS)}}}.json")
    pictures = Pictures(files[0].parent / "val2014", files[0].parent.parent / "val2014", files[0].parent / "images")
    found = []
    for path in files:
        split = path.stem.rpartition("_")[2]
        if split not in SPLITS:
            raise DataError(f"{path}: its name must end in {', '.join(SPLITS)}, as coco_pope_random.json does")
        for row in read_lines(path):
            name, label = row.text("image"), row.one_of("label", ("yes", "no"))
            text = f"{row.text('text')}\n{SW}"
            identity = f"{split}/{row['question_id']}"
            found.append(question(identity, name, pictures.find(row, name), text, (label,), kind=split))
    return sorted(found, key=lambda one: SPLITS.index(one.kind))


def parse_pope(answer: str) -> str:
    """yes or no."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score_pope(questions: Sequence[Question], answers: Sequence[str]) -> list[Measure]:
    """The mean F1 of the splits, then F1, accuracy, precision, recall and the ratio of yes for each."""
    tally = Tally(questions)
    says = np.array([parse_pope(answer) == "yes" for answer in answers])
    truth = np.array([one.accepted[0] == "yes" for one in questions])
    parts = []
    for split in SPLITS:
        inside = np.array([one.kind == split for one in questions])
        if not inside.any():
            continue
        both, count = tally.sums(says & truth & inside), int(inside.sum())
        said, true = tally.sums(says & inside), tally.sums(truth & inside)
        parts.append([
            f1(f"F1 {split}", both, said, true, count),
            tally.share(f"accuracy {split}", says == truth, inside),
            tally.ratio(f"precision {split}", both, said, count=count),
            tally.ratio(f"recall {split}", both, true, count=count),
            tally.share(f"yes ratio {split}", says, inside),
        ])  # fmt: skip
    mean = added("F1", [measures[0] for measures in parts], count=len(questions), mean=True)
    return [mean, *(one for measures in parts for one in measures)]


def f1(name: str, both: np.ndarray, said: np.ndarray, true: np.ndarray, count: int) -> Measure:
    """Twice what is said and true over all said and all true, from sums for each picture."""

    def of(weights: np.ndarray) -> np.ndarray:
        return 200 * divide(weights @ both, weights @ said + weights @ true)

    return Measure(name, of, count, int(((said + true) > 0).sum()))


# -- MME ------------------------------------------------------------------------------------


def read_mme(data: Path) -> list[Question]:
    """The folder ``MME_Benchmark_release_version``: subtasks with pictures and texts of two lines, question, tab, answer."""
    if not data.is_dir():
        raise DataError(f"{data} is no folder; MME is a folder with one for each subtask, such as existence")
    nested = data / "MME_Benchmark_release_version"
    root, found = nested if nested.is_dir() else data, []
    for subtask in (*PERCEPTION, *COGNITION):
        folder = root / subtask
        texts, pictures = folder / "questions_answers_YN", Pictures(folder / "images", folder)
        for path in sorted((texts if texts.is_dir() else folder).glob("*.txt")) if folder.is_dir() else ():
            found += _mme_pair(subtask, path, pictures)
    if not found:
        raise DataError(f"{root} holds no subtask of MME; expected folders named {', '.join((*PERCEPTION, *COGNITION))}")
    return found


def _mme_pair(subtask: str, path: Path, pictures: Pictures) -> list[Question]:
    lines = [line for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    if len(lines) != 2:
        raise DataError(f"{path} holds {len(lines)} questions, expected 2, one that is answered yes and one no")
    pair = []
    for number, line in enumerate(lines, 1):
        asked, tab, answer = line.strip().rpartition("\t")
        row = Row({"answer": answer.strip().lower()}, f"{path} row {number}")
        if not tab or not asked.strip():
            raise row.refuse("expected a question, a tab and yes or no")
        label = row.one_of("answer", ("yes", "no"))
        draw, name = pictures.find(row, path.stem), f"{subtask}/{path.stem}"
        text = f"{asked.replace(YES_OR_NO, '').strip()}\n{SW}"
        extra = {"asked": asked, "file": path.name}
        pair.append(question(f"{name}#{number}", name, draw, text, (label,), kind=subtask, group=name, extra=extra))
    return pair


def parse_mme(answer: str) -> str:
    """yes, no or other."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score_mme(questions: Sequence[Question], answers: Sequence[str]) -> list[Measure]:
    """Perception and cognition as sums, then each subtask."""
    tally = Tally(questions)
    right = np.array([parse_mme(answer) == one.accepted[0] for one, answer in zip(questions, answers, strict=True)])
    groups: dict[str, list[int]] = defaultdict(list)
    for place, one in enumerate(questions):
        groups[one.group].append(place)
    both, first = np.zeros(len(right), bool), np.zeros(len(right), bool)
    for places in groups.values():
        first[places[0]], both[places[0]] = True, right[places].all()
    subtasks: dict[str, Measure] = {}
    for subtask in (*PERCEPTION, *COGNITION):
        inside = np.array([one.kind == subtask for one in questions])
        if inside.any():
            acc = tally.share("acc", right, inside)
            subtasks[subtask] = added(subtask, [acc, tally.share("acc+", both, inside & first)], count=acc.count)
    sums = []
    for name, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if parts := [subtasks[subtask] for subtask in names if subtask in subtasks]:
            sums.append(added(name, parts, count=sum(part.count for part in parts)))
    return [*sums, *subtasks.values()]


def submit_mme(questions: Sequence[Question], answers: Sequence[str], path: Path) -> None:
    """What MME's eval tool reads: a folder `path` with ``existence.txt`` and so on, picture, question, truth, answer by tabs."""
    lines: dict[str, list[str]] = defaultdict(list)
    for one, answer in zip(questions, answers, strict=True):
        row = (one.extra["file"], one.extra["asked"], one.accepted[0].capitalize(), re.sub(r"\s+", " ", answer))
        lines[one.kind].append("\t".join(row) + "\n")
    if path.is_file():
        raise WriteError(f"{path} is a file; MME's results are a folder with a file for each subtask")
    for subtask, rows in lines.items():
        with whole_file(path / f"{subtask}.txt") as temporary:
            temporary.write_text("".join(rows), "utf-8")

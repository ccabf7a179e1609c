"""An answer out of a few: a letter (ScienceQA, MMBench, MMBench-CN, SEED), or yes or no (POPE, MME).

Three readings of a letter, because there were three. ScienceQA: a letter alone, one with ``. `` behind it at the start, or
exactly one "The answer is X." (any sign may stand for the full stop, as in LLaVA's expression); else it failed, which counts
as wrong. SEED: the whole answer is the letter. MMBench's server first looks for one letter or one option's text and asks
ChatGPT where it finds none; here such an answer is wrong and counted.

MMBench counts a question only when it is right in every rotation of its options. Its table holds the rotations as rows whose
``index`` differ by millions.

POPE is F1 on three samplings of absent things, as LLaVA's ``eval_pope.py`` reads it: of the first sentence, without commas, any
of the words No, not and no makes a no; everything else is a yes, an empty answer too. The ratio of yes is of the model's answers
(lmms-eval prints the truth's).

MME is single answers and both answers about a picture, as its authors' ``calculation.py``: yes and no are looked for in the first
four characters, in lower case; a subtask is 100 times the share of right answers plus 100 times the share of pictures with both
right. Perception adds ten subtasks (2,000 at most), cognition four (800); the paper prints perception.

Sources: haotian-liu/LLaVA @ c121f04 ``llava/eval/eval_science_qa.py``, ``model_vqa_mmbench.py``, ``eval_pope.py``,
``scripts/convert_mmbench_for_submission.py``, ``convert_seed_for_submission.py``; Liu et al. 2023 (MMBench, circular); Li et al.
2023 (POPE); Fu et al. 2023 (MME) and its eval tool.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from llava_lab.errors import DataError, WriteError
from llava_lab.evaluation.benchmarks import files
from llava_lab.evaluation.benchmarks.benchmark import MC, SW, Measure, Question, Tally, added, divide, in_groups, question
from llava_lab.models.pictures import read_picture
from llava_lab.results import whole_file

MC_CN = "请直接回答选项字母。"
LETTERS = "ABCDE"

# -- ScienceQA ------------------------------------------------------------------------------

SAID = re.compile(r"The answer is ([A-Z]).")


def read_scienceqa(data: Path) -> list[Question]:
    """``problems.json`` and ``pid_splits.json`` with ``images/test``: the problems of the test split that have a picture."""
    path = files.only(data, "problems.json")
    problems, folder, found = files.read_object(path), path.parent, []
    for key in files.read_object(folder / "pid_splits.json").texts("test"):
        row = files.Row(problems[key], f"{path} problem {key}")
        if not row.get("image"):
            continue
        name, choices = row.text("image"), row.texts("choices")
        if len(choices) > len(LETTERS) or row["answer"] not in range(len(choices)):
            raise row.refuse(f"expected up to {len(LETTERS)} choices and the place of the right one, got {row['answer']!r}")
        places = (folder / "images" / "test" / key, folder / "test" / key, folder / key)
        draw = files.Pictures(*places).find(row, name)
        text = scienceqa_prompt(row.text("question"), choices, row.get("hint") or "")
        found.append(question(key, f"{key}/{name}", draw, text, (LETTERS[row["answer"]],), options=tuple(choices)))
    return found


def scienceqa_prompt(asked: str, choices: Sequence[str], hint: str = "") -> str:
    """Context, question and options in lines, single spaces, then the request for a letter."""
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    text = f"Context: {hint.strip() or 'N/A'}\nQuestion: {asked}\nOptions: {options}\n"
    return f"{text.replace('  ', ' ').strip()}\n{MC}"


def parse_scienceqa(answer: str, choices: int) -> str:
    """A letter of the choices, or FAILED."""
    if answer in tuple(LETTERS):
        letter = answer
    elif len(answer) >= 3 and answer[0] in LETTERS and answer[1:3] == ". ":
        letter = answer[0]
    else:
        said = SAID.findall(answer)
        letter = said[0] if len(said) == 1 else "FAILED"
    return letter if letter in tuple(LETTERS[:choices]) else "FAILED"


def score_scienceqa(questions: Sequence[Question], answers: Sequence[str]) -> list[Measure]:
    """Accuracy on questions with a picture, and the share of answers that no letter could be read from."""
    tally = Tally(questions)
    letters = [parse_scienceqa(answer, len(one.options)) for one, answer in zip(questions, answers, strict=True)]
    right = [letter in one.accepted for one, letter in zip(questions, letters, strict=True)]
    return [tally.share("accuracy", right), tally.share("no letter", [letter == "FAILED" for letter in letters])]


# -- MMBench --------------------------------------------------------------------------------

APART = 1_000_000  # between the indices of a question's rotations
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")  # from what is sent
PLACE = 6  # of the column that is put in


def read_mmbench(data: Path, *, chinese: bool = False) -> list[Question]:
    """``mmbench_dev_20230712.tsv``, or ``mmbench_dev_cn_20231003.tsv``; its pictures stand in the table."""
    path = files.only(data, *(["mmbench*cn*.tsv"] if chinese else ["mmbench_dev_2*.tsv", "mmbench*.tsv"]))
    found: list[Question] = []
    inside: dict[str, Callable[[], np.ndarray]] = {}
    for row in files.read_table(path):
        index = row.text("index")
        if not index.isdecimal():
            raise row.refuse(f"'index' must be a whole number, got {index!r}")
        packed = row.text("image")
        if packed.isdecimal():  # a rotation may name the row that holds its picture
            if packed not in inside:
                raise row.refuse(f"its picture is that of row {packed}, which does not stand before it")
            draw = inside[packed]
        else:
            draw = partial(_unpacked, packed, row.where)
        inside[index] = draw
        number = int(index) % APART
        options = []
        for letter in "ABCD":
            if row[letter] is None:
                break
            options.append(row[letter])
        hint = f"{row['hint']}\n" if row.get("hint") is not None else ""
        text = mmbench_prompt(f"{hint}{row.text('question')}", options, chinese=chinese)
        accepted = [row.one_of("answer", "ABCD")] if row.get("answer") is not None else []
        extra = {"row": dict(row.values_)}
        more = {"kind": row.get("category") or "", "group": str(number), "options": tuple(options), "extra": extra}
        found.append(question(index, str(number), draw, text, accepted, **more))
    return found


def _unpacked(packed: str, where: str) -> np.ndarray:
    try:
        return read_picture(base64.b64decode(packed, validate=True))
    except binascii.Error:
        raise files.Row({}, where).refuse("'image' is not a picture in base64") from None


def mmbench_prompt(asked: str, options: Sequence[str], *, chinese: bool = False) -> str:
    """The question with its hint, a line for each option, then the request for a letter."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([asked, *lines, MC_CN if chinese else MC])


def parse_mmbench(answer: str, options: Sequence[str]) -> str:
    """The one letter among the words of an answer, else the one option whose text stands in it, else nothing.

    An A in more than three words may be an article and says nothing.
    """
    letters = LETTERS[: len(options)]
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = {word for word in words if word in tuple(letters)}
    if len(named) == 1 and not (named == {"A"} and len(words) > 3):
        return named.pop()
    inside = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in answer.lower()]
    return inside[0] if len(inside) == 1 and len(named) <= 1 else ""


def score_mmbench(questions: Sequence[Question], answers: Sequence[str]) -> list[Measure]:
    """Questions right in every rotation, rows right on their own, and answers no letter could be read from."""
    tally = Tally(questions)
    letters = [parse_mmbench(answer, one.options) for one, answer in zip(questions, answers, strict=True)]
    right = np.array([letter in one.accepted for one, letter in zip(questions, letters, strict=True)])
    first, every = in_groups(questions, right)
    by_row, unread = tally.share("rows alone", right), tally.share("no letter", [not letter for letter in letters])
    return [tally.share("accuracy", every, first), by_row, unread]


def submit_mmbench(questions: Sequence[Question], answers: Sequence[str], path: Path) -> None:
    """What MMBench's server takes: the table without pictures as .xlsx, with a column ``prediction``."""
    columns = [name for name in questions[0].extra["row"] if name not in DROPPED]
    columns.insert(PLACE, "prediction")
    rows = []
    for one, answer in zip(questions, answers, strict=True):
        cells = {**one.extra["row"], "prediction": answer, "index": int(one.id)}
        rows.append([cells[name] for name in columns])
    files.write_workbook(path, columns, rows)


# -- SEED -----------------------------------------------------------------------------------


def read_seed(data: Path) -> list[Question]:
    """``SEED-Bench.json`` with ``SEED-Bench-image`` and, one frame from the middle each, ``SEED-Bench-video-image``."""
    path = files.only(data, "SEED-Bench.json")
    whole, folder = files.read_object(path), path.parent
    kinds = {number: name for name, number in files.Row(whole["question_type"], str(path)).items()}
    shelves = {"image": files.Pictures(folder / "SEED-Bench-image"), "video": files.Pictures(folder / "SEED-Bench-video-image")}
    found = []
    for row in files.rows_of(path, whole["questions"]):
        medium, key, name = row.one_of("data_type", ("image", "video")), str(row["question_id"]), str(row["data_id"])
        choices = [row.text(f"choice_{letter}") if isinstance(row[f"choice_{letter}"], str) else str(row[f"choice_{letter}"])
                   for letter in "abcd"]  # fmt: skip
        names = (name,) if medium == "image" else (key, Path(name).stem, name)
        draw = shelves[medium].find(row, *names)
        text = mmbench_prompt(row.text("question"), choices)
        more = {"kind": medium, "group": kinds.get(row["question_type_id"], str(row["question_type_id"]))}
        more["options"] = tuple(choices)
        found.append(question(key, f"{medium}/{name}", draw, text, (row.one_of("answer", "ABCD"),), **more))
    return found


def score_seed(questions: Sequence[Question], answers: Sequence[str]) -> list[Measure]:
    """Answers that are the letter and nothing else: all, about pictures, about videos, then by type."""
    tally = Tally(questions)
    right = [answer in one.accepted for one, answer in zip(questions, answers, strict=True)]
    media = [tally.share(name, right, [one.kind == name for one in questions]) for name in ("image", "video")]
    names = dict.fromkeys(one.group for one in questions)
    types = [tally.share(name, right, [one.group == name for one in questions]) for name in names]
    return [tally.share("all", right), *(part for part in media if part.count), *types]


def submit_seed(questions: Sequence[Question], answers: Sequence[str], path: Path) -> None:
    """What SEED's leaderboard takes: a line each of ``{"question_id": "1", "prediction": "A"}``."""
    rows = [{"question_id": one.id, "prediction": answer} for one, answer in zip(questions, answers, strict=True)]
    files.write_json(path, rows, lines=True)


# -- yes or no ------------------------------------------------------------------------------

SPLITS = ("random", "popular", "adversarial")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_OR_NO = "Please answer yes or no."

# -- POPE -----------------------------------------------------------------------------------


def read_pope(data: Path) -> list[Question]:
    """``coco_pope_random.json``, ``_popular`` and ``_adversarial`` (or one of them), with COCO's ``val2014`` beside."""
    paths = sorted(data.glob("*pope_*.json")) if data.is_dir() else [data]
    if not paths:
        raise DataError(f"{data} holds no coco_pope_{{{','.join(SPLITS)}}}.json")
    folder, found = paths[0].parent, []
    pictures = files.Pictures(folder / "val2014", folder.parent / "val2014", folder / "images")
    for path in paths:
        split = path.stem.rpartition("_")[2]
        if split not in SPLITS:
            raise DataError(f"{path}: its name must end in {', '.join(SPLITS)}, as coco_pope_random.json does")
        for row in files.read_lines(path):
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
        texts, pictures = folder / "questions_answers_YN", files.Pictures(folder / "images", folder)
        for path in sorted((texts if texts.is_dir() else folder).glob("*.txt")) if folder.is_dir() else ():
            found += _mme_pair(subtask, path, pictures)
    if not found:
        raise DataError(f"{root} holds no subtask of MME; expected folders named {', '.join((*PERCEPTION, *COGNITION))}")
    return found


def _mme_pair(subtask: str, path: Path, pictures: files.Pictures) -> list[Question]:
    lines = [line for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    if len(lines) != 2:
        raise DataError(f"{path} holds {len(lines)} questions, expected 2, one that is answered yes and one no")
    pair = []
    for number, line in enumerate(lines, 1):
        asked, tab, answer = line.strip().rpartition("\t")
        row = files.Row({"answer": answer.strip().lower()}, f"{path} row {number}")
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
    first, both = in_groups(questions, right)
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

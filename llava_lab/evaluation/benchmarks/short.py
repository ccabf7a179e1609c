"""Short answers: VQAv2, VizWiz and TextVQA by soft accuracy over ten people, GQA by exact match.

The soft accuracy of an answer is the mean, over leaving out each person in turn, of min(1, n / 3), n being how many of the
others said the same. With ten people, one who agrees makes 0.3, two 0.6, three 0.9, four or more 1.

`normalise` is the processor of EvalAI's VQA challenge, which LLaVA runs on VQAv2's and VizWiz's answers before they are sent
and on both sides for TextVQA. It is copied with its slips: the look-behind of the rule for full stops is misspelt and never
holds, so that only a digit *after* a stop saves it; at most 32 stops go, for a flag stands where the count belongs; the word
"none" is 0. VQAv2's and VizWiz's own scorer normalises people's answers only where they differ.

Sources: haotian-liu/LLaVA @ c121f04 ``llava/eval/m4c_evaluator.py``, ``eval_textvqa.py``, ``scripts/convert_*``; Antol et al.
2015 (the metric); GT-Vision-Lab/VQA ``vqaEval.py`` (when people's answers are normalised); GQA's ``eval.py`` (exact match).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_lab.evaluation.benchmarks import files
from llava_lab.evaluation.benchmarks.benchmark import SW, Measure, Question, Tally, question
from llava_lab.stats import NUMBER_WORDS

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
OCR = "Reference OCR token: "
NO_OCR = "No file with OCR tokens was found, so the prompt has none. LLaVA-1.5's has: 58.2 for the 7B, 46.1 without."

# -- the processor --------------------------------------------------------------------------

MARKS = ';/[]"{}()=+\\_-><@`,?!'
STOP = re.compile(r"\.(?!\d)")
MOST_STOPS = 32
COMMA = re.compile(r"(?<=\d),+(?=\d)")
ARTICLES = ("a", "an", "the")
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
SPELT = re.findall(
    r"\S+",
    """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've""",
)


def _with_one_left_out(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, sign in enumerate(word) if sign == "'"]


# each form with one apostrophe left out; the table's one slip turns a right form into a wrong one
CONTRACTIONS = {wrong: word for word in SPELT for wrong in _with_one_left_out(word)} | {"somebody'd": "somebodyd"}


def normalise(answer: str) -> str:
    """An answer as EvalAI's processor leaves it: lower case, no marks, numbers as digits, no articles, apostrophes put in."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return without_articles(without_marks(text.replace("\n", " ").replace("\t", " ").strip()))


def without_marks(text: str) -> str:
    """Punctuation taken out: a mark with a space beside it somewhere vanishes, else it becomes a space."""
    bare, thousands = text, COMMA.search(text) is not None
    for mark in MARKS:
        bare = bare.replace(mark, "" if thousands or f"{mark} " in text or f" {mark}" in text else " ")
    return STOP.sub("", bare, count=MOST_STOPS)


def without_articles(text: str) -> str:
    """Numbers up to ten as digits, articles left out, apostrophes put in."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft(answer: str, people: Sequence[str]) -> float:
    """Mean over leaving out each of `people` of min(1, agreeing others / 3)."""
    agree = sum(said == answer for said in people)
    total = len(people)
    return (agree * min(1, (agree - 1) / 3) + (total - agree) * min(1, agree / 3)) / total if agree else 0.0


def soft_challenge(answer: str, people: Sequence[str]) -> float:
    """As VQAv2's and VizWiz's server scores an answer that LLaVA sent: people's answers are normalised where they differ."""
    sent = normalise(answer)
    said = [person.replace("\n", " ").replace("\t", " ").strip() for person in people]
    if len(set(said)) > 1:
        said = [without_articles(without_marks(person)) for person in said]
        sent = without_articles(without_marks(sent))
    return soft(sent, said)


def soft_textvqa(answer: str, people: Sequence[str]) -> float:
    """As LLaVA's own evaluator of TextVQA: both sides through the processor."""
    return soft(normalise(answer), [normalise(person) for person in people])


# -- VQAv2 ----------------------------------------------------------------------------------

KINDS = ("yes/no", "number", "other")  # of answers


def read_vqav2(data: Path) -> list[Question]:
    """``v2_OpenEnded_mscoco_*_questions.json``, its annotations where they are public, and the folder of COCO pictures."""
    path = files.only(data, "*OpenEnded*questions.json")
    whole = files.read_object(path)
    annotations = path.with_name(path.name.replace("OpenEnded_", "").replace("questions.json", "annotations.json"))
    people: dict[Any, tuple[str, list[str]]] = {}
    if annotations != path and annotations.is_file():
        for row in files.rows_of(annotations, files.read_object(annotations)["annotations"]):
            said = [files.Row(answer, row.where).text("answer") for answer in row["answers"]]
            people[row["question_id"]] = row.one_of("answer_type", KINDS), said
    split = "test2015" if "test" in whole.get("data_subtype", path.name) else whole.get("data_subtype", "val2014")
    pictures = files.Pictures(path.parent / split, path.parent / "images", path.parent)
    found = []
    for row in files.rows_of(path, whole["questions"]):
        name = f"COCO_{split}_{int(row['image_id']):012d}.jpg"
        kind, said = people.get(row["question_id"], ("", []))
        text, draw = f"{row.text('question')}\n{SW}", pictures.find(row, name)
        found.append(question(str(row["question_id"]), name, draw, text, said, kind=kind))
    return found


def score_vqav2(questions: Sequence[Question], answers: Sequence[str]) -> list[Measure]:
    """Accuracy overall, and by the type that the annotations give."""
    tally, right = Tally(questions), _softly(questions, answers)
    parts = [tally.share(kind, right, [one.kind == kind for one in questions]) for kind in KINDS]
    return [tally.share("accuracy", right), *(part for part in parts if part.count)]


def submit_vqav2(questions: Sequence[Question], answers: Sequence[str], path: Path) -> None:
    """What EvalAI takes: ``[{"question_id": 1, "answer": "red"}]``, every answer through the processor."""
    pairs = zip(questions, answers, strict=True)
    files.write_json(path, [{"question_id": _number(one.id), "answer": normalise(answer)} for one, answer in pairs])


def _softly(questions: Sequence[Question], answers: Sequence[str]) -> np.ndarray:
    return np.array([soft_challenge(answer, one.accepted) for one, answer in zip(questions, answers, strict=True)])


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


# -- VizWiz ---------------------------------------------------------------------------------


def read_vizwiz(data: Path) -> list[Question]:
    """``val.json`` or ``test.json`` with the folder of pictures of that name beside it."""
    path = files.only(data, "val.json", "test.json")
    pictures = files.Pictures(path.parent / path.stem, path.parent / "images", path.parent)
    found = []
    for row in files.rows_of(path, files.read_json(path)):
        name = row.text("image")
        people = [files.Row(said, row.where).text("answer") for said in row["answers"]] if "answers" in row else []
        text = f"{row.text('question')}\n{UNANSWERABLE}\n{SW}"
        kind = "answerable" if row.get("answerable", 1) else "unanswerable"
        found.append(question(name, name, pictures.find(row, name), text, people, kind=kind))
    return found


def score_vizwiz(questions: Sequence[Question], answers: Sequence[str]) -> list[Measure]:
    """Accuracy overall, of questions that can be answered and of those that cannot."""
    tally, right = Tally(questions), _softly(questions, answers)
    parts = [tally.share(kind, right, [one.kind == kind for one in questions]) for kind in ("answerable", "unanswerable")]
    return [tally.share("accuracy", right), *(part for part in parts if part.count)]


def submit_vizwiz(questions: Sequence[Question], answers: Sequence[str], path: Path) -> None:
    """What EvalAI takes: ``[{"image": "VizWiz_test_1.jpg", "answer": "red"}]``, every answer through the processor."""
    pairs = zip(questions, answers, strict=True)
    files.write_json(path, [{"image": one.id, "answer": normalise(answer)} for one, answer in pairs])


# -- TextVQA --------------------------------------------------------------------------------


def read_textvqa(data: Path) -> list[Question]:
    """``TextVQA_0.5.1_val.json`` and ``train_images``; OCR tokens from LLaVA's question file or from TextVQA's Rosetta file."""
    path = files.only(data, "TextVQA_[0-9]*_val.json")
    folder, rows = path.parent, files.rows_of(path, files.read_object(path)["data"])
    prompts, tokens = _llava_prompts(folder), _rosetta(folder)
    pictures = files.Pictures(folder / "train_images", folder / "images", folder)
    found = []
    for row in rows:
        name, asked = row.text("image_id"), row.text("question")
        text, note = prompts.get((name, asked.lower())), {}
        if text is None and tokens is not None:
            text = f"{asked}\n{OCR}{', '.join(tokens.get(name, []))}\n{SW}"
        elif text is None:
            text, note = f"{asked}\n{SW}", {"note": NO_OCR}
        people = row.texts("answers") if "answers" in row else []
        found.append(question(name, name, pictures.find(row, name), text, people, extra=note))
    return found


def _llava_prompts(folder: Path) -> dict[tuple[str, str], str]:
    """LLaVA's own file, ``llava_textvqa_val_v051_ocr.jsonl``: whole prompts by picture and question."""
    path = files.maybe(folder, "llava_textvqa*ocr.jsonl")
    rows = files.read_lines(path) if path else []
    return {(str(row["question_id"]), row.text("text").split("\n")[0].lower()): row.text("text") for row in rows}


def _rosetta(folder: Path) -> dict[str, list[str]] | None:
    path = files.maybe(folder, "TextVQA_Rosetta_OCR*val.json")
    if path is None:
        return None
    return {row.text("image_id"): list(row["ocr_tokens"]) for row in files.rows_of(path, files.read_object(path)["data"])}


def score_textvqa(questions: Sequence[Question], answers: Sequence[str]) -> list[Measure]:
    """Mean soft accuracy."""
    right = [soft_textvqa(answer, one.accepted) for one, answer in zip(questions, answers, strict=True)]
    return [Tally(questions).share("accuracy", right)]


# -- GQA ------------------------------------------------------------------------------------


def read_gqa(data: Path) -> list[Question]:
    """``testdev_balanced_questions.json`` (or another split's) and the folder ``images``."""
    path = files.only(data, "testdev_balanced_questions.json", "*_balanced_questions.json")
    whole = files.read_object(path)
    if not whole:
        raise whole.refuse("expected questions by their id")
    pictures = files.Pictures(path.parent / "images", path.parent.parent / "images", path.parent)
    found = []
    for number, (key, value) in enumerate(whole.items(), 1):
        row = files.Row(value, f"{path} row {number} ({key})")
        name, text = str(row["imageId"]), f"{row.text('question')}\n{SW}"
        kind = "open" if files.Row(row.get("types", {}), row.where).get("structural") == "query" else "binary"
        accepted = [row.text("answer")] if "answer" in row else []
        found.append(question(key, name, pictures.find(row, name), text, accepted, kind=kind))
    return found


def parse_gqa(answer: str) -> str:
    """Lower case, without the full stops at the end."""
    return answer.rstrip(".").lower()


def score_gqa(questions: Sequence[Question], answers: Sequence[str]) -> list[Measure]:
    """Exact match overall, of open questions and of those with two possible answers."""
    tally = Tally(questions)
    right = [parse_gqa(answer) in one.accepted for one, answer in zip(questions, answers, strict=True)]
    parts = [tally.share(kind, right, [one.kind == kind for one in questions]) for kind in ("binary", "open")]
    return [tally.share("accuracy", right), *(part for part in parts if part.count)]


def submit_gqa(questions: Sequence[Question], answers: Sequence[str], path: Path) -> None:
    """What GQA's ``eval.py`` reads: ``[{"questionId": "1", "prediction": "red"}]``."""
    pairs = zip(questions, answers, strict=True)
    files.write_json(path, [{"questionId": one.id, "prediction": parse_gqa(answer)} for one, answer in pairs])

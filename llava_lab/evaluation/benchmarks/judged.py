"""Free answers that a judge grades: LLaVA-Bench in the Wild against a reference answer, MM-Vet from 0 to 1.

A judge is any model that reads text (`Judge`); who it was is kept with the scores, for scores by different judges do not
compare: LLaVA's released MM-Vet answers, graded again, gave 27.9 instead of 31.1 (LLaVA issue #1905).

What the judge is told is read from the authors' own files where they lie beside the data, LLaVA's ``rule.json`` and the text
of MM-Vet's notebook as ``prompt.txt``; without them it is told the same task in our words, and the result says so.

`by_rule` judges without a model, by words in common: for trying the path, and for drawn worlds, whose reference answers are
exact. It is no measure of style or sense.

Sources: haotian-liu/LLaVA @ c121f04 ``llava/eval/eval_gpt_review_bench.py``, ``summarize_gpt_review.py``,
``scripts/convert_mmvet_for_eval.py``; Yu et al. 2023 (MM-Vet) and its notebook.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_lab.errors import DataError
from llava_lab.evaluation.benchmarks.benchmark import Judge, Measure, Question, Tally, question
from llava_lab.evaluation.benchmarks.files import Pictures, Row, maybe, only, read_json, read_lines, read_object, write_json

OWN_WORDS = "The judge was told its task in our words. Put {} into the folder of the data to tell it in the authors'."
UNREAD = -1.0  # LLaVA's mark for a review without two numbers; it goes into the means as it is

# -- LLaVA-Bench in the Wild ----------------------------------------------------------------

WILD_KINDS = ("conv", "detail", "complex")
WILD_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
WILD_TEMPERATURE, WILD_TOKENS = 0.2, 1024
WILD_TASK = (
    "Two assistants answered the question above, which a user asked about a picture. The sentences under Context say what the "
    "picture shows. Judge how helpful, relevant, accurate and detailed each answer is, and give each assistant a score from 1 to "
    "10; higher is better. Write a first line that holds the score of Assistant 1, a space, and the score of Assistant 2, and "
    "nothing else. From the next line on, explain your scores. Do not let the order of the answers count."
)


def read_wild(data: Path) -> list[Question]:
    """``questions.jsonl``, ``context.jsonl``, ``answers_gpt4.jsonl`` and ``images``, as the data set is published."""
    path = only(data, "questions.jsonl")
    folder = path.parent
    contexts = {row.text("image"): row for row in read_lines(only(folder, "context.jsonl"))}
    references = {str(row["question_id"]): row.text("text") for row in read_lines(only(folder, "answers_gpt4.jsonl"))}
    rules = maybe(folder, "rule.json")
    told = read_object(rules) if rules else None
    pictures, found = Pictures(folder / "images", folder), []
    for row in read_lines(path):
        key, name, kind = str(row["question_id"]), row.text("image"), row.one_of("category", WILD_KINDS)
        if name not in contexts or key not in references:
            raise row.refuse("context.jsonl has no row for its image, or answers_gpt4.jsonl none for its question_id")
        shown = contexts[name]["caption"]
        task = Row(told[f"llava_bench_{kind}"], str(rules)).text("prompt") if told else WILD_TASK
        extra = {"context": "\n".join(shown) if isinstance(shown, list) else str(shown), "task": task}
        extra |= {} if told else {"note": OWN_WORDS.format("LLaVA's llava/eval/table/rule.json")}
        draw = pictures.find(row, name)
        found.append(question(key, name, draw, row.text("text"), (references[key],), kind=kind, extra=extra))
    return found


def grade_wild(judge: Judge, one: Question, answer: str) -> tuple[float, ...]:
    """Scores of the reference and of the answer, 1 to 10; both `UNREAD` where the first line is not two numbers."""
    parts = [f"[Context]\n{one.extra['context']}", f"[Question]\n{one.item.question}"]
    for number, text in enumerate((one.accepted[0], answer), 1):
        parts += [f"[Assistant {number}]\n{text}", f"[End of Assistant {number}]"]
    asked = "\n\n".join([*parts, f"[System]\n{one.extra['task']}", ""])
    return parse_review(judge.ask(WILD_SYSTEM, asked, WILD_TEMPERATURE, WILD_TOKENS))


def parse_review(review: str) -> tuple[float, float]:
    """The two numbers of a review's first line, a comma between them or a single space."""
    numbers = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, numbers)
    except ValueError:
        return UNREAD, UNREAD
    return first, second


def score_wild(questions: Sequence[Question], grades: Sequence[tuple[float, ...]]) -> list[Measure]:
    """100 times the mean score of the model over the mean score of the reference: all, and by category."""
    tally, scores = Tally(questions), np.array(grades, float).reshape(-1, 2)
    measures = []
    for name in ("all", *WILD_KINDS):
        inside = np.array([name in ("all", one.kind) for one in questions])
        if inside.any():
            ours, reference = tally.sums(scores[:, 1] * inside), tally.sums(scores[:, 0] * inside)
            measures.append(tally.ratio(name, ours, reference, count=int(inside.sum()), whole=np.nan))
    return measures


# -- MM-Vet ---------------------------------------------------------------------------------

VET_SYSTEM, VET_TOKENS = "", 8
VET_TRIES = 3
VET_TASK = """Grade how right a prediction is, given the ground truth.
Where the ground truth holds <AND>, the prediction is wholly right only with every part; where it holds <OR>, one part is enough.
The grade is 0.0 (all wrong), 0.1, 0.2, and so on up to 1.0 (all right).
Write only the grade that belongs into the last column of the last row.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which fruits lie on the table? | an apple <AND> a pear | There is a plum. | 0.0
Which fruits lie on the table? | an apple <AND> a pear | I see a pear. | 0.5
Which fruits lie on the table? | an apple <AND> a pear | A pear lies beside an apple. | 1.0
What does the sign say? | stop <OR> halt | It says halt. | 1.0
"""


def read_vet(data: Path) -> list[Question]:
    """``mm-vet.json`` and ``images``."""
    path = only(data, "mm-vet.json")
    whole, folder = read_json(path), path.parent
    told = maybe(folder, "prompt.txt")
    task = told.read_text("utf-8-sig") if told else VET_TASK
    pictures, found = Pictures(folder / "images", folder), []
    if not isinstance(whole, dict) or not whole:
        raise DataError(f"{path}: expected questions by their name, such as v1_0")
    for number, (key, value) in enumerate(whole.items(), 1):
        row = Row(value, f"{path} row {number} ({key})")
        name, skills = row.text("imagename"), row.texts("capability")
        extra = {"task": task, "skills": skills}
        extra |= {} if told else {"note": OWN_WORDS.format("the text of MM-Vet's notebook, as prompt.txt,")}
        draw, kind = pictures.find(row, name), ",".join(skills)
        found.append(question(key, name, draw, row.text("question"), (row.text("answer"),), kind=kind, extra=extra))
    return found


def grade_vet(judge: Judge, one: Question, answer: str) -> tuple[float, ...]:
    """A grade from 0 to 1, and whether it could be read; asked again, warmer each time, where the reply is no such number."""
    cells = [one.item.question, one.accepted[0].replace("<AND>", " <AND> ").replace("<OR>", " <OR> "), answer, ""]
    asked = one.extra["task"] + "\n" + " | ".join(cells)
    for attempt in range(VET_TRIES):
        if (grade := parse_grade(judge.ask(VET_SYSTEM, asked, 0.5 * attempt, VET_TOKENS))) is not None:
            return grade, 1.0
    return 0.0, 0.0


def parse_grade(reply: str) -> float | None:
    """The first word as a number from 0 to 1."""
    try:
        grade = float(reply.strip().split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def score_vet(questions: Sequence[Question], grades: Sequence[tuple[float, ...]]) -> list[Measure]:
    """100 times the mean grade: total, and of the questions that ask for each skill."""
    tally, values = Tally(questions), [grade[0] for grade in grades]
    skills = dict.fromkeys(skill for one in questions for skill in one.extra["skills"])
    parts = [tally.share(skill, values, [skill in one.extra["skills"] for one in questions]) for skill in skills]
    return [tally.share("total", values), *parts]


def submit_vet(questions: Sequence[Question], answers: Sequence[str], path: Path) -> None:
    """What MM-Vet's notebook reads: ``{"v1_0": "answer"}``."""
    write_json(path, dict(zip((one.id for one in questions), answers, strict=True)), indent=2)


# -- a judge without a model ----------------------------------------------------------------

STOPWORDS = frozenset(
    ("a", "an", "and", "are", "at", "i", "in", "is", "it", "of", "on", "or", "see", "shows", "the", "there", "this", "to", "with")
)
_BLOCK = re.compile(r"\[(Context|Assistant 1|Assistant 2)\]\n(.*?)\n\n\[", re.DOTALL)


def by_rule() -> Judge:
    """A judge that reads the very prompts a model would, and compares words.

    LLaVA-Bench: 1 to 10 by the harmonic mean of how much of the answer the context says and how much of the context the answer
    says. MM-Vet: the share of the parts around <AND> whose words all stand in the prediction, 1 for any part around <OR>.
    """
    return Judge("words in common, no model", _by_words, {"kind": "rule"})


def _by_words(system: str, asked: str, temperature: float, tokens: int) -> str:
    if blocks := dict(_BLOCK.findall(asked)):
        context = _words(blocks["Context"])
        return " ".join(f"{1 + 9 * _overlap(_words(blocks[f'Assistant {number}']), context):.1f}" for number in (1, 2))
    _, truth, said, _ = asked.rsplit(" | ", 3)
    words = _words(said)
    if " <OR> " in truth:
        return str(float(any(_words(part) <= words for part in truth.split(" <OR> "))))
    parts = [_words(part) <= words for part in truth.split(" <AND> ")]
    return f"{sum(parts) / len(parts):.1f}"


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) - STOPWORDS


def _overlap(one: set[str], other: set[str]) -> float:
    return 2 * len(one & other) / (len(one) + len(other)) if one and other else 0.0

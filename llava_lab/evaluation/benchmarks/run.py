"""A benchmark from its files to its table: questions, answers, controls, grades, measures with intervals.

    scores = benchmark(lab, "pope", data="picturebook", n=50)
    print(scores.table())

The controls are those of every evaluation here: *blind*, every picture grey, and *shuffled*, every picture another one's. They
are asked the same questions; the gap to each has its own interval, from the same resampled pictures.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from llava_lab.checks import PATIENCE, entry, known
from llava_lab.errors import DataError, OptionError
from llava_lab.evaluation.benchmarks.benchmark import Benchmark, Judge, Measure, Question, interval, resampled, values_of
from llava_lab.evaluation.benchmarks.files import read_lines, write_json
from llava_lab.evaluation.benchmarks.judged import by_rule
from llava_lab.evaluation.benchmarks.registry import BENCHMARKS, DIFFERENCES, PUBLISHED
from llava_lab.evaluation.scoring import BATCH, LONGEST, answer_all, blinded, shuffled
from llava_lab.models import Lab
from llava_lab.models.folders import ASSETS
from llava_lab.results import BenchmarkScores

TWIN = "picturebook"
TWIN_PICTURES = 200
TWIN_NOTE = (
    "Drawn pictures: a test of the machinery and of models that know this world. No number here compares with the paper's."
)
NO_TRUTH = "the files hold no right answers, as those of a test split do; nothing can be scored, but --submission writes the file"


@entry
def benchmark(
    lab: Lab,
    name: str,
    *,
    data: str | os.PathLike = TWIN,
    n: int | None = None,
    split: str = "test",
    seed: int = 0,
    prompt: str | None = None,
    judge: Judge | None = None,
    controls: bool = True,
    batch: int = BATCH,
    limit: int | None = None,
    answers: str | os.PathLike | None = None,
    submission: str | os.PathLike | None = None,
    progress: bool = True,
) -> BenchmarkScores:
    """Ask a model one of `BENCHMARKS` as LLaVA-1.5 was asked it, greedily, and score the answers as it was scored.

    `data`: a folder or file as the authors publish it (``BENCHMARKS[name].files``), or ``picturebook``, the same on drawn
    pictures. `n`: pictures, the first of the files (None: all; 200 drawn ones). `split` is of the drawn world. `judge` grades
    free answers; None is `by_rule` on drawn pictures. `limit`: new tokens, where fewer than LLaVA's script allows are enough
    (drawn pictures: 48). `answers` keeps the answers in LLaVA's jsonl, `submission` what the
    benchmark's own server or script takes. Raises DataError with file and row, OptionError.

    >>> from llava_lab.evaluation.benchmarks import benchmark
    >>> benchmark(lab, "pope", n=2, controls=False, progress=False).measures[0]
    'F1'
    """
    began = time.perf_counter()
    chosen, drawn = _chosen(name), str(data) == TWIN
    judge = _judge(chosen, judge, drawn)
    questions = load_questions(name, data, n=n, split=split, seed=seed)
    if submission is not None and chosen.submit is None:
        able = ", ".join(one.name for one in BENCHMARKS.values() if one.submit)
        raise OptionError(f"{chosen.title} has no file to send; --submission belongs to {able}")
    limit = LONGEST if drawn and limit is None else limit
    options: dict[str, Any] = {"prompt": prompt, "batch": batch, "limit": limit, "progress": progress}
    said: dict[str, Sequence[str]] = {"": answer_benchmark(lab, name, questions, **options)}
    if answers is not None:
        write_answers(Path(answers), questions, said[""], lab.name)
    if submission is not None and chosen.submit is not None:
        chosen.submit(questions, said[""], Path(submission))
    if not all(one.accepted for one in questions):
        raise DataError(f"{data}: {NO_TRUTH}" + (f"; it is written to {submission}" if submission is not None else ""))
    if controls:
        items = [one.item for one in questions]
        for label, changed in (("blind", blinded(items)), ("shuffled", shuffled(items, seed))):
            asked = [replace(one, item=item) for one, item in zip(questions, changed, strict=True)]
            said[label] = answer_benchmark(lab, name, asked, label=label, **options)
    about = {"prompt": prompt or lab.prompt, "split": split} if drawn else {"prompt": prompt or lab.prompt}
    return score_benchmark(
        name,
        questions,
        said.pop(""),
        controls=said,
        judge=judge,
        seed=seed,
        data=str(data),
        model=lab.name,
        fingerprint=lab.fingerprint,
        about=about,
        began=began,
        progress=progress,
    )


@entry
def load_questions(
    name: str, data: str | os.PathLike = TWIN, *, n: int | None = None, split: str = "test", seed: int = 0
) -> list[Question]:
    """A benchmark's questions as LLaVA-1.5 was asked them: of the first `n` pictures in its files, or of `n` drawn ones.

    >>> from llava_lab.evaluation.benchmarks import load_questions
    >>> load_questions("gqa", n=1)[0].item.question.split("\\n")[1]
    'Answer the question using a single word or phrase.'
    """
    chosen = _chosen(name)
    if n is not None and n < 1:
        raise DataError(f"n must be 1 or more, got {n}")
    if str(data) == TWIN:
        if chosen.twin is None:
            raise DataError(f"{chosen.title} has no drawn twin (nothing is written in our worlds); give --data with its files")
        questions = chosen.twin(split, n or TWIN_PICTURES, seed)
    elif chosen.read is None:
        raise DataError(f"{chosen.title} needs {chosen.files}")
    else:
        questions = chosen.read(Path(data))
        if n is not None:
            first = set(list(dict.fromkeys(one.item.picture for one in questions))[:n])
            questions = [one for one in questions if one.item.picture in first]
    if not questions:
        raise DataError(f"{data} gave no questions of {chosen.title}; it needs {chosen.files}")
    return questions


def answer_benchmark(
    lab: Lab,
    name: str,
    questions: Sequence[Question],
    *,
    prompt: str | None = None,
    batch: int = BATCH,
    limit: int | None = None,
    label: str = "",
    progress: bool = True,
) -> list[str]:
    """Greedy answers, in order, of at most as many tokens as LLaVA's script allows (or `limit`)."""
    chosen = _chosen(name)
    most = chosen.limit if limit is None else min(limit, chosen.limit)
    items = [one.item for one in questions]
    return answer_all(
        lab, items, prompt=prompt, max_new_tokens=most, batch=batch, label=f"{name} {label}".strip(), progress=progress
    )


def score_benchmark(
    name: str,
    questions: Sequence[Question],
    answers: Sequence[str],
    *,
    controls: dict[str, Sequence[str]] | None = None,
    judge: Judge | None = None,
    seed: int = 0,
    data: str = "",
    model: str = "",
    fingerprint: str = "",
    about: dict[str, Any] | None = None,
    began: float | None = None,
    progress: bool = True,
) -> BenchmarkScores:
    """Scores of answers, wherever they come from, beside those of `controls` (answers by name)."""
    began = time.perf_counter() if began is None else began
    chosen, drawn = _chosen(name), data == TWIN
    judge = _judge(chosen, judge, drawn)
    sides: dict[str, Sequence[str]] = {"": answers, **(controls or {})}
    notes = list(dict.fromkeys(one.extra["note"] for one in questions if "note" in one.extra))
    graded: dict[str, Sequence[Any]] = sides
    if chosen.grade is not None and judge is not None:
        graded = {label: _grades(chosen, judge, questions, side, label, progress) for label, side in sides.items()}
        unread = sum(grade[0] < 0 or (name == "mm-vet" and not grade[1]) for grade in graded[""])
        notes += [f"{unread} of {len(answers)} replies of the judge held no score."] if unread else []
    measured = [chosen.score(questions, side) for side in graded.values()]
    notes += [TWIN_NOTE] if drawn else list(DIFFERENCES.get(name, ()))
    if chosen.server and not drawn:
        notes.append("The paper's number comes from the benchmark's server on a split whose answers are kept back.")
    told: dict[str, Any] = {"data": data, "seed": seed, "questions": len(questions), "source": chosen.source, **(about or {})}
    told["pictures"] = len({one.item.picture for one in questions})
    if judge is not None:
        told["judge"] = {"name": judge.name, **judge.about}
    published = {} if drawn else {who: numbers[name] for who, numbers in PUBLISHED.items() if name in numbers}
    return tabulate(
        name,
        measured,
        tuple(list(sides)[1:]),
        told["pictures"],
        seed=seed,
        published=published,
        model=model,
        fingerprint=fingerprint,
        about=told,
        seconds=round(time.perf_counter() - began, 1),
        notes=tuple(notes),
    )


def tabulate(
    name: str, measured: Sequence[Sequence[Measure]], controls: tuple[str, ...], pictures: int, *, seed: int, **more: Any
) -> BenchmarkScores:
    """Measures of the model and of each control, with intervals and gaps from the same resampled pictures."""
    values = np.stack([values_of(side, pictures) for side in measured])
    draws = resampled(measured, pictures, seed=seed)
    intervals = np.array(
        [[interval(draws[i, :, j], one, values[i, j]) for j, one in enumerate(side)] for i, side in enumerate(measured)]
    )
    gaps = [[interval(draws[0, :, j] - draws[i, :, j]) for j in range(len(measured[0]))] for i in range(1, len(measured))]
    shape = (len(controls), len(measured[0]), 2)
    return BenchmarkScores(
        benchmark=name,
        measures=tuple(one.name for one in measured[0]),
        values=values[0],
        intervals=intervals[0],
        counts=np.array([one.count for one in measured[0]], np.int64),
        controls=controls,
        control_values=values[1:],
        control_intervals=intervals[1:].reshape(shape),
        gap_intervals=np.array(gaps, float).reshape(shape),
        **more,
    )


def shipped_scores(name: str) -> dict[str, Any]:
    """The scores that ship with a model, with command and date, by benchmark; `benchmarks.ship` made them.

    >>> from llava_lab.evaluation import shipped_scores
    >>> "pope" in shipped_scores("tiny")["scores"]
    True
    """
    try:
        return dict(json.loads(shipped_place(name).read_text("utf-8")))
    except FileNotFoundError:
        raise DataError(f"no benchmark scores ship with {name!r}; llava-lab evaluate --benchmark makes them") from None


def shipped_place(name: str) -> Path:
    """Where they are."""
    return ASSETS / name / "benchmarks.json"


# -- answers as files -----------------------------------------------------------------------


def write_answers(path: Path, questions: Sequence[Question], answers: Sequence[str], model: str) -> None:
    """LLaVA's jsonl: question_id, prompt, text, answer_id, model_id, metadata."""
    rows = []
    for one, answer in zip(questions, answers, strict=True):
        key = hashlib.sha256(f"{model}\n{one.id}\n{answer}".encode()).hexdigest()[:22]
        row = {"question_id": one.id, "prompt": one.item.question, "text": answer}
        rows.append(row | {"answer_id": key, "model_id": model, "metadata": {}})
    write_json(path, rows, lines=True)


def read_answers(path: str | os.PathLike, questions: Sequence[Question]) -> list[str]:
    """The answers to `questions` from such a file, also one of LLaVA's own. Raises DataError for a question without one.

    An answer belongs to the question with its `question_id`; where that names a picture, as in LLaVA's files of TextVQA and
    MME, to the one about it with its `prompt`.
    """
    by_id: dict[str, str] = {}
    by_prompt: dict[tuple[str, str], str] = {}
    for row in read_lines(Path(path)):
        key, text = str(row["question_id"]), row["text"]
        if not isinstance(text, str):
            raise row.refuse(f"'text' must be text, got {text!r}")
        by_id[key] = text
        by_prompt[_stem(key), str(row.get("prompt", ""))] = text
    found = []
    for one in questions:
        text = by_prompt.get((_stem(one.item.picture), one.item.question), by_id.get(one.id))
        if text is None:
            raise DataError(f"{path} holds no answer to question {one.id!r}")
        found.append(text)
    return found


def _stem(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return stem if dot and ending.lower() in ("jpg", "png", "jpeg") else name


# -- parts ----------------------------------------------------------------------------------


def _chosen(name: str) -> Benchmark:
    return BENCHMARKS[known("benchmark", name, BENCHMARKS)]


def _judge(chosen: Benchmark, judge: Judge | None, drawn: bool) -> Judge | None:
    if chosen.grade is None:
        if judge is not None:
            raise OptionError(f"{chosen.title} has no judge; its answers are compared with the right ones")
        return None
    if judge is None and not drawn:
        raise OptionError(
            f"{chosen.title} needs a judge: --judge NAME --judge-url ADDRESS, or --judge rule to try without a model"
        )
    return judge or by_rule()


def _grades(
    chosen: Benchmark, judge: Judge, questions: Sequence[Question], answers: Sequence[str], label: str, progress: bool
) -> list[tuple[float, ...]]:
    grade: Callable[[Judge, Question, str], tuple[float, ...]] = chosen.grade  # type: ignore[assignment]
    pairs = list(zip(questions, answers, strict=True))
    bar = tqdm(pairs, desc=f"grading {label}".strip(), unit="answer", delay=PATIENCE, disable=not progress)
    return [grade(judge, one, answer) for one, answer in bar]

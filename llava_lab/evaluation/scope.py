"""What a shipped model was made for, measured: which pictures are like its own, and how far its wording may be left.

    python -m llava_lab.evaluation.scope          # writes scope.npz of `tiny` and prints its table
    python -m llava_lab.evaluation.scope wordings  # asks in twenty other ways, writes wordings.json

The distance of pictures is fitted on training pictures, its threshold is a quantile of validation pictures, and false alarms are
counted on the test split and on `compositions`, which took no part in either. What it should find are photographs: those that
come with scikit-image. easy-VQA's drawings stand beside them for what it does not find.

A wording is *as good as* the trained one where its share of right answers is at most `SLACK` lower on the same questions.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from llava_lab.errors import DataError
from llava_lab.evaluation.items import Item
from llava_lab.evaluation.scoring import answer_all
from llava_lab.models import Lab, layout, load
from llava_lab.models.card import fingerprint
from llava_lab.models.pictures import read_picture
from llava_lab.models.scope import Familiar, read_features, words_of
from llava_lab.results import whole_file
from llava_lab.shipped import MODELS
from llava_lab.stats import cluster_interval, same_answer, wilson
from llava_lab.worlds import easy_vqa
from llava_lab.worlds.paraphrases import WAYS, ask_in
from llava_lab.worlds.picturebook import REQUESTS, SHORT, TYPES, ask_about, scene

FIT, CHOOSE, JUDGE = 600, 1000, 1000  # pictures
QUANTILE = 0.99  # of validation pictures that lie within the threshold
WORD_SCENES = 3000  # whose questions give the words
BATCH = 32
PER_WAY = 20  # questions asked in each way
SLACK = 0.05  # a way is as good as the trained wording down to this much below it
COMMAND = "python -m llava_lab.evaluation.scope"


def measure_scope(lab: Lab, *, progress: bool = True) -> Familiar:
    """Fit, choose and judge the distance of `lab`'s tower on the picture book, with the words of its questions."""
    read = partial(_features, lab)
    book = {split: read(_drawn(split, n)) for split, n in (("train", FIT), ("validation", CHOOSE))}
    about = {"tower": fingerprint(layout.vision_tower(lab.model)), "words": question_words(), "command": COMMAND}
    known = Familiar.of(book["train"], book["validation"], QUANTILE, **about)
    others = {
        "unseen, test split": _drawn("test", JUDGE),
        "unseen, compositions": _drawn("compositions", JUDGE // 2),
        "photographs of scikit-image": photographs(),
        "drawings of easy-VQA": map(read_picture, islice(dict.fromkeys(one.picture for one in easy_vqa.questions("test")), 200)),
    }
    measured = {name: _beyond(known, read(pictures)) for name, pictures in others.items()}
    return Familiar(**{**vars(known), "measured": measured})


def question_words(scenes: int = WORD_SCENES) -> tuple[str, ...]:
    """Every word of the questions of training scenes and of the requests beside them, sorted."""
    texts = [*REQUESTS, SHORT]
    for index in range(scenes):
        drawn = scene("train", index)
        texts += [question.text for question in ask_about(drawn, np.random.default_rng(index), len(TYPES))]
    return tuple(sorted({word for text in texts for word in words_of(text)}))


def photographs() -> list[np.ndarray]:
    """The pictures that come with scikit-image. Raises DataError where it is not installed."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise DataError("the photographs come with scikit-image; `pip install 'llava-lab[lab]'` brings it")
    files = sorted((Path(package.origin).parent / "data").iterdir())
    return [read_picture(file) for file in files if file.suffix in (".png", ".jpg", ".gif")]


def measure_wordings(lab: Lab, *, per_way: int = PER_WAY, progress: bool = True) -> dict[str, Any]:
    """Shares of right answers in the trained wording and in twenty other ways, by question type, on unseen pictures.

    What is read alike (`Lab.read_as`) about one picture is asked once.

    >>> from llava_lab.evaluation.scope import measure_wordings
    >>> sorted(measure_wordings(lab, per_way=1, progress=False)["by_type"])[:2]
    ['color', 'comparison']
    """
    asked = {type_: list(_questions(type_, per_way)) for type_ in WAYS}
    known: dict[tuple[str, str], str] = {}
    trained = {type_: _right(lab, rows, [item for item, _ in rows], known, progress, type_) for type_, rows in asked.items()}
    table: dict[str, dict[str, Any]] = {}
    every: list[tuple[str, bool, bool]] = []
    for type_, rows in asked.items():
        ways: list[dict[str, Any]] = []
        for way in range(sum(map(len, WAYS[type_]))):
            chosen = [i for i, (_, question) in enumerate(rows) if ask_in(question, way)][:per_way]
            told = [Item(**{**vars(rows[i][0]), "question": ask_in(rows[i][1], way)}) for i in chosen]
            right = _right(lab, [rows[i] for i in chosen], told, known, progress, f"{type_} {way + 1}")
            own = trained[type_][chosen]
            ways.append({"example": told[0].question, "right": float(right.mean()), "trained": float(own.mean()), "n": len(told)})
            every += [
                (rows[i][0].picture, bool(value), bool(before)) for i, value, before in zip(chosen, right, own, strict=True)
            ]
        good = sum(way["right"] >= way["trained"] - SLACK for way in ways)
        counts = np.array([way["n"] for way in ways])
        shares = {name: float(np.average([way[name] for way in ways], weights=counts)) for name in ("right", "trained")}
        table[type_] = {**shares, "as_good": good, "ways": ways}
    pictures, right, own = (np.array(column) for column in zip(*every, strict=True))
    return {
        "command": f"{COMMAND} wordings",
        "model": lab.name,
        "fingerprint": lab.fingerprint,
        "questions_per_way": per_way,
        "as_good_within": SLACK,
        "ways": sum(len(row["ways"]) for row in table.values()),
        "as_good": sum(row["as_good"] for row in table.values()),
        "right": [round(float(right.mean()), 4), *(round(v, 4) for v in cluster_interval(right, pictures))],
        "trained": [round(float(own.mean()), 4), *(round(v, 4) for v in cluster_interval(own, pictures))],
        "by_type": table,
    }


def _questions(type_: str, per_way: int) -> Iterable[tuple[Item, Any]]:
    """Questions of a type about test pictures, one a picture, until each of its forms has `per_way`."""
    have, index = [0] * len(WAYS[type_]), 0
    firsts = np.cumsum([0, *map(len, WAYS[type_])])[:-1]
    while min(have) < per_way:
        drawn = scene("test", index)
        rng = np.random.default_rng((9, index))
        for question in ask_about(drawn, rng, 1, (type_,)):
            form = next(f for f, first in enumerate(firsts) if ask_in(question, int(first)))
            if have[form] < per_way:
                have[form] += 1
                draw = partial(_picture, "test", index)
                yield Item(drawn.name, draw, question.text, question.answer, question.short, type_), question
        index += 1


def _right(
    lab: Lab,
    rows: Sequence[tuple[Item, Any]],
    told: Sequence[Item],
    known: dict[tuple[str, str], str],
    progress: bool,
    label: str,
) -> np.ndarray:
    """Whether each question as `told` is answered as its row's; `known` are the answers by picture and question as read."""
    keys = [(item.picture, lab.read_as(item.question)) for item in told]
    new = {key: item for key, item in zip(keys, told, strict=True) if key not in known}
    if new:
        known.update(zip(new, answer_all(lab, list(new.values()), label=label, progress=progress), strict=True))
    return np.array([same_answer(known[key], item.answer) for key, (item, _) in zip(keys, rows, strict=True)])


def _picture(split: str, index: int) -> np.ndarray:
    return np.asarray(scene(split, index).picture())


def _drawn(split: str, n: int) -> Iterable[np.ndarray]:
    return (_picture(split, index) for index in range(n))


def _features(lab: Lab, pictures: Iterable[np.ndarray]) -> Float[np.ndarray, "N F"]:
    waiting, parts = iter(pictures), []
    while batch := list(islice(waiting, BATCH)):
        parts.append(read_features(lab.model, torch.cat([lab.pixels(picture) for picture in batch])))
    return np.concatenate(parts)


def _beyond(known: Familiar, features: Float[np.ndarray, "N F"]) -> dict[str, Any]:
    distances = np.array([known.distance(row) for row in features])
    far = int((distances > known.threshold).sum())
    low, high = wilson(far, len(distances))
    shares = {"beyond": far / len(distances), "interval": [low, high], "median": float(np.median(distances))}
    return {"pictures": len(distances), **shares}


def main(argv: Sequence[str]) -> None:
    lab, folder = load("tiny"), MODELS["tiny"].folder
    if "wordings" in argv:
        told = measure_wordings(lab)
        with whole_file(folder / "wordings.json") as temporary:
            temporary.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        lines = [f"{name}: {row['right']:.1%}, trained {row['trained']:.1%}, {row['as_good']} of {len(row['ways'])} ways as good"
                 for name, row in told["by_type"].items()]  # fmt: skip
        sys.stdout.write(
            "\n".join([*lines, f"all: {told['right']}, trained {told['trained']}, {told['as_good']} as good"]) + "\n"
        )
        return
    known = measure_scope(lab)
    known.save(folder / "scope.npz")
    sys.stdout.write(f"{known.table()}\n")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What is stored of tiny's scope is what the command measures; twenty ways of each type are other than the trained ones."""

from __future__ import annotations

import json
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.evaluation import scope
from llava_lab.models.card import fingerprint
from llava_lab.models.layout import vision_tower
from llava_lab.models.scope import Familiar, read_features
from llava_lab.shipped import MODELS
from llava_lab.stats import cluster_interval
from llava_lab.worlds import picturebook
from llava_lab.worlds.paraphrases import WAYS, ask_in

KNOWN = Familiar.load(MODELS["tiny"].folder / "scope.npz")


def test_false_alarms_are_under_two_percent_and_photographs_are_found() -> None:
    for name in ("unseen, test split", "unseen, compositions"):
        assert KNOWN.measured[name]["pictures"] >= 500
        assert KNOWN.measured[name]["beyond"] < 0.02
    assert KNOWN.measured["photographs of scikit-image"]["beyond"] > 0.95
    assert scope.COMMAND in KNOWN.command
    assert "beyond the threshold" in str(KNOWN.table())


def test_what_is_stored_is_of_the_shipped_tower_and_can_be_measured_again() -> None:
    lab = ll.load("tiny")
    assert fingerprint(vision_tower(lab.model)) == KNOWN.tower
    pictures = [picture for picture, _ in zip(scope.photographs(), range(6), strict=False)]
    distances = [KNOWN.distance(read_features(lab.model, lab.pixels(picture))[0]) for picture in pictures]
    assert min(distances) > KNOWN.threshold
    near = [picturebook.scene("validation", i).picture() for i in range(30)]
    own = [KNOWN.distance(read_features(lab.model, lab.pixels(np.asarray(picture)))[0]) for picture in near]
    assert np.median(own) < KNOWN.threshold / 2


def test_the_words_are_those_of_training_questions() -> None:
    words = scope.question_words(60)
    assert set(words) <= set(KNOWN.words)
    assert {"color", "car", "equally"} & set(KNOWN.words) == {"color", "car"}
    assert {"dog", "colour", "photo"} & set(KNOWN.words) == set()


@pytest.mark.parametrize("type_", picturebook.TYPES)
def test_there_are_twenty_other_ways_of_each_type(type_: str) -> None:
    assert sum(map(len, WAYS[type_])) == 20
    trained, asked = set(), set()
    for index in range(60):
        scene, rng = picturebook.scene("test", index), np.random.default_rng(index)
        for question in picturebook.ask_about(scene, rng, 3, (type_,)):
            trained.add(question.text)
            asked |= {text for way in range(20) if (text := ask_in(question, way))}
    assert asked
    assert asked.isdisjoint(trained)
    assert not [text for text in asked if "{" in text]


def test_what_is_stored_of_the_wordings_is_of_the_shipped_model() -> None:
    told = json.loads((MODELS["tiny"].folder / "wordings.json").read_text("utf-8"))
    assert told["fingerprint"] == ll.load("tiny").fingerprint
    assert told["ways"] == 160
    assert told["as_good"] == sum(row["as_good"] for row in told["by_type"].values())
    assert told["trained"][0] > 0.9


def test_intervals_of_wordings_are_over_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture is asked about in many ways; what goes wrong with it goes wrong in each."""
    asked: list[tuple[str, bool]] = []

    def judged(lab: object, rows: list, told: list, known: dict, progress: bool, label: str) -> np.ndarray:
        right = np.array([zlib.crc32(item.picture.encode()) % 3 > 0 for item in told])
        if label not in WAYS:
            asked.extend(zip((item.picture for item in told), right, strict=True))
        return right

    monkeypatch.setattr(scope, "_right", judged)
    told = scope.measure_wordings(SimpleNamespace(name="m", fingerprint="f"), per_way=1, progress=False)  # type: ignore[arg-type]
    pictures, right = (np.array(column) for column in zip(*asked, strict=True))
    assert len(set(pictures)) < len(pictures) == 160
    expected = pytest.approx(cluster_interval(right, pictures), abs=1e-4)
    assert tuple(told["right"][1:]) == tuple(told["trained"][1:]) == expected


@pytest.mark.long
def test_a_way_is_judged_on_the_same_questions() -> None:
    told = scope.measure_wordings(ll.load("tiny"), per_way=1, progress=False)
    assert told["ways"] == 160
    assert all(way["n"] == 1 for row in told["by_type"].values() for way in row["ways"])

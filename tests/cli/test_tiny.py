"""The command line on the shipped model, end to end: real pictures in, right answers and real maps out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_lab.worlds import picturebook

Printed = Callable[..., dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]
SCENES = 12
RIGHT = 11  # of `SCENES`; the model's card says 98% of answers and more
LESSON_PICTURES = ROOT / "notebooks" / "images"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, picturebook.Question]]:
    """Unseen drawn pictures on disk, each with one question and its only right answer."""
    folder, found = tmp_path_factory.mktemp("pictures"), []
    for index in range(SCENES):
        drawn = picturebook.scene("test", index, seed=1)
        path = folder / f"{index}.png"
        drawn.picture().save(path)
        found.append((str(path), picturebook.ask_about(drawn, np.random.default_rng(index), 1)[0]))
    return found


@pytest.mark.long
def test_tiny_answers_pictures_it_has_never_seen(asked: list[tuple[str, picturebook.Question]], printed: Printed) -> None:
    answers = [(printed("ask", path, question.text)["answer"], question.answer) for path, question in asked]
    right = sum(said.casefold() == wanted.casefold() for said, wanted in answers)
    assert right >= RIGHT, answers


def test_tiny_counts_the_things_of_a_lesson_s_picture(printed: Printed) -> None:
    picture = str(LESSON_PICTURES / "three-mushrooms.png")
    assert printed("ask", picture, "How many mushrooms are there?")["answer"] == "There are three mushrooms."


def test_explain_writes_the_overlay_and_prints_the_map(
    asked: list[tuple[str, picturebook.Question]], tmp_path: Path, printed: Printed
) -> None:
    path, question = asked[0]
    out = tmp_path / "map.png"
    data = printed("explain", path, question.text, "--method", "rollout", "--out", str(out))
    maps = np.asarray(data["relevance"])
    assert maps.shape == (len(data["words"]), *data["grid"])
    assert data["targets"] == data["words"]
    assert np.isfinite(maps).all()
    assert maps.std() > 0
    assert data["method"] == "rollout"
    assert data["picture"]["width"] == data["picture"]["height"] == picturebook.SIZE
    with Image.open(out) as drawn:
        assert drawn.format == "PNG"
        assert np.asarray(drawn.convert("RGB")).std() > 10


def test_one_word_can_be_explained_by_occlusion(
    asked: list[tuple[str, picturebook.Question]], tmp_path: Path, printed: Printed
) -> None:
    path, question = asked[0]
    out = tmp_path / "map.png"
    data = printed(
        "explain", path, question.text, "--method", "occlusion", "--option", "block=3", "--target", "answer", "--out", str(out)
    )
    assert len(data["targets"]) == len(data["relevance"]) == 1
    assert out.stat().st_size > 1000


def test_same_seed_same_sampled_answer(asked: list[tuple[str, picturebook.Question]], printed: Printed) -> None:
    command = ["ask", asked[0][0], "Describe the picture.", "--temperature", "1.5", "--seed", "3"]
    assert printed(*command) == printed(*command)


@pytest.mark.long
def test_evaluate_prints_scores_beside_their_controls(printed: Printed) -> None:
    data = printed("evaluate", "--n", "6", "--split", "test", "--seed", "1")
    keys = {"accuracy", "interval", "n", "by_type", "controls", "model", "data", "split", "seed", "seconds"}
    assert keys <= set(data)
    assert set(data["controls"]) == {"blind", "shuffled", "majority"}
    assert data["accuracy"] > data["controls"]["blind"]["accuracy"]
    assert data["interval"][0] <= data["accuracy"] <= data["interval"][1]


def test_a_local_folder_takes_the_same_path(tiny_folder: Path, tmp_path: Path, printed: Printed) -> None:
    picture, out = tmp_path / "wide.png", tmp_path / "map.svg"
    Image.new("RGB", (60, 40), "red").save(picture)
    command = ["explain", str(picture), "What is it?", "--model", str(tiny_folder), "--max-new-tokens", "4", "--fit", "crop"]
    data = printed(*command, "--target", "#0", "--target", "answer", "--out", str(out))
    assert np.asarray(data["relevance"]).shape == (2, *data["grid"])
    assert data["picture"] == {"width": 60, "height": 40, "mode": "crop", "seen_box": [10.0, 0.0, 50.0, 40.0]}
    assert out.read_text("utf-8").startswith("<?xml")


@pytest.mark.parametrize(
    ("name", "question", "word"),
    [
        ("red-car-and-fish", "What color is the car?", "red"),
        ("blue-car-cup-and-moon", "What color is the car?", "blue"),
        ("blue-car-cup-and-moon", "What color is the cup?", "green"),
        ("boats-house-and-flower", "What color is the house?", "purple"),
        ("red-tree-and-flowers", "What color is the tree?", "red"),
    ],
)
def test_questions_about_the_lessons_pictures_are_answered_right(name: str, question: str, word: str, printed: Printed) -> None:
    said = printed("ask", str(LESSON_PICTURES / f"{name}.png"), question)
    assert word in [text.strip(".,").casefold() for text in said["words"]], said["answer"]
    assert len(said["logprobs"]) == said["segments"]["answer"][1] - said["segments"]["answer"][0]


@pytest.mark.long
def test_lab_check_runs_the_first_lesson_and_leaves_its_map() -> None:
    picture = ROOT / "map.png"
    picture.unlink(missing_ok=True)
    code = "import sys, run; run.install = lambda *_: None; run.PYTHON = sys.executable; sys.exit(run.main(['lab', '--check']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "00_start_here.ipynb says: " in done.stdout
    with Image.open(picture) as drawn:
        assert min(drawn.size) > 100

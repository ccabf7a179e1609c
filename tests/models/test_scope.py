"""What a shipped model knows is said; variants of its wording are folded; words and pictures outside of it are noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.evaluation.scope import photographs
from llava_lab.models import layout
from llava_lab.models import scope as scopes
from llava_lab.models.scope import Familiar, fold, scope_of, words_of
from llava_lab.results import Run
from llava_lab.shipped import MODELS
from llava_lab.worlds import picturebook

SCENE = picturebook.scene("test", 0)
PICTURE = np.asarray(SCENE.picture())
QUESTION = picturebook.ask_about(SCENE, np.random.default_rng(0), 1, ("color",))[0]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return ll.load("tiny")


def test_a_question_in_the_trainings_words_is_left_alone() -> None:
    for index in range(150):
        scene, rng = picturebook.scene("train", index), np.random.default_rng(index)
        for question in picturebook.ask_about(scene, rng, 8):
            assert fold(question.text) == question.text
            assert fold(f"{question.text}\n{picturebook.SHORT}") == f"{question.text}\n{picturebook.SHORT}"
    for request in picturebook.REQUESTS:
        assert fold(request) == request


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("What colour is the car?", "What color is the car?"),
        ("WHAT COLOR IS THE CAR", "What color is the car?"),
        ("what colour's the car??", "What color is the car?"),
        ("hey, whats the color of the big car", "What is the color of the large car?"),
        ("Count the cars, please", "Count the cars."),
        ("Is the car to the left of the tree", "Is the car left of the tree?"),
        ("How big is the image?", "How big is the picture?"),
        ("where’s  the\tcar", "Where is the car?"),
        ("The star is right of the tree?", "Is the star right of the tree?"),
        ("Tell me whether there is a red car.", "Is there a red car?"),
        ("would you say that the star is above the cup", "Is the star above the cup?"),
        ("Can you find the orange car in the picture?", "Where can I find the orange car?"),
        ("Can you find the star left of the cup?", "Can you see the star left of the cup?"),
        ("At the bottom right is what?", "What is at the bottom right?"),
        ("The big car is what colour?", "What color is the large car?"),
        ("Tell me what is right of the star.", "What is right of the star?"),
        ("What do you see at the top?", "What do you see at the top?"),
        ("How large is the car?", "How big is the car?"),
        ("Do you see cars, and how many?", "How many cars do you see?"),
        ("The star or the cup, which one is larger?", "Which is bigger, the star or the cup?"),
        ("Is the star the same colour as the cup?", "Are the star and the cup the same color?"),
        ("More flowers than hearts?", "Are there more flowers than hearts?"),
        ("Is the car red?", "Is the car red?"),
        ("???", "???"),
    ],
)
def test_common_variants_are_folded_and_folding_again_changes_nothing(typed: str, read: str) -> None:
    assert fold(typed) == read
    assert fold(read) == read


def test_the_same_question_in_another_spelling_is_the_same_question(tiny: Any) -> None:
    plain = tiny.ask(PICTURE, QUESTION.text)
    british = tiny.ask(PICTURE, QUESTION.text.replace("color", "colour").replace("?", "").upper())
    assert plain.answer == british.answer == QUESTION.answer
    assert british.question == plain.question
    assert (british.token_ids == plain.token_ids).all()
    assert plain.notes == ()
    assert british.notes == (f"Read as {QUESTION.text!r}.",)
    turns = [(QUESTION.text, QUESTION.answer)]
    loud = [(QUESTION.text.upper(), QUESTION.answer)]
    assert tiny.sequence("how many things are there", history=loud).text == tiny.sequence(
        "How many things are there?", history=turns
    ).text  # fmt: skip


def test_words_outside_the_vocabulary_are_named(tiny: Any) -> None:
    run = tiny.ask(PICTURE, "C'è una barca blu?", max_new_tokens=2)
    assert "Outside the words that tiny learned with pictures: c'è, una, barca, blu." in run.notes[0]
    many = tiny.scope.about_words(" ".join("abcdefgh"))[0]
    assert "b, c, d, e, f and 2 more" in many


@pytest.mark.long
def test_photographs_are_noted_and_its_own_pictures_are_not(tiny: Any) -> None:
    noted = [bool(_notes(tiny, picture)) for picture in photographs()[:8]]
    own = [bool(_notes(tiny, np.asarray(picturebook.scene("test", i, seed=3).picture()))) for i in range(40)]
    assert np.mean(noted) == 1
    assert np.mean(own) < 0.1


def _notes(lab: Any, picture: np.ndarray) -> tuple[str, ...]:
    return lab.scope.about_picture(lab.model, lab.pixels(picture))


def test_a_run_about_a_photograph_says_so_and_keeps_it(tiny: Any, tmp_path: Path) -> None:
    run = tiny.ask(photographs()[0], "What color is the car?")
    assert "Unlike the pictures that tiny was trained on" in run.notes[0]
    again = Run.load(run.save(tmp_path / "run.npz"))
    assert (again.notes, again.knows) == (run.notes, MODELS["tiny"].knows)
    assert run.notes[0] in str(run.table())
    assert tiny.ask_many([photographs()[0]] * 2, ["Is it red?", "What is it?"], max_new_tokens=1, progress=False)[1].notes


def test_nothing_is_said_of_a_picture_by_another_tower(tiny: Any) -> None:
    weight = next(layout.vision_tower(tiny.model).parameters())
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(0.1)
        assert _notes(tiny, photographs()[0]) == ()
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert _notes(tiny, photographs()[0]) != ()


def test_without_the_measured_file_questions_are_asked_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scopes, "FILE", "nowhere.npz")
    scope = scope_of("tiny")
    assert scope is not None
    assert scope.read_as("what colour") == "what colour"
    assert scope.about_words("what colour") == ()
    assert scope_of("somebody/elses") is None


def test_the_distance_is_mahalanobis_by_hand() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 2)) @ np.array([[2.0, 0.0], [1.0, 0.5]])
    known = Familiar.of(features, features, 0.9, tower="t", words=(), command="c")
    spread = np.cov(features.T)
    spread += 0.1 * np.trace(spread) / 2 * np.eye(2)
    gap = np.array([3.0, -1.0])
    assert known.distance(features.mean(0) + gap) == pytest.approx(gap @ np.linalg.inv(spread) @ gap / 2, rel=1e-4)
    assert np.mean([known.distance(row) > known.threshold for row in features]) == pytest.approx(0.1, abs=0.01)


def test_every_shipped_model_says_in_one_sentence_what_it_knows() -> None:
    for name, shipped in MODELS.items():
        assert shipped.knows.endswith("."), name
        assert "\n" not in shipped.knows
        assert 60 < len(shipped.knows) < 260


def test_a_card_says_what_its_model_knows(tiny: Any, tiny_random: Any) -> None:
    assert tiny.card.knows == MODELS["tiny"].knows
    assert tiny.card.knows in tiny.card.describe()
    assert tiny.card.knows in tiny._repr_html_()
    assert tiny_random.card.knows == "not stated"
    run = tiny_random.ask(PICTURE, "what colour's that", max_new_tokens=2)
    assert run.question == "what colour's that"  # a stranger's model reads what was typed
    assert (run.knows, run.cut) == ("", True)


def test_an_answer_cut_at_the_limit_is_marked_everywhere(tiny: Any, tmp_path: Path) -> None:
    whole, cut = tiny.ask(PICTURE, QUESTION.text), tiny.ask(PICTURE, QUESTION.text, max_new_tokens=2)
    assert not whole.cut
    assert whole.answer_shown == whole.answer
    assert cut.cut
    assert cut.answer_shown == f"{cut.answer} … [cut]"
    assert cut.notes == ("The answer was cut at 2 tokens (max_new_tokens); it may go on.",)
    assert "cut" in repr(cut)
    assert "[cut]" in cut._repr_html_()
    assert "[cut]" in str(cut.table())
    assert cut.to_dict()["cut"] is True
    assert Run.load(cut.save(tmp_path / "cut.npz")).notes == cut.notes


def test_words_are_those_of_a_text_once() -> None:
    assert words_of("Is there a red star, a RED one, or 2?") == ["is", "there", "a", "red", "star", "one", "or", "2"]

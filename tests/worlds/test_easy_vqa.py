"""The easy-VQA adapter keeps the published split, and what it writes trains as LLaVA's format does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_lab.errors import DataError
from llava_lab.evaluation.items import load_items
from llava_lab.training.text import read_turns
from llava_lab.worlds import easy_vqa


def test_official_split_is_whole_and_disjoint() -> None:
    import easy_vqa as package

    texts, answers, numbers = package.get_test_questions()
    ours = easy_vqa.questions("test")
    assert [(q.text, q.answer, int(q.picture.stem)) for q in ours] == list(zip(texts, answers, numbers, strict=True))
    assert len(ours) == 9673
    assert len(easy_vqa.questions("train", whole_train=True)) == 38_575
    assert {q.answer for q in ours} == set(package.get_answers())
    assert all(q.picture.parts[-3] == "test" and q.picture.is_file() for q in ours)


@pytest.mark.long
def test_validation_is_cut_from_training_by_picture() -> None:
    train, held = easy_vqa.questions("train"), easy_vqa.questions("validation")
    assert len(train) + len(held) == 38_575
    assert not {q.picture for q in train} & {q.picture for q in held}
    assert 0.08 < len(held) / 38_575 < 0.12


def test_types_follow_the_answer() -> None:
    kinds = {q.type: q for q in easy_vqa.questions("test")}
    assert set(kinds) == {"yes/no", "color", "shape"}
    assert sum(q.type == "yes/no" for q in easy_vqa.questions("test")) == 7136  # as published


@pytest.mark.long
def test_written_conversations_hold_every_question_once(tmp_path: Path) -> None:
    rows = json.loads(easy_vqa.write_dataset(tmp_path, split="test").read_text())
    asked = []
    for row in rows:
        turns, picture = read_turns(row, stage="instruct")
        assert turns[0][0].endswith("single word or phrase.")
        asked += [(text.split("\n")[0], answer, picture) for text, answer in turns]
    assert sorted(asked) == sorted((q.text, q.answer, str(q.picture)) for q in easy_vqa.questions("test"))


@pytest.mark.long
def test_captions_say_what_the_questions_say(tmp_path: Path) -> None:
    rows = json.loads(easy_vqa.write_dataset(tmp_path, split="validation", stage="align").read_text())
    told: dict[str, set[str]] = {}
    for q in easy_vqa.questions("validation"):
        told.setdefault(str(q.picture), set()).add(q.answer)
    assert rows
    for row in rows:
        _, color, shape = row["conversations"][1]["value"].rstrip(".").split()
        assert {color, shape} <= told[row["image"]]


def test_mistakes_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="split must be one of train, validation, test, got 'dev'"):
        easy_vqa.questions("dev")
    easy_vqa.write_dataset(tmp_path, split="validation", stage="align")
    with pytest.raises(DataError, match="exists"):
        easy_vqa.write_dataset(tmp_path, split="validation", stage="align")
    monkeypatch.setattr(easy_vqa, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install 'llava-lab\\[easy-vqa\\]'"):
        easy_vqa.questions("test")


@pytest.mark.long
def test_evaluation_asks_every_question_of_the_first_pictures_on_its_own_for_one_word() -> None:
    items = load_items("easy-vqa", split="test", n=3)
    every = easy_vqa.questions("test")
    first = list(dict.fromkeys(one.picture for one in every))[:3]
    expected = [(one.picture.stem, one.answer, one.type) for one in every if one.picture in first]
    assert [(item.picture, item.answer, item.type) for item in items] == expected
    assert all(item.question.endswith("\nAnswer the question using a single word or phrase.") for item in items)
    assert len({id(item.draw) for item in items}) == 3
    assert items[0].drawn().shape == (64, 64, 3)
    assert len(load_items("easy-vqa", split="test", n=10**6)) == 9673

"""Evaluation: batches answer as single questions do, intervals are honest, controls are controls."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_lab.errors import DataError
from llava_lab.evaluation import Item, answer_all, evaluate, load_items
from llava_lab.evaluation.scoring import answers_and_confidence, blinded, majority_of, scores_of, shuffled


def test_batched_answers_equal_single_questions(tiny_random) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (40, 40, 3), dtype=np.uint8) for _ in range(3)]
    questions = ("What color is the car?", "Is there a blue house left of the tree?", "How many stars?", "Car?")
    draws = [partial(np.copy, p) for p in pictures]
    items = [Item(str(i), draw, q, "", "", "all") for i, draw in enumerate(draws) for q in questions]
    batched = answer_all(tiny_random, items, max_new_tokens=8, batch=5, progress=False)
    single = [tiny_random.ask(item.drawn(), item.question, max_new_tokens=8).answer.strip() for item in items]
    assert batched == single


def test_shuffled_never_shows_a_picture_its_own_question() -> None:
    items = load_items("picturebook", n=7)
    for item, other in zip(items, shuffled(items, 0), strict=True):
        assert not np.array_equal(item.drawn(), other.drawn())
        assert (item.question, item.answer) == (other.question, other.answer)
    assert len({item.drawn().tobytes() for item in blinded(items)}) == 1


@pytest.fixture(autouse=True)
def _few_training_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_lab.evaluation.scoring.MAJORITY_PICTURES", 200)


def test_majority_comes_from_the_training_split() -> None:
    items = load_items("picturebook", n=200)
    share = majority_of(items, "picturebook", 0).mean()
    assert 0.15 < share < 0.55


def test_evaluate_reports_what_json_promises(tiny_random) -> None:
    result = evaluate(tiny_random, n=3, progress=False)
    assert set(result) >= {"accuracy", "interval", "n", "by_type", "controls", "model", "data", "split", "seed", "seconds"}
    assert set(result["controls"]) == {"blind", "shuffled", "majority"}
    for part in (result, *result["controls"].values(), *result["by_type"].values()):
        low, high = part["interval"]
        assert 0 <= low <= high <= 1
        assert part["n"] >= 1
    for part in (result, result["controls"]["blind"], *result["by_type"].values()):
        assert sum(count for _, _, count in part["calibration"]["bins"]) == part["n"]
    json.dumps(result)


def test_the_confidence_of_a_batch_is_that_of_the_run(tiny_random) -> None:
    items = load_items("picturebook", n=1)
    given = answers_and_confidence(tiny_random, items, prompt=None, limit=6, label="", progress=False)
    for item, (answer, sure) in zip(items, given, strict=True):
        assert item.draw is not None
        run = tiny_random.ask(item.draw(), item.question, max_new_tokens=6)
        assert run.answer == answer
        assert sure == pytest.approx(run.confidence, rel=1e-3, nan_ok=True)


def test_intervals_resample_pictures_and_not_questions() -> None:
    """Eight questions about a picture that are right together say no more than one: 40 pictures, not 320 questions."""
    right = np.random.default_rng(0).random(40) < 0.5

    def scores(questions: int) -> dict[str, Any]:
        items = [Item(str(picture), partial(np.zeros, 3), "", "", "", "color") for picture in range(40) for _ in range(questions)]
        return scores_of(items, np.repeat(right, questions))

    assert scores(8)["by_type"]["color"]["interval"] == scores(1)["by_type"]["color"]["interval"]
    once, often = scores(1)["interval"], scores(8)["interval"]
    assert often == once
    assert often[1] - often[0] > 0.25


def test_llava_json_items_ask_each_turn_alone(tmp_path) -> None:
    from llava_lab.worlds.picturebook import write_dataset

    path = write_dataset(tmp_path, n=2, split="test", progress=False)
    items = load_items(str(path), n=2)
    rows = json.loads(path.read_text())
    assert len(items) == sum(len(r["conversations"]) // 2 for r in rows)
    assert items[0].question == rows[0]["conversations"][0]["value"].removeprefix("<image>\n")
    assert items[0].drawn().shape == (288, 288, 3)


@pytest.mark.long
def test_rows_without_a_picture_are_asked_without_one(tmp_path, tiny_random) -> None:
    Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(tmp_path / "a.png")
    said = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "red"}]
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    rows = [{"conversations": said}, {"image": "", "conversations": said}]
    rows.insert(1, {"images": ["a.png"], "messages": [*shown, {"role": "assistant", "content": "red"}]})
    for name, text in (("rows.json", json.dumps(rows)), ("rows.jsonl", "\n".join(map(json.dumps, rows)))):
        (tmp_path / name).write_text(text)
        items = load_items(str(tmp_path / name))
        assert [item.draw is None for item in items] == [True, False, True]
        answers = answer_all(tiny_random, items, max_new_tokens=4, progress=False)
        pictures = [None, tmp_path / "a.png", None]
        assert answers == [tiny_random.ask(one, "What is it?", max_new_tokens=4).answer.strip() for one in pictures]
        assert evaluate(tiny_random, data=str(tmp_path / name), progress=False)["n"] == 3


def test_bad_data_is_refused_in_one_line(tmp_path) -> None:
    with pytest.raises(DataError, match="picturebook, easy-vqa, photos or a .json"):
        load_items("vqa")
    with pytest.raises(DataError, match="no such data file"):
        load_items(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match="not a JSON list"):
        load_items(str(tmp_path / "bad.json"))
    (tmp_path / "row.json").write_text('[{"image": "a.png"}]')
    with pytest.raises(DataError, match="row 0"):
        load_items(str(tmp_path / "row.json"))

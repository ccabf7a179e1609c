"""The picture book: same seed, same bytes; truth that fits the pixels; questions with one right answer."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from llava_lab.errors import DataError
from llava_lab.worlds import picturebook
from llava_lab.worlds.drawing import COLORS, KINDS
from llava_lab.worlds.questions import DIRECTIONS, MARGIN, NUMBERS, RARE, place_of
from llava_lab.worlds.scenes import GAP, HELD_OUT, SIZE, Scene, Thing

MANY = 400


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, list[picturebook.Question]]]:
    scenes = [picturebook.scene("test", i) for i in range(MANY)]
    return [(s, picturebook.ask_about(s, np.random.default_rng((1, i)), 8)) for i, s in enumerate(scenes)]


def test_world_is_as_rich_as_promised() -> None:
    assert len(KINDS) >= 10
    assert len(COLORS) >= 8
    counts = {len(picturebook.scene("train", i).things) for i in range(60)}
    assert counts == {1, 2, 3, 4}
    assert len(picturebook.TYPES) == 8


def test_same_seed_gives_same_bytes_and_other_seeds_other_bytes() -> None:
    def digest(split: str, index: int, seed: int) -> str:
        return hashlib.sha256(picturebook.scene(split, index, seed=seed).picture().tobytes()).hexdigest()

    assert digest("test", 3, 0) == digest("test", 3, 0)
    assert len({digest(split, 3, seed) for split in picturebook.SPLITS for seed in (0, 1)}) == 2 * len(picturebook.SPLITS)


def test_things_lie_inside_without_touching_and_masks_fit_their_boxes() -> None:
    for index in range(80):
        scene = picturebook.scene("train", index)
        masks = scene.masks()
        assert (masks.sum(0) <= 1).all(), "two things share a pixel"
        for mask, (left, top, right, bottom) in zip(masks, scene.boxes(), strict=True):
            assert 0 <= left < right <= SIZE
            assert 0 <= top < bottom <= SIZE
            ys, xs = np.nonzero(mask)
            assert len(xs) > 0.15 * (right - left) * (bottom - top)
            assert left - 1 <= xs.min() <= xs.max() <= right + 1
            assert top - 1 <= ys.min() <= ys.max() <= bottom + 1
        for i, a in enumerate(scene.things):
            for b in scene.things[:i]:
                reach = (a.side + b.side) / 2 + GAP / SIZE
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= reach - 1e-9


@pytest.mark.parametrize("color", COLORS)
def test_a_thing_is_drawn_in_its_own_color(color: str) -> None:
    for kind in KINDS:
        scene = Scene("lesson", 0, 0, (Thing(kind, color, "large", 0.5, 0.5, 0.36),), (1,))
        pixels = np.asarray(scene.picture())[scene.masks()[0]].astype(float)
        near = {name: (np.abs(pixels - np.array(rgb)).max(1) < 25).mean() for name, rgb in COLORS.items()}
        assert max(near, key=near.__getitem__) == color, f"a {color} {kind} looks {near}"
        assert near[color] > 0.2


def test_held_out_pairs_appear_only_in_compositions() -> None:
    assert {kind for _, kind in HELD_OUT} == set(KINDS)
    for split in ("train", "validation", "test"):
        for index in range(150):
            scene = picturebook.scene(split, index)
            assert not any(t.held_out for t in scene.things)
            text = " ".join(q.text + q.answer for q in picturebook.ask_about(scene, np.random.default_rng(index), 8))
            assert not any(f"{color} {kind}" in text for color, kind in HELD_OUT)
    for index in range(150):
        assert any(t.held_out for t in picturebook.scene("compositions", index).things)


def test_composition_questions_turn_on_a_held_out_pair() -> None:
    for index in range(100):
        scene = picturebook.scene("compositions", index)
        for q in picturebook.ask_about(scene, np.random.default_rng(index), 6):
            named = any(f"{color} {kind}" in q.text for color, kind in HELD_OUT)
            assert named or any(scene.things[i].held_out for i in q.deciding)


def _holds(scene: Scene, q: picturebook.Question) -> bool:
    """An independent reading of the scene for the types whose short answer can be checked from the deciding things."""
    things = [scene.things[i] for i in q.deciding]
    if q.type == "color":
        return things[0].color == q.short
    if q.type == "kind":
        return things[0].kind == q.short
    if q.type == "size":
        return things[0].size == q.short
    if q.type == "place":
        return place_of(things[0]) == q.short
    if q.type == "count":
        return NUMBERS[len(things)] == q.short
    if q.type == "existence":
        return (q.short == "yes") == bool(things)
    return True


def test_short_answers_follow_from_the_deciding_things(asked: list) -> None:
    for scene, questions in asked:
        for q in questions:
            assert _holds(scene, q), f"{scene.things} {q}"
            assert q.answer[0].isupper()
            assert q.answer.endswith(".")


def test_relations_hold_with_a_margin(asked: list) -> None:
    checked = 0
    for scene, questions in asked:
        for q in questions:
            if q.type == "relation" and q.short in ("yes", "no"):
                first, second = (scene.things[i] for i in q.deciding)
                word = next(w for w in DIRECTIONS if f" {w} " in q.text)
                axis, sign = DIRECTIONS[word]
                gap = ((first.x, first.y)[axis] - (second.x, second.y)[axis]) * sign
                assert abs(gap) >= MARGIN
                assert (gap > 0) == (q.short == "yes")
                checked += 1
    assert checked > 60


def test_names_pick_out_one_thing(asked: list) -> None:
    for scene, questions in asked:
        for q in questions:
            if q.type in ("color", "size", "place"):
                name = q.answer.removeprefix("The ").split(" is ")[0].split()
                fits = [t for t in scene.things if all(word in (t.kind, t.color, t.size) for word in name)]
                assert fits == [scene.things[q.deciding[0]]], f"{q.answer} fits {fits}"


def test_yes_and_no_are_balanced_and_no_is_mostly_a_near_miss(asked: list) -> None:
    rows = [(scene, q) for scene, questions in asked for q in questions if q.type == "existence"]
    yes = sum(q.short == "yes" for _, q in rows) / len(rows)
    assert 0.42 < yes < 0.58
    missing = [(s, q.answer.removeprefix("No, there is no ").rstrip(".").split()) for s, q in rows if q.short == "no"]
    pairs = [(s, words) for s, words in missing if len(words) == 2 and words[1] != "thing"]
    near = [any((t.color == c) != (t.kind == k) for t in s.things) for s, (c, k) in pairs]
    assert np.mean(near) > 0.6


def test_every_type_is_asked_and_no_answer_dominates_its_type(asked: list) -> None:
    by_type: dict[str, list[str]] = {}
    for _, questions in asked:
        for q in questions:
            by_type.setdefault(q.type, []).append(q.short)
    assert set(by_type) == set(picturebook.TYPES)
    for name, answers in by_type.items():
        share = max(answers.count(a) for a in set(answers)) / len(answers)
        assert share < 0.6, f"{name}: one answer is {share:.0%}"


def test_rare_comparisons_are_asked_on_purpose_with_the_answer_they_are_for() -> None:
    found: dict[str, set[str]] = {name: set() for name in RARE}
    for i in range(60):
        for name, answers in found.items():
            for question in picturebook.ask_about(picturebook.scene("train", i), np.random.default_rng(i), 2, (name,)):
                assert question.type == "comparison"
                answers.add(question.answer.split()[0] if "color" in name else question.short)
                if "color" in name:
                    one, two = (picturebook.scene("train", i).things[thing].color for thing in question.deciding)
                    assert (one == two) == (question.short == "yes")
    assert found == {"same color": {"Yes,"}, "different color": {"No,"}, "unequal": {"yes", "no"}}


def test_caption_names_everything_and_description_its_places() -> None:
    scene = picturebook.scene("test", 5)
    text = picturebook.caption(scene)
    for thing in scene.things:
        assert f"{thing.size} {thing.color} {thing.kind}" in text
    told = picturebook.description(scene, np.random.default_rng(0))
    assert told.count(".") == len(scene.things)


def test_dataset_on_disk_is_llavas_format_and_repeats_byte_for_byte(tmp_path) -> None:
    one = picturebook.write_dataset(tmp_path / "a", n=6, seed=4, split="test", progress=False)
    two = picturebook.write_dataset(tmp_path / "b", n=6, seed=4, split="test", progress=False)
    assert one.read_bytes() == two.read_bytes()
    rows = json.loads(one.read_text())
    assert len(rows) == 6
    for row in rows:
        assert set(row) == {"id", "image", "conversations"}
        assert [t["from"] for t in row["conversations"]] == ["human", "gpt"] * (len(row["conversations"]) // 2)
        assert row["conversations"][0]["value"].startswith("<image>\n")
        assert sum("<image>" in t["value"] for t in row["conversations"]) == 1
        assert (tmp_path / "a" / row["image"]).read_bytes() == (tmp_path / "b" / row["image"]).read_bytes()
    truth = [json.loads(line) for line in (tmp_path / "a" / "test.truth.jsonl").read_text().splitlines()]
    assert [t["id"] for t in truth] == [r["id"] for r in rows]
    assert all(set(q) == {"type", "question", "answer", "short", "deciding"} for t in truth for q in t["questions"])


def test_conversations_have_many_turns_and_sometimes_the_short_form() -> None:
    forms = set()
    for i in range(60):
        turns = picturebook.conversation(picturebook.scene("train", i), np.random.default_rng(i), 5)
        assert len(turns) >= 3
        forms.add(picturebook.SHORT in turns[0][0])
        assert not any(picturebook.SHORT in asked for asked, _ in turns[1:])
    assert forms == {True, False}


def test_bad_requests_are_refused_in_one_line(tmp_path) -> None:
    with pytest.raises(DataError, match="split must be one of train, validation"):
        picturebook.scene("tset")
    with pytest.raises(DataError, match="0 or more"):
        picturebook.scene("test", -1)
    with pytest.raises(DataError, match="n must be 1 or more"):
        picturebook.write_dataset(tmp_path, n=0)
    picturebook.write_dataset(tmp_path / "x", n=1, progress=False)
    with pytest.raises(DataError, match="exists"):
        picturebook.write_dataset(tmp_path / "x", n=1, progress=False)

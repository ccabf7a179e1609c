"""Named photographs, the scenes made of them, and what is asked: names are read right and every answer is true of its scene."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_lab.errors import DataError
from llava_lab.worlds.photo_names import Thing, classes, everyday, read_photos, thing_named, with_article
from llava_lab.worlds.photo_scenes import (
    FORMS,
    NUMBERS,
    QUARTERS,
    WHICH_COULD,
    absent,
    collage,
    describe,
    draw_scene,
    present,
    talk_about,
)

COLOURS = {
    "cat": (200, 30, 30),
    "banjo": (30, 200, 30),
    "pizza": (30, 30, 200),
    "school_bus": (200, 200, 30),
    "golden_retriever": (9, 9, 9),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for number, (name, colour) in enumerate(COLOURS.items()):
        (root / name).mkdir()
        Image.new("RGB", (60 + 10 * number, 50), colour).save(root / name / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("text", "name", "basic", "kind"),
    [
        ("n02099601_golden_retriever", "golden retriever", "dog", "animal"),
        ("golden_retriever_12", "golden retriever", "dog", "animal"),
        ("Golden Retriever (3)", "golden retriever", "dog", "animal"),
        ("dog-7", "dog", "", "animal"),
        ("banjo", "banjo", "", "musical instrument"),
        ("my grandmother_2", "my grandmother", "", ""),
        ("n99999999_moon_buggy", "moon buggy", "", ""),
    ],
)
def test_a_file_name_is_read_as_what_it_shows(text: str, name: str, basic: str, kind: str) -> None:
    thing = thing_named(text)
    assert (thing.name, thing.basic, thing.kind) == (name, basic, kind)


def test_the_table_holds_every_class_and_every_category_names_its_own_classes() -> None:
    assert len(classes()) == 1000
    assert len(everyday()) == 200
    assert list(classes()) == sorted(classes())
    assert "golden retriever" in everyday()["n02084071"].accepted
    assert everyday()["n02084071"].name == "dog"
    assert all(category.accepted for category in everyday().values())


def test_photographs_are_named_by_their_files_or_their_folders(folder: Path, tmp_path: Path) -> None:
    photos = read_photos(folder)
    assert {photo.thing.name.replace(" ", "_") for photo in photos} == set(COLOURS)
    Image.new("RGB", (9, 9)).save(tmp_path / "teapot_1.jpg")
    (tmp_path / "notes.txt").write_text("x")
    assert [photo.thing.name for photo in read_photos(tmp_path)] == ["teapot"]


def test_a_folder_without_named_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        read_photos(tmp_path / "nowhere")
    Image.new("RGB", (9, 9)).save(tmp_path / "0001.jpg")
    with pytest.raises(DataError, match="named by what it shows"):
        read_photos(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_every_box_holds_its_photograph(folder: Path, form: str) -> None:
    photos = read_photos(folder)
    colour = {photo.thing.name: COLOURS[photo.thing.name.replace(" ", "_")] for photo in photos}
    for seed in range(6):
        scene = draw_scene(photos, np.random.default_rng(seed), form=form)
        pixels = np.asarray(scene.picture, np.int64)
        for item in scene.items:
            left, top, right, bottom = item.box
            middle = pixels[(top + bottom) // 2, (left + right) // 2]
            nearest = min(
                colour,
                key=lambda name: float(np.abs(middle / max(middle.sum(), 1) - np.array(colour[name]) / sum(colour[name])).sum()),
            )
            if sum(colour[item.thing.name]) > 100:
                assert nearest == item.thing.name
        names = [item.thing.name for item in scene.items]
        assert len(set(names)) == len(names)


def test_a_collage_has_each_photograph_in_its_quarter(folder: Path) -> None:
    photos = read_photos(folder)[:4]
    scene = collage(photos, "quarters", side=64)
    assert [item.place for item in scene.items] == list(QUARTERS)
    corners = [(8, 8), (8, 56), (56, 8), (56, 56)]
    for photo, corner in zip(photos, corners, strict=True):
        expected = COLOURS[photo.thing.name.replace(" ", "_")]
        assert np.abs(np.asarray(scene.picture)[corner].astype(int) - expected).max() <= 2


def test_what_is_said_is_true_of_the_scene(folder: Path) -> None:
    photos = read_photos(folder)
    things = [photo.thing for photo in photos]
    seen = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        scene = draw_scene(photos, rng)
        words = {word for item in scene.items for word in item.thing.words}
        for (asked, answered), *_ in talk_about(scene, things, rng):
            if asked.startswith("How many") and "things" not in asked:
                number = sum(item.thing.kind in asked or item.thing.kind.split()[0] in asked for item in scene.items)
                assert NUMBERS[number] in answered, (asked, answered, scene.items)
                seen += 1
            for item in scene.items:
                if item.place and f"at the {item.place}?" in asked and answered.endswith("."):
                    assert any(word in answered for word in item.thing.words) or "Answer" in asked
                    seen += 1
        yes, no = present(scene, rng)[0], absent(scene, things, rng)
        assert any(word in yes[0] for word in words)
        assert yes[1].startswith("Yes")
        assert not no or (no[0][1].startswith("No") and not any(f"{with_article(word)} " in no[0][0] for word in words))
        assert any(word in describe(scene, rng) for word in words)
    assert seen > 100


def test_which_of_them_and_which_of_two_is_answered_truly(folder: Path) -> None:
    photos = read_photos(folder)
    things = [photo.thing for photo in photos]
    found = set()
    for seed in range(150):
        rng = np.random.default_rng(seed)
        scene = draw_scene(photos, rng, form="quarters" if seed % 2 else "alone")
        for (asked, answered), *_ in talk_about(scene, things, rng, short=0):
            if asked in WHICH_COULD:
                true = {item.thing for item in scene.items if item.thing.kind in WHICH_COULD[asked]}
                named = {item.thing for item in scene.items if any(word in answered for word in item.thing.words[:2])}
                assert (named == true) if true else (answered == "None of them.")
                found.add("could" if true else "none")
            if match := re.fullmatch(r"Is this (.+) or (.+)\?", asked):
                mine = scene.items[0].thing.words
                assert sum(any(word in said for word in mine) for said in match.groups()) == 1
                assert any(word in answered for word in mine)
                found.add("either")
            match = re.fullmatch(r"(?:What|Which)(?: kind of)? (\w[\w ]*?) (is this|do you see|is in the picture)\?", asked)
            if match and match[1] != "thing" and match[1] in {thing.kind for thing in things}:
                assert match[1] == scene.items[0].thing.kind
                assert scene.items[0].thing.name in answered
                found.add("of a kind")
    assert found == {"could", "none", "either", "of a kind"}


def test_articles() -> None:
    said = {
        word: with_article(word) for word in ("dog", "apple", "broccoli", "umbrella", "unicycle", "sunglasses", "bus", "orange")
    }
    assert said["dog"] == "a dog"
    assert said["apple"] == "an apple"
    assert said["broccoli"] == "broccoli"
    assert said["bus"] == "a bus"
    assert said["umbrella"] == "an umbrella"
    assert said["unicycle"] == "a unicycle"
    assert said["sunglasses"] == "sunglasses"
    assert Thing("stone wall", "wall", "thing").words == ("stone wall", "wall")

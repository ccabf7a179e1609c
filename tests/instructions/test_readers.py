"""Contexts are what the files say, in a fixed order, one in memory at a time; what is wrong is named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_lab.errors import DataError
from llava_lab.instructions import Box, Coco, Context, World, read_folder, read_jsonl
from llava_lab.instructions import readers as module

IMAGES = [
    {"id": 7, "file_name": "b.jpg", "width": 200, "height": 100},
    {"id": 3, "file_name": "a.jpg", "width": 100, "height": 100},
]


def coco(folder: Path) -> tuple[Path, Path]:
    captions, instances = folder / "captions.json", folder / "instances.json"
    said = [{"id": 1, "image_id": 7, "caption": "Two dogs."}, {"id": 0, "image_id": 3, "caption": 'A "cat" [sleeping].'}]
    said.append({"id": 2, "image_id": 7, "caption": "Dogs run."})
    captions.write_text(json.dumps({"info": {"year": 2014, "list": [1, 2]}, "images": IMAGES, "annotations": said}, indent=1))
    boxes = [
        {"id": 5, "image_id": 7, "category_id": 18, "bbox": [20, 10, 40, 50], "iscrowd": 0, "segmentation": [[1.5, 2.5]]},
        {"id": 4, "image_id": 7, "category_id": 18, "bbox": [100, 0, 100.4, 100], "iscrowd": 1},
    ]
    kinds = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    instances.write_text(json.dumps({"categories": kinds, "annotations": boxes, "images": IMAGES}))
    return captions, instances


def test_coco_is_sorted_by_picture_and_boxes_are_shares(tmp_path: Path) -> None:
    captions, instances = coco(tmp_path)
    reader = Coco(tmp_path / "work", captions=captions, instances=instances)
    cat, dogs = list(reader)
    assert (len(reader), cat.id, cat.image, cat.captions, cat.boxes) == (2, "3", "a.jpg", ('A "cat" [sleeping].',), ())
    assert dogs.captions == ("Two dogs.", "Dogs run.")
    assert dogs.boxes == (Box("dog", 0.5, 0, 1.0, 1.0, crowd=True), Box("dog", 0.1, 0.1, 0.3, 0.6))
    assert dogs.complete == ("cat", "dog")
    assert dogs.text(boxes=True).splitlines()[2:] == [
        "",
        "dog: [0.500, 0.000, 1.000, 1.000]",
        "dog: [0.100, 0.100, 0.300, 0.600]",
    ]
    assert dogs.text(boxes=False) == "Two dogs.\nDogs run."


def test_coco_is_sorted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions, _ = coco(tmp_path)
    first = Coco(tmp_path / "work", captions=captions)
    monkeypatch.setattr(module, "_sort", lambda *_: pytest.fail("sorted again"))
    assert list(Coco(tmp_path / "work", captions=captions)) == list(first)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_elements_of_lists_are_those_json_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    data: dict[str, Any] = {"a": [1, {"b": ["]", "é"]}, 23], "empty": [], "no": {"list": [9]}, "c": [12.5e3]}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data, indent=2), "utf-8")
    assert list(module.elements(path)) == [(name, e) for name in ("a", "c") for e in data[name]]


@pytest.mark.parametrize("text", ["[1]", '{"images": [{"id": 1}', '{"images": [{"id": }]}', '{"images" [1]}', ""])
def test_broken_files_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(DataError, match="captions.json") as refused:
        Coco(tmp_path / "work", captions=path)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "work").glob("*.db"))


def test_an_element_without_its_fields_is_named(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": IMAGES, "annotations": [{"id": 1, "image_id": 3, "caption": "x"}, {"id": 2}]}))
    with pytest.raises(DataError, match=r"annotations\[1\] lacks what COCO's captions file has \(KeyError: 'image_id'\)"):
        Coco(tmp_path / "work", captions=path)


def test_lines_of_json_and_the_place_of_a_bad_one(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    good = {"image": "a.jpg", "captions": ["A car."], "boxes": [["car", 0, 0, 0.5, 1]], "complete": ["car"]}
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, "boxes": [["car", 0, 0, 50, 100]]}) + "\n")
    reader = read_jsonl(path)
    assert len(reader) == 2
    assert next(iter(reader)) == Context(("A car.",), (Box("car", 0, 0, 0.5, 1),), "a.jpg", "a.jpg", ("car",))
    assert len(list(read_jsonl(path, n=1))) == 1
    with pytest.raises(DataError, match=r"c.jsonl line 2: a box is a name and left <= right"):
        list(reader)


def test_a_folder_of_photographs_with_boxes_or_captions_beside_them(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.json").write_text(json.dumps({"boxes": [["dog", 0.1, 0.1, 0.9, 0.9]]}))
    (tmp_path / "a.txt").write_text("A dog.\n\nIt sleeps.\n")
    (tmp_path / "b.txt").write_text("A field.\n")
    first, second = list(read_folder(tmp_path))
    assert (first.image, first.captions, first.boxes[0].name) == ("a.png", ("A dog.", "It sleeps."), "dog")
    assert (second.image, second.captions) == ("b.png", ("A field.",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="none has its captions or boxes"):
        read_folder(tmp_path / "empty")


def test_a_world_gives_captions_boxes_and_its_scene() -> None:
    context = next(iter(World(1, "test")))
    assert context.scene is not None
    assert len(context.boxes) == len(context.scene.things)
    assert context.text(boxes=True).count("\n") == len(context.boxes) + 1
    with pytest.raises(DataError, match="split must be one of"):
        World(1, "tests")


def test_a_context_has_a_caption_or_a_box() -> None:
    with pytest.raises(DataError, match="needs a caption or a box"):
        Context(("  ",))

"""The twelve benchmarks' files in small, laid out as their authors publish them, about drawn scenes that `tiny` can see.

folder = write("pope", tmp_path)
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_lab.worlds import picturebook
from llava_lab.worlds.questions import article

SCENES = tuple(picturebook.scene("test", index) for index in range(2))  # an orange car; an orange star, two trees, a blue star
CAR, STAR = "orange car", "orange star"
ABSENT = "green fish"


def write(name: str, folder: Path) -> Path:
    """Write a benchmark's files into `folder`; returns what --data is given."""
    folder.mkdir(parents=True, exist_ok=True)
    return WRITERS[name](folder) or folder


def _picture(path: Path, scene: picturebook.Scene) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scene.picture().save(path)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _people(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers, 1)]


def _vqav2(folder: Path) -> None:
    asked = [(0, "What is the orange thing?", ["car"] * 10), (1, "Is there a fish?", ["no"] * 8 + ["yes"] * 2)]
    for number, _, _ in asked:
        _picture(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg", SCENES[number])
    rows = [{"image_id": n, "question": text, "question_id": n * 1000} for n, text, _ in asked]
    answers = [
        {"question_id": n * 1000, "image_id": n, "answer_type": "other", "answers": _people(*said)} for n, _, said in asked
    ]
    _json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"data_subtype": "val2014", "questions": rows})
    _json(folder / "v2_mscoco_val2014_annotations.json", {"data_subtype": "val2014", "annotations": answers})


def _gqa(folder: Path) -> None:
    rows = {}
    for number, (scene, text, answer, kind) in enumerate(
        [(0, "What is the orange thing?", "car", "query"), (1, "Is there a fish?", "no", "verify")]
    ):
        _picture(folder / "images" / f"n{scene}.jpg", SCENES[scene])
        types = {"structural": kind, "semantic": "obj", "detailed": "exist"}
        rows[f"20{number}"] = {"imageId": f"n{scene}", "question": text, "answer": answer, "types": types}
    _json(folder / "testdev_balanced_questions.json", rows)


def _vizwiz(folder: Path) -> None:
    asked = [("What is the orange thing?", ["car"] * 10, 1), ("What does it say?", ["unanswerable"] * 10, 0)]
    rows = []
    for number, (text, said, can) in enumerate(asked):
        name = f"VizWiz_val_{number:08d}.jpg"
        _picture(folder / "val" / name, SCENES[number])
        rows.append({"image": name, "question": text, "answers": _people(*said), "answer_type": "other", "answerable": can})
    _json(folder / "val.json", rows)


def _scienceqa(folder: Path) -> None:
    base = {"hint": "Look closely.", "lecture": "", "solution": "", "split": "test", "subject": "natural science"}
    problems = {
        "4": {**base, "question": "What is shown?", "choices": ["a car", "a fish"], "answer": 0, "image": "image.png"},
        "5": {**base, "question": "What is two?", "choices": ["2", "3"], "answer": 0, "image": None},
    }
    _picture(folder / "images" / "test" / "4" / "image.png", SCENES[0])
    _json(folder / "problems.json", problems)
    _json(folder / "pid_splits.json", {"train": [], "test": ["4", "5"]})


def _textvqa(folder: Path) -> None:
    rows = []
    for number, (text, said) in enumerate([("What is the orange thing?", ["car"] * 10), ("Is there a fish?", ["no"] * 10)]):
        _picture(folder / "train_images" / f"i{number}.jpg", SCENES[number])
        rows.append({"question_id": number, "image_id": f"i{number}", "question": text, "answers": said, "set_name": "val"})
    _json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    tokens = [{"image_id": "i0", "ocr_tokens": ["STOP", "7"]}, {"image_id": "i1", "ocr_tokens": []}]
    _json(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})


def _pope(folder: Path) -> None:
    for scene, name in zip(SCENES, ("a", "b"), strict=True):
        _picture(folder / "val2014" / f"{name}.jpg", scene)
    for split in ("random", "popular", "adversarial"):
        asked = [("a", CAR, "yes"), ("a", ABSENT, "no"), ("b", STAR, "yes"), ("b", ABSENT, "no")]
        rows = [
            {"question_id": i, "image": f"{name}.jpg", "text": f"Is there {article(thing)}?", "label": label}
            for i, (name, thing, label) in enumerate(asked, 1)
        ]
        _lines(folder / f"coco_pope_{split}.json", rows)


def _mme(folder: Path) -> None:
    root = folder / "MME_Benchmark_release_version"
    _picture(root / "existence" / "000000006040.jpg", SCENES[0])
    text = f"Is there {article(CAR)}? Please answer yes or no.\tYes\nIs there {article(ABSENT)}? Please answer yes or no.\tNo\n"
    (root / "existence" / "000000006040.txt").write_text(text, "utf-8")
    _picture(root / "artwork" / "images" / "1.jpg", SCENES[1])
    (root / "artwork" / "questions_answers_YN").mkdir()
    (root / "artwork" / "questions_answers_YN" / "1.txt").write_text(text.replace(CAR, STAR), "utf-8")


def _mmbench(folder: Path, *, chinese: bool = False) -> None:
    _picture(folder / "one.png", SCENES[0])
    packed = base64.b64encode((folder / "one.png").read_bytes()).decode()
    headings = ["index", "question", "hint", *"ABCD", "answer", "category", "image", "source", "l2-category", "comment", "split"]
    rows = [
        ["7", "Which thing is it?", "Look, it drives.", "car", "fish", "", "", "A", "kinds", packed, "own", "x", "", "dev"],
        ["1000007", "Which thing is it?", "Look, it drives.", "fish", "car", "", "", "B", "kinds", packed, "own", "x", "", "dev"],
        ["8", 'Which "thing"\tis\nit?', "nan", "fish", "moon", "car", "", "C", "kinds", packed, "own", "x", "", "dev"],
    ]

    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in '"\t\n') else text

    name = "mmbench_dev_cn_20231003.tsv" if chinese else "mmbench_dev_20230712.tsv"
    text = "".join("\t".join(map(cell, row)) + "\n" for row in [headings, *rows])
    (folder / name).write_text(text, "utf-8")


def _mmbench_cn(folder: Path) -> None:
    _mmbench(folder, chinese=True)


def _seed(folder: Path) -> None:
    (folder / "SEED-Bench-image").mkdir()
    SCENES[0].picture().save(folder / "SEED-Bench-image" / "1454426_2591111986", "JPEG")  # published without an ending
    _picture(folder / "SEED-Bench-video-image" / "v9.png", SCENES[1])
    choices = {f"choice_{letter}": word for letter, word in zip("abcd", ("car", "fish", "moon", "cup"), strict=True)}
    image = {"answer": "A", **choices, "data_id": "1454426_2591111986", "data_type": "image", "question": "What is it?",
             "question_id": "101669", "question_type_id": 1}  # fmt: skip
    video = {**image, "data_id": "v9.webm", "data_type": "video", "question_id": "v9", "question_type_id": 10}
    types = {"Scene Understanding": 1, "Action Recognition": 10}
    _json(folder / "SEED-Bench.json", {"question_type": types, "questions": [image, video]})


def _wild(folder: Path) -> None:
    _picture(folder / "images" / "001.jpg", SCENES[0])
    asked = [("conv", "What color is the car?", "The car is orange."), ("detail", "Describe the picture.", "A large orange car.")]
    rows = [{"question_id": i, "image": "001.jpg", "text": text, "category": kind} for i, (kind, text, _) in enumerate(asked)]
    _lines(folder / "questions.jsonl", rows)
    _lines(folder / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A large orange car."}])
    _lines(folder / "answers_gpt4.jsonl", [{"question_id": i, "text": said} for i, (_, _, said) in enumerate(asked)])


def _vet(folder: Path) -> None:
    _picture(folder / "images" / "v1_0.png", SCENES[0])
    one = {"imagename": "v1_0.png", "question": "Describe the picture.", "answer": f"{CAR}<AND>large", "capability": ["rec"]}
    two = {**one, "question": "What color is the car?", "answer": "orange<OR>red", "capability": ["rec", "know"]}
    _json(folder / "mm-vet.json", {"v1_0": one, "v1_1": two})


WRITERS: dict[str, Callable[[Path], Path | None]] = {
    "vqav2": _vqav2,
    "gqa": _gqa,
    "vizwiz": _vizwiz,
    "scienceqa": _scienceqa,
    "textvqa": _textvqa,
    "pope": _pope,
    "mme": _mme,
    "mmbench": _mmbench,
    "mmbench-cn": _mmbench_cn,
    "seed": _seed,
    "llava-wild": _wild,
    "mm-vet": _vet,
}

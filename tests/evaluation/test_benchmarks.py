"""The twelve benchmarks end to end on `tiny`: from files as published to scores, answers, submissions; and what is refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import llava_lab as ll
from llava_lab.errors import DataError, OptionError
from llava_lab.evaluation.benchmarks import (
    BENCHMARKS,
    DIFFERENCES,
    PUBLISHED,
    benchmark,
    by_rule,
    load_questions,
    read_answers,
    shipped_scores,
)
from llava_lab.evaluation.benchmarks.benchmark import MC, SW
from llava_lab.evaluation.benchmarks.run import score_benchmark, shipped_place
from tests.support.benchmark_files import write

TWELVE = [name for name in BENCHMARKS if name != "chair"]
FREE = ("llava-wild", "mm-vet")
QUICK: dict[str, Any] = {"limit": 12, "progress": False}


@pytest.fixture(scope="module")
def tiny():
    return ll.load("tiny")


def test_there_are_twelve_each_with_what_the_paper_printed() -> None:
    assert len(TWELVE) == 12
    for numbers in PUBLISHED.values():
        assert sorted(numbers) == sorted(TWELVE)
    assert sorted(DIFFERENCES) == sorted(TWELVE)


# What `tiny` answers to the questions of tests/support/benchmark_files.py, by the paper's headline measure. It was never taught
# letters, nor "Unanswerable"; where an option's own words count (MMBench) it can be right.
HEADLINES = {"vqav2": 100, "gqa": 100, "textvqa": None, "pope": 100, "mme": 400, "scienceqa": 0, "seed": 0, "llava-wild": 100}
HEADLINES |= {"vizwiz": None, "mmbench": None, "mmbench-cn": None, "mm-vet": 100}


@pytest.mark.parametrize("name", TWELVE)
def test_from_files_as_published_to_scores_and_back(name: str, tiny, tmp_path: Path) -> None:
    data = write(name, tmp_path / "data")
    judge = by_rule() if name in FREE else None
    kept: dict[str, Any] = {"answers": tmp_path / "answers.jsonl"}
    if BENCHMARKS[name].submit:
        kept["submission"] = tmp_path / "sent"
    scores = benchmark(tiny, name, data=data, judge=judge, **kept, **QUICK)
    assert scores.controls == ("blind", "shuffled")
    first = scores.measures[0]
    expected = HEADLINES[name]
    assert expected is None or scores.at(first)["value"] == pytest.approx(expected)
    assert first in scores.published["LLaVA-1.5 7B"]
    assert "LLaVA-1.5 13B" in str(scores.table())
    questions = load_questions(name, data)
    again = score_benchmark(
        name, questions, read_answers(kept["answers"], questions), judge=judge, data=str(data), progress=False
    )
    assert again.values.tolist() == pytest.approx(scores.values.tolist(), nan_ok=True)
    assert json.dumps(scores.to_dict(), allow_nan=False)
    if "submission" in kept:
        assert _submitted(name, kept["submission"]) == _expected(name, questions, read_answers(kept["answers"], questions))


def _submitted(name: str, path: Path) -> Any:
    if name == "mme":
        return {file.name: file.read_text() for file in sorted(path.iterdir())}
    if name.startswith("mmbench"):
        space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
        with zipfile.ZipFile(path) as book:
            sheet = ElementTree.fromstring(book.read("xl/worksheets/sheet1.xml"))
        return [["".join(cell.itertext()) for cell in row.iter(f"{space}c")] for row in sheet.iter(f"{space}row")]
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if name == "seed" else json.loads(text)


def _expected(name: str, questions: Any, said: list[str]) -> Any:
    if name == "vqav2":
        return [{"question_id": 0, "answer": said[0].lower()}, {"question_id": 1000, "answer": said[1].lower()}]
    if name == "gqa":
        return [{"questionId": one.id, "prediction": text.rstrip(".").lower()} for one, text in zip(questions, said, strict=True)]
    if name == "vizwiz":
        names = [f"VizWiz_val_{number:08d}.jpg" for number in range(2)]
        return [{"image": image, "answer": text.lower()} for image, text in zip(names, said, strict=True)]
    if name == "seed":
        return [{"question_id": one.id, "prediction": text} for one, text in zip(questions, said, strict=True)]
    if name == "mm-vet":
        return {"v1_0": said[0], "v1_1": said[1]}
    if name == "mme":
        yes, no = (
            "Is there an orange {}? Please answer yes or no.\tYes\t",
            "Is there a green fish? Please answer yes or no.\tNo\t",
        )
        rows = {"existence.txt": ("000000006040.txt", "car", said[:2]), "artwork.txt": ("1.txt", "star", said[2:])}
        return {
            file: f"{picture}\t{yes.format(thing)}{pair[0]}\n{picture}\t{no}{pair[1]}\n"
            for file, (picture, thing, pair) in sorted(rows.items())
        }
    headings = ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    lines = [["7", "Which thing is it?", "car", "fish", "", "", said[0], "A", "dev"],
            ["1000007", "Which thing is it?", "fish", "car", "", "", said[1], "B", "dev"],
            ["8", 'Which "thing"\tis\nit?', "fish", "moon", "car", "", said[2], "C", "dev"]]  # fmt: skip
    return [headings, *lines]


def test_each_is_asked_as_llava_asked_it(tmp_path: Path) -> None:
    texts = {name: load_questions(name, write(name, tmp_path / name))[0].item.question for name in TWELVE}
    orange, vet = "What is the orange thing?", "Describe the picture."
    unanswerable = "When the provided information is insufficient, respond with 'Unanswerable'."
    choices = "A. car\nB. fish"
    assert texts == {
        "vqav2": f"{orange}\n{SW}",
        "gqa": f"{orange}\n{SW}",
        "vizwiz": f"{orange}\n{unanswerable}\n{SW}",
        "scienceqa": f"Context: Look closely.\nQuestion: What is shown?\nOptions: (A) a car (B) a fish\n{MC}",
        "textvqa": f"{orange}\nReference OCR token: STOP, 7\n{SW}",
        "pope": f"Is there an orange car?\n{SW}",
        "mme": f"Is there an orange car?\n{SW}",
        "mmbench": f"Look, it drives.\nWhich thing is it?\n{choices}\n{MC}",
        "mmbench-cn": f"Look, it drives.\nWhich thing is it?\n{choices}\n请直接回答选项字母。",
        "seed": f"What is it?\n{choices}\nC. moon\nD. cup\n{MC}",
        "llava-wild": "What color is the car?",
        "mm-vet": vet,
    }


def test_llavas_own_textvqa_file_is_asked_word_for_word(tmp_path: Path) -> None:
    data = write("textvqa", tmp_path)
    row = {"question_id": "i0", "image": "i0.jpg", "text": f"what is the ORANGE thing?\nReference OCR token: X\n{SW}"}
    (data / "llava_textvqa_val_v051_ocr.jsonl").write_text(json.dumps(row) + "\n")
    first, second = load_questions("textvqa", data)
    assert first.item.question == row["text"]
    assert second.item.question == f"Is there a fish?\nReference OCR token: \n{SW}"


def test_a_prompt_without_ocr_tokens_says_so(tmp_path: Path) -> None:
    data = write("textvqa", tmp_path)
    (data / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    questions = load_questions("textvqa", data)
    notes = score_benchmark("textvqa", questions, ["car", "no"], data=str(data), progress=False).notes
    assert any("58.2 for the 7B, 46.1 without" in note for note in notes)


def test_the_table_says_where_harnesses_differ_and_drawn_twins_print_no_paper(tmp_path: Path) -> None:
    data = write("pope", tmp_path)
    questions = load_questions("pope", data)
    real = score_benchmark("pope", questions, ["Yes", "No"] * 6, data=str(data), progress=False)
    assert "its yes ratio is the truth's" in str(real.table())
    assert real.published["LLaVA-1.5 13B"]["F1 adversarial"] == 84.5
    drawn = score_benchmark("pope", load_questions("pope", n=1), ["Yes", "No"] * 3, data="picturebook", progress=False)
    assert drawn.published == {}
    assert "No number here compares" in str(drawn.table())


BROKEN = {
    "vqav2": ("v2_OpenEnded_mscoco_val2014_questions.json", '"question": "What', '"asked": "What', "row 1: lacks 'question'"),
    "gqa": ("testdev_balanced_questions.json", '"n1"', '"n7"', r"row 2 \(201\): no picture n7 in .*images"),
    "vizwiz": ("val.json", '"What does it say?"', "7", "row 2: 'question' must be text, got 7"),
    "scienceqa": ("problems.json", '"answer": 0', '"answer": 5', "problem 4: expected up to 5 choices"),
    "textvqa": ("TextVQA_0.5.1_val.json", '["car"', '[1, "car"', "row 1: 'answers' must be a list of texts"),
    "pope": ("coco_pope_popular.json", '"label": "no"', '"label": "maybe"', "row 2: 'label' must be one of 'yes', 'no'"),
    "mme": ("MME_Benchmark_release_version/existence/000000006040.txt", "\tNo", "", "row 2: expected a question, a tab"),
    "mmbench": ("mmbench_dev_20230712.tsv", "1000007\t", "one\t", "row 2: 'index' must be a whole number, got 'one'"),
    "mmbench-cn": ("mmbench_dev_cn_20231003.tsv", "\tB\tkinds", "\tE\tkinds", "row 2: 'answer' must be one of 'A', 'B'"),
    "seed": ("SEED-Bench.json", '"video"', '"sound"', "row 2: 'data_type' must be one of 'image', 'video'"),
    "llava-wild": ("questions.jsonl", '"detail"', '"details"', "row 2: 'category' must be one of"),
    "mm-vet": ("mm-vet.json", '["rec", "know"]', '"rec"', r"row 2 \(v1_1\): 'capability' must be a list of texts"),
}  # fmt: skip


@pytest.mark.parametrize("name", TWELVE)
def test_a_broken_file_is_refused_with_its_name_and_row(name: str, tmp_path: Path) -> None:
    data = write(name, tmp_path)
    file, old, new, message = BROKEN[name]
    text = (data / file).read_text("utf-8")
    assert old in text
    (data / file).write_text(text.replace(old, new), "utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_questions(name, data)
    assert Path(file).name in str(caught.value)


@pytest.mark.parametrize("name", TWELVE)
def test_an_empty_folder_says_what_is_needed(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no "):
        load_questions(name, tmp_path)


def test_what_does_not_go_together_is_refused(tiny, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no benchmark 'vqa'; the benchmarks are vqav2, gqa"):
        load_questions("vqa")
    with pytest.raises(DataError, match="TextVQA has no drawn twin"):
        load_questions("textvqa")
    with pytest.raises(DataError, match="CHAIR needs nothing: the truth is exact on drawn worlds"):
        load_questions("chair", tmp_path)
    with pytest.raises(OptionError, match="MM-Vet needs a judge"):
        benchmark(tiny, "mm-vet", data=write("mm-vet", tmp_path / "vet"))
    with pytest.raises(OptionError, match="POPE has no judge"):
        benchmark(tiny, "pope", n=1, judge=by_rule())
    with pytest.raises(OptionError, match="POPE has no file to send; --submission belongs to vqav2, gqa"):
        benchmark(tiny, "pope", n=1, submission=tmp_path / "x")
    with pytest.raises(DataError, match="no such file or folder"):
        load_questions("gqa", tmp_path / "none")


def test_a_test_split_without_answers_gives_its_submission_and_no_score(tiny, tmp_path: Path) -> None:
    data = write("vizwiz", tmp_path / "data")
    rows = [{"image": row["image"], "question": row["question"]} for row in json.loads((data / "val.json").read_text())]
    (data / "val.json").unlink()
    (data / "val").rename(data / "test")
    (data / "test.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"hold no right answers.*it is written to"):
        benchmark(tiny, "vizwiz", data=data, submission=tmp_path / "sent.json", controls=False, **QUICK)
    assert [row["image"] for row in json.loads((tmp_path / "sent.json").read_text())] == [row["image"] for row in rows]


def test_answers_of_llava_are_found_by_picture_and_prompt(tmp_path: Path) -> None:
    """Its files of MME give both questions about a picture one id."""
    questions = load_questions("mme", write("mme", tmp_path / "data"))
    rows = [{"question_id": f"{one.item.picture}.png", "prompt": one.item.question, "text": f"answer {i}"} for i, one in
            enumerate(questions)]  # fmt: skip
    path = tmp_path / "llava.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    assert read_answers(path, questions) == [f"answer {i}" for i in range(len(questions))]
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="llava.jsonl holds no answer to question"):
        read_answers(path, questions)


@pytest.mark.parametrize("name", [name for name, one in BENCHMARKS.items() if one.twin])
def test_every_twin_runs(name: str, tiny) -> None:
    scores = benchmark(tiny, name, n=2, controls=False, **QUICK)
    assert scores.about["questions"] >= 2
    assert scores.values[0] >= 0
    assert scores.published == {}


def test_what_ships_is_of_these_weights_with_intervals_and_controls(tiny) -> None:
    kept = shipped_scores("tiny")
    assert kept["fingerprint"] == tiny.fingerprint
    assert kept["command"].endswith("ship tiny")
    assert set(kept["scores"]) == {name for name, one in BENCHMARKS.items() if one.twin} | {"hallucination"}
    for name, scores in kept["scores"].items():
        for row in scores["measures"]:
            assert len(row["interval"]) == 2
            assert name == "hallucination" or set(row["controls"]) == {"blind", "shuffled"}
    again = benchmark(tiny, "chair", n=kept["scores"]["chair"]["about"]["pictures"], controls=False, progress=False)
    shown = {row["measure"]: row["value"] for row in kept["scores"]["chair"]["measures"]}
    assert dict(zip(again.measures, again.values.tolist(), strict=True)) == pytest.approx(shown, abs=1e-3)
    with pytest.raises(DataError, match="no benchmark scores ship with 'large'"):
        shipped_scores("large")


@pytest.mark.parametrize("name", ["smol", "photo"])
def test_what_ships_with_the_other_models_is_of_them_and_in_their_cards(name: str) -> None:
    kept = shipped_scores(name)
    assert kept["fingerprint"] == ll.load(name).fingerprint
    assert kept["command"].endswith(f"ship {name} 10")
    assert set(kept["scores"]) - {"hallucination"} == {one for one, benchmark in BENCHMARKS.items() if benchmark.twin}
    card = (shipped_place(name).parent / "README.md").read_text("utf-8").splitlines()
    for title, measure in (("POPE", "F1"), ("GQA", "accuracy"), ("LLaVA-Wild", "all")):
        row = next(row for row in kept["scores"][title.lower()]["measures"] if row["measure"] == measure)
        cells = next(line for line in card if line.startswith(f"| {title},")).split("|")
        blind, shuffled = (row["controls"][control]["value"] for control in ("blind", "shuffled"))
        assert [float(cells[column]) for column in (2, 4, 5)] == pytest.approx([row["value"], blind, shuffled], abs=0.051)

"""Rows come out as training reads them, whoever and however many made them; what is thrown away says why."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from llava_lab.errors import BudgetError, OptionError
from llava_lab.instructions import (
    KINDS,
    Context,
    RuleTeacher,
    ServerTeacher,
    Told,
    World,
    check_rows,
    estimate_generation,
    generate,
    read_jsonl,
)
from llava_lab.models.text import read_row
from llava_lab.results import Generated
from tests.support.endpoint_server import Answered, Asked, says, serving
from tests.support.training_rows import turn

PICTURES = 120  # three chunks of fifty


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "rows.json").read_text("utf-8"))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_row_is_one_that_training_reads_and_has_a_past(tmp_path: Path) -> None:
    made = generate(World(6), tmp_path, teacher=RuleTeacher(), kinds=KINDS, progress=False)
    rows, past = rows_of(tmp_path), lines_of(tmp_path / "provenance.jsonl")
    assert made.rows == len(rows) == len(past) == 24
    assert [row["id"] for row in rows] == [line["id"] for line in past]
    for row, line in zip(rows, past, strict=True):
        messages, picture = read_row(row)
        assert picture is not None
        assert (tmp_path / picture).is_file()
        assert len(messages) % 2 == 0
        assert row["made_by"] == line["made_by"]
    assert len({row["made_by"] for row in rows}) == len(rows)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "Terms of the teacher: rules of llava-lab" in card
    again = Generated.load(tmp_path / "truth.npz")
    assert str(again.table()) == str(made.table())
    assert again.to_dict() == made.to_dict()


def test_the_truth_s_report_follows_the_rate_of_lies(tmp_path: Path) -> None:
    honest, lying = (
        generate(World(40), tmp_path / str(lie), teacher=RuleTeacher(lie), kinds=["detail"], progress=False) for lie in (0.0, 0.5)
    )
    assert honest.shares()["false"] == honest.shares()["chair_i"] == 0
    assert honest.shares()["not told"] == 0
    assert honest.passing.sum() == honest.kept.sum()
    sentences = lying.chair[0, 3]
    false = sum(len(line["false"]) for line in lines_of(tmp_path / "0.5" / "provenance.jsonl"))
    assert 0.35 < false / sentences < 0.65


def test_false_rows_can_be_left_out(tmp_path: Path) -> None:
    kept = generate(World(30), tmp_path / "a", teacher=RuleTeacher(0.3), kinds=["detail"], progress=False)
    dropped = generate(World(30), tmp_path / "b", teacher=RuleTeacher(0.3), kinds=["detail"], drop_false=True, progress=False)
    assert 0 < dropped.rows == kept.passing.sum() < kept.rows
    assert {line["reason"] for line in lines_of(tmp_path / "b" / "rejected.jsonl")} == {"false"}
    assert not any(line["false"] for line in lines_of(tmp_path / "b" / "provenance.jsonl"))


class Slow(RuleTeacher):
    """Rules that take their time, so that workers overlap; notes who was asked."""

    def __init__(self, note: Path, pause: float) -> None:
        super().__init__()
        self.note, self.pause = note, pause

    def ask(self, kind, context, *, seed):  # type: ignore[no-untyped-def]
        with self.note.open("a") as file:
            file.write(f"{os.getpid()} {context.id}\n")
        time.sleep(self.pause)
        return super().ask(kind, context, seed=seed)


def work(out: str, note: str, pause: float) -> None:
    """One worker, in a process of its own."""
    generate(World(PICTURES), out, teacher=Slow(Path(note), pause), kinds=["detail"], progress=False)


@pytest.mark.long
def test_two_workers_and_one_that_was_killed_lose_and_double_nothing(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    generate(World(PICTURES), alone, teacher=RuleTeacher(), kinds=["detail"], progress=False)
    note, spawn = tmp_path / "note", multiprocessing.get_context("spawn")
    killed = spawn.Process(target=work, args=(str(shared), str(note), 0.05))
    killed.start()
    until = time.monotonic() + 200
    while not (shared / "work" / "chunk-0000000.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.02)
    killed.kill()
    killed.join()
    assert not (shared / "rows.json").exists()
    before = note.read_text()
    worker = spawn.Process(target=work, args=(str(shared), str(note), 0.05))
    worker.start()
    while note.read_text() == before and time.monotonic() < until:  # this process is the other: both are at work from here on
        time.sleep(0.02)
    work(str(shared), str(note), 0.05)
    worker.join(300)
    assert worker.exitcode == 0
    assert (shared / "rows.json").read_bytes() == (alone / "rows.json").read_bytes()
    asked = [line.split() for line in note.read_text().splitlines()]
    by = {pid: {name for who, name in asked if who == pid} for pid, _ in asked}
    first, *rest = by.values()
    assert len(by) == 3
    assert all(rest), "each worker made some"
    assert not rest[0] & rest[1], "two workers asked about one picture"
    assert len(first) < PICTURES
    assert [line["id"] for line in lines_of(shared / "provenance.jsonl")] == [row["id"] for row in rows_of(alone)]


def test_another_run_s_folder_is_refused(tmp_path: Path) -> None:
    generate(World(2), tmp_path, teacher=RuleTeacher(), progress=False)
    with pytest.raises(OptionError, match="begun with another teacher"):
        generate(World(2), tmp_path, teacher=RuleTeacher(0.1), progress=False)
    with pytest.raises(OptionError, match="begun with another contexts"):
        generate(World(3), tmp_path, teacher=RuleTeacher(), progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rows.json").write_text("[]")
    with pytest.raises(OptionError, match="holds rows that were not made here"):
        generate(World(2), tmp_path / "other", teacher=RuleTeacher(), progress=False)


class Parrot(RuleTeacher):
    """Says the same of every picture, but for its name where the text has a place for it."""

    text = "Question:\nIs it nice?\n===\nAnswer:\nYes, it is nice.\n===\n"

    def ask(self, kind, context, *, seed):  # type: ignore[no-untyped-def]
        return Told(self.text.replace("NAME", context.id))


def test_the_same_words_about_another_picture_are_a_duplicate(tmp_path: Path) -> None:
    made = generate(World(30), tmp_path, teacher=Parrot(), kinds=["conversation"], progress=False)
    assert len(rows_of(tmp_path)) == 1
    assert made.to_dict()["kinds"]["conversation"]["rejected"] == {"duplicate": 29}


def test_yes_does_not_outnumber_no_by_much(tmp_path: Path) -> None:
    parrot = Parrot()
    parrot.text = parrot.text.replace("nice.", "nice, and called NAME.")
    generate(World(30), tmp_path, teacher=parrot, kinds=["conversation"], progress=False)
    assert len(rows_of(tmp_path)) == 20
    assert [line["reason"] for line in lines_of(tmp_path / "rejected.jsonl")] == ["balance"] * 10


def test_what_cannot_be_read_is_counted_and_kept(tmp_path: Path) -> None:
    odd = Parrot()
    odd.text = "I would rather not."
    made = generate(World(2), tmp_path, teacher=odd, kinds=["conversation"], progress=False)
    assert made.rows == 0
    assert rows_of(tmp_path) == []
    assert made.to_dict()["kinds"]["conversation"]["rejected"] == {"format": 2}
    assert "I would rather not." in lines_of(tmp_path / "rejected.jsonl")[0]["answer"]


def test_rows_that_are_there_are_checked_as_those_made_here(tmp_path: Path) -> None:
    made = generate(World(12), tmp_path, teacher=RuleTeacher(0.5), kinds=["detail", "reasoning"], progress=False)
    checked = check_rows(tmp_path / "rows.json", World(12), progress=False)
    assert checked.kinds == made.kinds
    assert (checked.kept == made.kept).all()
    assert (checked.passing == made.passing).all()
    kept = list(lines_of(tmp_path / "provenance.jsonl"))
    assert checked.claims[..., 1].sum() == sum(counts[1] for line in kept for counts in line["claims"].values()) > 0
    fewer = check_rows(tmp_path / "rows.json", World(5), progress=False)
    assert fewer.rejected[:, fewer.reasons.index("no context")].sum() == made.rows - fewer.rows > 0


def test_rows_are_found_by_the_name_of_their_picture(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "There are three dogs and a cat."}]
    rows = [{"id": "1", "image": "000000000009.jpg", "conversations": said}, {"id": "2", "conversations": turn("Hi", "Hello.")}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    context = {
        "image": "train2014/COCO_train2014_000000000009.jpg",
        "boxes": [["dog", 0, 0, 1, 1]] * 2,
        "complete": ["dog", "cat"],
    }
    (tmp_path / "c.jsonl").write_text(json.dumps(context) + "\n")
    checked = check_rows(tmp_path / "rows.json", read_jsonl(tmp_path / "c.jsonl"), progress=False)
    assert checked.to_dict()["kinds"]["rows"]["rejected"] == {"text alone": 1}
    assert checked.claims.sum((0, 1)).tolist() == [1, 2, 0]  # dogs are there, not three; no cat
    assert checked.shares()["chair_i"] == 0.5


# -- a teacher behind a server -------------------------------------------------------------


def contexts(folder: Path, count: int) -> Path:
    path = folder / "contexts.jsonl"
    lines = [json.dumps({"image": f"{i}.jpg", "captions": [f"Dog number {i} runs."]}) + "\n" for i in range(count)]
    path.write_text("".join(lines))
    return path


def about_a_dog(asked: Asked) -> Answered:
    number = next(word for word in asked.body["messages"][-1]["content"].split() if word.isdecimal())
    return says(f"Question:\nWhich dog is it?\n===\nAnswer:\nIt is dog {number}.\n===\n")


def test_a_server_is_asked_once_for_each_row_and_a_spent_budget_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-long-secret-of-nobody")
    reader = read_jsonl(contexts(tmp_path, 5))
    with serving(about_a_dog) as server:
        teacher = ServerTeacher("a-model", server.base_url, max_requests=3, parallel=1)
        plan = estimate_generation(reader, teacher, ["conversation"])
        assert (plan.requests, plan.left) == (5, 3)
        with pytest.raises(BudgetError, match="all 3 requests are spent"):
            generate(reader, tmp_path / "out", teacher=teacher, kinds=["conversation"], progress=False)
        assert len(server.asked) == 3
        more = ServerTeacher("a-model", server.base_url, max_requests=3, parallel=2)
        made = generate(reader, tmp_path / "out", teacher=more, kinds=["conversation"], progress=False)
        assert len(server.asked) == 5
    assert made.rows == 5
    assert made.used == (500, 60)  # what the server says of each: 100 read, 12 written
    roles = [message["role"] for message in server.asked[0].body["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert all("image_url" not in json.dumps(asked.body) for asked in server.asked)
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"sk-a-long-secret" not in path.read_bytes(), path
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "forbid using answers to train models that compete" in card


def test_the_estimate_is_of_texts_and_price(tmp_path: Path) -> None:
    reader = read_jsonl(contexts(tmp_path, 4))
    teacher = ServerTeacher("m", "http://127.0.0.1:9/v1", max_requests=9, price=(1.0, 2.0))
    plan = estimate_generation(reader, teacher, ["detail", "brief"])
    assert plan.requests == 4
    assert plan.written == 4 * 500
    assert plan.cost == pytest.approx((plan.read + 2 * plan.written) / 1e6, rel=1e-6)
    assert "the budget allows 9 requests" in str(plan)


def test_a_rule_teacher_reads_boxes_too(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    boxes = [["dog", 0.0, 0.0, 0.3, 0.5], ["dog", 0.1, 0.5, 0.3, 0.9], ["cat", 0.7, 0.1, 0.9, 0.9]]
    path.write_text(
        json.dumps({"image": "a.jpg", "captions": ["Two dogs and a cat."], "boxes": boxes, "complete": ["dog", "cat", "bus"]})
    )
    honest = generate(read_jsonl(path), tmp_path / "a", teacher=RuleTeacher(), progress=False)
    lying = generate(read_jsonl(path), tmp_path / "b", teacher=RuleTeacher(1.0), progress=False)
    assert honest.claims[..., 1].sum() == 0 < honest.claims[..., 0].sum()
    assert lying.claims[..., 1].sum() >= 5


def test_rules_are_the_same_for_the_same_seed_and_lies_change_answers_only() -> None:
    from llava_lab.instructions import read_kinds

    kind = read_kinds(["conversation"])["conversation"]
    context: Context = next(iter(World(1)))
    one, two, lying = (RuleTeacher(lie).ask(kind, context, seed=3).text for lie in (0, 0, 1))
    assert one == two != lying
    assert one.split("Answer:")[0] == lying.split("Answer:")[0]
    assert RuleTeacher().ask(kind, context, seed=4).text != one
    with pytest.raises(OptionError, match="lie must be a share from 0 to 1, got 2"):
        RuleTeacher(2)

"""A judge behind an address: asked by the benchmarks' own prompts, recorded with the scores, paid for once."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_lab.errors import BudgetError, EndpointError, OptionError
from llava_lab.evaluation.benchmarks import load_questions, score_benchmark
from llava_lab.remote import open_judge
from tests.support.benchmark_files import write
from tests.support.endpoint_server import Asked, says, serving


def test_a_judge_grades_is_recorded_and_is_asked_once(tmp_path: Path) -> None:
    questions = load_questions("llava-wild", write("llava-wild", tmp_path / "data"))

    def answer(asked: Asked):
        return says("10 5\nShort." if "[Assistant 2]\nno\n" in asked.body["messages"][1]["content"] else "8 8\nAlike.")

    with serving(answer) as server:
        judge = open_judge("grader-1", server.base_url, cache=tmp_path / "replies")
        for _ in range(2):
            scores = score_benchmark(
                "llava-wild", questions, ["no", "A large orange car."], judge=judge, data="d", progress=False
            )
        assert len(server.asked) == 2  # the second time everything is known
        body = server.asked[0].body
    assert scores.at("all")["value"] == pytest.approx(100 * (5 + 8) / (10 + 8))
    assert scores.about["judge"] == {"name": "grader-1", "base_url": judge.about["base_url"], "kind": "chat completions"}
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("grader-1", 0.2, 1024)


def test_replies_without_scores_are_counted_as_llava_counts_them(tmp_path: Path) -> None:
    questions = load_questions("llava-wild", write("llava-wild", tmp_path / "data"))
    with serving(lambda asked: says("I cannot say")) as server:
        judge = open_judge("grader-1", server.base_url, cache=False)
        scores = score_benchmark("llava-wild", questions, ["a", "b"], judge=judge, data="d", progress=False)
    assert scores.at("all")["n"] == 2
    assert "2 of 2 replies of the judge held no score." in scores.notes


def test_a_judge_has_a_budget_and_says_why_it_is_silent(tmp_path: Path) -> None:
    questions = load_questions("mm-vet", write("mm-vet", tmp_path / "data"))
    with serving(lambda asked: says("0.5")) as server:
        judge = open_judge("grader-1", server.base_url, max_requests=1, cache=False)
        with pytest.raises(BudgetError):
            score_benchmark("mm-vet", questions, ["a", "b"], judge=judge, data="d", progress=False)
    with serving(lambda asked: says("", finish="length")) as server:
        judge = open_judge("grader-1", server.base_url, cache=False)
        with pytest.raises(EndpointError, match="the judge gave no grade: it was cut off"):
            score_benchmark("mm-vet", questions, ["a", "b"], judge=judge, data="d", progress=False)
    with pytest.raises(OptionError, match="a judge has a name"):
        open_judge(" ", "http://127.0.0.1:1/v1")

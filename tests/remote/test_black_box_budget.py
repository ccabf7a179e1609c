"""Requests are counted before they are sent, never beyond the budget, and what was paid for is never asked again."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.errors import BudgetError, EndpointError, OptionError
from llava_lab.remote import client as endpoint
from tests.support.endpoint_server import Answered, Asked, open_box, says, serving, weighing

PLAIN = np.full((36, 36, 3), (220, 30, 30), np.uint8)
ROUGH = np.random.default_rng(0).choice(np.array([20, 60, 240], np.uint8), (36, 36, 3))
WEIGHTS = np.arange(9.0).reshape(3, 3) / 9
QUESTION = "What is it?"


@pytest.mark.parametrize(("method", "options"), [
    ("occlusion", {}), ("occlusion", {"block": 2, "stride": 1, "fill": "mean"}), ("rise", {"masks": 12}),
    ("shapley", {"orders": 2, "regions": 4}), ("kernel_shap", {"samples": 12, "regions": 4}), ("center", {}),
])  # fmt: skip
def test_an_estimate_is_what_is_sent(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    with serving(weighing(WEIGHTS, PLAIN)) as server:
        box = open_box(server, tmp_path, price=(2.0, 10.0))
        run = box.ask(PLAIN, QUESTION)
        wanted = ll.estimate(box, run, method=method, target="red", **options)
        assert len(server.asked) == 1
        ll.attribute(box, run, method=method, target="red", **options)
        assert len(server.asked) == 1 + wanted.requests
    assert wanted.tokens == (100 * wanted.requests, 3 * wanted.requests)
    assert wanted.cost == pytest.approx(wanted.requests * 230e-6)
    assert str(wanted).startswith(f"{wanted.requests} requests to send, 0 known already, 499 left")
    assert box.cost is not None


def test_what_the_budget_cannot_pay_is_refused_before_it_starts(tmp_path: Path) -> None:
    with serving(weighing(WEIGHTS, ROUGH)) as server:
        box = open_box(server, tmp_path, max_requests=10)
        run = box.ask(ROUGH, QUESTION)
        with pytest.raises(BudgetError, match="needs 10 requests and 9 of max_requests=10 are left; raise it"):
            ll.attribute(box, run, method="occlusion", target="red")
        rel = ll.attribute(box, run, method="occlusion", target="red", block=3)
        with pytest.raises(BudgetError, match="fewer masks"):
            ll.faithfulness(box, run, rel)
        assert len(server.asked) == 3


def test_a_budget_spent_on_retries_keeps_what_was_paid_for_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    answer = weighing(WEIGHTS, PLAIN)

    def now_and_then(asked: Asked) -> Answered:
        return Answered({}, 503) if len(server.asked) in (3, 5, 6) else answer(asked)

    with serving(now_and_then) as server:
        box = open_box(server, tmp_path, max_requests=11, parallel=1)
        run = box.ask(PLAIN, QUESTION)
        with pytest.raises(BudgetError, match="all 11 requests are spent; every reply is kept"):
            ll.attribute(box, run, method="occlusion", target="red")
        assert len(server.asked) == 11
        box.max_requests = 20
        assert ll.estimate(box, run, method="occlusion", target="red").known == 7
        rel = ll.attribute(box, run, method="occlusion", target="red")
    np.testing.assert_allclose(rel.values[0], WEIGHTS, atol=1e-6)
    assert len(server.asked) == 14  # ten looks, one question, three failures


def test_replies_are_kept_for_the_next_process_but_not_for_another_question(tmp_path: Path) -> None:
    with serving(weighing(WEIGHTS, PLAIN)) as server:
        box = open_box(server, tmp_path)
        first = ll.attribute(box, box.ask(PLAIN, QUESTION), method="occlusion")
        sent = len(server.asked)
        again = open_box(server, tmp_path, max_requests=1)
        second = ll.attribute(again, again.ask(PLAIN, QUESTION), method="occlusion")
        assert (len(server.asked), again.endpoint.requests) == (sent, 0)
        again.ask(PLAIN, "And now?")
        changed = PLAIN.copy()
        changed[0, 0, 0] -= 1
        open_box(server, tmp_path).ask(changed, QUESTION)
        open_box(server, tmp_path, cache=False).ask(PLAIN, QUESTION)
    assert np.array_equal(first.values, second.values)
    assert len(server.asked) == sent + 3


def test_damaged_files_are_asked_for_again_and_no_half_file_is_left(tmp_path: Path) -> None:
    with serving(lambda asked: says("a red car", own=-0.5)) as server:
        open_box(server, tmp_path).ask(PLAIN, QUESTION)
        (file,) = (tmp_path / "replies").rglob("*.*")
        whole = file.read_text("utf-8")
        file.write_text(whole[:20], "utf-8")
        assert open_box(server, tmp_path).ask(PLAIN, QUESTION).answer == "a red car"
    assert len(server.asked) == 2
    assert [one.read_text("utf-8") for one in (tmp_path / "replies").rglob("*.*")] == [whole]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "replies").write_text("a file", "utf-8")
    with serving(lambda asked: says("yes")) as server, pytest.raises(EndpointError, match="give cache=FOLDER, or cache=False"):
        open_box(server, tmp_path).ask(PLAIN, QUESTION)


def test_requests_go_in_parallel_but_no_more_than_allowed(tmp_path: Path) -> None:
    answer, lock = weighing(WEIGHTS, PLAIN), threading.Lock()
    busy, most = [0], [0]

    def slowly(asked: Asked) -> Answered:
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.05)
        with lock:
            busy[0] -= 1
        return answer(asked)

    maps = []
    for parallel in (1, 3):
        most[0] = 0
        with serving(slowly) as server:
            box = open_box(server, tmp_path / str(parallel), parallel=parallel)
            maps.append(ll.attribute(box, box.ask(PLAIN, QUESTION), method="occlusion", target="red"))
        assert most[0] == parallel
    assert np.array_equal(maps[0].values, maps[1].values)


def test_an_interrupt_keeps_the_blocks_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(weighing(WEIGHTS, PLAIN)) as server:
        box = open_box(server, tmp_path)
        run, replies, calls = box.ask(PLAIN, QUESTION), box.replies, []

        def stopped(looks: Any) -> Any:
            calls.append(len(looks))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return replies(looks)

        monkeypatch.setattr(box, "replies", stopped)
        rel = ll.attribute(box, run, method="occlusion", target="red", batch=3)
    np.testing.assert_allclose(rel.values[0, 0], WEIGHTS[0], atol=1e-6)
    assert any("Interrupted after 3 of 9 blocks" in note for note in rel.notes)


def test_an_estimate_is_for_closed_models_only() -> None:
    with pytest.raises(OptionError, match="closed models"):
        ll.estimate(object(), object())  # type: ignore[arg-type]

"""A closed model is asked in the protocol within its budget, and refuses in one line what looks inside."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.attribution.registry import works_at
from llava_lab.errors import BudgetError, EndpointError, LabError, OptionError
from llava_lab.remote import client
from tests.support.endpoint_server import (
    PLAIN,
    QUESTION,
    ROUGH,
    Answered,
    Asked,
    a_red_car,
    closed,
    open_box,
    says,
    serving,
    weighing,
)

WEIGHTS = np.arange(9.0).reshape(3, 3) / 9


def test_asks_in_the_protocol_with_the_picture_unharmed(tmp_path: Path, picture: np.ndarray) -> None:
    with serving(a_red_car) as server:
        run = open_box(server, tmp_path, grid=(2, 3)).ask(picture, QUESTION, max_new_tokens=9, seed=4)
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions"
    assert np.array_equal(asked.picture, picture)
    kinds = [part["type"] for part in asked.body["messages"][0]["content"]]
    assert (kinds, asked.question) == (["image_url", "text"], QUESTION)
    wanted = {"model": "scripted", "max_tokens": 9, "temperature": 0, "seed": 4, "logprobs": True, "top_logprobs": 20}
    assert {name: asked.body[name] for name in wanted} == wanted
    assert run.answer == "a red car"
    assert [run.tokens[i] for i in run.answer_positions] == ["a", " red", " car"]
    assert [(word.text, word.stop - word.start) for word in run.words] == [("a", 1), ("red", 1), ("car", 1)]
    assert run.logprobs.tolist() == [-0.5] * 3
    assert len(run.image_positions) == 6
    assert run.map.seen_box == (0, 0, 60, 40)  # nothing cut off, nothing added
    assert run.map.coverage().min() == pytest.approx(1)
    assert run.map.patch_box(1, 2) == pytest.approx((40, 20, 60, 40))


def test_a_run_is_saved_and_loaded_exactly(tmp_path: Path) -> None:
    with serving(a_red_car) as server:
        run = open_box(server, tmp_path).ask(PLAIN, QUESTION)
    back = ll.Run.load(run.save(tmp_path / "run.npz"))
    assert (back.tokens, back.words, back.map, back.options) == (run.tokens, run.words, run.map, run.options)
    assert np.array_equal(back.token_ids, run.token_ids)


def test_earlier_turns_and_system_text_are_sent_in_their_order(tmp_path: Path) -> None:
    with closed(a_red_car, tmp_path, system="Be brief.") as (server, box):
        run = box.ask(PLAIN, QUESTION, history=[("Is it old?", "No.")])
        ll.attribute(box, run, method="occlusion", target="red", block=3)
    for asked in server.asked:
        turns = [(one["role"], one["content"] if isinstance(one["content"], str) else one["content"][-1]["text"])
                 for one in asked.body["messages"]]  # fmt: skip
        assert turns == [("system", "Be brief."), ("user", "Is it old?"), ("assistant", "No."), ("user", QUESTION)]


@pytest.mark.parametrize(("pictures", "said"), [(None, "none"), ([PLAIN, PLAIN], "2")])
def test_none_and_several_pictures_are_refused_before_anything_is_sent(tmp_path: Path, pictures: Any, said: str) -> None:
    with closed(a_red_car, tmp_path) as (server, box):
        with pytest.raises(OptionError, match=f"is asked about one picture at a time, got {said}"):
            box.ask(pictures, QUESTION)
        assert box.ask([PLAIN], QUESTION).answer == box.ask(PLAIN, QUESTION).answer
    assert len(server.asked) == 1


def test_a_large_picture_is_sent_smaller_and_mapped_on_the_original(tmp_path: Path) -> None:
    large = np.zeros((300, 600, 3), np.uint8)
    with serving(a_red_car) as server:
        run = open_box(server, tmp_path, longest=100).ask(large, QUESTION)
    assert server.asked[0].picture.shape == (50, 100, 3)
    assert (run.map.width, run.map.height) == (600, 300)


def test_log_probabilities_that_do_not_spell_the_answer_are_not_used(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Answered:
        reply = a_red_car(asked)
        reply.data["choices"][0]["message"]["content"] = "quite another answer"
        return reply

    with serving(answer) as server:
        run = open_box(server, tmp_path).ask(PLAIN, QUESTION)
        assert run.options["scoring"] == "agreement"
        with pytest.raises(LabError, match="gives no log-probabilities"):
            open_box(server, tmp_path, scoring="top").ask(PLAIN, QUESTION)


def test_what_the_budget_cannot_pay_is_refused_before_it_starts(tmp_path: Path) -> None:
    with closed(weighing(WEIGHTS, ROUGH), tmp_path, max_requests=10) as (server, box):
        run = box.ask(ROUGH, QUESTION)
        with pytest.raises(BudgetError, match="needs 10 requests and 9 of max_requests=10 are left; raise it"):
            ll.attribute(box, run, method="occlusion", target="red")
        rel = ll.attribute(box, run, method="occlusion", target="red", block=3)
        with pytest.raises(BudgetError, match="fewer masks"):
            ll.faithfulness(box, run, rel)
        assert len(server.asked) == 3


def test_a_budget_spent_on_retries_keeps_what_was_paid_for_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    answer = weighing(WEIGHTS, PLAIN)

    def now_and_then(asked: Asked) -> Answered:
        return Answered({}, 503) if len(server.asked) in (3, 5, 6) else answer(asked)

    with closed(now_and_then, tmp_path, max_requests=11, parallel=1) as (server, box):
        run = box.ask(PLAIN, QUESTION)
        with pytest.raises(BudgetError, match="all 11 requests are spent; every reply is kept"):
            ll.attribute(box, run, method="occlusion", target="red")
        assert len(server.asked) == 11
        box.max_requests = 20
        assert ll.estimate(box, run, method="occlusion", target="red").known == 7
        rel = ll.attribute(box, run, method="occlusion", target="red")
    np.testing.assert_allclose(rel.values[0], WEIGHTS, atol=1e-6)
    assert len(server.asked) == 14  # ten looks, one question, three failures


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
        with closed(slowly, tmp_path / str(parallel), parallel=parallel) as (_, box):
            maps.append(ll.attribute(box, box.ask(PLAIN, QUESTION), method="occlusion", target="red"))
        assert most[0] == parallel
    assert np.array_equal(maps[0].values, maps[1].values)


def test_an_interrupt_keeps_the_blocks_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed(weighing(WEIGHTS, PLAIN), tmp_path) as (_, box):
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


def test_an_error_in_the_middle_keeps_what_came_before(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Answered:
        return a_red_car(asked) if len(server.asked) <= 5 or mended else Answered({"error": {"message": "oh"}}, 401)

    mended: list[bool] = []
    with closed(answer, tmp_path, parallel=1) as (server, box):
        run = box.ask(PLAIN, QUESTION)
        with pytest.raises(EndpointError, match="answered 401"):
            ll.attribute(box, run, method="occlusion", target="red")
        sent = len(server.asked)
        mended.append(True)
        ll.attribute(box, run, method="occlusion", target="red")
    assert sent == 6  # the question, four looks, and the one that failed
    assert len(server.asked) == sent + 6  # ten looks in all


def test_every_method_that_looks_inside_is_refused_before_it_starts(tmp_path: Path) -> None:
    with closed(a_red_car, tmp_path) as (server, box):
        run = box.ask(PLAIN, QUESTION)
        for method in ll.METHODS.keys() - set(works_at("pixels")):
            with pytest.raises(OptionError, match=f"{method!r} looks inside.*occlusion, rise") as refused:
                ll.attribute(box, run, method=method)
            assert "\n" not in str(refused.value)
        with pytest.raises(OptionError, match="at must be 'pixels'"):
            ll.attribute(box, run, method="occlusion", at="projector")
        assert len(server.asked) == 1


@pytest.mark.parametrize("look", [
    lambda box, run: ll.logit_lens(box, run), lambda box, run: ll.head_maps(box, run), lambda box, run: ll.compare(box, run),
    lambda box, run: ll.nearest_words(box, run), lambda box, run: ll.sanity(box, run, "occlusion"),
    lambda box, run: ll.knockout(box, run, source="image", target="last"), lambda box, run: ll.image_share(box, run),
])  # fmt: skip
def test_whatever_else_looks_inside_says_what_works(tmp_path: Path, look: Any) -> None:
    with closed(a_red_car, tmp_path) as (server, box):
        run = box.ask(PLAIN, QUESTION)
        with pytest.raises(LabError, match="with a closed model work ask"):
            look(box, run)
        assert len(server.asked) == 1


def test_controls_that_run_no_model_send_nothing(tmp_path: Path) -> None:
    with closed(a_red_car, tmp_path) as (server, box):
        run = box.ask(PLAIN, QUESTION)
        assert [ll.attribute(box, run, method=name).grid for name in ("random", "center", "edges")] == [(3, 3)] * 3
        assert len(server.asked) == 1


def test_a_run_of_another_address_or_system_text_is_refused(tmp_path: Path) -> None:
    with serving(a_red_car) as server:
        run = open_box(server, tmp_path).ask(PLAIN, QUESTION)
        other = open_box(server, tmp_path, system="Lie.")
        with pytest.raises(LabError, match="ask again"):
            ll.attribute(other, run, method="occlusion")


def test_patches_can_be_taken_away_and_the_question_asked_again(tmp_path: Path) -> None:
    with closed(lambda asked: says("nothing") if (asked.picture == 128).all(-1).any() else a_red_car(asked), tmp_path) as (
        _,
        box,
    ):
        assert ll.ask_without(box, box.ask(PLAIN, QUESTION), [(1, 1)]).answer == "nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 12}, "grid must be"),
        ({"grid": (0, 3)}, "grid must be"),
        ({"scoring": "echo"}, "'auto', 'top', 'prefill', 'agreement'"),
        ({"floor": 1.0}, "below 0"),
        ({"price": 3}, "per million"),
        ({"parallel": 0}, "parallel must be"),
        ({"repeats": True}, "repeats must be"),
        ({"timeout": 0}, "timeout must be"),
        ({"patience": 3}, "no option 'patience'.*ts options are base_url, grid"),
        ({"base_url": ""}, "needs base_url"),
        ({"base_url": "example.org/v1"}, "must be an address"),
        ({"device": "cpu"}, "server's own"),
        ({"base_url": "http://me:secret@example.org/v1"}, "no user, password"),
        ({"base_url": "https://example.org/v1?key=secret"}, "no user"),
    ],
)
def test_options_are_checked_before_anything_is_sent(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as refused:
        ll.load("openai:gpt", **{"base_url": "http://127.0.0.1:9/v1", "cache": False, **options})
    assert "secret" not in str(refused.value)


def test_options_of_a_server_are_refused_for_a_model_of_ones_own() -> None:
    with pytest.raises(OptionError, match="base_url belong to a model behind a server"):
        ll.load("tiny", base_url="http://127.0.0.1:9/v1")

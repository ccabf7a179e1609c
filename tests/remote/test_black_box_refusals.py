"""What a closed model cannot do is refused in one line that says what works, and options are checked first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.attribution.registry import works_at
from llava_lab.errors import LabError, OptionError
from tests.support.endpoint_server import Answered, Asked, open_box, says, serving

PLAIN = np.full((36, 36, 3), (220, 30, 30), np.uint8)
QUESTION = "What is it?"


def yes(asked: Asked) -> Answered:
    return says("a red car", own=-0.5)


def test_every_method_that_looks_inside_is_refused_before_it_starts(tmp_path: Path) -> None:
    with serving(yes) as server:
        box = open_box(server, tmp_path)
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
    with serving(yes) as server:
        box = open_box(server, tmp_path)
        run = box.ask(PLAIN, QUESTION)
        with pytest.raises(LabError, match="with a closed model work ask"):
            look(box, run)
        assert len(server.asked) == 1


def test_controls_that_run_no_model_send_nothing(tmp_path: Path) -> None:
    with serving(yes) as server:
        box = open_box(server, tmp_path)
        run = box.ask(PLAIN, QUESTION)
        assert [ll.attribute(box, run, method=name).grid for name in ("random", "center", "edges")] == [(3, 3)] * 3
        assert len(server.asked) == 1


def test_a_run_of_another_address_or_system_text_is_refused(tmp_path: Path) -> None:
    with serving(yes) as server:
        run = open_box(server, tmp_path).ask(PLAIN, QUESTION)
        other = open_box(server, tmp_path, system="Lie.")
        with pytest.raises(LabError, match="ask again"):
            ll.attribute(other, run, method="occlusion")


def test_patches_can_be_taken_away_and_the_question_asked_again(tmp_path: Path) -> None:
    with serving(lambda asked: says("nothing") if (asked.picture == 128).all(-1).any() else yes(asked)) as server:
        box = open_box(server, tmp_path)
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
        ({"patience": 3}, "no option 'patience'; its options are base_url, grid"),
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

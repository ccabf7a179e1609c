"""Work spread over processes: each piece once, with the model's own weights, and the same leaderboard either way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_lab as ll
from llava_lab.errors import OptionError
from llava_lab.judging.leaderboard import spread
from llava_lab.models import Lab


def _piece(lab: Lab, index: int) -> tuple[int, str]:
    return os.getpid(), f"{lab.fingerprint} {index} {lab.tokenizer.decode([5 + index])}"


def _failing(lab: Lab, index: int) -> None:
    raise OptionError(f"piece {index} cannot be done")


def test_several_processes_find_what_one_finds(tiny_random: Lab) -> None:
    alone = dict(spread(tiny_random, _piece, range(4)))
    shared = dict(spread(tiny_random, _piece, range(4), workers=2))
    assert {pid for pid, _ in alone.values()} == {os.getpid()}
    assert os.getpid() not in {pid for pid, _ in shared.values()}
    assert {i: text for i, (_, text) in shared.items()} == {i: text for i, (_, text) in alone.items()}


def test_an_error_of_a_piece_is_the_callers(tiny_random: Lab) -> None:
    with pytest.raises(OptionError, match="piece 1 cannot be done|piece 0 cannot be done"):
        list(spread(tiny_random, _failing, range(2), workers=2))


def test_no_workers_and_workers_on_a_gpu_are_refused(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="workers"):
        list(spread(tiny_random, _piece, range(2), workers=0))
    monkeypatch.setattr(Lab, "device", torch.device("meta"))
    with pytest.raises(OptionError, match="on meta, so leave workers at 1"):
        list(spread(tiny_random, _piece, range(2), workers=2))


def test_a_leaderboard_shared_by_two_is_the_same_table(tmp_path: Path) -> None:
    lab = ll.load("tiny")
    settings: dict[str, Any] = {"methods": ["attention", "random"], "n": 2, "steps": 2, "seeds": 2, "progress": False}
    alone = ll.leaderboard(lab, **settings)
    shared = ll.leaderboard(lab, workers=2, out=tmp_path / "board.jsonl", **settings)
    for method in ("attention", "random"):
        one, two = (board.at(method, "deletion") for board in (alone, shared))
        assert one["mean"] == pytest.approx(two["mean"], abs=1e-5)
    assert len((tmp_path / "board.jsonl").read_text("utf-8").splitlines()) == 3

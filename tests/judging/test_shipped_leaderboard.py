"""The shipped leaderboard opens for its own weights only, and a missing or foreign one says how to compute another."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import llava_lab as ll
from llava_lab.errors import LabError
from llava_lab.models import Lab
from llava_lab.shipped import ASSETS, Shipped
from tests.support.score_examples import example_board

shipped = importlib.import_module("llava_lab.judging.leaderboard")  # the module: its package gives the function of that name


@pytest.fixture
def shelf(tiny_random: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that counts as the one `tiny_random` ships in."""
    monkeypatch.setattr(shipped, "MODELS", MappingProxyType({tiny_random.name: Shipped(tmp_path, knows="")}))
    return tmp_path


def _board(fingerprint: str) -> Any:
    board = example_board()
    return replace(board, about={**board.about, "fingerprint": fingerprint})


def test_it_opens_for_the_weights_it_was_computed_on(tiny_random: Lab, shelf: Path) -> None:
    _board(tiny_random.fingerprint).save(shelf / shipped.FILE)
    board = ll.shipped_leaderboard(tiny_random)
    assert board.methods == example_board().methods
    assert board.about["fingerprint"] == tiny_random.fingerprint


def test_one_of_other_weights_is_refused(tiny_random: Lab, shelf: Path) -> None:
    _board("0123").save(shelf / shipped.FILE)
    wanted = f"of weights 0123, and '{tiny_random.name}' now has {tiny_random.fingerprint}; compute one with: llava-lab compare"
    with pytest.raises(LabError, match=wanted) as refused:
        ll.shipped_leaderboard(tiny_random)
    assert "\n" not in str(refused.value)


def test_a_model_without_one_hears_how_to_compute_it(tiny_random: Lab, shelf: Path) -> None:
    wanted = f"no leaderboard ships with '{tiny_random.name}'; compute one with: llava-lab compare --model {tiny_random.name} "
    with pytest.raises(LabError, match=wanted):
        ll.shipped_leaderboard(tiny_random)
    shelf.rmdir()
    with pytest.raises(LabError, match=wanted):
        ll.shipped_leaderboard(tiny_random)


@pytest.mark.parametrize("name", ["tiny", "photo"])
def test_the_shipped_ones_are_of_the_shipped_weights_and_their_cards_say_what_they_hold(name: str) -> None:
    board = ll.shipped_leaderboard(ll.load(name))
    assert board.about["model"] == name
    card = (ASSETS / name / "README.md").read_text("utf-8")
    for method in board.methods:
        gain = board.at(method, "gain")
        low, high = gain["interval"]
        assert f"| {method} | {gain['mean']:.2f} ({low:.2f} to {high:.2f}) |" in card, method

"""Asking again without patches: covers what was chosen and nothing else, asks the same way, and changes answers it should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.interventions.ablate import cover
from llava_lab.models import Lab
from llava_lab.replay.fills import FILLS
from tests.support.planted import planted_lab, red_picture


@pytest.fixture(scope="module")
def planted() -> Lab:
    return planted_lab()


def test_only_the_chosen_patches_change_and_the_runs_own_picture_does_not(planted: Lab) -> None:
    picture = red_picture(128, 128, (32, 64, 48, 80))  # 8x8 patches of 16 pixels: row 4, column 2
    run = planted.ask(picture, "What is it?", max_new_tokens=1)
    covered = cover(run, [(4, 2), (0, 7)])
    changed = (covered != picture).any(2)
    expected = np.zeros((128, 128), bool)
    expected[64:80, 32:48] = expected[0:16, 112:128] = True
    assert not (changed & ~expected).any()
    assert (covered[expected] == 128).all()
    np.testing.assert_array_equal(run.picture, picture)


@pytest.mark.parametrize(("fit", "box"), [("pad", (96, 0, 128, 32)), ("crop", (80, 0, 96, 16))])
def test_patches_are_found_on_a_wide_picture(planted: Lab, fit: str, box: tuple[int, int, int, int]) -> None:
    """256x128: padded, patches are 32 pixels and the picture starts in row 2; cropped, 16 pixels from column 64."""
    run = planted.ask(red_picture(256, 128, (96, 0, 112, 16)), "What is it?", max_new_tokens=1, fit=fit)
    patch = (2, 3) if fit == "pad" else (0, 1)
    left, top, right, bottom = box
    covered = cover(run, [patch])
    assert (covered[top:bottom, left:right] == 128).all()
    assert (covered == 128).all(2).sum() - (run.picture == 128).all(2).sum() <= (right - left) * (bottom - top)


def test_without_its_red_patch_the_planted_model_no_longer_says_red(planted: Lab) -> None:
    run = planted.ask(red_picture(128, 128, (32, 64, 48, 80)), "What is it?", max_new_tokens=1)
    assert run.answer == "red"
    again = ll.ask_without(planted, run, [(4, 2)])
    elsewhere = ll.ask_without(planted, run, [(1, 5)])
    assert elsewhere.answer == "red"
    assert float(np.exp(again.logprobs[0])) < 0.5 * float(np.exp(elsewhere.logprobs[0]))
    np.testing.assert_array_equal(again.picture, cover(run, [(4, 2)]))


def test_it_is_asked_the_same_way(tiny_random: Lab, picture: np.ndarray) -> None:
    run = tiny_random.ask(picture, "What?", max_new_tokens=3, temperature=0.7, seed=5, prompt="hf", fit="crop")
    again = ll.ask_without(tiny_random, run, [(1, 1)], fill="blur")
    assert (again.question, again.prompt, again.seed, again.map) == (run.question, run.prompt, run.seed, run.map)
    assert {**again.options, "stopped": ""} == {**run.options, "stopped": ""}


@pytest.mark.parametrize("fill", FILLS)
def test_every_fill_takes_the_red_away(planted: Lab, fill: str) -> None:
    run = planted.ask(red_picture(128, 128, (32, 64, 48, 80)), "What is it?", max_new_tokens=1)
    covered = cover(run, [(4, 2)], fill=fill)[64:80, 32:48].astype(int)
    assert (covered[..., 0] - covered[..., 1]).max() < 60


def test_earlier_turns_are_asked_for_and_used(tiny_random: Lab, picture: np.ndarray) -> None:
    turns = [("What is it?", "A car.")]
    run = tiny_random.ask(picture, "What color?", max_new_tokens=2, history=turns)
    with pytest.raises(OptionError, match="give them again as history="):
        ll.ask_without(tiny_random, run, [(0, 0)])
    assert ll.ask_without(tiny_random, run, [(0, 0)], history=turns).prompt == run.prompt


@pytest.mark.parametrize(
    ("patches", "options", "message"),
    [
        ([], {}, "expected at least one"),
        ([(0, 4)], {}, "rows 0 to 3 and columns 0 to 3, got \\(0, 4\\)"),
        ([(-1, 0)], {}, "got \\(-1, 0\\)"),
        ([(0, 0)], {"fill": "gray"}, "fill must be one of 'grey', 'mean', 'blur', got 'gray'"),
    ],
)
def test_what_cannot_be_covered_is_refused(
    tiny_random: Lab, picture: np.ndarray, patches: list[tuple[int, int]], options: dict[str, Any], message: str
) -> None:
    run = tiny_random.ask(picture, "What?", max_new_tokens=1)
    with pytest.raises(OptionError, match=message):
        ll.ask_without(tiny_random, run, patches, **options)


def test_another_checkpoints_run_is_refused(tiny_random: Lab, picture: np.ndarray) -> None:
    run = replace(tiny_random.ask(picture, "What?", max_new_tokens=1), fingerprint="other")
    with pytest.raises(CheckpointError, match="with other weights; ask again"):
        ll.ask_without(tiny_random, run, [(0, 0)])

"""Steering and erasing: the states move by exactly what was asked, the planted verdict follows, side effects are reported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llava_lab.capture import undisturbed
from llava_lab.capture.residual import watch_stream
from llava_lab.errors import OptionError
from llava_lab.interventions import erase, erased, mean_difference, steer, steered
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.results import Run
from tests.support.closeness import TERMS, close
from tests.support.gradients import noise_run
from tests.support.leftovers import state_of
from tests.support.planted import planted_lab, red_picture, scripted_run

QUESTION = ["How many stars are there?"]


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    return noise_run(tiny_random, fit="crop")


def _stream(lab: Lab, run: Run) -> dict[int, torch.Tensor]:
    seen: dict[int, torch.Tensor] = {}
    with undisturbed(lab.model), watch_stream(language_layers(lab.model), lambda layer, state: seen.update({layer: state[0]})):
        lab.model(**lab.inputs(run), use_cache=False)
    return seen


def test_steering_adds_alpha_of_each_state_s_length_of_the_direction(tiny_random: Lab, run: Run) -> None:
    direction = np.random.default_rng(0).normal(size=64).astype(np.float32)
    before, plain = state_of(tiny_random), _stream(tiny_random, run)
    with steered(tiny_random, run, direction=direction, layers=(1, 2), alpha=0.5, where="question"):
        moved = _stream(tiny_random, run)
    at = slice(*run.segments["question"])
    step = 0.5 * plain[2][at].norm(dim=-1, keepdim=True) * torch.from_numpy(direction / np.linalg.norm(direction))
    close(moved[2][at], plain[2][at] + step, terms=TERMS)
    first = run.segments["question"][0]
    assert torch.equal(moved[2][:first], plain[2][:first])
    assert state_of(tiny_random) == before


def test_steering_is_the_same_token_by_token_and_in_one_forward(tiny_random: Lab, run: Run) -> None:
    asked = tiny_random.ask(run.picture, "What color is the car?", max_new_tokens=6)
    direction = np.random.default_rng(0).normal(size=64)
    effect = steer(tiny_random, asked, direction=direction, layers=(0, 2), alpha=2.0, draws=0, others=[])
    assert effect.answered
    assert effect.proof["decode_error"] < 1e-4
    assert len(effect.answer_after) > 0


def test_nothing_of_an_erased_direction_is_left(tiny_random: Lab, run: Run) -> None:
    direction = np.random.default_rng(1).normal(size=64).astype(np.float32)
    unit = torch.from_numpy(direction / np.linalg.norm(direction))
    plain = _stream(tiny_random, run)
    with erased(tiny_random, run, direction=direction, layers=(0, 2), where="image"):
        gone = _stream(tiny_random, run)
    at = slice(*run.segments["image"])
    for layer in (1, 2):
        assert float((plain[layer][at] @ unit).abs().max()) > 0.1
        assert float((gone[layer][at] @ unit).abs().max()) < 1e-4
    close(gone[1][at], plain[1][at] - (plain[1][at] @ unit)[:, None] * unit, terms=TERMS)


def test_the_planted_verdict_can_be_added_and_erased() -> None:
    lab = planted_lab()
    run = scripted_run(lab, red_picture(64, 64, (24, 24, 40, 40)), "It is red.")
    verdict = np.eye(64, dtype=np.float32)[2]  # the direction that only the word "red" reads
    more = steer(lab, run, direction=verdict, metric="red", draws=10, others=[], answer=False)
    less = erase(lab, run, direction=verdict, where="last", metric="red", draws=10, others=[], answer=False)
    assert more.change[0] > more.control[:, 0].max()
    assert less.change[0] < less.control[:, 0].min()
    assert less.percentile[0] == 100
    empty = np.eye(64, dtype=np.float32)[9]
    aside = erase(lab, run, direction=empty, where="last", metric="red", draws=0, others=[], answer=False)
    assert aside.change[0] == pytest.approx(0, abs=1e-5), "nothing lies along this direction"


def test_side_effects_on_other_questions_are_part_of_the_effect(tiny_random: Lab, run: Run) -> None:
    effect = steer(tiny_random, run, direction="blue", alpha=3.0, draws=2, others=QUESTION)
    assert effect.side["questions"] == QUESTION
    (before,), (after,), (change,) = (effect.side[key] for key in ("before", "after", "change"))
    assert before == tiny_random.ask(run.picture, QUESTION[0], fit="crop", max_new_tokens=1).answer
    assert isinstance(after, str)
    assert change != 0
    assert effect.proof["states"] > 0
    assert effect.proof["decode_error"] < 1e-3


def test_a_word_of_several_tokens_says_which_is_used(tiny_random: Lab, run: Run) -> None:
    effect = erase(tiny_random, run, direction="zebra", draws=0, others=[], answer=False)
    assert "'zebra' (its first of" in effect.what
    pair = erase(tiny_random, run, direction=("blue", "green"), draws=0, others=[], answer=False)
    assert "'blue' minus 'green'" in pair.what


def test_the_difference_of_means_is_that_of_the_states(tiny_random: Lab, run: Run) -> None:
    other = noise_run(tiny_random, "No.", fit="crop")
    found = mean_difference(tiny_random, [run], [other], layer=1, where="question")
    at = slice(*run.segments["question"])
    means = [_stream(tiny_random, one)[1][at].mean(0) for one in (run, other)]
    close(found, means[0] - means[1], terms=TERMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": np.zeros(64)}, "finite and not zero"),
        ({"direction": np.ones(3)}, "must have 64 numbers"),
        ({"direction": " "}, "expected a word"),
        ({"direction": "blue", "alpha": 0}, "alpha must be a finite number other than 0"),
        ({"direction": "blue", "layers": (2, 2)}, "layers must be"),
        ({"direction": "blue", "where": "tail"}, "where: no segment 'tail'"),
        ({"direction": "blue", "others": "What?"}, "others must be a list, each text"),
    ],
)
def test_bad_input_is_said_in_one_line(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        steer(tiny_random, run, **options)
    assert "\n" not in str(error.value)

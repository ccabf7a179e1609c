"""Relative attention and the question-blind control, and what all attention methods leave behind: nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_lab.attribution import attribute
from llava_lab.attribution.attention import NEUTRAL, ask_instead
from llava_lab.attribution.rollout import whole_rows
from llava_lab.capture import Full, fuse_heads, undisturbed, watch_attention
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab, load
from llava_lab.models.layout import language_layers, used_vision_layers
from llava_lab.results import Run
from tests.attribution.test_attribution import _state
from tests.attribution.test_flow import naive_rollout
from tests.support.planted import RED, planted_lab, red_picture, scripted_run

METHODS_HERE = ("value_attention", "localization_heads", "relative_attention", "attention_flow", "vision")
QUESTION = "What color is the car?"


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", question=QUESTION)


@pytest.fixture(scope="module")
def planted() -> Lab:
    return planted_lab()


# -- relative attention ---------------------------------------------------------------------


def _rows(lab: Lab, run: Run, positions: list[int]) -> np.ndarray:
    with undisturbed(lab.model), watch_attention(language_layers(lab.model), Full()) as full:
        lab.model(**lab.inputs(run))
    mean = torch.stack([one[0].mean(0) for one in full.attention.values()]).mean(0)
    return mean[positions].mean(0)[slice(*run.segments["image"])].numpy()


@pytest.mark.parametrize("beside", ["cue", "answer"])
def test_equals_asking_the_neutral_thing_and_dividing(tiny_random: Lab, run: Run, beside: str) -> None:
    """The neutral side is asked for real, and made to give the same answer."""
    other = scripted_run(tiny_random, run.picture, "The car is blue.", question=NEUTRAL)
    rel = attribute(tiny_random, run, method="relative_attention", target=["blue", 0], beside=beside, floor=0)
    raised = attribute(tiny_random, run, method="relative_attention", target=["blue", 0], beside=beside)
    even = 1 / len(run.token_ids)
    assert rel.passes["forward"] == 2
    for i, target in enumerate(rel.targets):
        shift = other.segments["answer"][0] - run.segments["answer"][0]
        there = [position + shift for position in target.positions] if beside == "answer" else [other.segments["answer"][0] - 1]
        ours, theirs = _rows(tiny_random, run, list(target.positions)), _rows(tiny_random, other, there)
        np.testing.assert_allclose(rel.values[i].ravel(), ours / theirs, rtol=1e-4)
        np.testing.assert_allclose(raised.values[i].ravel(), (ours + even) / (theirs + even), rtol=1e-4)
    log = attribute(tiny_random, run, method="relative_attention", target=["blue", 0], beside=beside, scale="log")
    np.testing.assert_allclose(log.values, np.log(raised.values), atol=1e-5)


def test_the_same_question_beside_itself_is_one_everywhere(tiny_random: Lab, run: Run) -> None:
    rel = attribute(tiny_random, run, method="relative_attention", target="words", neutral=QUESTION, beside="answer")
    np.testing.assert_array_equal(rel.values, np.ones_like(rel.values))
    first = attribute(tiny_random, run, method="relative_attention", target=0, neutral=f"  {QUESTION} ")
    np.testing.assert_array_equal(first.values, np.ones_like(first.values))
    assert first.extras["neutral"] == QUESTION


def test_layers_and_heads_are_chosen_on_both_sides(tiny_random: Lab, run: Run) -> None:
    pair = {"heads": ((1, 2),), "neutral": QUESTION, "beside": "answer"}
    np.testing.assert_array_equal(attribute(tiny_random, run, method="relative_attention", **pair).values, 1)
    one = attribute(tiny_random, run, method="relative_attention", heads=((1, 2),)).values
    window = attribute(tiny_random, run, method="relative_attention", heads=2, layers=(1, 2)).values
    np.testing.assert_allclose(one, window, rtol=1e-5)
    assert not np.allclose(one, attribute(tiny_random, run, method="relative_attention").values)


def test_earlier_turns_stay_as_they_were(tiny_random: Lab, picture: np.ndarray) -> None:
    history = [("Is there a car?", "Yes."), (QUESTION, "Red.")]  # the question itself was asked before
    run = tiny_random.ask(picture, QUESTION, history=history, max_new_tokens=3)
    other = ask_instead(tiny_random, run, NEUTRAL)
    asked = tiny_random.ask(picture, NEUTRAL, history=history, max_new_tokens=1)
    assert other.prompt == asked.prompt
    before = asked.segments["answer"][0]
    np.testing.assert_array_equal(other.token_ids[:before], asked.token_ids[:before])
    np.testing.assert_array_equal(other.token_ids[before:], run.token_ids[slice(*run.segments["answer"])])
    assert {name: span for name, span in other.segments.items() if name != "answer"} == {
        name: span for name, span in asked.segments.items() if name != "answer"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neutral": " "}, "neutral must be an instruction in words, for example 'Describe the picture.'; got ' '"),
        ({"neutral": 3}, "neutral must be an instruction in words"),
        ({"neutral": "Describe <image>"}, "holds '<image>', a special token"),
        ({"floor": -0.1}, "floor must be a number of at least 0, got -0.1"),
        ({"beside": "question"}, "beside must be one of 'cue', 'answer', got 'question'"),
        ({"scale": "share"}, "scale must be one of 'ratio', 'log', got 'share'"),
        ({"fusion": "sum"}, "fusion must be one of 'mean', 'max', 'min', got 'sum'"),
    ],
)
def test_relative_options_out_of_range_are_refused(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attribute(tiny_random, run, method="relative_attention", **options)


def test_what_every_question_looks_at_alike_cancels(tiny_folder: Path, run: Run) -> None:
    """Without queries every row attends uniformly, early image tokens and all: nothing is left of it."""
    lab = load(str(tiny_folder))
    with torch.no_grad():
        for layer in language_layers(lab.model):
            layer.self_attn.q_proj.weight.zero_()
    blind = scripted_run(lab, run.picture, "The car is blue.", question=QUESTION)
    rel = attribute(lab, blind, method="relative_attention", target=0)
    # uniform rows of different lengths: the ratio is one number
    np.testing.assert_allclose(rel.values, rel.values.mean(), rtol=1e-5)


# -- the vision tower alone -----------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_vision_is_the_mean_patch_row_of_the_towers_rollout(tiny_random: Lab, run: Run, fusion: str) -> None:
    model = tiny_random.model
    with undisturbed(model), watch_attention(used_vision_layers(model), Full()) as full:
        model(**tiny_random.inputs(run))
    matrices = [whole_rows(fuse_heads(one, fusion)[0]) for one in full.attention.values()]
    total = naive_rollout(matrices, [torch.tensor(0.5)] * len(matrices))
    rel = attribute(tiny_random, run, method="vision", fusion=fusion)
    np.testing.assert_allclose(rel.values[0].ravel(), total[1:, 1:].mean(0).numpy(), atol=1e-6)
    assert rel.extras["lost_to_cls"] == pytest.approx(float(total[1:, 0].mean()), abs=1e-6)
    assert rel.values.sum() + rel.extras["lost_to_cls"] == pytest.approx(1, abs=1e-5)


def test_vision_knows_neither_the_question_nor_the_answer(tiny_random: Lab, run: Run) -> None:
    other = scripted_run(tiny_random, run.picture, "Yes, a tree.", question="Is there a tree?")
    one = attribute(tiny_random, run, method="vision", target=["blue", ("blue", "green")])
    np.testing.assert_array_equal(one.values[0], one.values[1])
    np.testing.assert_array_equal(one.values[0], attribute(tiny_random, other, method="vision").values[0])
    assert any("a control, not an explanation" in note for note in one.notes)
    flipped = scripted_run(tiny_random, np.ascontiguousarray(run.picture[:, ::-1]), "The car is blue.")
    assert not np.allclose(one.values[0], attribute(tiny_random, flipped, method="vision").values[0])


def test_a_tower_that_is_not_the_grid_is_refused(tiny_random: Lab, run: Run) -> None:
    wrong = replace(run, map=replace(run.map, rows=3))
    with pytest.raises(LabError, match="expected 12 patches and at most one CLS token in the vision tower, got 17 positions"):
        attribute(tiny_random, wrong, method="vision")


# -- all of them ----------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize(("width", "height", "box"), [(120, 80, (60, 10, 80, 30)), (80, 120, (10, 60, 30, 80))])
@pytest.mark.parametrize("method", ["value_attention", "localization_heads", "attention_flow"])
def test_the_red_square_lights_up_where_it_is(
    planted: Lab, fit: str, width: int, height: int, box: tuple[int, int, int, int], method: str
) -> None:
    picture = red_picture(width, height, box)
    run = scripted_run(planted, picture, "The car is red.", fit=fit)
    rel = attribute(planted, run, method=method, target="red")
    painted = rel.on_picture()
    y, x = np.unravel_index(np.nanargmax(painted), painted.shape)
    assert (picture[y, x] == RED).all(), f"brightest at ({x}, {y}), the red square is {box}"


def test_heads_that_look_at_red_only_when_told_to_stand_out_against_another_instruction() -> None:
    """The planted model looks at red whatever is asked, so it is given a question that it listens to."""
    lab = planted_lab()
    picture = red_picture(96, 96, (12, 60, 36, 84))
    blue = lab.tokenizer.encode(" is", add_special_tokens=False)[0]
    with torch.no_grad():  # only the word "is" asks for red; every other token's query is nothing
        language: Any = lab.model.model.language_model
        language.embed_tokens.weight[:, 3] = 0.0
        language.embed_tokens.weight[blue, 3] = 1.0
        attention = language.layers[0].self_attn
        attention.q_proj.weight[:, 3] = attention.q_proj.weight[:, 1]
        attention.q_proj.weight[:, 1] = 0.0
    run = scripted_run(lab, picture, "The car is red.")
    rel = attribute(lab, run, method="relative_attention", target="red", layers=(0, 1), floor=0)
    covered = run.map.mask_to_patches((picture == np.array(RED)).all(-1))
    assert rel.values[0][covered == 1].min() > 10 * rel.values[0][covered == 0].max()


@pytest.mark.parametrize("how", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", METHODS_HERE)
def test_nothing_is_left_behind(
    tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, method: str, how: type[BaseException] | None
) -> None:
    tiny_random.model.train()
    tiny_random.model.model.vision_tower.eval()
    before = _state(tiny_random)
    stopped = False
    with monkeypatch.context() as patch:
        if how is not None:  # in the middle of the forward, after some layers were captured
            last = used_vision_layers if method == "vision" else language_layers
            patch.setattr(last(tiny_random.model)[-1].mlp, "forward", _raiser(how))
        try:
            attribute(tiny_random, run, method=method)
        except (RuntimeError, KeyboardInterrupt):
            stopped = True
    after = _state(tiny_random)
    tiny_random.model.eval()
    assert after == before
    assert stopped == (how is not None)


def _raiser(how: type[BaseException]) -> Callable[..., Any]:
    def forward(*_: Any) -> Any:
        raise how("stop")

    return forward


@pytest.mark.parametrize("method", METHODS_HERE)
def test_bfloat16_weights_give_nearly_the_same_map(planted: Lab, method: str) -> None:
    run = scripted_run(planted, red_picture(96, 96, (12, 60, 36, 84)), "The car is red.")
    exact = attribute(planted, run, method=method, target="red").values
    before = {name: value.clone() for name, value in planted.model.state_dict().items()}
    planted.model.to(torch.bfloat16)
    try:
        rough = attribute(planted, replace(run, fingerprint=planted.fingerprint), method=method, target="red").values
    finally:
        planted.model.to(torch.float32).load_state_dict(before)
    # rounding of the inputs and of the residual stream: the hand-written weights are exact but for one
    np.testing.assert_allclose(rough, exact, atol=0.02 * np.abs(exact).max())


def test_576_image_tokens_take_the_same_path(llava15_folder: Path) -> None:
    lab = load(str(llava15_folder))
    run = scripted_run(lab, red_picture(120, 90, (10, 10, 60, 60)), "The car is blue.")
    for method in METHODS_HERE:
        if method != "attention_flow":  # its own file
            rel = attribute(lab, run, method=method, target=["answer", "blue"])
            assert rel.values.shape == (2, 24, 24)
            assert rel.values.max() > rel.values.min()
    share = attribute(lab, run, method="value_attention", target="blue")
    assert sum(share.extras["mass"][0].values()) == pytest.approx(1, abs=1e-5)

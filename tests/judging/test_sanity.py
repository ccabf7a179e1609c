"""Sanity checks: weights come back bitwise, maps that ignore the model or the question are caught, likeness by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import llava_lab as ll
from llava_lab.attribution import attribute
from llava_lab.errors import CheckpointError, DataError, OptionError, TargetError
from llava_lab.judging import sanity, with_question
from llava_lab.judging.sanity import moved, parts_from_top, rank_likeness, ssim, top_likeness
from llava_lab.models import Lab
from llava_lab.models.weights import weights_put_back
from llava_lab.replay import resolve_targets
from llava_lab.results import Relevance, Run, Sanity
from tests.support.closeness import TERMS, close
from tests.support.planted import planted_lab, red_picture, scripted_run

MODULE = sys.modules["llava_lab.judging.sanity"]  # the package's name `sanity` is the function


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "Yes, the car is blue.")


@pytest.fixture(scope="module")
def planted() -> Lab:
    return planted_lab()


@pytest.fixture(scope="module")
def found(tiny_random: Lab, run: Run) -> Sanity:
    return sanity(tiny_random, run, "direct_logit", target=["blue", ("blue", "red")], structure=True)


def _weights(lab: Lab) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in lab.model.state_dict().items()}


def _same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


def _stopping(after: int, how: type[BaseException]) -> Callable[..., Relevance]:
    """`attribute` that fails when it is called for the (after + 1)th time."""
    calls = []

    def made(*args: Any, **options: Any) -> Relevance:
        calls.append(1)
        if len(calls) > after:
            raise how("stop")
        return attribute(*args, **options)

    return made


# -- the model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "after", "raises"),
    [
        (None, 9, False),
        (RuntimeError, 1, True),
        (RuntimeError, 4, True),
        (KeyboardInterrupt, 1, True),
        (KeyboardInterrupt, 4, False),
    ],
)
def test_nothing_is_left_behind(
    tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, how: type[BaseException] | None, after: int, raises: bool
) -> None:
    weights, random = _weights(tiny_random), torch.get_rng_state()
    grads = [parameter.requires_grad for parameter in tiny_random.model.parameters()]
    if how is not None:
        monkeypatch.setattr(MODULE, "attribute", _stopping(after, how))
    with pytest.raises(how) if raises and how is not None else nullcontext():
        sanity(tiny_random, run, "logit_lens_map", tests="model")
    assert _same(weights, _weights(tiny_random))
    assert torch.equal(random, torch.get_rng_state())
    assert grads == [parameter.requires_grad for parameter in tiny_random.model.parameters()]
    assert not tiny_random.model.training


def test_each_step_is_the_map_of_the_model_shuffled_so_far(tiny_random: Lab, run: Run) -> None:
    found = sanity(tiny_random, run, "direct_logit", target="blue", tests="model", seed=4, options={"layers": (1, 3)})
    with weights_put_back(4) as shuffle:
        for i, (name, parameters) in enumerate(parts_from_top(tiny_random.model, 8)):
            shuffle(parameters)
            now = replace(run, fingerprint=tiny_random.fingerprint)
            rel = attribute(tiny_random, now, method="direct_logit", target="blue", layers=(1, 3))
            np.testing.assert_array_equal(found.maps[i], rel.values)
            assert found.steps[i] == name
    again = attribute(tiny_random, run, method="direct_logit", target="blue", layers=(1, 3))
    np.testing.assert_array_equal(found.original, again.values)
    assert found.options["layers"] == [1, 3]
    assert found.passes["forward"] == 6


def test_a_map_that_never_asks_the_model_is_caught(tiny_random: Lab, run: Run) -> None:
    for method in ("center", "random"):
        found = sanity(tiny_random, run, method)
        np.testing.assert_allclose(found.spearman, 1, atol=1e-6)
        assert found.verdict == {"model": "unchanged", "question": "unchanged"}
        assert not found.passed


def test_a_map_read_before_the_language_model_does_not_notice_it(tiny_random: Lab, run: Run) -> None:
    found = sanity(tiny_random, run, "logit_lens_map", target="blue", options={"layers": 0, "value": "logit"})
    np.testing.assert_allclose(found.spearman[:3], 1, atol=1e-6)
    assert abs(found.spearman[3:]).max() < 0.9
    np.testing.assert_allclose(found.question_spearman, 1, atol=1e-6)
    assert found.verdict["question"] == "unchanged"
    assert not found.passed


@pytest.mark.parametrize("method", ["attention", "direct_logit"])
def test_a_map_of_the_planted_cause_goes_when_the_weights_go(planted: Lab, method: str) -> None:
    run = scripted_run(planted, red_picture(96, 96, (12, 60, 36, 84)), "The car is red.")
    found = sanity(planted, run, method, target="red", tests=("model",))
    assert found.verdict == {"model": "changed", "question": "not run"}
    assert found.passed
    assert found.overlap[-1, 0] < 0.5


# -- the question ---------------------------------------------------------------------------


def test_another_question_moves_the_answer_and_nothing_else(tiny_random: Lab, run: Run) -> None:
    other = with_question(tiny_random, run, " How many stars are there above the green boat? ")
    assert other.question == "How many stars are there above the green boat?"
    assert other.prompt == run.prompt.replace(run.question, other.question)
    start, stop = other.segments["answer"]
    assert start != run.segments["answer"][0]
    assert stop == len(other.token_ids) == len(other.tokens)
    np.testing.assert_array_equal(other.token_ids[start:], run.token_ids[slice(*run.segments["answer"])])
    assert other.segments["image"] == run.segments["image"]
    asked = other.token_ids[slice(*other.segments["question"])].tolist()
    assert tiny_random.tokenizer.decode(asked).strip() == other.question
    for word in other.words:
        assert tiny_random.tokenizer.decode(other.token_ids[word.start : word.stop].tolist()).strip() in word.text
    same = with_question(tiny_random, run, run.question)
    np.testing.assert_array_equal(same.token_ids, run.token_ids)
    assert same.segments == run.segments


@pytest.mark.parametrize("prompt", ["hf", "chat"])
def test_another_question_keeps_earlier_turns_and_the_prompts_form(tiny_random: Lab, picture: np.ndarray, prompt: str) -> None:
    history = [("What color is the car?", "It is blue.")]
    run = tiny_random.ask(picture, "Is there a tree?", history=history, prompt=prompt, max_new_tokens=3)
    other = with_question(tiny_random, run, "What color is the car?")
    want = tiny_random.ask(picture, "What color is the car?", history=history, prompt=prompt, max_new_tokens=1)
    start = want.segments["answer"][0]
    np.testing.assert_array_equal(other.token_ids[:start], want.token_ids[:start])
    assert {**other.segments, "answer": 0} == {**want.segments, "answer": 0}


def test_question_maps_are_those_of_the_same_answer_after_another_question(tiny_random: Lab, run: Run, found: Sanity) -> None:
    for i, question in enumerate(found.questions):
        other = with_question(tiny_random, run, question)
        rel = attribute(tiny_random, other, method="direct_logit", target=["blue", ("blue", "red")])
        close(found.question_maps[i], rel.values, terms=TERMS)
        target = rel.targets[0]
        assert [int(other.token_ids[at + 1]) for at in target.positions] == list(target.token_ids)


def test_questions_are_the_own_words_shuffled_and_something_else(tiny_random: Lab, run: Run, found: Sanity) -> None:
    mixed, other = found.questions
    assert sorted(mixed.split()) == sorted(run.question.split())
    assert mixed != run.question
    assert other in MODULE.OTHERS
    counting = scripted_run(tiny_random, run.picture, "There are two.", question="How many things are there?")
    assert sanity(tiny_random, counting, "center", tests="question").questions[1] == "What is the weather like?"
    short = scripted_run(tiny_random, run.picture, "Yes.", question="Really?")
    assert len(sanity(tiny_random, short, "center", tests="question").questions) == 1
    chosen = sanity(tiny_random, run, "center", tests="question", questions="Is it a fish?")
    assert chosen.questions == ("Is it a fish?",)
    assert chosen.steps == ()
    assert chosen.verdict["model"] == "not run"


# -- numbers, verdicts, saving --------------------------------------------------------------


def test_shapes_ranges_and_controls(tiny_random: Lab, run: Run, found: Sanity) -> None:
    assert (ll.sanity, ll.Sanity) == (sanity, Sanity)
    assert found.spearman.shape == found.overlap.shape == found.ssim.shape == (5, 2)
    assert found.question_spearman.shape == found.question_ssim.shape == (2, 2)
    assert found.maps.shape == (5, 2, 4, 4)
    assert found.top == 2  # a tenth of 16
    assert 0 < found.chance < 0.25
    assert np.abs(found.random_spearman.mean(0)).max() < 0.1
    share = (found.random_spearman > found.limit).mean(0)
    assert share.max() <= 0.05 + 1e-9
    assert found.limit.max() < 0.9
    assert found.targets == resolve_targets(tiny_random, run, ["blue", ("blue", "red")])
    assert not found.interrupted
    assert sanity(tiny_random, run, "center", tests="question").ssim.shape == (0, 0)


def test_verdicts_follow_from_the_curves(found: Sanity) -> None:
    def judged(last: float, **changes: Any) -> dict[str, str]:
        curve = np.array([[1.0, 1.0]] * 4 + [[last, last]], np.float32)
        return replace(found, spearman=curve, **changes).verdict

    limit = float(found.limit.mean())
    assert judged(limit - 0.01)["model"] == "changed"
    assert judged(-1.0)["model"] == "changed"
    assert judged(limit + 0.01)["model"] == "partly"
    assert judged(0.95)["model"] == "unchanged"
    assert judged(0.0, interrupted=True)["model"] == "not finished"
    flat = judged(0.0, original=np.ones_like(found.original))
    assert flat == {"model": "flat", "question": "flat"}
    lenient = replace(found, question_spearman=np.array([[0.99, 0.99], [0.7, 0.7]], np.float32))
    assert lenient.verdict["question"] == "partly"
    strict = replace(found, question_spearman=np.full((2, 2), 0.99, np.float32))
    assert strict.verdict["question"] == "unchanged"
    assert not strict.passed
    gone = np.zeros((5, 2), np.float32)
    assert replace(lenient, spearman=gone).passed


def test_results_save_load_and_become_json(found: Sanity, tmp_path: Path) -> None:
    again = Sanity.load(found.save(tmp_path / "sanity.npz"))
    for name in Sanity.__dataclass_fields__:
        one, two = getattr(found, name), getattr(again, name)
        if isinstance(one, np.ndarray):
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)
        else:
            assert one == two, name
    plain = json.loads(json.dumps(found.to_dict()))
    assert [row["randomised"] for row in plain["model"]] == list(found.steps)
    assert len(plain["model"][0]["ssim"]) == 2
    assert plain["verdict"] == found.verdict
    with pytest.raises(DataError, match="holds a sanity"):
        Relevance.load(tmp_path / "sanity.npz")


def test_ctrl_c_returns_the_finished_part(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = _weights(tiny_random)
    monkeypatch.setattr(MODULE, "attribute", _stopping(5, KeyboardInterrupt))
    found = sanity(tiny_random, run, "logit_lens_map")
    assert found.interrupted
    assert found.steps == ("layer 2", "layer 1")
    assert len(found.questions) == 2
    assert "Interrupted after 4 of 7 maps." in found.notes
    assert found.verdict["model"] == "not finished"
    assert not found.passed
    assert _same(weights, _weights(tiny_random))


def test_a_sweep_that_was_cut_short_ends_the_check_too(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def cut(*args: Any, **options: Any) -> Relevance:
        calls.append(1)
        rel = attribute(*args, **options)
        return replace(rel, interrupted=len(calls) == 3)

    monkeypatch.setattr(MODULE, "attribute", cut)
    found = sanity(tiny_random, run, "center", tests="model")
    assert found.steps == ("layer 2",)
    assert found.interrupted


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"tests": "labels"}, OptionError, "tests must be some of 'model', 'question', got 'labels'"),
        ({"tests": ()}, OptionError, "tests must be some of"),
        ({"groups": 0}, OptionError, "groups must be a whole number of at least 1, got 0"),
        ({"seed": -1}, OptionError, "seed must be a whole number of at least 0"),
        ({"questions": []}, OptionError, "questions must be others than the run's own"),
        ({"questions": ["What color is the car?"]}, OptionError, "questions must be others than the run's own"),
        ({"questions": " "}, OptionError, "expected a question to ask instead, got empty text"),
        ({"questions": "<image> what?"}, OptionError, "holds '<image>', a special token"),
        ({"method": "magic"}, OptionError, "no method 'magic'"),
        ({"options": {"size": 3}}, OptionError, "'rollout' has no option 'size'"),
        ({"target": "dog"}, TargetError, "the answer has no word 'dog'"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_shuffled(
    tiny_random: Lab, run: Run, options: dict[str, Any], kind: type[ValueError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "weights_put_back", None)
    with pytest.raises(kind, match=message) as error:
        sanity(tiny_random, run, **options)
    assert "\n" not in str(error.value)


def test_a_run_by_other_weights_is_refused(tiny_random: Lab, run: Run) -> None:
    with pytest.raises(CheckpointError, match="other weights; ask again"):
        sanity(tiny_random, replace(run, fingerprint="0" * 16), "center")


def test_layers_are_shuffled_from_last_to_first_then_connector_then_tower(tiny_random: Lab) -> None:
    model = tiny_random.model
    assert [name for name, _ in parts_from_top(model, 8)] == ["layer 2", "layer 1", "layer 0", "connector", "vision tower"]
    assert [name for name, _ in parts_from_top(model, 1)] == ["layers 0 to 2", "connector", "vision tower"]
    assert [name for name, _ in parts_from_top(model, 2)[:2]] == ["layer 2", "layers 0 to 1"]
    taken = [id(parameter) for _, parameters in parts_from_top(model, 2) for parameter in parameters]
    assert len(taken) == len(set(taken))
    left = {name for name, parameter in model.named_parameters() if id(parameter) not in taken}
    assert left == {"lm_head.weight", "model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}


def test_shuffling_keeps_every_value_and_is_seeded() -> None:
    layer = nn.Linear(20, 30)
    before = layer.weight.detach().clone()
    with weights_put_back(1) as shuffle:
        shuffle([layer.weight])
        once = layer.weight.detach().clone()
        shuffle([layer.weight, layer.bias])
        assert not torch.equal(layer.weight, once)
    assert torch.equal(layer.weight, before)
    assert torch.equal(once.flatten().sort().values, before.flatten().sort().values)
    assert (once == before).float().mean() < 0.1
    for seed, same in ((1, True), (2, False)):
        with weights_put_back(seed) as shuffle:
            shuffle([layer.weight])
            assert torch.equal(layer.weight, once) == same
    assert layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_come_back_bitwise_even_what_is_not_a_number(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-40, 3.0], dtype=dtype)
    parameter = nn.Parameter(values.clone())

    def failing() -> None:
        with weights_put_back() as shuffle:
            shuffle([parameter])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        failing()
    width = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(parameter.detach().view(width), values.view(width))


def test_ctrl_c_while_weights_are_put_back_waits_until_all_are() -> None:
    class Jumpy(nn.Parameter):
        """Is interrupted the first time it is put back."""

        writes = 0

        def copy_(self, source: torch.Tensor) -> torch.Tensor:
            Jumpy.writes += 1
            if Jumpy.writes == 2:
                raise KeyboardInterrupt
            return super().copy_(source)

    jumpy, plain = Jumpy(torch.arange(9.0)), nn.Parameter(torch.arange(9.0))
    with pytest.raises(KeyboardInterrupt), weights_put_back() as shuffle:
        shuffle([plain, jumpy])
    assert torch.equal(jumpy.detach(), torch.arange(9.0))
    assert torch.equal(plain.detach(), torch.arange(9.0))


# -- likeness of maps -----------------------------------------------------------------------


def test_structural_similarity_knows_equal_opposite_and_flat() -> None:
    values = np.random.default_rng(0).random((8, 8))
    assert ssim(values, values) == pytest.approx(1)
    assert ssim(values, 5 * values - 2) == pytest.approx(1)
    assert ssim(values, -values) < -0.5
    assert ssim(values, np.ones((8, 8))) == 0
    assert ssim(np.zeros((8, 8)), np.ones((8, 8))) == 1
    a, b = np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [1.0, 1.0]])  # one window: by hand
    light = (2 * 0.5 * 0.75 + 1e-4) / (0.25 + 0.5625 + 1e-4)
    contrast = (2 * (0.5 - 0.375) + 9e-4) / (0.25 + 0.1875 + 9e-4)
    assert ssim(a, b) == pytest.approx(light * contrast)


def test_a_moved_map_has_the_same_values_elsewhere() -> None:
    rng, values = np.random.default_rng(0), np.arange(20.0).reshape(4, 5)
    for _ in range(50):
        other = moved(values, rng)
        assert sorted(other.ravel()) == sorted(values.ravel())
        assert not np.array_equal(other, values)
    assert moved(np.arange(6.0).reshape(1, 6), rng).shape == (1, 6)
    maps = np.stack([[values], [-values]])
    np.testing.assert_allclose(top_likeness(values[None], maps, np.ones((4, 5), bool), 4), [[1], [0]])


def test_likeness_is_measured_where_the_picture_is() -> None:
    rng, seen = np.random.default_rng(1), np.zeros((3, 4), bool)
    seen[:2] = True
    first = rng.random((2, 3, 4))
    other = first.copy()
    other[:, 2] = 9 * rng.random((2, 4))  # only what holds no picture
    flat = np.ones_like(first)
    np.testing.assert_allclose(rank_likeness(first, np.stack([other, -first, flat]), seen), [[1, 1], [-1, -1], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(top_likeness(first, other[None], seen, 2), 1)
    np.testing.assert_allclose(top_likeness(first, flat[None], seen, 2), 2 / 8)
    assert rank_likeness(first, np.zeros((0, 2, 3, 4)), seen).shape == (0, 2)

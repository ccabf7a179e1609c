"""Maps taken while the answer is made: the same answer, the same maps, and nothing left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llava_lab.attribution import ask_and_attribute, attribute
from llava_lab.capture import AnswerRows, watch, watch_attention
from llava_lab.errors import LabError, OptionError, TargetError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from tests.support.closeness import TERMS, close
from tests.support.planted import RED, planted_lab

PICTURE = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)


QUESTION = "What color is the car?"


NEW = 5


EVERY: Any = list(range(NEW))


PLAIN: dict[str, Any] = {"residual": 0.5, "null": "none"}


@pytest.fixture
def lab(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(tiny_random, "eos_ids", frozenset())
    return tiny_random


def eager_maps(lab: Lab, method: str) -> np.ndarray:
    """Stock generate with eager attention, everything kept; head mean, averaged or multiplied over the layers."""
    sequence = lab.sequence(QUESTION)
    ids = torch.from_numpy(sequence.token_ids)[None]
    before = lab.model.config._attn_implementation
    lab.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            steps = lab.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=lab.pixels(PICTURE), do_sample=False,
                max_new_tokens=NEW, min_new_tokens=NEW, suppress_tokens=[lab.image_id], pad_token_id=0,
                return_dict_in_generate=True, output_attentions=True,
            ).attentions  # fmt: skip
    finally:
        lab.model.set_attn_implementation(before)
    size = ids.shape[1] + NEW - 1
    pad = torch.nn.functional.pad
    layers = [torch.cat([pad(s[i][0].mean(0), (0, size - s[i].shape[-1])) for s in steps]) for i in range(len(steps[0]))]
    total = torch.eye(size)
    for layer in layers:
        total = (0.5 * layer + 0.5 * torch.eye(size)) @ total
    rows = torch.stack(layers).mean(0) if method == "attention" else total
    return rows[ids.shape[1] - 1 :, slice(*sequence.segments["image"])].numpy()


@pytest.mark.parametrize(("method", "options"), [("attention", {}), ("rollout", PLAIN)])
def test_every_token_s_map_equals_eager_with_everything_kept(lab: Lab, method: str, options: dict[str, Any]) -> None:
    _, found = ask_and_attribute(
        lab, PICTURE, QUESTION, method=method, target=EVERY, options=options, max_new_tokens=NEW
    )  # fmt: skip
    theirs = eager_maps(lab, method)
    assert theirs.max() > 1e-3
    close(found.values.reshape(NEW, -1), theirs, terms=TERMS)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("attention", {"layers": (1, 3), "fusion": "max"}),
        ("rollout", {}),
        ("rollout", {"residual": 0.9}),
        ("rollout", {"layers": (1, 3), "fusion": "max", "null": "none"}),
    ],
    ids=str,
)
def test_answer_and_maps_are_those_of_ask_then_attribute(lab: Lab, method: str, options: dict[str, Any]) -> None:
    run, found = ask_and_attribute(lab, PICTURE, QUESTION, method=method, target=EVERY, options=options, max_new_tokens=NEW)
    alone = lab.ask(PICTURE, QUESTION, max_new_tokens=NEW)
    assert np.array_equal(run.token_ids, alone.token_ids)
    close(run.logprobs, alone.logprobs, terms=TERMS)  # rollout mixes the prompt's values by the rows it keeps
    if method == "attention":
        assert np.array_equal(run.logprobs, alone.logprobs)
    after = attribute(lab, alone, method=method, target=EVERY, **options)
    close(found.values, after.values, terms=TERMS)
    assert (found.method, found.options, found.targets) == (after.method, after.options, after.targets)
    for mine, theirs in zip(found.extras["mass"], after.extras["mass"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
        assert sum(mine.values()) == pytest.approx(1, abs=1e-5)
    assert found.passes == {"forward": 0, "backward": 0}


def test_a_long_prompt_is_kept_in_half_and_right_to_one_part_in_a_thousand(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_lab.capture.reducers.EXACT", 0)
    run, found = ask_and_attribute(lab, PICTURE, QUESTION, target=EVERY, options=PLAIN, max_new_tokens=NEW)
    exact = attribute(lab, run, target=EVERY, **PLAIN).values
    np.testing.assert_allclose(found.values, exact, rtol=1e-3)  # eleven bits, once a layer
    assert np.abs(found.values - exact).max() > 1e-7  # it was half precision


def test_the_planted_cause_is_found_while_answering() -> None:
    lab = planted_lab()
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:24, 40:48] = RED
    for method, options in (("attention", {"layers": (0, 1)}), ("rollout", {})):
        _, found = ask_and_attribute(lab, picture, QUESTION, method=method, target="answer", options=options, max_new_tokens=2)
        assert found.top(1)[0][:2] == (2, 5), method


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind(lab: Lab, stop: type[BaseException]) -> None:
    def interrupt(*_: Any) -> None:
        raise stop

    def state() -> tuple[Any, ...]:
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lab.model.modules()]
        return hooks, lab.model.config.text_config._attn_implementation, dict(watch.HANDLERS)

    handle = lab.model.model.language_model.layers[1].register_forward_pre_hook(interrupt)
    before = state()
    try:
        with pytest.raises(stop):  # no token at all, so there is nothing to give back
            ask_and_attribute(lab, PICTURE, QUESTION, max_new_tokens=NEW)
        assert state() == before
    finally:
        handle.remove()
    assert not before[2]


def test_interrupted_it_gives_the_answer_so_far_with_its_maps(lab: Lab) -> None:
    whole = lab.ask(PICTURE, QUESTION, max_new_tokens=NEW)
    calls: list[int] = []

    def second_layer_of_the_third_step(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    layers = lab.model.model.language_model.layers
    handle = layers[1].register_forward_pre_hook(second_layer_of_the_third_step)
    try:
        run, found = ask_and_attribute(lab, PICTURE, QUESTION, target="answer", options=PLAIN, max_new_tokens=NEW)
    finally:
        handle.remove()
    assert run.options["stopped"] == "interrupted"
    said = len(run.answer_positions)
    assert said == 2
    assert np.array_equal(run.token_ids, whole.token_ids[: len(run.token_ids)])
    close(found.values, attribute(lab, run, **PLAIN).values, terms=TERMS)
    assert not watch.HANDLERS


def test_a_long_answer_is_kept_in_several_blocks(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_lab.capture.reducers.ROOM", 2)
    run, found = ask_and_attribute(lab, PICTURE, QUESTION, target=EVERY, max_new_tokens=NEW)
    close(found.values, attribute(lab, run, target=EVERY).values, terms=TERMS)


@pytest.mark.parametrize("method", ["attention", "rollout"])
def test_no_key_and_no_row_is_held_longer_than_it_is_needed(lab: Lab, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[AnswerRows] = []
    make = AnswerRows.__init__

    def made(self: AnswerRows, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        seen.append(self)

    monkeypatch.setattr(AnswerRows, "__init__", made)
    run, _ = ask_and_attribute(lab, PICTURE, QUESTION, method=method, max_new_tokens=NEW)
    (rows,), size = seen, len(run.token_ids) - 1
    assert [keys.shape[2] for keys in rows._keys.values()] == [size] * 3  # the newest alone
    assert all(query.untyped_storage().nbytes() <= lab.model.config.text_config.hidden_size * 4 for query in rows._waiting[0])
    below = sum(kept.numel() for _, kept in rows._prompt[0]) if method == "rollout" else 0
    assert below <= (rows.first + 1) * (rows.first + 1 + 64) / 2


def test_only_rows_that_every_layer_has_are_counted(lab: Lab) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError

    layers = language_layers(lab.model)
    reducer = AnswerRows(len(lab.sequence(QUESTION).token_ids))
    handle = layers[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError), watch_attention(layers, reducer, calls=None):
            lab.ask(PICTURE, QUESTION, max_new_tokens=NEW)
    finally:
        handle.remove()
    assert (reducer.count(1), reducer.count(len(layers))) == (1, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "occlusion"}, "while answering, method must be one of attention, rollout, got 'occlusion'"),
        ({"method": "rolout"}, "no method 'rolout'; the methods are rollout, "),
        (
            {"options": {"sinks": "remove"}},
            "while answering, sinks must be 'keep', got 'remove'; that map is made by ll.attribute",
        ),
        ({"method": "attention", "options": {"heads": (0,)}}, "while answering, heads must be None"),
        ({"options": {"fusion": "min"}}, "while answering, fusion must be mean or max"),
        ({"options": {"sink": "keep"}}, "has no option 'sink'"),
    ],
)
def test_what_needs_the_finished_answer_is_refused(lab: Lab, given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ask_and_attribute(lab, PICTURE, QUESTION, **given)


def test_a_contrast_and_a_mask_are_refused(lab: Lab) -> None:
    run = lab.ask(PICTURE, QUESTION, max_new_tokens=NEW)
    with pytest.raises(TargetError, match="cannot tell"):
        ask_and_attribute(lab, PICTURE, QUESTION, target=(run.words[0].text, "red"), max_new_tokens=NEW)
    inputs = lab.inputs(run)
    hidden = torch.ones_like(inputs["attention_mask"])
    hidden[:, :3] = 0  # left padding
    reducer = AnswerRows(len(run.token_ids))
    with (
        pytest.raises(LabError, match="with a mask; watch a forward of the finished answer"),
        watch_attention(language_layers(lab.model), reducer, calls=None),
    ):
        lab.model(**{**inputs, "attention_mask": hidden})

"""Knockout: the cut entries are zero in what the model really used, the numbers are a masked forward's, and nothing stays."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava_lab.capture import undisturbed
from llava_lab.errors import CheckpointError, LabError, OptionError
from llava_lab.interventions import knocked_out, knockout, knockout_sweep
from llava_lab.models import Lab, load
from llava_lab.models.layout import language_layers
from llava_lab.results import Effect, FlowSweep, Run
from tests.support.checkpoints import build_llava
from tests.support.closeness import TERMS, close, tolerance
from tests.support.gradients import noise_run
from tests.support.interrupts import interrupting
from tests.support.leftovers import state_of

# the module: its package gives the function of that name
cut_module = importlib.import_module("llava_lab.interventions.knockout")

TEXT = "Yes, the car is blue."


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    return noise_run(tiny_random, TEXT, fit="crop")


@pytest.fixture(params=["sdpa", "eager"])
def lab(request: pytest.FixtureRequest, tiny_random: Lab) -> Any:
    tiny_random.model.set_attn_implementation(request.param)
    yield tiny_random
    tiny_random.model.set_attn_implementation("sdpa")


def _naive(lab: Lab, run: Run, rows: list[int], columns: list[int], window: tuple[int, int]) -> float:
    """The answer's log-probability by a whole forward in which each layer is given its own additive mask."""
    size = len(run.token_ids)
    causal = torch.zeros(1, 1, size, size).masked_fill_(torch.ones(size, size, dtype=torch.bool).triu(1), -1e9)
    closed = causal.clone()
    for row in rows:
        closed[0, 0, row, [column for column in columns if column < row]] = -1e9
    layers: Any = language_layers(lab.model)
    plain = [layer.forward for layer in layers]

    def with_mask(number: int) -> Any:
        mask = closed if window[0] <= number < window[1] else causal
        return lambda *args, **kwargs: plain[number](*args, **{**kwargs, "attention_mask": mask})

    try:
        for number, layer in enumerate(layers):
            layer.forward = with_mask(number)
        with torch.no_grad():
            odds = torch.logit(lab.model(**lab.inputs(run)).logits[0].double().softmax(-1))
    finally:
        for layer in layers:
            del layer.forward
    start, stop = run.segments["answer"]
    return float(sum(odds[i - 1, run.token_ids[i]] for i in range(start, stop)))


def _logits(lab: Lab, run: Run) -> Tensor:
    with undisturbed(lab.model):
        return lab.model(**lab.inputs(run)).logits


@pytest.mark.parametrize("window", [(0, 3), (1, 2)])
@pytest.mark.parametrize(("source", "target"), [("image", "question"), ("question", "last"), ([(0, 1), (3, 2)], "last")])
def test_scores_are_those_of_a_whole_forward_under_the_mask(
    lab: Lab, run: Run, source: Any, target: str, window: tuple[int, int]
) -> None:
    effect = knockout(lab, run, source=source, target=target, layers=window, draws=0)
    start, stop = run.segments["answer"]
    rows = list(range(start - 1, stop)) if target == "last" else list(range(*run.segments[target]))
    first = run.segments["image"][0]
    columns = list(range(*run.segments[source])) if isinstance(source, str) else [first + 1, first + 14]
    close(effect.before[0], _naive(lab, run, [], [], window), terms=TERMS)
    close(effect.after[0], _naive(lab, run, rows, columns, window), terms=TERMS)
    assert abs(effect.change[0]) > 1e-3
    assert effect.proof["largest"] == 0
    assert effect.proof["row_error"] < 1e-5
    assert effect.proof["edges"] > 0
    assert effect.proof["decode_error"] < 1e-3


def test_knockout_of_nothing_is_bitwise_identity(lab: Lab, run: Run) -> None:
    plain = _logits(lab, run)
    with knocked_out(lab, run, source="answer", target="image"):
        assert torch.equal(_logits(lab, run), plain)
    effect = knockout(lab, run, source="answer", target="image", draws=2)
    assert effect.change.tolist() == [0.0]
    assert "Nothing was cut" in effect.notes[0]


def test_cutting_all_but_itself_changes_the_logits(lab: Lab, run: Run) -> None:
    plain = _logits(lab, run)
    with knocked_out(lab, run, source="all", target="all"):
        alone = _logits(lab, run)
    assert float((alone - plain)[0, 1:].abs().max()) > 0.1
    close(alone[0, 0], plain[0, 0], terms=TERMS)


def test_decoding_on_a_cache_gives_what_whole_forwards_give(lab: Lab, picture: np.ndarray) -> None:
    asked = lab.ask(picture, "What color is the car?", max_new_tokens=8)
    effect = knockout(lab, asked, source="image", target="last", draws=0)
    ids, said = asked.token_ids[: asked.segments["answer"][0]].tolist(), []
    pixels = lab.inputs(asked)["pixel_values"]
    with undisturbed(lab.model), knocked_out(lab, asked, source="image", target="last"):
        for _ in range(8):
            logits = lab.model(input_ids=torch.tensor([ids]), pixel_values=pixels, use_cache=False).logits[0, -1]
            logits[lab.image_id] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] in lab.eos_ids:
                break
            said.append(ids[-1])
    assert effect.answer_after == lab.tokenizer.decode(said, skip_special_tokens=True).strip()
    with knocked_out(lab, asked, source="image", target="last"):
        assert lab.ask(picture, "What color is the car?", max_new_tokens=8).answer == effect.answer_after
    nothing = knockout(lab, asked, source="answer", target="image")
    assert nothing.answer_after == nothing.answer_before == asked.answer


def test_a_cut_that_does_not_reach_the_attention_is_refused(lab: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def useless(mask: Tensor | None, blocked: Tensor, like: Tensor) -> Tensor:
        causal = torch.ones_like(blocked).triu(blocked.shape[1] - blocked.shape[0] + 1)
        return torch.zeros(1, 1, *blocked.shape).masked_fill_(causal, -1e9)

    monkeypatch.setattr(cut_module, "_masked", useless)
    before = state_of(lab)
    with pytest.raises(LabError, match="expected attention 0 where it was cut"):
        knockout(lab, run, source="image", target="last", draws=0)
    assert state_of(lab) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_stays_behind_after_an_exception(lab: Lab, run: Run, error: type[BaseException]) -> None:
    before, plain = state_of(lab), _logits(lab, run)
    with pytest.raises(error), knocked_out(lab, run, source="image", target="last"):
        raise error
    knockout(lab, run, source="image", target="last", draws=1)
    assert state_of(lab) == before
    assert torch.equal(_logits(lab, run), plain)


def test_the_control_is_as_many_random_patches_and_repeats_with_its_seed(tiny_random: Lab, run: Run) -> None:
    one, two, other = (
        knockout(tiny_random, run, source=[(0, 0), (2, 2)], target="last", draws=5, seed=seed, answer=False) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one.control, two.control)
    assert (one.control != other.control).any()
    assert one.control.shape == (5, 1)
    assert one.control_name == "2 random patches"
    assert 0 <= one.percentile[0] <= 100
    segment = knockout(tiny_random, run, source="image", target="image", draws=3, answer=False)
    assert segment.control_name == "16 other positions at random"
    assert segment.control.shape == (3, 1)
    every = knockout(tiny_random, run, source="all", target="image", draws=3, answer=False)
    assert every.control_name.startswith("none: there are not ")
    assert every.control.shape == (0, 1)
    assert np.isnan(every.percentile[0])


def test_an_effect_comes_back_from_its_file(tiny_random: Lab, run: Run, tmp_path: Path) -> None:
    effect = knockout(tiny_random, run, source="image", target="last", metric=["blue", ("blue", "green")], draws=2)
    again = Effect.load(effect.save(tmp_path / "effect.npz"))
    assert again.to_dict() == effect.to_dict() or np.isnan(effect.percentile).any()
    np.testing.assert_array_equal(again.after, effect.after)
    assert again.targets == effect.targets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "picture", "target": "last"}, "source: no segment 'picture'; there is system, image, question, cue, answer"),
        ({"source": [], "target": "last"}, "source must be system, image.*none empty; got \\[\\]"),
        ({"source": [(0, 4)], "target": "last"}, "columns 0 to 3, got \\(0, 4\\)"),
        ({"source": np.zeros((4, 4), bool), "target": "last"}, "source: expected at least one patch"),
        ({"source": [9999], "target": "last"}, "positions run from 0 to"),
        ({"source": "image", "target": "last", "layers": (0, 4)}, "layers must be .* <= 3.*got \\(0, 4\\)"),
        ({"source": "all", "target": "all", "keep_self": False}, "position 0 with every key blocked"),
        ({"source": "image", "target": "last", "draws": -1}, "draws must be a whole number of at least 0, got -1"),
    ],
)
def test_bad_input_is_said_in_one_line(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        knockout(tiny_random, run, **options)
    assert "\n" not in str(error.value)


def test_another_checkpoint_s_run_is_refused(tiny_random: Lab, run: Run, tmp_path: Path) -> None:
    other = load(str(build_llava(tmp_path / "other", seed=5)))
    with pytest.raises(CheckpointError, match="ask again with this lab"):
        knockout(other, run, source="image", target="last")


def test_it_holds_in_half_precision_at_576_patches(llava15_folder: Path) -> None:
    lab = load(str(llava15_folder), dtype="bfloat16")
    run = noise_run(lab, "The car is red.")
    assert run.segments["image"][1] - run.segments["image"][0] == 576
    for name in ("sdpa", "eager"):
        lab.model.set_attn_implementation(name)
        effect = knockout(lab, run, source="image", target="last", draws=0, answer=False)
        assert effect.proof["largest"] == 0
        assert effect.change[0] != 0


def test_a_sweep_is_knockouts_one_by_one(lab: Lab, run: Run, tmp_path: Path) -> None:
    sweep = knockout_sweep(lab, run, metric=["blue", ("blue", "green")], width=1)
    assert sweep.flows == ("image -> question", "question -> last", "image -> last")
    assert sweep.windows.tolist() == [[0, 1], [1, 2], [2, 3]]
    for i, (source, target) in enumerate([("image", "question"), ("question", "last"), ("image", "last")]):
        options: dict[str, Any] = {"metric": ["blue", ("blue", "green")], "draws": 0, "answer": False}
        one = knockout(lab, run, source=source, target=target, layers=(1, 2), **options)
        close(sweep.after[i, 1], one.after, terms=TERMS)
    assert np.isnan(sweep.relative[..., 1]).all()
    plain = knockout_sweep(lab, run, metric="blue", width=1, score="logprob")
    rounding = tolerance(plain.before, terms=TERMS)  # of effects near 0, where no relative difference holds
    np.testing.assert_allclose(plain.relative, np.exp(plain.after - plain.before) - 1, rtol=1e-4, atol=rounding)
    np.testing.assert_allclose(sweep.relative[..., 0], plain.relative[..., 0], rtol=1e-4, atol=rounding)
    older = replace(plain, chance=np.zeros((0, 0, 0), np.float32), noise_floor=())
    np.testing.assert_allclose(older.relative, plain.relative, rtol=1e-3, atol=rounding)
    assert older.noise_notes() == ()
    np.testing.assert_array_equal(FlowSweep.load(sweep.save(tmp_path / "sweep.npz")).after, sweep.after)
    # in the last layer the question's states are read by nobody
    assert abs(sweep.flow("image -> question")[2]).max() < 1e-4


def test_ctrl_c_in_a_sweep_gives_the_finished_cells(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before, whole = state_of(tiny_random), knockout_sweep(tiny_random, run, width=1)
    # the kept beginning, the plain score, two cells
    monkeypatch.setattr(tiny_random.model, "forward", interrupting(tiny_random.model.forward, at=5))
    part = knockout_sweep(tiny_random, run, width=1)
    monkeypatch.undo()
    assert part.interrupted
    np.testing.assert_array_equal(part.after[0, :2], whole.after[0, :2])
    assert np.isnan(part.after[0, 2:]).all()
    assert np.isnan(part.after[1:]).all()
    assert "Interrupted after 2 of 9 cells" in part.notes[-1]
    assert state_of(tiny_random) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 4}, "width must be at most 3"),
        ({"flows": "image"}, "flows must be pairs"),
        ({"flows": [("image", "tail")]}, "no segment 'tail'"),
    ],
)
def test_a_sweep_says_what_it_expects(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        knockout_sweep(tiny_random, run, **options)

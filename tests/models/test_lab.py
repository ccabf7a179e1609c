"""Asking: the answer equals transformers' own, every number can be checked again, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_lab.errors import CheckpointError, LabError, OptionError, PictureError
from llava_lab.models import Lab, layout, load
from llava_lab.models import lab as lab_module
from llava_lab.models.text import decode
from llava_lab.results import Run
from tests.support.answers import probabilities_check_out
from tests.support.closeness import close
from tests.support.leftovers import state_of

QUESTION = "What color is the car?"


@pytest.fixture
def run(tiny_random: Lab, picture: np.ndarray) -> Run:
    return tiny_random.ask(picture, QUESTION, max_new_tokens=12)


@pytest.fixture
def unchanged(tiny_random: Lab) -> Iterator[None]:
    before = state_of(tiny_random)
    yield
    assert state_of(tiny_random) == before


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_the_greedy_answer_equals_generate(tiny_random: Lab, picture: np.ndarray, fit: str) -> None:
    run = tiny_random.ask(picture, QUESTION, max_new_tokens=24, fit=fit)
    inputs = tiny_random.processor(text=run.prompt, images=picture, return_tensors="pt", do_pad=fit == "pad")
    with torch.no_grad():
        out = tiny_random.model.generate(
            **inputs, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert out.sequences[0].tolist() == run.token_ids.tolist()
    theirs = [float(step[0].float().log_softmax(-1)[token]) for step, token in zip(out.logits, run.token_ids[-24:], strict=True)]
    close(run.logprobs, theirs, terms=64 * 3)


def test_teacher_forcing_gives_the_answer_s_logprobs_again(tiny_random: Lab, run: Run) -> None:
    assert len(run.logprobs) == 12
    assert run.logprobs.dtype == np.float32
    probabilities_check_out(tiny_random, run)


def test_segments_cover_the_sequence_and_the_image_is_where_its_ids_are(tiny_random: Lab, run: Run) -> None:
    spans = [run.segments[name] for name in ("system", "image", "question", "cue", "answer")]
    assert list(run.segments) == ["system", "image", "question", "cue", "answer"]
    assert [position for span in spans for position in range(*span)] == list(range(len(run.token_ids)))
    assert len(run.tokens) == len(run.token_ids)
    where = np.flatnonzero(run.token_ids == tiny_random.model.config.image_token_index)
    assert np.array_equal(where, run.image_positions)
    assert len(where) == tiny_random.grid[0] * tiny_random.grid[1] == run.map.rows * run.map.cols


def test_history_stands_between_picture_and_question(tiny_random: Lab, picture: np.ndarray) -> None:
    run = tiny_random.ask(picture, "And the tree?", history=[(QUESTION, "It is red.")], max_new_tokens=3)
    assert list(run.segments) == ["system", "image", "history", "question", "cue", "answer"]
    assert "It is red.</s>" in "".join(run.tokens[slice(*run.segments["history"])])
    probabilities_check_out(tiny_random, run)


def test_answer_and_words_come_from_the_answer_s_tokens(tiny_random: Lab, run: Run) -> None:
    start, stop = run.segments["answer"]
    assert run.answer == decode(tiny_random.tokenizer, run.token_ids[start:stop].tolist()).strip()
    assert run.words[0].start == start
    assert "".join(run.answer.split()) == "".join("".join(word.text for word in run.words).split())
    assert run.options["stopped"] == "length"


def test_streamed_text_adds_up_to_the_answer_in_whole_characters(tiny_random: Lab, picture: np.ndarray) -> None:
    got: list[str] = []
    run = tiny_random.ask(picture, QUESTION, max_new_tokens=40, on_token=got.append)
    assert len(got) > 3
    assert "".join(got).rstrip() == run.answer


def test_streaming_holds_back_half_a_character(tiny_random: Lab) -> None:
    got: list[str] = []
    stream = lab_module._Stream(tiny_random.tokenizer, got.append)
    for token in tiny_random.tokenizer.encode(" a 🦊é b", add_special_tokens=False):
        stream.add(token)
    stream.close()
    assert "".join(got) == "a 🦊é b"
    assert all("\ufffd" not in piece for piece in got)


def test_the_end_mark_ends_the_answer_and_is_not_kept(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run.token_ids[slice(*run.segments["answer"])]
    monkeypatch.setattr(tiny_random, "eos_ids", frozenset({int(said[4])}))
    cut = tiny_random.ask(run.picture, QUESTION, max_new_tokens=12)
    stop = int(np.flatnonzero(said == said[4])[0])
    assert cut.options["stopped"] == "eos"
    assert cut.token_ids[slice(*cut.segments["answer"])].tolist() == said[:stop].tolist()


def test_an_empty_answer_is_a_sound_run(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = int(run.token_ids[run.segments["answer"][0]])
    monkeypatch.setattr(tiny_random, "eos_ids", frozenset({first}))
    empty = tiny_random.ask(run.picture, QUESTION)
    assert (empty.answer, empty.words, len(empty.logprobs)) == ("", (), 0)
    assert empty.segments["answer"] == (len(empty.token_ids), len(empty.token_ids))
    assert Run.load(empty.save(tmp_path / "empty.npz")).logprobs.dtype == np.float32


def test_sampling_depends_on_its_seed_alone(tiny_random: Lab, picture: np.ndarray, unchanged: None) -> None:
    def ask(seed: int, temperature: float = 1.5) -> list[int]:
        return tiny_random.ask(picture, QUESTION, max_new_tokens=10, temperature=temperature, seed=seed).token_ids.tolist()

    torch.rand(3, generator=torch.Generator().manual_seed(1))
    assert ask(1) == ask(1)
    assert ask(1) != ask(2)
    assert ask(5, temperature=0) == ask(6, temperature=0)


def test_sampled_tokens_keep_the_log_probability_of_the_raw_logits(tiny_random: Lab, picture: np.ndarray) -> None:
    run = tiny_random.ask(picture, QUESTION, max_new_tokens=10, temperature=2.0, seed=3)
    probabilities_check_out(tiny_random, run)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_image_token_is_never_said(
    tiny_random: Lab, picture: np.ndarray, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = tiny_random.model.lm_head
    wish = torch.zeros(head.out_features)
    wish[tiny_random.image_id] = 1000.0
    monkeypatch.setattr(head, "forward", lambda hidden: torch.nn.functional.linear(hidden, head.weight) + wish)
    run = tiny_random.ask(picture, QUESTION, max_new_tokens=5, temperature=temperature)
    assert tiny_random.image_id not in run.token_ids[slice(*run.segments["answer"])]
    assert (run.logprobs < -900).all()  # of the raw logits: the model did want to say it


def test_interrupting_keeps_the_answer_so_far(
    tiny_random: Lab, run: Run, unchanged: None, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    def stop_after_three(piece: str) -> None:
        seen.append(piece)
        if len(seen) == 3:
            raise KeyboardInterrupt

    cut = tiny_random.ask(run.picture, QUESTION, max_new_tokens=12, on_token=stop_after_three)
    assert cut.options["stopped"] == "interrupted"
    start, stop = cut.segments["answer"]
    assert 3 <= stop - start < 12
    assert cut.token_ids.tolist() == run.token_ids[:stop].tolist()
    assert np.array_equal(cut.logprobs, run.logprobs[: stop - start])
    assert "interrupted" in caplog.text


def test_interrupting_before_the_first_token_gives_an_empty_answer(
    tiny_random: Lab, run: Run, unchanged: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiny_random.model.model, "forward", interrupted)
        cut = tiny_random.ask(run.picture, QUESTION)
    assert (cut.answer, cut.options["stopped"]) == ("", "interrupted")
    assert tiny_random.ask(run.picture, QUESTION, max_new_tokens=12).token_ids.tolist() == run.token_ids.tolist()


def test_an_error_in_the_callback_reaches_the_caller_and_leaves_nothing(
    tiny_random: Lab, picture: np.ndarray, unchanged: None
) -> None:
    def broken(piece: str) -> None:
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        tiny_random.ask(picture, QUESTION, on_token=broken)


def test_a_model_in_training_mode_answers_in_evaluation_mode_and_gets_its_mode_back(tiny_random: Lab, run: Run) -> None:
    config, layer = tiny_random.model.config.text_config, tiny_random.model.model.language_model.layers[0]
    tower = tiny_random.model.model.vision_tower
    before = layer.self_attn.attention_dropout
    try:
        layer.self_attn.attention_dropout = 0.5
        tiny_random.model.train()
        tower.eval()  # frozen, as in LLaVA's second stage
        again = tiny_random.ask(run.picture, QUESTION, max_new_tokens=12)
        assert (tiny_random.model.training, layer.training, tower.training) == (True, True, False)
    finally:
        layer.self_attn.attention_dropout = before
        tiny_random.model.eval()
    assert config.attention_dropout == before
    assert again.token_ids.tolist() == run.token_ids.tolist()


def test_a_run_survives_its_file_exactly(run: Run, tmp_path: Path) -> None:
    back = Run.load(run.save(tmp_path / "run.npz"))
    for name in (field.name for field in fields(Run)):
        mine, theirs = getattr(run, name), getattr(back, name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype
            assert np.array_equal(mine, theirs)
        else:
            assert mine == theirs, name
            assert type(mine) is type(theirs)


def test_inputs_take_another_picture_of_the_same_size_only(tiny_random: Lab, run: Run) -> None:
    own = tiny_random.inputs(run)
    other = tiny_random.inputs(run, picture=np.zeros_like(run.picture))
    assert set(own) == {"input_ids", "attention_mask", "pixel_values"}
    assert own["input_ids"].shape == own["attention_mask"].shape == (1, len(run.token_ids))
    assert own["attention_mask"].all()
    assert torch.equal(own["pixel_values"], tiny_random.pixels(run.picture, run.map.mode))
    assert not torch.equal(own["pixel_values"], other["pixel_values"])
    with pytest.raises(PictureError, match="40, 60, 3"):
        tiny_random.inputs(run, picture=np.zeros((5, 5, 3), np.uint8))


def test_another_model_s_run_is_refused(tiny_random: Lab, run: Run) -> None:
    for other in (replace(run, fingerprint="0" * 16), replace(run, model="elsewhere", fingerprint="1" * 16)):
        with pytest.raises(CheckpointError, match="ask again") as error:
            tiny_random.inputs(other)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 2.5}, "whole number"),
        ({"max_new_tokens": True}, "whole number"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"prompt": "v1"}, "llava-1.5, hf"),
        ({"fit": "square"}, "pad, crop"),
        ({"question": "a <pad> b"}, "<pad>"),
        ({"question": "word " * 600}, "context is 512"),
    ],
)
def test_unusable_options_are_refused_in_one_line(
    tiny_random: Lab, picture: np.ndarray, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError) as error:
        tiny_random.ask(picture, **{"question": QUESTION, **options})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_answer_stops_where_the_context_ends(tiny_random: Lab, picture: np.ndarray) -> None:
    run = tiny_random.ask(picture, "a " * 410, max_new_tokens=64)
    assert len(run.token_ids) == tiny_random.context == 512
    assert run.options["stopped"] == "length"
    probabilities_check_out(tiny_random, run)


def test_a_lab_can_be_made_of_a_model_in_memory(tiny_random: Lab, run: Run) -> None:
    again = Lab(tiny_random.model, tiny_random.processor, name="here")
    assert (again.card.source, again.card.parameters) == ("in memory", tiny_random.card.parameters)
    assert again.ask(run.picture, QUESTION, max_new_tokens=12).answer == run.answer
    assert "4x4 patches" in repr(again)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_logits_that_are_not_finite_are_no_answer(
    tiny_folder: Path, picture: np.ndarray, value: float, temperature: float
) -> None:
    lab = load(str(tiny_folder))
    lab.ask(picture, "What?", max_new_tokens=1)  # transformers installs its own recording hooks at the first forward
    with torch.no_grad():
        layout.language_layers(lab.model)[1].mlp.down_proj.weight[0, 0] = value
    before = state_of(lab)
    with pytest.raises(LabError, match="expected finite logits, got NaN or infinity in .*dtype='float32'"):
        lab.ask(picture, "What?", max_new_tokens=3, temperature=temperature)
    assert state_of(lab) == before

"""Asking: the answer equals transformers' own, every number can be checked again, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab import plots
from llava_lab.errors import CheckpointError, LabError, OptionError, PictureError
from llava_lab.models import Lab, layout, load
from llava_lab.models import lab as lab_module
from llava_lab.models.text import decode
from llava_lab.results import Run, load_npz, save_npz
from tests.support.answers import probabilities_check_out
from tests.support.closeness import close
from tests.support.families import family
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
        ({"question": ["Why?", "Who?"]}, "one question"),
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


def drawn(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(("batch", "temperature"), [(8, 0.0), (3, 0.0), (8, 1.5)])
def test_many_questions_get_the_runs_that_ask_gives_one_by_one(
    tiny_random: Lab, picture: np.ndarray, batch: int, temperature: float, unchanged: None
) -> None:
    other = drawn(50, 70)
    pictures = [picture, picture, other, other, picture, None, None, [picture, other], other]
    questions = [
        QUESTION,
        "Is it a car or a tree over there, or what else?",
        "Why?",
        QUESTION,
        "a " * 300,
        "Hello.",
        "Who?",
        "?",
        "Red?",
    ]
    asking: dict[str, Any] = {"max_new_tokens": 9, "temperature": temperature, "seed": 4}
    many = tiny_random.ask_many(pictures, questions, batch=batch, progress=False, **asking)
    text = tiny_random.model.config.text_config
    for run, shown, question in zip(many, pictures, questions, strict=True):
        alone = tiny_random.ask(shown, question, **asking)
        close(run.logprobs, alone.logprobs, terms=text.hidden_size * text.num_hidden_layers)
        for name in (field.name for field in fields(Run)):
            if name != "logprobs":
                np.testing.assert_equal(getattr(run, name), getattr(alone, name))


def test_a_batch_takes_few_passes_and_sees_a_picture_once(tiny_random: Lab, picture: np.ndarray) -> None:
    passes: list[int] = []
    seen: list[int] = []
    model: Any = tiny_random.model
    count = model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
    look = model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, given: seen.append(len(given["pixel_values"] if "pixel_values" in given else args[0])),
        with_kwargs=True,
    )
    try:
        tiny_random.ask_many([picture] * 4 + [drawn(50, 70)] * 4, QUESTION, max_new_tokens=5, progress=False)
    finally:
        count.remove()
        look.remove()
    assert (len(passes), seen) == (1 + 5, [2])


@pytest.mark.parametrize(
    ("pictures", "questions", "shapes"),
    [
        (drawn(9, 8), ["Why?", "Who?"], [(8, 9)] * 2),
        ([drawn(9, 8), drawn(7, 6)], "Why?", [(8, 9), (6, 7)]),
        (np.stack([drawn(9, 8), drawn(9, 8)]), "Why?", [(8, 9)] * 2),
        (torch.zeros(2, 3, 8, 9), ("Why?", "Who?"), [(8, 9)] * 2),
        (iter([drawn(9, 8), drawn(7, 6)]), iter(["Why?", "Who?"]), [(8, 9), (6, 7)]),
        (None, ["Why?"], [(0, 0)]),
        (drawn(9, 8), "Why?", [(8, 9)]),
        ([], [], []),
    ],
)
def test_one_picture_or_one_question_stands_for_all(
    tiny_random: Lab, pictures: Any, questions: Any, shapes: list[tuple[int, int]]
) -> None:
    runs = tiny_random.ask_many(pictures, questions, max_new_tokens=1, progress=False)
    assert [run.picture.shape[:2] for run in runs] == shapes


@pytest.mark.parametrize(
    ("pictures", "questions", "words"),
    [
        ([drawn(9, 8)] * 2, ["Why?"], "2 pictures and 1 questions"),
        ([drawn(9, 8), "none.png"], "Why?", "question 2 of 2: no such picture"),
        (drawn(9, 8), ["Why?", ""], "question 2 of 2: the question is empty"),
        (drawn(9, 8), ["Why?", None], "question 2 of 2: the question must be text"),
        (drawn(9, 8), 5, "questions must be a list of text"),
        ([[]], "Why?", "the list of pictures is empty"),
    ],
)
def test_a_bad_question_of_many_is_named_before_any_is_answered(
    tiny_random: Lab, pictures: Any, questions: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_random.model, "forward", lambda **given: pytest.fail("the model ran"))
    with pytest.raises(LabError) as error:
        tiny_random.ask_many(pictures, questions, progress=False)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("batch", [1, 2])
def test_interrupting_many_keeps_the_finished_runs_and_is_raised_before_the_first(
    tiny_random: Lab, picture: np.ndarray, batch: int, unchanged: None, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tiny_random.ask_many(picture, [QUESTION] * 6, max_new_tokens=4, batch=batch, progress=False)
    steps = 0

    def stop_at(step: int) -> Any:
        def count(*_: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == step:
                raise KeyboardInterrupt

        return count

    for step, finished in ((2, None), (12, 2)):
        steps = 0
        hook = tiny_random.model.model.language_model.register_forward_pre_hook(stop_at(step))
        try:
            if finished is None:
                with pytest.raises(KeyboardInterrupt):
                    tiny_random.ask_many(picture, [QUESTION] * 6, max_new_tokens=4, batch=batch, progress=False)
                continue
            some = tiny_random.ask_many(picture, [QUESTION] * 6, max_new_tokens=4, batch=batch, progress=False)
        finally:
            hook.remove()
        assert len(some) >= finished
        assert len(some) < 6
        assert [run.answer for run in some] == [run.answer for run in whole[: len(some)]]
        assert "their runs are kept" in caplog.text


@pytest.mark.parametrize("pictures", [0, 2, 3])
@pytest.mark.parametrize("history", [(), [(QUESTION, "It is red.")]])
def test_without_a_picture_and_with_several_the_answer_is_transformers_own(
    tiny_random: Lab, picture: np.ndarray, pictures: int, history: Any
) -> None:
    shown = [picture, drawn(50, 70), drawn(30, 30)][:pictures]
    run = tiny_random.ask(shown or None, "What differs?", history=history, max_new_tokens=8)
    assert run.prompt.count("<image>\n") == pictures
    inputs = tiny_random.processor(
        text=run.prompt, images=shown or None, return_tensors="pt", **{"do_pad": True} if shown else {}
    )
    with torch.no_grad():
        out = tiny_random.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert out[0].tolist() == run.token_ids.tolist()
    probabilities_check_out(tiny_random, run, tiles=True)
    spans = list(run.segments.values())
    assert [position for span in spans for position in range(*span)] == list(range(len(run.token_ids)))
    where = np.flatnonzero(run.token_ids == tiny_random.image_id)
    assert np.array_equal(np.concatenate([where[:0], *(view.positions.ravel() for view in run.views)]), where)
    asked = "".join(run.tokens[slice(*run.segments["question"])])
    assert asked.split() == ["What", "differs?"]
    if history:
        assert "".join(run.tokens[slice(*run.segments["history"])]).split()[0] == "What"


def test_a_run_of_several_pictures_may_have_another_first(tiny_random: Lab, picture: np.ndarray, tmp_path: Path) -> None:
    pictures = (picture, drawn(50, 70), drawn(30, 30))
    run = tiny_random.ask(list(pictures), QUESTION, max_new_tokens=3)
    run = Run.load(run.save(tmp_path / "run.npz"))
    for number, own in enumerate(pictures):
        one = run.about(number)
        assert one.number == number
        assert np.array_equal(one.picture, own)
        assert (one.map.width, one.map.height) == own.shape[1::-1]
        assert one.views[0].name == f"picture {number + 1}"
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(one.pictures, pictures, strict=True))
        assert torch.equal(
            tiny_random.inputs(one, tiles=True)["pixel_values"], tiny_random.inputs(run, tiles=True)["pixel_values"]
        )
    assert run.about(2).about(0).views == run.views
    with pytest.raises(OptionError, match="0 to 2"):
        run.about(3)


@pytest.mark.parametrize("pictures", [0, 2])
def test_what_was_made_for_one_picture_refuses_none_and_several_in_one_line(
    tiny_random: Lab, picture: np.ndarray, pictures: int, unchanged: None
) -> None:
    run = tiny_random.ask([picture] * pictures or None, "Is it red or blue?", max_new_tokens=4)
    refused = [
        lambda: tiny_random.inputs(run),
        lambda: ll.logit_lens(tiny_random, run),
        lambda: ll.nearest_words(tiny_random, run),
        lambda: ll.image_share(tiny_random, run),
        lambda: ll.head_maps(tiny_random, run),
        lambda: ll.sanity(tiny_random, run, "random", tests="question"),
        lambda: ll.knockout(tiny_random, run, source="question", target="last"),
        lambda: ll.ablate_tokens(tiny_random, run, [(0, 0)]),
        lambda: ll.attribute(tiny_random, run, method="relevancy"),
        lambda: ll.ask_and_attribute(tiny_random, [picture] * pictures or None, QUESTION),
    ]
    if not pictures:
        refused += [
            lambda: ll.attribute(tiny_random, run),
            lambda: ll.attribute(tiny_random, run, method="occlusion"),
            lambda: ll.compare(tiny_random, run, ["random"]),
            lambda: ll.ask_without(tiny_random, run, [(0, 0)]),
            lambda: plots.journey(run),
        ]
    for call in refused:
        with pytest.raises(OptionError, match="picture") as error:
            call()
        assert "\n" not in str(error.value)


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


@pytest.mark.parametrize(
    "questions", [{"a": "What?"}, {"What?", "Why?"}, frozenset({"What?"}), b"What?", 3, None, lambda: "What?"]
)
def test_questions_without_an_order_are_refused(tiny_random: Lab, picture: np.ndarray, questions: Any) -> None:
    """Of a dictionary its names would be asked, of a set the questions in any order."""
    with pytest.raises(OptionError, match="questions must be a list of text, got "):
        tiny_random.ask_many(picture, questions, progress=False)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(
            ("temperature", value)
            for value in (1e-300, 1e-7, -1e-9, -1, float("nan"), float("inf"), 10**400, True, "1", Decimal(1))
        ),
        *(("prompt", value) for value in ("", " hf", "HF", False, ["hf"])),
        *(("fit", value) for value in ("", " pad", "PAD", False, np.array(["pad", "crop"]))),
    ],
)
def test_an_odd_value_of_an_option_is_refused_and_never_taken_for_the_default(
    tiny_random: Lab, picture: np.ndarray, option: str, value: Any
) -> None:
    with pytest.raises(OptionError, match=f"^{option} must be "):
        tiny_random.ask(picture, QUESTION, max_new_tokens=1, **{option: value})


@pytest.mark.parametrize("value", [Fraction(1, 2), np.float16(0.5), np.array(0.5), torch.tensor(0.5), np.longdouble(0.5)])
def test_a_temperature_of_another_kind_is_the_same_number(tiny_random: Lab, picture: np.ndarray, value: Any) -> None:
    wanted, got = (tiny_random.ask(picture, QUESTION, max_new_tokens=3, temperature=one, seed=1) for one in (0.5, value))
    assert got.options == wanted.options
    assert got.logprobs.tobytes() == wanted.logprobs.tobytes()


def moved(run: Run, by: int) -> Run:
    start, stop = run.segments["image"]
    return replace(run, segments={**run.segments, "image": (start + by, stop + by)})


def with_token(run: Run, place: int, token: int) -> Run:
    ids = run.token_ids.copy()
    ids[place] = token
    return replace(run, token_ids=ids)


DAMAGED: dict[str, tuple[Any, str]] = {
    "the picture's place moved on": (lambda run: moved(run, 1), "expected its image tokens at"),
    "the picture's place moved back": (lambda run: moved(run, -1), "expected its image tokens at"),
    "a shorter place": (lambda run: replace(run, segments={**run.segments, "image": (1, 3)}), "expected its image tokens at"),
    "a token beyond the words": (lambda run: with_token(run, -1, 10**6), "expected token ids of 0 to"),
    "a token before the answer": (lambda run: with_token(run, 0, 10**6), "expected token ids of 0 to"),
    "a token below zero": (lambda run: with_token(run, -1, -5), "expected token ids of 0 to"),
    "a token far below zero": (lambda run: with_token(run, 0, -(2**62)), "expected token ids of 0 to"),
    "an image token too many": (lambda run: with_token(run, -1, run.token_ids[run.segments["image"][0]]), "image tokens"),
    "an image token too few": (lambda run: with_token(run, run.segments["image"][0], 5), "image tokens"),
    "a larger grid": (lambda run: replace(run, map=replace(run.map, rows=5)), "expected a grid of 4x4 patches, got 5x4"),
    "a smaller grid": (lambda run: replace(run, map=replace(run.map, rows=2, cols=2)), "expected a grid of 4x4 patches, got 2x2"),
    "a flat grid": (lambda run: replace(run, map=replace(run.map, rows=1, cols=16)), "expected a grid of 4x4 patches, got 1x16"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_run_that_was_changed_in_its_file_is_refused_before_it_is_explained(tiny_random: Lab, run: Run, what: str) -> None:
    change, words = DAMAGED[what]
    for work in (tiny_random.inputs, lambda damaged: ll.attribute(tiny_random, damaged)):
        with pytest.raises(CheckpointError, match=words) as error:
            work(change(run))
        assert "\n" not in str(error.value)


def _said(header: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**header, **changes}


def _instead(header: dict[str, Any], field: str, old: str, new: str) -> dict[str, Any]:
    assert old in header[field]
    return {**header, field: header[field].replace(old, new)}


def _first_word(header: dict[str, Any], text: str) -> dict[str, Any]:
    first, *rest = header["words"]
    return {**header, "words": [{**first, "text": text}, *rest]}


# what is changed in the file of a run, and what is said when it is used
EDITED: dict[str, tuple[Any, str]] = {
    "another question": (lambda file: _said(file, question="What color is the dog?"), "the question that its prompt asks"),
    "the end of the question": (lambda file: _said(file, question="the car?"), "the question that its prompt asks"),
    "the question in capitals": (lambda file: _said(file, question=QUESTION.upper()), "the question that its prompt asks"),
    "a sign less in the question": (lambda file: _said(file, question=QUESTION[:-1]), "the question that its prompt asks"),
    "no question": (lambda file: _said(file, question=""), "the question that its prompt asks"),
    "the model's name for a question": (lambda file: _said(file, question="ASSISTANT"), "the question that its prompt asks"),
    "a word of the prompt": (lambda file: _instead(file, "prompt", "car", "dog"), "the prompt that its token ids spell"),
    "question and prompt alike": (
        lambda file: _instead(_instead(file, "prompt", "car", "dog"), "question", "car", "dog"),
        "the prompt that its token ids spell",
    ),
    "a sign less in the prompt": (lambda file: _instead(file, "prompt", "?", ""), "the prompt that its token ids spell"),
    "more in the prompt": (lambda file: _instead(file, "prompt", "?", "? Be brief."), "the prompt that its token ids spell"),
    "no prompt": (lambda file: _said(file, prompt="<image>"), "the prompt that its token ids spell"),
    "two pictures in the prompt": (
        lambda file: _instead(file, "prompt", "<image>", "<image><image>"),
        "a prompt with 1 times <image>, got 2",
    ),
    "no picture in the prompt": (lambda file: _instead(file, "prompt", "<image>", ""), "a prompt with 1 times <image>, got 0"),
    "another answer": (lambda file: _said(file, answer="The zebra is blue."), "the answer that its token ids spell"),
    "no answer": (lambda file: _said(file, answer=""), "the answer that its token ids spell"),
    "another word of the answer": (lambda file: _first_word(file, "zebra"), "the words of its answer"),
    "another form of prompt": (
        lambda file: _said(
            file, options={**file["options"], "prompt": "hf" if "chat between" in file["prompt"] else "llava-1.5"}
        ),
        "the question that its prompt asks",
    ),
}


@pytest.mark.parametrize("what", EDITED)
def test_a_run_whose_texts_were_changed_in_its_file_loads_and_is_refused_where_it_is_used(
    tiny_random: Lab, run: Run, tmp_path: Path, what: str
) -> None:
    """The reader knows no tokenizer; the lab that explains the ids under these words does."""
    change, words = EDITED[what]
    header, arrays = load_npz(run.save(tmp_path / "run.npz"), Run.KIND)
    damaged = Run.load(save_npz(tmp_path / "changed.npz", Run.KIND, change(header), arrays))
    for use in (
        tiny_random.inputs,
        lambda damaged: ll.attribute(tiny_random, damaged),
        lambda damaged: ll.attribute(tiny_random, damaged, method="center"),
        lambda damaged: ll.ask_without(tiny_random, damaged, [(0, 0)]),
    ):
        with pytest.raises(CheckpointError, match=f"this run is damaged: expected {words}") as error:
            use(damaged)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["llava-1.5", "hf", "chat"])
@pytest.mark.parametrize("history", [(), (("Is it red?", "Yes, the car."), ("And the sky?", "Blue."))])
@family("question", [QUESTION, "  Is it the car?\nOr USER: a   dog? ", "ASSISTANT?", "é 雪 🙂"], quick=2)
def test_a_run_as_it_was_saved_is_its_lab_s_own(
    tiny_random: Lab, picture: np.ndarray, tmp_path: Path, form: str, history: Any, question: str
) -> None:
    for shown in (picture, None) if form != "chat" else (picture,):
        made = tiny_random.ask(shown, question, prompt=form, history=history, max_new_tokens=3)
        tiny_random.check(Run.load(made.save(tmp_path / "run.npz")))


def test_the_end_of_a_question_is_none_after_earlier_turns(tiny_random: Lab, picture: np.ndarray) -> None:
    made = tiny_random.ask(picture, QUESTION, history=[("Is it red?", "Yes.")], max_new_tokens=2)
    with pytest.raises(CheckpointError, match="the question that its prompt asks"):
        tiny_random.check(replace(made, question="the car?"))


def test_another_question_cannot_be_put_where_the_prompt_does_not_hold_the_first(tiny_random: Lab, run: Run) -> None:
    with pytest.raises(CheckpointError, match="its prompt does not hold its question; ask again"):
        tiny_random.asked_instead(replace(run, prompt="x"), "Why?")

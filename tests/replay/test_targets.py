"""Targets: what a user names becomes the positions that predict it, contrasts included, or a clear refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llava_lab.errors import LabError, TargetError
from llava_lab.models import Lab
from llava_lab.replay import resolve_targets
from llava_lab.results import Run
from tests.support.checkpoints import SENTENCES, build_llama_model, build_processor, llava_config, sentencepiece_tokenizer
from tests.support.planted import scripted_run


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "Yes, the car is blue.")


def test_targets_are_the_positions_before_the_tokens(tiny_random: Lab, run: Run) -> None:
    start, stop = run.segments["answer"]
    (whole,) = resolve_targets(tiny_random, run)
    assert whole.positions == tuple(range(start - 1, stop - 1))
    assert whole.token_ids == tuple(run.token_ids[start:stop])
    words = resolve_targets(tiny_random, run, "words")
    assert "".join(word.text for word in words) == "Yes,thecarisblue."
    assert tuple(i for word in words for i in word.positions) == whole.positions
    several = resolve_targets(tiny_random, run, ["words", np.int64(1), ("blue", "green"), whole])
    assert [one.kind for one in several] == ["word"] * len(words) + ["token", "contrast", "answer"]


def test_a_contrast_differs_at_the_first_token_that_would(tiny_random: Lab, run: Run) -> None:
    tokenizer, start = tiny_random.tokenizer, run.segments["answer"][0]
    (target,) = resolve_targets(tiny_random, run, ("blue", "green"))
    word = run.word("blue")
    assert target.positions == (word.start - 1,)
    assert target.token_ids == (run.token_ids[word.start],)
    assert tokenizer.decode(list(target.against_ids))[:2] == " g"
    (yes,) = resolve_targets(tiny_random, run, ("yes", "no"))
    assert (yes.text, yes.positions[0] >= start - 1) == ("Yes, not No", True)
    assert tokenizer.decode(list(yes.against_ids)).strip()[0] == "N"


@pytest.mark.parametrize(
    ("answer", "said", "instead"),
    [
        ("Straße, the car is blue.", "blue", "green"),  # small letters of the first word are more than its letters
        ("ŉ ßßß İİ the car is blue.", "blue", "green"),
        ("Straße", "STRASSE", "green"),
        ("the ﬁsh is blue.", "fish", "green"),
        ("the café is blue.", "cafe\u0301", "green"),
        ("the cafe\u0301 is blue.", "café", "green"),
        ("the car is blue.", " blue ", " green "),
        ("the car is blue.", "Blue!", "green"),
        ("the car is blue.", np.str_("blue"), np.str_("green")),
        ("blue, the car is blue.", "blue", "green"),
        ("the car is 🦊 blue.", "blue", "green"),
        ("the car is 🦊 blue.", "🦊", "green"),
        ("赤い車", "い", "green"),
    ],
)
def test_a_contrast_puts_the_other_word_where_the_first_stands(
    tiny_random: Lab, run: Run, answer: str, said: str, instead: str
) -> None:
    told = scripted_run(tiny_random, run.picture, answer)
    word, start, tokenizer = told.word(said), told.segments["answer"][0], tiny_random.tokenizer
    (target,) = resolve_targets(tiny_random, told, (said, instead))
    ids = [int(i) for i in told.token_ids[start:]]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    stands = whole.index(word.text.rstrip(".!"), len(tokenizer.decode(ids[: word.start - start]).rstrip()))
    capital = "Green" if word.text[0].isupper() else "green"
    other = tokenizer.encode(whole[:stands] + capital + whole[stands + len(word.text.rstrip(".!")) :], add_special_tokens=False)
    at = target.positions[0] + 1 - start
    assert word.start <= target.positions[0] + 1 < word.stop
    assert ids[:at] == other[:at]
    assert (target.token_ids, target.against_ids) == ((ids[at],), (other[at],))
    assert "  " not in target.text


@pytest.mark.parametrize("instead", ["</s>", "<s>", "<image>", "a <image>", "", " ", "\n", "BLUE", "blue.", " blue "])
def test_a_contrast_with_a_special_token_nothing_or_the_same_word_is_refused(tiny_random: Lab, run: Run, instead: str) -> None:
    with pytest.raises(LabError, match=r"special token|two different words|needs another word"):
        resolve_targets(tiny_random, run, ("blue", instead))


def test_a_contrast_within_a_word_compares_where_it_parts(tiny_random: Lab, run: Run) -> None:
    tokenizer, word = tiny_random.tokenizer, run.word("car")
    (target,) = resolve_targets(tiny_random, run, ("car", "care"))
    other = tokenizer.encode(" Yes, the care is blue.", add_special_tokens=False)
    at = target.positions[0] + 1
    offset = at - run.segments["answer"][0]
    assert at >= word.start
    assert [int(i) for i in run.token_ids[run.segments["answer"][0] : at]] == other[:offset]
    assert (target.token_ids[0], target.against_ids[0]) == (run.token_ids[at], other[offset])


def test_a_sentencepiece_contrast_finds_the_same_place() -> None:
    tokenizer = sentencepiece_tokenizer((*SENTENCES, "It is red or blue"))
    config = llava_config(
        tokenizer,
        image=32,
        patch=8,
        vision_width=32,
        vision_layers=2,
        hidden=32,
        layers=1,
        heads=4,
        feature_layer=-2,
        feature_strategy="default",
        projector_bias=True,
        context=512,
        vocab=len(tokenizer),
    )
    lab = Lab(build_llama_model(config), build_processor(config, tokenizer, do_pad=True))
    run = scripted_run(lab, np.zeros((8, 8, 3), np.uint8), "The car is blue")
    (target,) = resolve_targets(lab, run, ("blue", "red"))
    assert target.positions == (run.word("blue").start - 1,)
    assert tokenizer.convert_ids_to_tokens(list(target.token_ids)) == ["▁blue"]
    (first,) = resolve_targets(lab, run, ("the", "a"))
    assert first.positions == (run.segments["answer"][0] - 1,)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("red", "the answer has no word 'red'.*it has 'Yes'"),
        (("red", "blue"), "the answer has no word 'red'"),
        (("blue", "Blue"), "two different words, got 'blue' twice"),
        (99, "answer tokens run from 0 to"),
        (1.5, "a target is None, an answer token number"),
        ([], "an empty list of targets"),
    ],
)
def test_targets_that_are_not_there_are_refused(tiny_random: Lab, run: Run, target: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        resolve_targets(tiny_random, run, target)


def test_targets_of_another_run_and_empty_answers_are_refused(tiny_random: Lab, run: Run) -> None:
    foreign = replace(run.target(), positions=(5,))
    with pytest.raises(TargetError, match="points outside the answer"):
        resolve_targets(tiny_random, run, foreign)
    stop = run.segments["answer"][0]
    silent = replace(run, segments={**run.segments, "answer": (stop, stop)}, words=())
    for target in (None, "words"):
        with pytest.raises(TargetError, match="an empty answer"):
            resolve_targets(tiny_random, silent, target)

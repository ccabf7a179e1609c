"""A model on this machine writes rows from the same messages as a server; what it cannot read is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from llava_lab.errors import CheckpointError
from llava_lab.instructions import Context, Kind, LocalTeacher, read_kinds
from llava_lab.instructions.teachers import request_key
from tests.support.little_language import WORDS, llama

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}{{ 'A:' if add_generation_prompt else '' }}"
CONTEXT = Context(("dog",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("language")
    llama().save_pretrained(place)
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=WORDS[2], pad_token=WORDS[2])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def kind(tmp_path: Path) -> Kind:
    (tmp_path / "say").mkdir()
    (tmp_path / "say" / "kind.json").write_text(json.dumps({"boxes": False, "form": "turns", "words": [1, 9], "tokens": 5}))
    (tmp_path / "say" / "system.txt").write_text("Say.")
    return read_kinds(["say"], tmp_path)["say"]


def test_a_model_here_answers_the_same_for_the_same_seed(folder: Path, kind: Kind) -> None:
    teacher = LocalTeacher(str(folder))
    told = teacher.ask(kind, CONTEXT, seed=0)
    assert told == teacher.ask(kind, CONTEXT, seed=1)  # greedy
    assert told.used is not None
    assert told.used[0] == len("Say.dogA:")
    assert 1 <= told.used[1] <= 5
    warm = LocalTeacher(str(folder), temperature=2.0)
    assert warm.ask(kind, CONTEXT, seed=0) == warm.ask(kind, CONTEXT, seed=0)
    assert len({warm.ask(kind, CONTEXT, seed=seed).text for seed in range(6)}) > 1


def test_what_does_not_fit_is_a_silence_that_says_why(folder: Path) -> None:
    told = LocalTeacher(str(folder)).ask(read_kinds(["conversation"])["conversation"], CONTEXT, seed=0)
    assert told.text == ""
    assert "the model's context is 2048" in told.silence


def test_a_teacher_that_cannot_be_loaded_or_asked_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot load the teacher"):
        LocalTeacher(str(tmp_path))
    other = PreTrainedTokenizerFast.from_pretrained(folder)
    other.chat_template = None
    llama().save_pretrained(tmp_path / "bare")
    other.save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="has no chat template"):
        LocalTeacher(str(tmp_path / "bare"))


def test_a_request_s_key_is_of_all_that_decides_its_answer(folder: Path, kind: Kind) -> None:
    cold, warm = LocalTeacher(str(folder)), LocalTeacher(str(folder), temperature=1.0)
    keys = [request_key(cold, kind, CONTEXT, 0), request_key(warm, kind, CONTEXT, 0), request_key(cold, kind, CONTEXT, 1)]
    keys.append(request_key(cold, kind, Context(("cat",)), 0))
    assert len(set(keys)) == 4

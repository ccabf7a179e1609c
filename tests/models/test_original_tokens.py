"""Words that stand in tokenizer.model only, as the released folders have them, are read as sentencepiece itself reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from llava_lab.models.formats.original import read_tokenizer

TEXTS = (
    "What color is the car?",
    "USER: hello\nASSISTANT:",
    "Zürich 42 é",
    "two  spaces ",
)  # spaces in front are transformers' own affair: its LlamaTokenizer drops one
SPECIAL = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair model trained with Llama's settings, and Vicuna's tokenizer_config.json."""
    made = tmp_path_factory.mktemp("words")
    lines = [f"What color is the car number {i}? The car is red. USER: hello ASSISTANT: yes" for i in range(300)]
    (made / "corpus.txt").write_text("\n".join(lines), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(made / "corpus.txt"),
        model_prefix=str(made / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    marks = {
        name: {**SPECIAL, "content": text} for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **marks}
    (made / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": None, "model_max_length": 2048}), "utf-8")
    return made


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_sentencepiece_s_own(folder: Path, text: str) -> None:
    words = read_tokenizer(folder, patch_token=False)
    expected = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).encode(text)
    assert words(text)["input_ids"] == [1, *expected]


def test_image_and_pad_come_after_the_last_word(folder: Path) -> None:
    words = read_tokenizer(folder, patch_token=False)
    assert words.convert_tokens_to_ids(["<image>", "<pad>"]) == [320, 321]
    assert words("<image>\nWhat")["input_ids"][:2] == [1, 320]
    assert words.pad_token_id == 321


def test_a_damaged_file_is_one_line(folder: Path, tmp_path: Path) -> None:
    from llava_lab.errors import CheckpointError

    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes()[:500])
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        read_tokenizer(tmp_path, patch_token=False)
    assert "\n" not in str(caught.value)

"""convert writes a folder that stock transformers reads whole, or leaves nothing behind; data writes what was asked.

train and ablate are tested with what they call (tests/training, tests/comparison).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_lab.cli import main as cli
from llava_lab.cli.train import read_source
from llava_lab.errors import OptionError
from llava_lab.models import load
from tests.support import original_folders as made
from tests.support.closeness import TERMS, close
from tests.support.original_folders import Parts

Printed = Callable[..., dict[str, Any]]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def parts() -> Parts:
    return made.make_parts()


@pytest.fixture
def convert(tmp_path: Path, parts: Parts) -> list[str]:
    """The command with its FOLDER and --vision."""
    folder, tower = made.write_whole(tmp_path / "llava", parts), made.write_tower(tmp_path / "clip", parts)
    return ["convert", "--vision", str(tower), str(folder)]


def test_stock_transformers_reads_what_was_written(tmp_path: Path, parts: Parts, convert: list[str], printed: Printed) -> None:
    out = tmp_path / "new" / "hf"
    data = printed(*convert, str(out))
    assert (data["folder"], data["image_token_id"], data["vocabulary"]) == (str(out), 400, 448)
    assert (data["connector"], data["dtype"], data["pad_token_id"]) == ("mlp2x_gelu", "float32", 401)
    model, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, pixels = made.probe()
    close(made.logits(model, ids, pixels), made.logits(parts.model, ids, pixels), terms=TERMS)
    lab = load(out)
    assert lab.card.fit == "pad"
    assert lab.sequence("What?", prompt="chat").text == lab.sequence("What?").text
    assert [file.name for file in out.parent.iterdir()] == ["hf"]


def test_half_precision_is_kept(tmp_path: Path, convert: list[str]) -> None:
    for file in Path(convert[-1]).glob("pytorch_model-*.bin"):
        torch.save({name: value.half() for name, value in torch.load(file).items()}, file)
    assert cli.main([*convert, str(tmp_path / "hf")]) == 0
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").dtype == torch.float16


def test_a_full_folder_is_not_written_over(tmp_path: Path, convert: list[str], refused: Refused) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("mine")
    assert "is not an empty folder" in refused(*convert, str(tmp_path / "hf"))
    assert [file.name for file in (tmp_path / "hf").iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, convert: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.LlavaProcessor.save_pretrained", stop)
    assert cli.main([*convert, str(tmp_path / "hf")]) == 130
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip", "llava"]


def test_a_transformers_folder_needs_no_conversion(tmp_path: Path, tiny_folder: Path, refused: Refused) -> None:
    assert "nothing to convert" in refused("convert", str(tiny_folder), str(tmp_path / "hf"))


def test_data_writes_what_was_asked(tmp_path: Path, printed: Printed, refused: Refused) -> None:
    out = tmp_path / "world"
    data = printed("data", "picturebook", "--n", "2", "--seed", "4", "--split", "test", "--out", str(out))
    assert len(json.loads(Path(data["file"]).read_text("utf-8"))) == 2
    assert (data["n"], data["split"]) == (2, "test")
    assert "empty folder" in refused("data", "picturebook", "--n", "2", "--split", "test", "--out", str(out))


def test_a_source_is_read_with_its_options() -> None:
    source = read_source("mix.json,weight=0.5,suffix=word,images=photos")
    assert (str(source.file), source.weight, source.suffix, str(source.images)) == ("mix.json", 0.5, "word", "photos")
    for text, message in (("mix.json,weigt=1", "--data wants FILE"), ("mix.json,weight=much", "weight must be a number")):
        with pytest.raises(OptionError, match=message):
            read_source(text)


def test_a_training_that_was_stopped_gives_130(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"folder": Path("m"), "steps": 3, "of": 9, "seconds": 1.0, "skipped": (), "losses": [1.0]}
    for stopped, code in (("interrupted", 130), ("finished", 0)):
        done = SimpleNamespace(**about, stopped=stopped)
        monkeypatch.setattr("llava_lab.training.stages.train_stage", lambda *_, done=done, **__: done)
        assert cli.main(["train", "--data", "x.json", "--stage", "align", "--out", "o"]) == code

"""``llava-lab convert`` writes a folder that stock transformers reads whole, or leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_lab.cli import main as cli
from llava_lab.models import load
from tests.support import original_folders as made
from tests.support.original_folders import Parts


@pytest.fixture(scope="module")
def parts() -> Parts:
    return made.make_parts()


@pytest.fixture
def folders(tmp_path: Path, parts: Parts) -> list[str]:
    """FOLDER and its --vision, as arguments."""
    return [str(made.write_whole(tmp_path / "llava", parts)), "--vision", str(made.write_tower(tmp_path / "clip", parts))]


def run(*arguments: str) -> int:
    return cli.main(["convert", *arguments])


def test_stock_transformers_reads_what_was_written(
    tmp_path: Path, parts: Parts, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "hf"
    assert run(*folders, str(out), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["folder"], said["image_token_id"], said["vocabulary"]) == (str(out), 400, 448)
    assert (said["connector"], said["dtype"], said["pad_token_id"]) == ("mlp2x_gelu", "float32", 401)
    model, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, pixels = made.probe()
    assert torch.allclose(made.logits(model, ids, pixels), made.logits(parts.model, ids, pixels), atol=1e-5, rtol=0)
    lab = load(out)
    assert lab.card.fit == "pad"
    assert lab.sequence("What?", prompt="chat").text == lab.sequence("What?").text
    assert [file.name for file in out.parent.iterdir()] == ["hf"]


def test_half_precision_is_kept(tmp_path: Path, folders: list[str]) -> None:
    for file in Path(folders[0]).glob("pytorch_model-*.bin"):
        torch.save({name: value.half() for name, value in torch.load(file).items()}, file)
    assert run(*folders, str(tmp_path / "hf")) == 0
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").dtype == torch.float16


def test_a_full_folder_is_not_written_over(tmp_path: Path, folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("mine")
    assert run(*folders, str(tmp_path / "hf")) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "hf").iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.LlavaProcessor.save_pretrained", stop)
    assert run(*folders, str(tmp_path / "hf")) == 130
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip", "llava"]


def test_a_transformers_folder_needs_no_conversion(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tiny_folder), str(tmp_path / "hf")) == 2
    assert "nothing to convert" in capsys.readouterr().err

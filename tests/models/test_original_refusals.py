"""What cannot be read exactly from an original LLaVA folder is refused in one line that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_lab.errors import OptionError
from tests.support import original_folders as made
from tests.support.original_folders import Parts
from tests.support.refusals import refused


@pytest.fixture(scope="module")
def parts() -> Parts:
    return made.make_parts()


@pytest.fixture
def tower(tmp_path: Path, parts: Parts) -> Path:
    return made.write_tower(tmp_path / "clip", parts)


@pytest.fixture
def whole(tmp_path: Path, parts: Parts) -> Path:
    return made.write_whole(tmp_path / "llava", parts)


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_missing_shard_is_named(whole: Path, tower: Path) -> None:
    (whole / "pytorch_model-00002-of-00002.bin").unlink()
    assert "lacks 1 of 2 weight files: pytorch_model-00002-of-00002.bin" in refused(whole, vision=tower)


def test_a_truncated_file_is_named(whole: Path, tower: Path) -> None:
    file = whole / "pytorch_model-00001-of-00002.bin"
    file.write_bytes(file.read_bytes()[:5000])
    assert "pytorch_model-00001-of-00002.bin is cut off" in refused(whole, vision=tower)


def test_an_absent_tower_is_named_with_the_way_out(whole: Path) -> None:
    change(whole / "config.json", mm_vision_tower="/nowhere/clip")
    text = refused(whole)
    assert "'/nowhere/clip'" in text
    assert "--vision" in text


def test_a_tower_of_another_width_is_refused(whole: Path, tower: Path) -> None:
    change(whole / "config.json", mm_hidden_size=1024)
    assert "vision features 1024 wide (mm_hidden_size)" in refused(whole, vision=tower)


def test_a_projector_of_another_width_is_refused_with_both_shapes(tmp_path: Path, parts: Parts, tower: Path) -> None:
    wide = Parts(parts.model, parts.kind, parts.language, {**parts.projector, "0.weight": torch.zeros(64, 48)}, parts.vision)
    text = refused(made.write_whole(tmp_path / "wide", wide), vision=tower)
    assert "linear_1.weight (64, 48) not (64, 32)" in text


def test_an_mlp_that_the_config_calls_linear_is_refused(whole: Path, tower: Path) -> None:
    change(whole / "config.json", mm_projector_type="linear")
    assert "does not hold a linear projector" in refused(whole, vision=tower)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mm_projector_type": "qformer"}, "unknown mm_projector_type"),
        ({"mm_projector_type": "resampler"}, "LLaVA has linear, identity"),
        ({"image_aspect_ratio": "anyres"}, "tiles"),
        ({"model_type": "llava_mistral"}, "'llava_mistral'"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer"),
        ({"mm_vision_select_feature": "all"}, "'all'"),
        ({"hidden_size": 128}, "128 (language)"),
    ],
)
def test_settings_that_are_not_llava_1_5_s_are_named(whole: Path, tower: Path, changes: dict[str, Any], said: str) -> None:
    change(whole / "config.json", **changes)
    assert said in refused(whole, vision=tower)


def test_a_missing_and_an_unknown_tensor_are_named(whole: Path, tower: Path) -> None:
    file = next(file for file in whole.glob("pytorch_model-*.bin") if "lm_head.weight" in torch.load(file))
    tensors = torch.load(file)
    head = tensors.pop("lm_head.weight")
    torch.save(tensors, file)
    assert "1 missing: lm_head.weight" in refused(whole, vision=tower)
    torch.save(tensors | {"lm_head.weight": head, "model.strange.weight": head}, file)
    assert "1 unexpected: model.strange.weight" in refused(whole, vision=tower)


def test_mixed_spellings_are_refused(whole: Path, tower: Path) -> None:
    file = whole / "pytorch_model-00001-of-00002.bin"
    torch.save(torch.load(file) | {"multi_modal_projector.linear_1.bias": torch.zeros(64)}, file)
    assert "mixes two spellings" in refused(whole, vision=tower)


def test_a_lora_without_its_base_or_its_projector_is_refused(tmp_path: Path, parts: Parts, tower: Path) -> None:
    base = made.write_lora(tmp_path / "lora", parts)
    adapter = tmp_path / "lora" / "adapter_config.json"
    change(adapter, base_model_name_or_path="/nowhere/vicuna")
    assert "--base" in (text := refused(tmp_path / "lora", vision=tower))
    assert "/nowhere/vicuna" in text
    language = made.write_language(tmp_path / "vicuna", parts, base)
    change(adapter, use_dora=True)
    assert "no plain LoRA (use_dora)" in refused(tmp_path / "lora", vision=tower, base=language)
    change(adapter, use_dora=False)
    (tmp_path / "lora" / "non_lora_trainables.bin").unlink()
    assert "has no non_lora_trainables.bin" in refused(tmp_path / "lora", vision=tower, base=language)


def test_a_base_of_another_size_is_refused(tmp_path: Path, parts: Parts, tower: Path) -> None:
    folder = made.write_projector_only(tmp_path / "stage1", parts)
    language = made.write_language(tmp_path / "vicuna", parts, hidden_size=5120)
    assert "hidden_size 64, the base" in refused(folder, vision=tower, base=language)


def test_options_of_the_original_format_are_refused_elsewhere(whole: Path, tower: Path, tiny_folder: Path) -> None:
    assert "leave base out" in refused(whole, OptionError, vision=tower, base=tower)
    assert "is whole" in refused(tiny_folder, OptionError, vision=tower)


def test_code_in_a_projector_file_is_refused(tmp_path: Path, parts: Parts, tower: Path) -> None:
    folder = made.write_projector_only(tmp_path / "stage1", parts)
    torch.save({"model.mm_projector.0.weight": Path}, folder / "mm_projector.bin")
    language = made.write_language(tmp_path / "vicuna", parts)
    assert "mm_projector.bin is cut off, damaged, or holds more than weights" in refused(folder, vision=tower, base=language)


def test_a_sentencepiece_tokenizer_without_its_packages_is_one_line(
    whole: Path, tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole / "tokenizer.json").rename(whole / "tokenizer.model")
    monkeypatch.setattr("llava_lab.models.formats.original.is_sentencepiece_available", lambda: False)
    assert "pip install sentencepiece protobuf" in refused(whole, vision=tower)
    (whole / "tokenizer.model").unlink()
    assert "has no tokenizer" in refused(whole, vision=tower)

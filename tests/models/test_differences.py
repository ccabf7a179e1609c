"""``llava-lab doctor --model X`` says how a checkpoint differs from LLaVA-1.5, and nothing where it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava_lab.models.differences import examine_model, render_model
from tests.support import original_folders as made


def differences(folder: Path) -> dict[str, str]:
    return {fact["name"]: str(fact["found"]) for fact in examine_model(folder)["facts"] if not fact["same"]}


def test_a_folder_like_the_hub_s_differs_only_where_the_hub_does_and_in_its_small_sizes(llava15_folder: Path) -> None:
    small = {"connector widths", "tower", "language model", "parameters"}
    assert set(differences(llava15_folder)) == small | {"preprocessing", "prompt"}


def test_published_sizes_are_no_difference(llava15_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llava15_folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    for wide, layers in ((4096, 32), (5120, 40)):
        config["text_config"] |= {"hidden_size": wide, "num_hidden_layers": layers, "num_attention_heads": layers}
        config["vision_config"] |= {"hidden_size": 1024, "num_hidden_layers": 24}
        (folder / "config.json").write_text(json.dumps(config))
        assert not {"language model", "connector widths", "tower"} & set(differences(folder))


@pytest.mark.parametrize(
    ("changes", "name", "found"),
    [
        ({"vision_feature_layer": -1}, "feature layer", "-1"),
        ({"vision_feature_select_strategy": "full"}, "image tokens", "577"),
        ({"mm_projector_type": "linear"}, "connector", "linear"),
        ({"image_token_index": 5}, "tokenizer's <image>", "32000"),
        ({"torch_dtype": "float32"}, "dtype", "float32"),
        ({"tie_word_embeddings": True}, "tied embedding and head", "True"),
    ],
)
def test_a_changed_setting_is_found(
    llava15_folder: Path, tmp_path: Path, changes: dict[str, object], name: str, found: str
) -> None:
    folder = Path(shutil.copytree(llava15_folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert differences(folder)[name] == found


def test_an_original_folder_is_compared_without_its_tower(tmp_path: Path) -> None:
    folder = made.write_whole(tmp_path / "llava", made.make_parts(), mm_hidden_size=1024, hidden_size=4096)
    report = examine_model(folder)
    assert report["format"] == "original LLaVA, whole checkpoint"
    same = {fact["name"] for fact in report["facts"] if fact["same"]}
    assert {"connector", "connector widths", "vision tower", "image tokens", "preprocessing"} <= same


def test_the_report_is_one_line_a_difference(llava15_folder: Path) -> None:
    report = examine_model(llava15_folder)
    assert len(render_model(report).splitlines()) == 2 + len(differences(llava15_folder))
    assert json.loads(json.dumps(report)) == report

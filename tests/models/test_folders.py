"""From a name to a folder: shipped, local, or the hub's cache without a network; and what is wrong in one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from llava_lab.models import Lab, folders, load
from tests.support.refusals import refused


def test_names_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    assert "'tiny'" in refused("nonesuch")
    assert "hub id" in refused(str(tmp_path / "none"))
    assert "is a file" in refused(tmp_path / "file.txt")
    assert "config.json" in refused(tmp_path)


def test_a_missing_shipped_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "NAMES", {"tiny": tmp_path})
    assert "shipped model 'tiny' is missing" in refused("tiny")


def test_missing_shards_are_named(llava15_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llava15_folder, tmp_path / "shards"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "lacks 1 of 3 weight files: model-00002-of-00003.safetensors" in refused(folder)


def hub_cache(root: Path, repo: str, source: Path) -> Path:
    """A hub cache as a download leaves it: blobs, one snapshot, refs/main."""
    base, commit = root / f"models--{repo.replace('/', '--')}", "c" * 40
    snapshot = base / "snapshots" / commit
    for place in (base / "blobs", base / "refs", snapshot):
        place.mkdir(parents=True)
    (base / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(source.iterdir())):
        blob = base / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def hub_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert constants.is_offline_mode()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_loads_from_the_cache_without_a_network(hub_home: Path, tiny_folder: Path, tiny_random: Lab) -> None:
    hub_cache(hub_home, "someone/llava-small", tiny_folder)
    lab = load("someone/llava-small")
    assert lab.fingerprint == tiny_random.fingerprint
    assert (lab.name, lab.card.source) == ("someone/llava-small", "hub someone/llava-small at cccccccccccc")


def test_a_hub_id_that_is_not_cached_is_one_line_offline(hub_home: Path) -> None:
    text = refused("llava-hf/llava-1.5-7b-hf")
    assert "not in the hub cache" in text
    assert "connect once" in text


def test_a_cached_hub_id_without_weights_is_refused(hub_home: Path, tiny_folder: Path) -> None:
    snapshot = hub_cache(hub_home, "someone/llava-half", tiny_folder)
    (snapshot / "model.safetensors").unlink()
    assert "no weights" in refused("someone/llava-half")


def test_a_folder_of_a_hub_id_s_name_comes_first(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_folder, tmp_path / "someone" / "here")
    monkeypatch.chdir(tmp_path)
    assert load("someone/here").card.source.startswith("folder")

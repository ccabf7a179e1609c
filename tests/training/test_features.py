"""Vision features are computed once, keyed by what decides them, and written whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_lab as ll
from llava_lab.errors import DataError, OptionError
from llava_lab.models import Lab, layout
from llava_lab.models.pictures import read_picture
from llava_lab.training import features as feature_cache
from llava_lab.training.features import FeatureCache, content_key, tower_features
from llava_lab.training.rows import LlavaData, Problems, Source, Text, build_index
from tests.support.checkpoints import build_llava
from tests.support.training_rows import write_rows


def data_of(lab: Lab, root: Path, *, problems: Problems | None = None) -> LlavaData:
    text = Text(lab.tokenizer, lab.image_id, layout.image_token_count(lab.model), lab.context, "instruct")
    source = Source(root / "mix.json")
    index = build_index(source, text, root / "i.index", problems=problems or Problems(), key=content_key, progress=False)
    return LlavaData([source], [index], text)


def prepared(lab: Lab, root: Path, **options: Any) -> FeatureCache:
    cache = FeatureCache(lab, root / "cache", **options)
    assert cache.prepare(data_of(lab, root), problems=Problems(), progress=False) == set()
    return cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_are_the_towers_own(tmp_path: Path, tiny_folder: Path, dtype: str) -> None:
    write_rows(tmp_path)
    lab = ll.load(str(tiny_folder), dtype=dtype)
    cache = prepared(lab, tmp_path)
    assert len(cache) == 6
    path = tmp_path / "images/3.png"
    pixels = lab.preprocessing.pixels(read_picture(path))
    states = lab.model.model.vision_tower(pixels.to(lab.dtype), output_hidden_states=True).hidden_states
    found = cache.read(content_key(path))
    assert found.dtype == lab.dtype
    assert found.shape == (16, 32)
    # a batch of another size may add in another order
    tolerance = 1e-5 if dtype == "float32" else 5e-2
    torch.testing.assert_close(found, states[-2][0, 1:], atol=tolerance, rtol=tolerance)


def test_second_run_never_asks_the_tower(tmp_path: Path, tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path)
    first = prepared(tiny_random, tmp_path)

    def asked(*args: object) -> None:
        raise AssertionError("the tower ran again")

    monkeypatch.setattr(feature_cache, "tower_features", asked)
    second = prepared(tiny_random, tmp_path)
    key = content_key(tmp_path / "images/0.png")
    assert torch.equal(first.read(key), second.read(key))


def test_same_bytes_under_two_names_are_computed_once(tmp_path: Path, tiny_random: Lab) -> None:
    write_rows(tmp_path)
    shutil.copy(tmp_path / "images/0.png", tmp_path / "images/1.png")
    assert len(prepared(tiny_random, tmp_path)) == 5


def test_folder_changes_with_tower_transform_and_precision_and_not_with_the_rest(tmp_path: Path, tiny_folder: Path) -> None:
    lab = ll.load(str(tiny_folder))
    name = FeatureCache(lab, tmp_path).folder
    with torch.no_grad():
        next(layout.connector_of(lab.model).parameters()).add_(1)
        next(layout.language_model(lab.model).parameters()).add_(1)
    assert FeatureCache(lab, tmp_path).folder == name
    assert FeatureCache(lab, tmp_path, fit="crop").folder != name
    assert FeatureCache(ll.load(str(tiny_folder), dtype="bfloat16"), tmp_path).folder != name
    with torch.no_grad():
        list(layout.vision_tower(lab.model).parameters())[5].view(-1)[3] += 1e-3
    assert FeatureCache(lab, tmp_path).folder != name
    other = ll.load(str(build_llava(tmp_path / "other", feature_layer=-1)))
    assert FeatureCache(other, tmp_path).folder != name


def test_a_shard_without_keys_is_not_there(tmp_path: Path, tiny_random: Lab) -> None:
    write_rows(tmp_path)
    cache = prepared(tiny_random, tmp_path)
    next(cache.folder.glob("*.keys.npy")).unlink()  # killed between the two files
    assert len(FeatureCache(tiny_random, tmp_path / "cache")) == 0
    assert len(prepared(tiny_random, tmp_path)) == 6


def test_damaged_shards_are_left_out_or_named(tmp_path: Path, tiny_random: Lab, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(tmp_path)
    whole, key = prepared(tiny_random, tmp_path), content_key(tmp_path / "images/0.png")
    features = whole.read(key)
    for end in (".npy", ".keys.npy", ".sums.npy"):
        path = next(path for path in whole.folder.glob(f"*{end}") if path.name.count(".") == end.count("."))
        path.write_bytes(path.read_bytes()[:-5])
        assert torch.equal(prepared(tiny_random, tmp_path).read(key), features)
    assert caplog.text.count("is damaged and is left out") == 3
    values = next(path for path in whole.folder.glob("*.npy") if path.name.count(".") == 1)
    raw = bytearray(values.read_bytes())
    raw[-1 - 4 * features.numel() * int(len(whole) - 1 - whole.where[whole.keys == key][0, 1])] ^= 1
    values.write_bytes(raw)
    with pytest.raises(DataError, match=r"features of picture .* are damaged; remove that file"):
        prepared(tiny_random, tmp_path).read(key)


def test_damaged_pictures_are_named_with_file_and_row(tmp_path: Path, tiny_random: Lab) -> None:
    write_rows(tmp_path)
    (tmp_path / "images/2.png").write_bytes(b"no picture")
    problems, data = Problems(skip=True), data_of(tiny_random, tmp_path)
    bad = FeatureCache(tiny_random, tmp_path / "cache").prepare(data, problems=problems, progress=False)
    assert problems.named[0].startswith(f"{tmp_path / 'mix.json'} row 2: ")
    kept = data.without(bad)
    assert len(kept) == len(data) - 3  # rows 2, 8 and 14
    with pytest.raises(DataError, match=r"mix.json row 2: .*--skip-bad"):
        Problems(count=1, named=problems.named).refuse()


def test_a_disk_too_small_is_said_before_anything_is_computed(
    tmp_path: Path, tiny_random: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path)
    monkeypatch.setattr(feature_cache, "SPARE", 1 << 60)
    with pytest.raises(OptionError, match=r"features of 6 pictures need .* GB are free; .*--no-cache"):
        prepared(tiny_random, tmp_path)


def test_tower_keeps_no_graph_and_its_mode(tiny_random: Lab) -> None:
    tower = layout.vision_tower(tiny_random.model)
    try:
        tower.train()
        tower.requires_grad_(True)
        found = tower_features(tiny_random.model, torch.zeros(1, 3, 32, 32, requires_grad=True))
        assert not found.requires_grad
        assert tower.training
    finally:
        tower.eval()
        tower.requires_grad_(False)

"""`train_photo` on a little language model: three stages, what is written is what was trained, a stopped run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_lab.cli import main as cli
from llava_lab.errors import DataError, OptionError
from llava_lab.models import layout
from llava_lab.models.formats import photo, smol
from llava_lab.training import loop
from llava_lab.training.photo import make
from llava_lab.training.photo.make import PHOTO, PhotoData, train_photo
from tests.support.little_language import llama, write_gguf

RECIPE = replace(
    PHOTO,
    rank=2,
    words=replace(PHOTO.words, steps=30, batch=256),
    align=replace(PHOTO.align, steps=2, batch=2),
    instruct=replace(PHOTO.instruct, steps=3, batch=2),
)
TEXTS = [[9, 30, 12, 55, 7, 2]] * 3


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("cat", "banjo", "pizza", "school_bus", "golden_retriever"):
        noise = rng.integers(0, 255, (6, 8, 3), np.uint8)
        Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC).save(root / f"{name}_1.png")
    return root


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(llama(), folder / "little.gguf")
    return smol.language_folder(folder / "little.gguf", cache=folder / "cache")


@pytest.fixture(scope="module")
def run(language: Path, pictures: Path) -> Any:
    def go(out: Path, **options: Any) -> Path:
        return train_photo(pictures, out, **{"recipe": RECIPE, "parts": {"language": language}, "texts": TEXTS, **options})

    train = loop.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "POOL", 8)
        patch.setattr(make, "CHECKED", 8)
        patch.setattr(make, "TEXT_EVERY", 2)
        patch.setattr(loop, "train", lambda *args, **options: train(*args, **{**options, "workers": 0}))
        yield go


@pytest.fixture(scope="module")
def whole(run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole") / "photo")


def test_the_first_stage_learns_what_the_tower_would_call_each_patch(whole: Path) -> None:
    losses = torch.load(whole.parent / "words.pt", weights_only=True)["losses"]
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


def test_what_is_written_loads_and_holds_no_part_of_the_packages(whole: Path, language: Path) -> None:
    tensors = load_file(whole / "photo.safetensors")
    assert all(name.startswith(("connector.", "lora.")) for name in tensors)
    assert any(value.abs().sum() > 0 for name, value in tensors.items() if name.endswith(".up"))
    model, _ = photo.load_photo(torch.float32, whole, language=language)
    state = torch.load(whole.parent / "instruct.pt", weights_only=True)["modules"]["connector"]
    for name, value in layout.connector_of(model).state_dict().items():
        assert torch.equal(value, state[name].to(torch.bfloat16).float())


@pytest.mark.long
def test_a_run_stopped_in_any_stage_goes_on_to_the_same_bits(
    run: Callable[..., Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = PhotoData.__getitem__, []
    monkeypatch.setattr("llava_lab.training.loop.SAVE_EVERY", 0.0)

    def stops(self: PhotoData, step: int) -> Any:
        now = self.stage.name, step
        if now in (("align", 1), ("instruct", 2)) and now not in taken:
            taken.append(now)
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(PhotoData, "__getitem__", stops)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "photo", resume=True)
    found = load_file(run(tmp_path / "photo", resume=True) / "photo.safetensors")
    assert len(taken) == 2
    assert all(torch.equal(value, found[name]) for name, value in load_file(whole / "photo.safetensors").items())


def test_pictures_are_squared_as_the_processor_squares_them() -> None:
    from llava_lab.models.pictures import Preprocessing

    noise = np.random.default_rng(1).integers(0, 255, (5, 9, 3), np.uint8)
    picture = Image.fromarray(noise).resize((270, 150), Image.Resampling.BICUBIC)
    wanted = Preprocessing.of(photo.image_processor(), image_size=photo.SIDE, patch=32, grid=(12, 12)).pixels(
        np.asarray(picture), None
    )[0]
    square = torch.from_numpy(make.to_square(picture).copy()).permute(2, 0, 1).float()
    assert ((square - 127) / 128 - wanted).abs().max() < 2 / 128


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stages": ["tower"]}, OptionError, "stages are words, align, instruct"),
        ({"steps_scale": 0}, OptionError, "steps_scale must be above 0"),
        ({"stages": ["instruct"]}, OptionError, "align.pt is missing; train stage align first"),
    ],
)
def test_mistakes_are_refused_in_a_line(
    run: Callable[..., Path], tmp_path: Path, options: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path / "out", **options)


def test_the_command_wants_a_folder_of_named_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "photo", "--out", str(tmp_path / "a")]) == 2
    assert "give --pictures FOLDER" in capsys.readouterr().err
    assert cli.main(["train", "tiny", "--pictures", "x", "--out", str(tmp_path / "a")]) == 2
    with pytest.raises(DataError, match="no folder"):
        train_photo(tmp_path / "none", tmp_path / "b")

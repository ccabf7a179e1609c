"""Fixtures shared by the suite: small random checkpoints and a picture. Loaded by `tests/conftest.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from tests.support.lab_server import chromium  # noqa: F401  one Chromium for all browser tests of a process

if TYPE_CHECKING:
    from llava_lab.models import Lab


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA folder: 32 px, 4x4 patches, 4 vision layers, 3 language layers."""
    from tests.support.checkpoints import build_llava

    return build_llava(tmp_path_factory.mktemp("checkpoints") / "tiny-random")


@pytest.fixture(scope="session")
def tiny_random(tiny_folder: Path) -> Lab:
    """The Lab of `tiny_folder`. Shared: a test that changes it must put it back."""
    from llava_lab.models import load

    return load(str(tiny_folder))


@pytest.fixture(scope="session")
def llava15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5's config keys, 336 px, 576 image tokens, vocabulary 32064; 3 + 2 layers of width 64."""
    from tests.support.checkpoints import build_llava

    return build_llava(
        tmp_path_factory.mktemp("checkpoints") / "llava-1.5-random", llava15_config=True, layers=2, vision_layers=3
    )


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of our own recipe in a size of seconds, with every stage's state, the tokenizer and the model."""
    from llava_lab.training import train
    from llava_lab.training.tiny.model import build_tokenizer
    from tests.support.training_rows import QUICK

    folder = tmp_path_factory.mktemp("quick")
    build_tokenizer(700, samples=1000).save_pretrained(folder / "tokenizer")  # from fewer texts than a real run's
    train("quick", folder, recipe=QUICK)
    return folder


@pytest.fixture
def picture() -> np.ndarray:
    """A wide uint8 picture, 60x40, grey noise with a red square in its lower left."""
    pixels = np.random.default_rng(0).integers(90, 160, (40, 60, 3), dtype=np.uint8)
    pixels[24:36, 6:18] = (220, 30, 30)
    return pixels


@pytest.fixture
def outlined(tmp_path: Path) -> Path:
    """A dog on the left of two pictures, a bowl and two oranges on the other."""
    (tmp_path / "classes.txt").write_text("18\tdog\n51\tbowl\n55\torange\n")
    corners = {"dog": (18, 0, 0.5), "bowl": (51, 0, 0.2), "orange": (55, 0.5, 0.7), "another": (55, 0.8, 1)}
    for name, shown in {"a": ["dog"], "b": ["orange", "bowl", "another"], "c": []}.items():
        Image.new("RGB", (80, 40), (90, 120, 60)).save(tmp_path / f"{name}.jpg")
        rows = [f"{one} {lo} 0 {hi} 0 {hi} 1 {lo} 1" for one, lo, hi in (corners[thing] for thing in shown)]
        (tmp_path / f"{name}.txt").write_text("\n".join(rows))
    return tmp_path

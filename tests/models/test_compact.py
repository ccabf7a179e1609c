"""Compact folders: bytes within half a step of what they were, the shared tower bit for bit, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_lab as ll
from llava_lab.comparison import ship
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import folders, layout
from llava_lab.models.formats import compact
from tests.support.checkpoints import build_llava
from tests.support.refusals import refused

HEAD = "language_model.lm_head.weight"


@pytest.fixture
def shelf(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of models that ship: `tiny` is the random checkpoint, the connectors' models are still to come."""
    names = {"tiny": tiny_folder, "tiny-linear": tmp_path / "shelf" / "linear", "tiny-mlp": tmp_path / "shelf" / "mlp2x_gelu"}
    monkeypatch.setattr(folders, "NAMES", MappingProxyType(names))
    return tmp_path / "shelf"


@pytest.fixture
def linear(tiny_folder: Path, tmp_path: Path) -> Path:
    """The random checkpoint with a linear connector in place, as a whole folder."""
    lab = ll.load(tiny_folder)
    lab.swap(ll.new_connector(lab, "linear", seed=1))
    return ll.save(lab, tmp_path / "whole")


@pytest.fixture
def packed(tiny_folder: Path, tmp_path: Path, shelf: Path) -> Path:
    """The random checkpoint itself, which has the stock connector."""
    return ship.write_compact(tiny_folder, tmp_path / "packed")


@pytest.fixture
def packed_linear(linear: Path, shelf: Path) -> Path:
    return ship.write_compact(linear, shelf / "linear")


def edit(folder: Path, change: Any) -> None:
    """Spoil the one file: `change` gets its tensors and its metadata."""
    path = folder / compact.FILE
    tensors, metadata = compact.read_tensors(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def test_a_row_is_within_half_a_step_of_what_it_was_and_its_largest_value_is_kept() -> None:
    rows = torch.tensor([[1.27, -0.634, 0.0049], [0.0, 0.0, 0.0], [-254.0, 2.9, 1.0]])
    packed = ship.pack({"a.weight": rows, "a.bias": torch.tensor([0.1, 0.2, 0.3])})
    assert packed["a.weight"].tolist() == [[127, -63, 0], [0, 0, 0], [-127, 1, 0]]  # by hand: steps of 0.01, -, 2
    torch.testing.assert_close(packed["a.weight" + compact.SCALE], torch.tensor([0.01, 0.0, 2.0]))
    back = compact.unpack(packed)
    assert torch.equal(back["a.bias"], torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(back["a.weight"], torch.tensor([[1.27, -0.63, 0.0], [0, 0, 0], [-254, 2, 0]]))
    many = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    error = (compact.unpack(ship.pack({"m": many}))["m"] - many).abs()
    assert bool((error <= many.abs().amax(1, keepdim=True) / 127 / 2 * 1.0001).all())


def test_every_weight_comes_back_and_the_tower_bit_for_bit(linear: Path, packed_linear: Path, tiny_random: Any) -> None:
    lab, whole = ll.load("tiny-linear"), ll.load(linear)
    mine, theirs = lab.model.state_dict(), whole.model.state_dict()
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        exact = "vision_tower" in name or value.ndim != 2
        assert torch.equal(value, theirs[name]) == exact, name  # matrices are rounded, all else is as it was
        assert float((value - theirs[name]).abs().max()) <= float(theirs[name].abs().max()) / 127 / 2 * 1.0001
    tower = layout.vision_tower(tiny_random.model).state_dict()
    for name, value in layout.vision_tower(lab.model).state_dict().items():
        assert torch.equal(value, tower[name])
    assert (packed_linear / compact.FILE).stat().st_size < (linear / "model.safetensors").stat().st_size / 3
    assert not [name for name in load_file(packed_linear / compact.FILE) if "vision_tower" in name]


def test_the_lab_is_whole_card_answer_and_generation(linear: Path, packed_linear: Path, picture: np.ndarray) -> None:
    (packed_linear / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    lab, whole = ll.load("tiny-linear"), ll.load(linear)
    assert lab.card.connector == "linear"
    assert lab.card.source == "shipped with llava-lab (tiny-linear)"
    assert lab.card.licence == "apache-2.0"
    assert lab.card.dtype == "float32"
    assert lab.card.why.endswith("stored as int8 rows, with the shipped tower")
    assert lab.card.parameters == whole.card.parameters
    assert lab.eos_ids == whole.eos_ids
    assert lab.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    run = lab.ask(picture, "What color is it?", max_new_tokens=4)
    assert run.model == "tiny-linear"
    logits = [one.model(**lab.inputs(run)).logits for one in (lab, whole)]
    assert 0 < float((logits[0] - logits[1]).abs().max()) < 0.5 * float(logits[1].std())


def test_a_stock_connector_loads_by_path_and_can_be_saved_whole(tiny_folder: Path, shelf: Path, tmp_path: Path) -> None:
    lab = ll.load(ship.write_compact(tiny_folder, tmp_path / "small"), dtype="bfloat16")
    assert (lab.card.connector, lab.card.dtype) == ("mlp2x_gelu", "bfloat16")
    assert ll.load(ll.save(lab, tmp_path / "again"), dtype="bfloat16").fingerprint == lab.fingerprint


def test_a_model_that_does_not_ship_yet_says_how_to_make_it(shelf: Path) -> None:
    text = refused("tiny-linear")
    assert f"the shipped model 'tiny-linear' is missing at {shelf / 'linear'}; make it with: llava-lab ablate" in text
    assert text.endswith("ship_ablation('runs/ablation')")


def test_another_tower_is_refused_when_written_and_when_read(
    packed: Path, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = build_llava(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError, match=r"vision tower in .* is not that of 'tiny' \(\d+ of \d+ weights differ"):
        ship.write_compact(other, tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir() if "small" in path.name] == []  # nor a part of it
    monkeypatch.setattr(folders, "NAMES", MappingProxyType({"tiny": other}))
    assert "was written beside a tower" in refused(packed)


def test_a_tower_that_differs_in_one_bit_is_another_tower(linear: Path, shelf: Path, tmp_path: Path) -> None:
    weights = load_file(linear / "model.safetensors")
    name = next(key for key, value in weights.items() if key.startswith("vision_tower") and value.ndim == 2)
    weights[name][1, 2] += 1e-3  # most likely not among the values a fingerprint looks at
    save_file(weights, linear / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 of \d+ weights differ, e\.g\. {name}"):
        ship.write_compact(linear, tmp_path / "small")


def test_a_truncated_file_is_named(packed: Path) -> None:
    path = packed / compact.FILE
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is not a whole safetensors file" in refused(packed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, _: [tensors.pop(name) for name in list(tensors) if HEAD in name], f"1 missing: {HEAD[15:]}"),
        (lambda tensors, _: tensors.update({"extra.weight": torch.ones(3)}), "1 unexpected: extra.weight"),
        (lambda tensors, _: tensors.pop(HEAD + compact.SCALE), "with no scales; expected one scale per row"),
        (lambda tensors, _: tensors.pop(HEAD), "and no matrix of bytes"),
        (
            lambda tensors, _: tensors.update({HEAD + compact.SCALE: torch.ones(3)}),
            "with scales (3,); expected one scale per row",
        ),
        (lambda _, metadata: metadata.update(compact="int4"), "has compact format 'int4'; expected 'int8 rows, 1'"),
        (lambda _, metadata: metadata.update(tower="large"), "names a shipped model for its tower ('tiny'), got 'large'"),
    ],
)
def test_what_is_wrong_inside_is_one_line(packed: Path, change: Any, said: str) -> None:
    edit(packed, change)
    assert said in refused(packed)


def test_another_width_is_refused(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (packed / "config.json").write_text(json.dumps(config))
    assert "misshapen" in refused(packed)


def test_what_cannot_be_kept_leaves_nothing_behind(linear: Path, shelf: Path, tmp_path: Path) -> None:
    weights = load_file(linear / "model.safetensors")
    name = next(key for key in weights if "multi_modal_projector" in key)
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, linear / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite"):
        ship.write_compact(linear, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    with pytest.raises(OptionError, match="is there already"):
        ship.write_compact(linear, linear)
    assert (linear / "model.safetensors").is_file()


def test_an_interrupted_rewrite_leaves_the_old_folder(tmp_path: Path) -> None:
    old = tmp_path / "here"
    old.mkdir()
    (old / "kept").write_text("x")

    def stopped() -> None:
        with folders.whole_folder(old) as part:
            (part / "new").write_text("y")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert [path.name for path in old.iterdir()] == ["kept"]
    with folders.whole_folder(old) as part:
        (part / "new").write_text("y")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert [path.name for path in old.iterdir()] == ["new"]

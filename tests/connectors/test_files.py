"""LLaVA's projector files in their own format, and folders that stock transformers loads without this library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

import llava_lab as ll
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import Lab, layout
from tests.support.closeness import TERMS, close

QUESTION = "What color is the car?"


def logits(model: Any, lab: Lab, picture: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(lab.sequence(QUESTION).token_ids)[None]
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=lab.pixels(picture).to(model.dtype)).logits


def plant(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("linear", ["weight", "bias"]),
        ("mlp1x_gelu", ["0.weight", "0.bias"]),
        ("mlp2x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("mlp3x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
    ],
)
@pytest.mark.parametrize(
    ("file", "prefix"), [("mm_projector.bin", "model."), ("non_lora_trainables.bin", "base_model.model.model.")]
)
def test_projector_files_have_llava_s_own_keys_and_come_back(
    tiny_random: Lab, tmp_path: Path, kind: str, names: list[str], file: str, prefix: str
) -> None:
    made = ll.new_connector(tiny_random, kind, seed=5)
    with ll.connector(tiny_random, made) as lab:
        path = ll.write_projector(lab, tmp_path / file)
    saved = torch.load(path, weights_only=True)
    assert list(saved) == [f"{prefix}mm_projector.{name}" for name in names]
    path.with_suffix(".json").unlink()  # as LLaVA writes it: nothing beside it
    again = ll.read_projector(tiny_random, path)
    assert again.kind == kind
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), made.parameters(), strict=True))
    assert again.trained_with is None
    with pytest.warns(ll.ForeignConnector, match="cannot be checked"), ll.connector(tiny_random, path):
        pass


def test_the_stock_connector_goes_through_a_file_and_changes_nothing(
    tiny_random: Lab, tmp_path: Path, picture: np.ndarray
) -> None:
    path = ll.write_projector(tiny_random, tmp_path / "mm_projector.bin")
    want = logits(tiny_random.model, tiny_random, picture)
    with ll.connector(tiny_random, path) as lab:  # recorded beside this very model: no warning
        close(logits(lab.model, lab, picture), want, terms=TERMS)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["mm_projector_type"] == "mlp2x_gelu"
    record["trained_with"]["language"] = "another"
    path.with_suffix(".json").write_text(json.dumps(record))
    with pytest.warns(ll.ForeignConnector, match="another language model"), ll.connector(tiny_random, path):
        pass


def test_our_own_kinds_come_back_with_their_options(tiny_random: Lab, tmp_path: Path) -> None:
    with ll.connector(tiny_random, ll.new_connector(tiny_random, "avgpool", side=1, layers=1)) as lab:
        path = ll.write_projector(lab, tmp_path / "mm_projector.bin")
    again = ll.read_projector(tiny_random, path)
    assert (again.kind, again.options) == ("avgpool", {"side": 1, "layers": 1})
    path.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match="else say kind="):
        ll.read_projector(tiny_random, path)
    assert ll.read_projector(tiny_random, path, kind="avgpool", side=1, layers=1).kind == "avgpool"


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear2x"])
def test_a_hidden_layer_of_another_width_comes_back_and_is_not_exported(tiny_random: Lab, tmp_path: Path, kind: str) -> None:
    made = ll.new_connector(tiny_random, kind, width=24, seed=1)
    with ll.connector(tiny_random, made) as lab:
        path = ll.write_projector(lab, tmp_path / "mm_projector.bin")
        with pytest.raises(OptionError, match=r"hidden layer as wide as the language model, 64; this one has 24; save keeps it"):
            ll.export(lab, tmp_path / "stock")
    # with the record beside the file, and from the file alone, which does not name every kind
    for given in (None, None if kind == "mlp2x_gelu" else kind):
        again = ll.read_projector(tiny_random, path, kind=given)
        assert (again.kind, again.options) == (kind, {"width": 24})
        assert all(torch.equal(value, made.state_dict()[name]) for name, value in again.state_dict().items())
        path.with_suffix(".json").unlink(missing_ok=True)
    with pytest.raises(OptionError, match=f"connector '{kind}' has no option 'depth'; did you mean 'width'"):
        ll.read_projector(tiny_random, path, kind=kind, depth=3)


def test_other_tensors_in_a_lora_file_are_left_alone(tiny_random: Lab, tmp_path: Path) -> None:
    shapes = {"base_model.model.model.mm_projector.weight": (64, 32), "base_model.model.model.embed_tokens.weight": (4, 4)}
    again = ll.read_projector(tiny_random, plant(tmp_path / "non_lora_trainables.bin", shapes))
    assert again.kind == "linear"
    assert [name for name, _ in again.named_parameters()] == ["linear_1.weight"]  # no bias was saved, so there is none


@pytest.mark.parametrize(
    ("shapes", "kind", "message"),
    [
        ({"mm_projector.weight": (64, 16), "mm_projector.bias": (64,)}, None, r"expected weight of \(64, 32\) .*got \(64, 16\)"),
        ({"model.mm_projector.0.weight": (2097152, 1)}, None, r"expected 0\.weight of \(64, 32\) .*got \(2097152, 1\)"),
        ({"model.mm_projector.weight": (64, 32)}, "mlp2x_gelu", r"does not hold a mlp2x_gelu: expected the tensors 0\.weight, 2"),
        ({"model.mm_projector.query": (64, 32)}, None, "names its tensors query; expected weight and bias"),
        ({"lm_head.weight": (4, 4)}, None, r"holds no projector: expected keys with 'mm_projector\.' in them, got lm_head"),
    ],
)
def test_a_file_that_does_not_fit_says_what_was_expected(
    tiny_random: Lab, tmp_path: Path, shapes: dict[str, tuple[int, ...]], kind: str | None, message: str
) -> None:
    path = plant(tmp_path / "mm_projector.bin", shapes)
    with pytest.raises(CheckpointError, match=message) as caught:
        ll.read_projector(tiny_random, path, kind=kind)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_of_tensors_is_refused(tiny_random: Lab, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such projector file"):
        ll.read_projector(tiny_random, tmp_path / "none.bin")
    (tmp_path / "text.bin").write_text("not tensors")
    with pytest.raises(CheckpointError, match=r"text\.bin is not a file of tensors"):
        ll.read_projector(tiny_random, tmp_path / "text.bin")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "linear2x"])
def test_stock_transformers_loads_an_export_and_gives_the_same_numbers(
    tiny_folder: Path, tmp_path: Path, picture: np.ndarray, kind: str, dtype: torch.dtype
) -> None:
    lab = ll.load(tiny_folder, dtype=dtype)
    lab.swap(ll.new_connector(lab, kind, seed=2))
    want, module = logits(lab.model, lab, picture), layout.connector_of(lab.model)
    ll.export(lab, tmp_path)
    assert layout.connector_of(lab.model) is module
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert "mm_projector_type" not in json.loads((tmp_path / "config.json").read_text())
    close(logits(stock.eval(), lab, picture), want, terms=TERMS, dtype=dtype)


def test_what_stock_transformers_does_not_have_is_not_exported(tiny_random: Lab, tmp_path: Path) -> None:
    with (
        ll.connector(tiny_random, ll.new_connector(tiny_random, "avgpool")) as lab,
        pytest.raises(OptionError, match="stock transformers has no 'avgpool'; can be exported: linear"),
    ):
        ll.export(lab, tmp_path)


def test_weights_that_are_not_finite_are_neither_saved_nor_read(tiny_random: Lab, tmp_path: Path) -> None:
    made = ll.new_connector(tiny_random, "linear")
    with torch.no_grad():
        next(made.parameters())[0, 0] = torch.nan
    with ll.connector(tiny_random, made) as lab:
        for write, name in ((ll.write_projector, "mm_projector.bin"), (ll.save, "folder"), (ll.export, "stock")):
            with pytest.raises(CheckpointError, match=r"expected finite weights in .*weight \(1 of "):
                write(lab, tmp_path / name)
    assert not list(tmp_path.iterdir())
    torch.save({"mm_projector.weight": torch.full((64, 32), torch.inf), "mm_projector.bias": torch.zeros(64)}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"expected finite weights in .*a.bin, got NaN or infinity in .*weight \(2,048 of"):
        ll.read_projector(tiny_random, tmp_path / "a.bin", kind="linear")

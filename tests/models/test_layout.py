"""The parts of the model are found, not guessed; its weights have a name; its place is chosen with a reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llava_lab.errors import CheckpointError
from llava_lab.models import Lab, choose_device, layout
from llava_lab.models.card import fingerprint
from llava_lab.models.placement import LARGE


def test_parts_are_the_model_s_own_modules(tiny_random: Lab) -> None:
    model: Any = tiny_random.model
    assert layout.language_layers(model) == list(model.model.language_model.layers)
    assert layout.vision_layers(model) == list(model.model.vision_tower.encoder.layers)
    assert layout.connector_of(model) is model.model.multi_modal_projector
    assert layout.has_class_token(model)
    assert layout.image_token_count(model) == 16


def test_parts_are_found_under_older_names_too() -> None:
    inner = nn.Module()
    inner.encoder = nn.Module()
    inner.encoder.layers = nn.ModuleList([nn.Linear(1, 1)])
    tower = nn.Module()
    tower.vision_model = inner
    text = nn.Module()
    text.model = nn.Module()
    text.model.layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    old = nn.Module()
    old.vision_tower, old.language_model, old.multi_modal_projector = tower, text, nn.Linear(1, 1)
    assert len(layout.vision_layers(old)) == 1
    assert len(layout.language_layers(old)) == 2
    assert layout.connector_of(old) is old.multi_modal_projector


def test_a_model_without_the_parts_is_refused() -> None:
    with pytest.raises(CheckpointError, match="Linear has no vision tower"):
        layout.vision_tower(nn.Linear(1, 1))
    odd = nn.Module()
    odd.language_model = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match="no list of layers"):
        layout.language_layers(odd)


@pytest.mark.parametrize(("chosen", "used"), [(-2, 3), (-1, 4), (4, 4), (2, 2), (0, 0), (-5, 0), ([-2, 1], 3), ([1, 2], 2)])
def test_used_vision_layers_are_those_that_can_change_the_features(
    tiny_random: Lab, picture: Any, chosen: Any, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_random.model.config
    monkeypatch.setattr(config, "vision_feature_layer", chosen)
    layers = layout.vision_layers(tiny_random.model)
    assert layout.used_vision_layers(tiny_random.model) == layers[:used]
    if isinstance(chosen, list) or chosen == 0:
        return  # the connector here is as wide as one layer; transformers itself cannot read state 0
    pixels = tiny_random.pixels(picture, "pad")

    def features() -> torch.Tensor:
        with torch.no_grad():
            return tiny_random.model.get_image_features(pixels).pooler_output[0]

    before = features()
    for number, layer in enumerate(layers):
        with monkeypatch.context() as patch:
            patch.setattr(layer.mlp, "forward", lambda hidden: 0 * hidden)
            assert torch.equal(features(), before) == (number >= used), number


@pytest.mark.parametrize("chosen", [5, -6, []])
def test_a_feature_layer_outside_the_tower_is_refused(tiny_random: Lab, chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_random.model.config, "vision_feature_layer", chosen)
    with pytest.raises(CheckpointError, match="5 hidden states"):
        layout.used_vision_layers(tiny_random.model)


@pytest.mark.long
def test_the_fingerprint_is_the_same_in_another_process(tiny_folder: Path, tiny_random: Lab) -> None:
    code = f"import llava_lab as ll; print(ll.load({str(tiny_folder)!r}).fingerprint)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tiny_random.fingerprint
    assert done.stderr == ""


def test_the_fingerprint_changes_with_any_parameter_and_comes_back(tiny_random: Lab) -> None:
    whole = tiny_random.fingerprint
    with torch.no_grad():
        for parameter in tiny_random.model.parameters():
            flat = parameter.view(-1)
            for at in (0, -1):
                kept = flat[at].clone()
                flat[at] += 1
                assert tiny_random.fingerprint != whole
                flat[at] = kept
    assert tiny_random.fingerprint == whole


def test_the_fingerprint_survives_a_wider_dtype() -> None:
    half = nn.Linear(7, 5).bfloat16()
    name = fingerprint(half)
    assert fingerprint(half.float()) == name


def test_the_fingerprint_tells_names_and_shapes_apart() -> None:
    one = nn.Linear(4, 2, bias=False)
    two = nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        two.weight.copy_(one.weight.reshape(4, 2))
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(one) != fingerprint(nn.Sequential(one))


def test_small_models_run_in_float32_and_large_ones_in_half_the_memory() -> None:
    small, large = choose_device("cpu", parameters=5_000_000), choose_device("cpu", parameters=7 * LARGE)
    assert (small.dtype, large.dtype) == (torch.float32, torch.bfloat16)
    assert "5.0M parameters" in small.why
    assert "7,000.0M parameters in half the memory" in large.why
    device, dtype, why = choose_device()
    assert dtype == torch.float32
    assert why.startswith(f"{device.type}: ")


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_gets_the_large_model_in_the_type_it_has(bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    placed = choose_device(parameters=7 * LARGE)
    assert (placed.device.type, placed.dtype) == ("cuda", dtype)
    assert choose_device(parameters=1000).dtype == torch.float32

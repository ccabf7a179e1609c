"""Packed or absent weights: the model is asked and explained all the same, and known for what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

from llava_lab.attribution import attribute
from llava_lab.errors import OptionError
from llava_lab.models import Lab, layout, load
from tests.support.refusals import refused


@pytest.fixture
def packed(tiny_folder: Path) -> Lab:
    """A lab that says of itself what bitsandbytes makes a model say."""
    lab = load(tiny_folder)
    lab.model.is_quantized = True  # type: ignore[attr-defined]
    return lab


def test_other_methods_work_on_packed_weights(packed: Lab, picture: np.ndarray) -> None:
    run = packed.ask(picture, "What?", max_new_tokens=2)
    assert attribute(packed, run, method="rollout").values.shape == (1, 4, 4)


def test_a_model_with_waiting_weights_is_asked_and_named_as_before(tiny_folder: Path, picture: np.ndarray) -> None:
    lab = load(tiny_folder)
    whole, answer = lab.fingerprint, lab.ask(picture, "What?", max_new_tokens=2).token_ids.tolist()
    cpu_offload(lab.model.lm_head, execution_device=torch.device("cpu"))
    assert layout.is_offloaded(lab.model)
    assert lab.fingerprint == whole
    assert lab.ask(picture, "What?", max_new_tokens=2).token_ids.tolist() == answer


def test_a_device_map_goes_to_transformers(tiny_folder: Path, tiny_random: Lab) -> None:
    lab = load(tiny_folder, device_map={"": "cpu"})
    assert lab.fingerprint == tiny_random.fingerprint
    assert "device_map" in refused(tiny_folder, OptionError, device="cpu", device_map="auto")


def test_quantization_without_its_library_is_one_line(tiny_folder: Path) -> None:
    from transformers import BitsAndBytesConfig

    text = refused(tiny_folder, OptionError, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert "quantization_config=BitsAndBytesConfig cannot be used here" in text


def test_integers_among_the_weights_count_as_packed(tiny_folder: Path) -> None:
    lab = load(tiny_folder)
    assert not layout.is_quantized(lab.model)
    lab.model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    assert layout.is_quantized(lab.model)

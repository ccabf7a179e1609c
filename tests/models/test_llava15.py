"""The 7B path is the same path: LLaVA-1.5's config keys, files and geometry, with few and narrow layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava_lab as ll
from llava_lab.models import Lab, layout
from llava_lab.results import Run

QUESTION = "What color is the car?"


@pytest.fixture(scope="module")
def lab(llava15_folder: Path) -> Lab:
    return ll.load(str(llava15_folder))


@pytest.fixture(scope="module")
def run(lab: Lab) -> Run:
    pixels = np.random.default_rng(1).integers(0, 256, (300, 480, 3), dtype=np.uint8)
    return lab.ask(pixels, QUESTION, max_new_tokens=6)


def test_the_folder_is_laid_out_as_the_hub_s(llava15_folder: Path) -> None:
    config = json.loads((llava15_folder / "config.json").read_text())
    assert (config["image_token_index"], config["image_seq_length"], config["pad_token_id"]) == (32000, 576, 32001)
    assert config["text_config"]["vocab_size"] == 32064
    assert (config["vision_config"]["image_size"], config["vision_config"]["patch_size"]) == (336, 14)
    index = json.loads((llava15_folder / "model.safetensors.index.json").read_text())
    assert any(name.startswith("vision_tower.vision_model.encoder") for name in index["weight_map"])
    assert "image_processor" not in json.loads((llava15_folder / "processor_config.json").read_text())


def test_it_loads_whole_with_576_image_tokens(lab: Lab) -> None:
    assert lab.grid == (24, 24)
    assert layout.image_token_count(lab.model) == 576
    assert (lab.card.licence, lab.card.connector, lab.card.fit) == ("llama2", "mlp2x_gelu", "crop")
    assert lab.dtype == torch.float32  # stored as float16; small enough to be exact
    assert lab.context == 4096


def test_its_run_has_576_image_positions_found_by_their_id(lab: Lab, run: Run) -> None:
    assert len(run.image_positions) == 576
    assert (run.token_ids[run.image_positions] == 32000).all()
    assert (np.delete(run.token_ids, run.image_positions) != 32000).all()
    assert (run.map.rows, run.map.cols, run.map.size, run.map.mode) == (24, 24, 336, "crop")


def test_its_tokens_are_the_transformers_processor_s_own(lab: Lab, llava15_folder: Path) -> None:
    theirs = AutoProcessor.from_pretrained(llava15_folder)
    found = lab.sequence(QUESTION)
    image = Image.new("RGB", (300, 200))
    assert theirs(text=found.text, images=image, return_tensors="np")["input_ids"][0].tolist() == found.token_ids.tolist()


def test_its_answer_equals_stock_transformers(lab: Lab, run: Run, llava15_folder: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava15_folder, dtype=torch.float32)
    inputs = AutoProcessor.from_pretrained(llava15_folder)(
        text=run.prompt, images=Image.fromarray(run.picture), return_tensors="pt"
    )
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert out[0].tolist() == run.token_ids.tolist()


def test_teacher_forcing_agrees_with_the_answer(lab: Lab, run: Run) -> None:
    with torch.no_grad():
        logits = lab.model(**lab.inputs(run)).logits[0]
    at = run.answer_positions
    assert np.abs(logits.log_softmax(-1)[at - 1, run.token_ids[at]].numpy() - run.logprobs).max() < 1e-4


def test_the_paper_s_padding_is_one_option_away(lab: Lab, run: Run) -> None:
    padded = lab.ask(run.picture, QUESTION, fit="pad", max_new_tokens=1)
    assert padded.map.mode == "pad"
    assert padded.map.seen_box == (0, 0, 480, 300)
    assert run.map.seen_box != padded.map.seen_box

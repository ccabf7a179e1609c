"""A relative of LLaVA-1.5 with a SigLIP tower and a Qwen2 language model loads and answers by the same path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaConfig, LlavaProcessor, Qwen2Config, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_lab.models import Lab, layout, load
from tests.support.checkpoints import V1_TEMPLATE, build_llama_model, byte_tokenizer


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """No class token, every feature kept, 30 px in patches of 8: a 3x3 grid with an unseen rim."""
    folder: Path = tmp_path_factory.mktemp("relative")
    tokenizer = byte_tokenizer()
    vision = SiglipVisionConfig(
        image_size=30, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    vision.vision_use_head = False
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=9,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    build_llama_model(config).save_pretrained(folder)
    images = SiglipImageProcessorPil(size={"height": 30, "width": 30})
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="full", chat_template=V1_TEMPLATE
    ).save_pretrained(folder)
    return load(folder)


def test_its_grid_has_no_class_token_and_every_layer_counts(lab: Lab) -> None:
    assert lab.grid == (3, 3)
    assert not layout.has_class_token(lab.model)
    assert len(layout.used_vision_layers(lab.model)) == 3
    assert lab.card.vision.startswith("siglip_vision_model")
    assert lab.card.language.startswith("qwen2")


def test_its_pictures_are_padded_and_its_answers_check_out(lab: Lab, picture: np.ndarray) -> None:
    run = lab.ask(picture, "What color is the car?", prompt="chat", max_new_tokens=6)
    assert (run.map.mode, len(run.image_positions)) == ("pad", 9)
    with torch.no_grad():
        logits = lab.model(**lab.inputs(run)).logits[0]
    at = run.answer_positions
    assert np.abs(logits.log_softmax(-1)[at - 1, run.token_ids[at]].numpy() - run.logprobs).max() < 1e-4

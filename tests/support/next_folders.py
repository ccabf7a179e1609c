"""Random LLaVA-NeXT and LLaVA-OneVision checkpoints, saved as the hub's folders are; see `tests.support.checkpoints`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from tests.support.checkpoints import V1_TEMPLATE, byte_tokenizer, llava_config, randomised

SIDE, PATCH = 32, 8
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]  # LLaVA-NeXT's own, in its squares of 336
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} [/INST]{% else %} {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
)


def build_next(folder: Path, *, template: str = V1_TEMPLATE, pinpoints: list[list[int]] | None = None, seed: int = 0) -> Path:
    """Save a random LLaVA-NeXT with squares of 4x4 patches and return its folder."""
    tokenizer = byte_tokenizer()
    inner = llava_config(tokenizer, image=SIDE, patch=PATCH, vision_layers=3, context=1024)
    shapes = pinpoints or PINPOINTS
    config = LlavaNextConfig(
        vision_config=inner.vision_config,
        text_config=inner.text_config,
        image_token_index=inner.image_token_index,
        image_grid_pinpoints=shapes,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(config)
    randomised(model, seed).save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=shapes)
    LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def build_onevision(folder: Path, *, side: int = SIDE, most: int = 4, seed: int = 0) -> Path:
    """Save a random LLaVA-OneVision: SigLIP without a class token, Qwen2, a grid of tiles drawn smaller above `most` squares."""
    tokenizer = byte_tokenizer()
    vision = SiglipVisionConfig(
        image_size=side, patch_size=PATCH, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    vision.vision_use_head = False
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    shapes = [[side * rows, side * cols] for rows in range(1, 5) for cols in range(1, 5)]
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<pad>"),
        image_grid_pinpoints=shapes,
        vision_aspect_ratio=f"anyres_max_{most}",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(config)
    randomised(model, seed).save_pretrained(folder)
    LlavaOnevisionImageProcessorPil(size={"height": side, "width": side}, image_grid_pinpoints=shapes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(V1_TEMPLATE)
    return folder

"""Random LLaVA-NeXT checkpoints, saved as the hub's folders are; see `tests.checkpoints`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.checkpoints import V1_TEMPLATE, byte_tokenizer, llava_config, randomised

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
    inner = llava_config(
        tokenizer,
        image=SIDE,
        patch=PATCH,
        vision_width=32,
        vision_layers=3,
        hidden=64,
        layers=3,
        heads=4,
        feature_layer=-2,
        feature_strategy="default",
        projector_bias=True,
        context=1024,
        vocab=len(tokenizer),
    )
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

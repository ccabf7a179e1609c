"""A LLaVA written by hand, weight by weight, whose only reason to say "red" is a red patch; and answers put in its mouth.

The patch embedding measures redness, the connector passes it on, every text position attends to red
image tokens and copies their redness to a direction that only the word "red" reads. Everything else is
zero, so the right map is known. Not trained, not random: a positive control for attribution.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from llava_lab.models import Lab
from llava_lab.models.text import group_words
from llava_lab.results import Run
from tests.support.checkpoints import SENTENCES, build_llama_model, build_processor, byte_tokenizer, llava_config

RED = (220, 30, 30)
COLORS = ("It is red. Is it red?", "It is blue. Is it blue?")  # so that each colour is one token
SHARPNESS = 0.4  # of the attention to red tokens: about 400 times a text token's weight
SLOW = 7  # a rotary dimension so slow that position does not matter here


def planted_lab() -> Lab:
    """The hand-written model, 64 px, 8x8 patches, two language layers of which the first does it all."""
    tokenizer = byte_tokenizer((*SENTENCES, *COLORS))
    config = llava_config(
        tokenizer,
        image=64,
        patch=8,
        vision_width=32,
        vision_layers=2,
        hidden=64,
        layers=2,
        heads=4,
        feature_layer=-2,
        feature_strategy="default",
        projector_bias=True,
        context=512,
        vocab=len(tokenizer),
    )
    model = build_llama_model(config)
    red = tokenizer.encode(" red", add_special_tokens=False)
    assert len(red) == 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        _write_weights(model, red[0])
    return Lab(model, build_processor(config, tokenizer, do_pad=True), name="planted")


def _write_weights(model: LlavaForConditionalGeneration, red: int) -> None:
    """Vision dimension 0 is redness, 1 is constant; in the language model 0, 1 the same, 2 the verdict."""
    vision: Any = model.model.vision_tower
    vision.embeddings.patch_embedding.weight[0, 0] = 1 / 64
    vision.embeddings.patch_embedding.weight[0, 1] = -1 / 64
    vision.embeddings.position_embedding.weight[:, 1] = 1.0
    projector: Any = model.model.multi_modal_projector
    projector.linear_1.weight[0, 0] = 1.0
    projector.linear_2.weight[0, 0] = 1.0
    projector.linear_2.bias[1] = 1.0
    language: Any = model.model.language_model
    language.embed_tokens.weight[:, 1] = 1.0
    attention = language.layers[0].self_attn
    for head in range(4):
        first = head * attention.head_dim
        attention.q_proj.weight[first + SLOW, 1] = 1.0
        attention.k_proj.weight[first + SLOW, 0] = SHARPNESS
        attention.v_proj.weight[first, 0] = 1.0
        attention.o_proj.weight[2, first] = 1 / 4
    model.lm_head.weight[red, 2] = 1.0


def red_picture(width: int, height: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """Grey noise with a red rectangle (left, top, right, bottom)."""
    pixels = np.random.default_rng(0).integers(110, 140, (height, width, 1), dtype=np.uint8).repeat(3, 2)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = RED
    return pixels


def scripted_run(lab: Lab, picture: np.ndarray, answer: str, *, question: str = "What color is the car?", **options: Any) -> Run:
    """A run in which the model is made to have said `answer`; its log-probabilities are left at zero."""
    run = lab.ask(picture, question, max_new_tokens=1, **options)
    start = run.segments["answer"][0]
    space = " " if len(lab.tokenizer) < 32000 else ""  # a SentencePiece tokenizer puts its own
    ids = np.array(lab.tokenizer.encode(space + answer, add_special_tokens=False), np.int64)
    token_ids = np.concatenate([run.token_ids[:start], ids])
    return replace(
        run,
        answer=answer,
        token_ids=token_ids,
        tokens=(*run.tokens[:start], *(lab.tokenizer.decode([i]) for i in ids)),
        segments={**run.segments, "answer": (start, len(token_ids))},
        words=group_words(lab.tokenizer, ids.tolist(), start),
        logprobs=np.zeros(len(ids), np.float32),
    )

"""Builds an untrained small LLaVA from an `Architecture`, of stock transformers classes only.

The tokenizer is a byte-level BPE trained on the world's own text, so any text a user types
encodes. Connector weights start as LLaVA's do (torch's Linear default), not as transformers
would re-initialise them: N(0, 0.02) makes the second layer several times larger.

    tokenizer = build_tokenizer(1024)
    model = build_model(build_config(Architecture(), tokenizer), seed=0)
"""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_lab.models.text import SYSTEM
from llava_lab.training.recipe import Architecture
from llava_lab.training.tiny.language import statements
from llava_lab.training.tiny.pictures import retold
from llava_lab.worlds.picturebook import REQUESTS, SHORT, ask_about, caption, description, scene

EMBEDDING_SCALE = 0.5  # standard deviation of a fresh word embedding; at 0.02 words drown in the first layer's output
ROPE_THETA = 1e6  # slow rotations, so that likeness of content counts at any distance within a picture
BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] if message['content'] is string "
    "else message['content'][0]['text'] }} {% elif message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %} "
    "{% else %}ASSISTANT: {{ message['content'] if message['content'] is string "
    "else message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer(vocabulary: int, *, samples: int = 3000) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocabulary` pieces; ``<image>`` and ``<pad>`` are its special pieces."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=3,
        special_tokens=[BOS, EOS, PAD, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(samples), trainer)
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _corpus(samples: int) -> list[str]:
    """The prompt's fixed words and the world's sentences; both letter cases meet a leading space."""
    lines = [f"{SYSTEM} USER: {SHORT} ASSISTANT: {request}" for request in REQUESTS for _ in range(20)]
    for index in range(samples):
        drawn, rng = scene("train", index, seed=9), np.random.default_rng((9, index))
        drawn = retold(drawn, rng) if index % 3 == 2 else drawn
        lines.append(f" {description(drawn, rng)} {caption(drawn)}")
        lines += [f" {q.text}\n ASSISTANT: {q.answer} {q.short.capitalize()} {q.short}" for q in ask_about(drawn, rng, 8)]
        lines.append(" ".join(given + known for given, known in statements(drawn, rng, 6)))
    return lines


def build_config(arch: Architecture, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """A stock LlavaConfig of these sizes."""
    vision = CLIPVisionConfig(
        image_size=arch.image,
        patch_size=arch.patch,
        hidden_size=arch.vision_width,
        intermediate_size=arch.vision_mlp,
        num_hidden_layers=arch.vision_layers,
        num_attention_heads=arch.vision_heads,
        projection_dim=arch.vision_width,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arch.hidden,
        intermediate_size=arch.mlp,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        max_position_embeddings=arch.context,
        rms_norm_eps=1e-5,
        initializer_range=arch.hidden**-0.5,  # transformers' 0.02 suits a width of 2500
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=arch.grid**2,
        projector_hidden_act="gelu",
        vision_feature_layer=arch.feature_layer,
        vision_feature_select_strategy="default",
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(config: LlavaConfig, *, seed: int) -> LlavaForConditionalGeneration:
    """The untrained model, float32, with the connector initialised as LLaVA does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        connector = model.model.multi_modal_projector
        for layer in (connector.linear_1, connector.linear_2):
            layer.reset_parameters()
        torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=EMBEDDING_SCALE)
        for layer in model.model.language_model.layers:
            _look_for_likeness(layer.self_attn)
    generation = model.generation_config
    generation.bos_token_id = config.text_config.bos_token_id
    generation.eos_token_id = config.text_config.eos_token_id
    generation.pad_token_id = config.text_config.pad_token_id
    return model


def _look_for_likeness(attention: torch.nn.Module) -> None:
    """Half of the heads start with keys like their queries, so that a token first attends to its like.

    After mimetic initialisation (Trockman and Kolter, arXiv 2305.09828).
    """
    half = attention.q_proj.weight.shape[0] // 2
    attention.k_proj.weight.data[:half] = attention.q_proj.weight.data[:half]


def build_processor(config: LlavaConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """LLaVA-1.5's own preprocessing: pad to a square with the mean colour, then CLIP's resize and scaling."""
    side = config.vision_config.image_size
    images = LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_pad=True)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )

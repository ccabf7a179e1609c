"""Random LLaVA checkpoints, saved as ordinary hub folders, for tests that need a model but no training.

Every norm weight and every bias is random, so that a norm applied twice or a bias left out
changes the numbers. Query and key projections are scaled so that attention is far from uniform.

Knows only the stock transformers classes; nothing of `llava_lab`. Sources: transformers
``LlavaForConditionalGeneration``; the folder layout and config keys of llava-hf/llava-1.5-7b-hf.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tests.support.hub_folder import as_hub_folder

BOS, EOS, UNK, PAD, IMAGE = "<s>", "</s>", "<unk>", "<pad>", "<image>"

SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant. ",
    "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
    "USER: What color is the car? ASSISTANT: The car is red.",
    "Is there a blue house left of the tree? No, the blue house is right of the tree.",
    "How many stars are there? There are three small yellow stars above the boat.",
    "Which thing is largest? The green fish below the cup. Yes, there is a white flower.",
)

V1_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

LLAVA15_VOCAB = 32064  # 32000 of Llama, <image>, <pad>, filled up to a multiple of 64


def build_llava(
    folder: str | Path,
    *,
    vocab_words: tuple[str, ...] = SENTENCES,
    do_pad: bool = True,
    dtype: torch.dtype = torch.float32,
    llava15_config: bool = False,
    seed: int = 0,
    **sizes: Any,
) -> Path:
    """Save a random LLaVA checkpoint as a hub folder and return its path; `sizes` are those of `llava_config`.

    ``llava15_config=True`` has LLaVA-1.5's geometry and vocabulary (336 px, patch 14, 576 image tokens, 32064 words,
    SentencePiece pieces) and its hub folder's files, with `hidden`, `layers` and `vision_layers` still small.
    """
    folder = Path(folder)
    if llava15_config:
        sizes |= {"image": 336, "patch": 14, "context": 4096, "vocab": LLAVA15_VOCAB}
    tokenizer = sentencepiece_tokenizer() if llava15_config else byte_tokenizer(vocab_words)
    config = llava_config(tokenizer, **sizes)
    build_llama_model(config, seed=seed).to(dtype).save_pretrained(folder)
    build_processor(config, tokenizer, do_pad=do_pad).save_pretrained(folder)
    if llava15_config:
        as_hub_folder(folder, config, V1_TEMPLATE)
    return folder


def llava_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    image: int = 32,
    patch: int = 8,
    vision_width: int = 32,
    vision_layers: int = 4,
    hidden: int = 64,
    layers: int = 3,
    heads: int = 4,
    feature_layer: int | list[int] = -2,
    feature_strategy: str = "default",
    projector_bias: bool = True,
    context: int = 512,
    vocab: int | None = None,
    text: Any = None,
) -> LlavaConfig:
    """A stock `LlavaConfig` for a CLIP tower and a Llama of the given sizes, or for the language model of config `text`."""
    vision = CLIPVisionConfig(
        image_size=image,
        patch_size=patch,
        hidden_size=vision_width,
        intermediate_size=2 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        projection_dim=vision_width,
        hidden_act="quick_gelu",
    )
    llama = LlamaConfig(
        vocab_size=vocab or len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text or llama,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(image // patch) ** 2 + (feature_strategy == "full"),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=feature_strategy,
        multimodal_projector_bias=projector_bias,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_llama_model(config: LlavaConfig, *, seed: int = 0) -> LlavaForConditionalGeneration:
    """The model in memory, float32, in eval mode, every parameter randomised from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    return randomised(model, seed)


def randomised(model: Any, seed: int) -> Any:
    """`model` with every parameter randomised, in eval mode; its generation config has the language model's ids."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random(name, parameter, generator))
    model.generation_config.bos_token_id = config.text_config.bos_token_id
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    return model.eval().requires_grad_(False)


def build_processor(config: LlavaConfig, tokenizer: PreTrainedTokenizerFast, *, do_pad: bool) -> LlavaProcessor:
    """LlavaProcessor with the PIL image processor (no torchvision) and a v1 chat template."""
    side = config.vision_config.image_size
    images = LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_pad=do_pad)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=V1_TEMPLATE,
    )


def byte_tokenizer(sentences: tuple[str, ...] = SENTENCES, size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (pieces like ``Ġred``) trained on `sentences`; any text encodes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS, PAD, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sentences, trainer)
    return wrap(core)


def sentencepiece_tokenizer(sentences: tuple[str, ...] = SENTENCES) -> PreTrainedTokenizerFast:
    """A Llama-like tokenizer: pieces like ``▁red``, byte fallback, 32000 words, then <image> and <pad>."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )
    trained.train_from_iterator(sentences, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    content = json.loads(trained.to_str())["model"]
    learned = [piece for piece, _ in sorted(content["vocab"].items(), key=lambda item: item[1])]
    pieces = [UNK, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    pieces += [f"▁filler{number}" for number in range(32000 - len(pieces))]
    merges = [tuple(merge) for merge in content["merges"]]
    bpe = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True)
    core = Tokenizer(bpe)
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([UNK, BOS, EOS, IMAGE, PAD])
    return wrap(core, unk_token=UNK)


def wrap(core: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    bos = core.token_to_id(BOS)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
        **special,
    )


def _random(name: str, parameter: nn.Parameter, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if "norm" in name and name.endswith("weight"):  # includes CLIP's own spelling, pre_layrnorm
        return 0.3 + 1.7 * torch.rand(parameter.shape, generator=generator)
    if name.endswith("bias"):
        return 0.2 * noise
    if "embed" in name:
        return 0.7 * noise
    gain = 1.4 if "q_proj" in name or "k_proj" in name else 2.0 if "lm_head" in name else 1.0
    return gain * noise / math.sqrt(parameter[0].numel())

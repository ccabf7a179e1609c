"""Models the tests of the logit methods share: grouped heads with biases, image tokens that speak for themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llava_lab.models import Lab
from llava_lab.models.layout import connector_of, language_layers
from llava_lab.results import Run
from tests.support.checkpoints import SENTENCES, build_llama_model, build_processor, byte_tokenizer, llava_config
from tests.support.planted import planted_lab


def grouped_lab() -> Lab:
    """Two key heads for four query heads, biases in attention, in the feed-forward layers and in the output head."""
    tokenizer = byte_tokenizer(SENTENCES)
    sizes: dict[str, Any] = {"image": 32, "patch": 8, "vision_width": 32, "vision_layers": 2, "hidden": 64, "layers": 2}
    plan: dict[str, Any] = {"heads": 4, "feature_layer": -2, "feature_strategy": "default", "projector_bias": True}
    config = llava_config(tokenizer, **sizes, **plan, context=512, vocab=len(tokenizer))
    text: Any = config.text_config
    text.num_key_value_heads, text.attention_bias, text.mlp_bias = 2, True, True
    model = build_llama_model(config)
    head = nn.Linear(64, len(tokenizer))
    head.weight.data.copy_(model.lm_head.weight)
    head.bias.data.copy_(torch.randn(len(tokenizer), generator=torch.Generator().manual_seed(1)))
    model.lm_head = head.requires_grad_(False)
    return Lab(model, build_processor(config, tokenizer, do_pad=True), name="grouped")


def speaking_lab() -> Lab:
    """The planted model changed so that a red image token itself asks for "red", and nothing is attended to."""
    lab = planted_lab()
    connector: Any = connector_of(lab.model)
    with torch.no_grad():
        connector.linear_2.weight[2, 0] = 1.0
        for layer in language_layers(lab.model):
            layer.self_attn.o_proj.weight.zero_()
    return lab


def states_and_logits(lab: Lab, run: Run) -> tuple[list[torch.Tensor], torch.Tensor]:
    """transformers' own hidden states (the last already normed) and the logits of every position."""
    with torch.no_grad():
        out = lab.model(**lab.inputs(run), output_hidden_states=True)
    return [state[0] for state in out.hidden_states], out.logits[0].float()

"""Rewrite a saved LLaVA folder into the exact files and keys of llava-hf/llava-1.5-7b-hf.

The hub's folder was written by an old transformers: no class names in the processor's file, a
separate preprocessor_config.json, the template in JSON, float16 shards whose vision weights are
named ``vision_tower.vision_model.*``. Loading it must not need any of today's spellings.

Source: llava-hf/llava-1.5-7b-hf, its config files, and transformers ``conversion_mapping.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import LlavaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def as_hub_folder(folder: Path, config: LlavaConfig, template: str) -> None:
    """Rewrite the JSON files to the keys and the layout of llava-hf/llava-1.5-7b-hf."""
    _write(folder / "config.json", _hub_config(config))
    side = {"height": 336, "width": 336}
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=side).to_dict()
    images = {key: value for key, value in images.items() if value is not None} | {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
    }
    _write(folder / "preprocessor_config.json", images)
    _write(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    )
    _write(folder / "chat_template.json", {"chat_template": template})
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _write(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001})
    _shard(folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    _write(folder / "tokenizer_config.json", tokenizer | {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    (folder / "README.md").write_text("---\nlicense: llama2\nlanguage:\n- en\n---\n# A random model in LLaVA-1.5's clothes\n")


def _hub_config(config: LlavaConfig) -> dict[str, Any]:
    """The keys of the hub's config.json and no others, but for the sizes that are small here."""
    text, vision = config.text_config, config.vision_config
    small_text = {key: getattr(text, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    small_text |= {"num_attention_heads": text.num_attention_heads, "num_key_value_heads": text.num_key_value_heads}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": 576,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": text.vocab_size,
            **small_text,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.39.0.dev0",
        "vision_config": {
            "hidden_size": vision.hidden_size,
            "image_size": 336,
            "intermediate_size": vision.intermediate_size,
            "model_type": "clip_vision_model",
            "num_attention_heads": vision.num_attention_heads,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": 14,
            "projection_dim": vision.projection_dim,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def _shard(folder: Path) -> None:
    """Store the weights as the hub does: float16, three shards with an index, `vision_model` in the names."""
    source = folder / "model.safetensors"
    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1): value.half() for name, value in load_file(source).items()
    }
    source.unlink()
    where: dict[str, str] = {}
    for number in range(3):
        shard = f"model-{number + 1:05}-of-00003.safetensors"
        part = {name: weights[name] for name in sorted(weights)[number::3]}
        save_file(part, folder / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(part, shard)
    total = sum(value.numel() * value.element_size() for value in weights.values())
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2))

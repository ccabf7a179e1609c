"""Folders exactly as the original LLaVA writes them, made from a stock transformers model, for every layout it has.

Key names, file names and config keys are written out here, not taken from the reader under test. Sources: haotian-liu/LLaVA
@ c121f04 ``llava/train/train.py`` (what is saved) and the released folders' config.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from tests.support.checkpoints import BOS, EOS, SENTENCES, UNK, build_llama_model, llava_config, wrap

WORDS, ROWS = 400, 448  # 400 words and 2 new ones, filled up to a multiple of 64
IMAGE_ID, PAD_ID = 400, 401
TOWER_NAME = "openai/clip-vit-large-patch14-336"


@dataclass
class Parts:
    """A reference model in memory and the tensors of its original form."""

    model: LlavaForConditionalGeneration
    kind: str
    language: dict[str, Tensor]  # model.embed_tokens..., lm_head.weight; WORDS rows
    projector: dict[str, Tensor]  # "0.weight", or "weight" for linear
    vision: dict[str, Tensor]  # embeddings..., encoder...


def original_tokenizer(marks: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """400 words and no <image>: the original keeps pictures outside its vocabulary. Padding is the unknown token.

    `marks` are added as the last of the words, as v1 added <im_start> and <im_end>.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"special_tokens": [UNK, BOS, EOS], "initial_alphabet": alphabet, "show_progress": False}
    core.train_from_iterator(SENTENCES * 2, trainers.BpeTrainer(vocab_size=WORDS - len(marks), **options))
    wrapped = wrap(core, unk_token=UNK)
    content = json.loads(wrapped.backend_tokenizer.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["id"] < WORDS - len(marks)]
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token=BOS, eos_token=EOS, unk_token=UNK, pad_token=UNK
    )
    plain.add_tokens(list(marks), special_tokens=True)
    assert len(plain) == WORDS, len(plain)
    return plain


def make_parts(kind: str = "mlp2x_gelu", *, layer: int = -2, seed: int = 3) -> Parts:
    """A random reference: stock transformers classes, its projector replaced by torch's own modules."""
    tokenizer = _with_new_words()
    config = llava_config(tokenizer, feature_layer=layer, layers=2, vocab=ROWS)
    model = build_llama_model(config, seed=seed)
    module = _projector(kind, seed)
    model.model.multi_modal_projector = module
    state = model.state_dict()
    language, vision = {}, {}
    for name, value in state.items():
        if name.startswith("model.language_model."):
            language[name.replace("language_model.", "")] = value
        elif name.startswith("model.vision_tower."):
            vision[name.removeprefix("model.vision_tower.")] = value
    language["lm_head.weight"] = state["lm_head.weight"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        language[name] = language[name][:WORDS]
    copies = [{k: v.detach().clone() for k, v in part.items()} for part in (language, module.state_dict(), vision)]
    return Parts(model, kind, *copies)


def logits(model: nn.Module, ids: Tensor, pixels: Tensor) -> Tensor:
    """Logits of the words the original knows: the two new ones differ by design."""
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[..., :WORDS]


def probe() -> tuple[Tensor, Tensor]:
    """A sequence with 16 image tokens, and a picture."""
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(3, WORDS, (1, 12), generator=generator)
    ids = torch.cat([words[:, :4], torch.full((1, 16), IMAGE_ID), words[:, 4:]], 1)
    return ids, torch.randn(1, 3, 32, 32, generator=generator)


def write_tower(folder: Path, parts: Parts) -> Path:
    """A CLIP folder as openai's: both halves in one file, an old image processor."""
    folder.mkdir(parents=True)
    vision: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu", "projection_dim": 32}
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": vision, "text_config": {}, "projection_dim": 32})
    tensors = {f"vision_model.{name}": value for name, value in parts.vision.items()}
    tensors |= {"text_model.final_layer_norm.weight": torch.ones(8), "visual_projection.weight": torch.ones(32, 32)}
    tensors |= {"logit_scale": torch.ones(()), "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    torch.save(tensors, folder / "pytorch_model.bin")
    images: dict[str, Any] = {
        "crop_size": 32,
        "size": 32,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
    }
    images |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    write_json(folder / "preprocessor_config.json", images | {"feature_extractor_type": "CLIPFeatureExtractor"})
    return folder


def config_of(parts: Parts, **changes: Any) -> dict[str, Any]:
    """config.json with the released folders' keys."""
    given = {
        "_name_or_path": "llava-v1.5-7b",
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": 64,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 512,
        "mm_hidden_size": 32,
        "mm_projector_type": parts.kind,
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": TOWER_NAME,
        "model_type": "llava_llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": WORDS,
    }
    return given | changes


def write_whole(
    folder: Path, parts: Parts, *, inside: bool = False, shards: int = 2, safetensors: bool = False, **changes: Any
) -> Path:
    """A whole checkpoint: shards with an index; `inside` adds the tower as a DeepSpeed run saves it."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config_of(parts, **changes))
    tensors = {**parts.language, **{f"model.mm_projector.{name}": value for name, value in parts.projector.items()}}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    if inside:
        tensors |= {f"model.vision_tower.vision_tower.vision_model.{name}": value for name, value in parts.vision.items()}
    _write_shards(folder, tensors, shards, safetensors)
    marks = ("<im_start>", "<im_end>") if changes.get("mm_use_im_start_end") else ()
    original_tokenizer(marks).save_pretrained(folder)
    write_json(folder / "generation_config.json", {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2})
    return folder


def write_language(folder: Path, parts: Parts, weights: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A Vicuna-like language model without eyes."""
    folder.mkdir(parents=True)
    given = {name: value for name, value in config_of(parts).items() if "mm_" not in name and not name.startswith("image")}
    write_json(folder / "config.json", given | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | changes)
    torch.save(parts.language if weights is None else weights, folder / "pytorch_model.bin")
    original_tokenizer().save_pretrained(folder)
    return folder


def write_projector_only(folder: Path, parts: Parts, **changes: Any) -> Path:
    """What stage 1 leaves: config.json and mm_projector.bin."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config_of(parts, image_aspect_ratio="square", **changes))
    torch.save({f"model.mm_projector.{name}": value for name, value in parts.projector.items()}, folder / "mm_projector.bin")
    return folder


def write_lora(folder: Path, parts: Parts, *, rank: int = 4, alpha: int = 8, **changes: Any) -> dict[str, Tensor]:
    """A LoRA run whose merged weights are `parts`; returns the base language model that it must be put on."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(9)
    adapters: dict[str, Tensor] = {}
    base = dict(parts.language)
    for name, value in parts.language.items():
        if "_proj.weight" in name:
            down = torch.randn(rank, value.shape[1], generator=generator) * 0.1
            up = torch.randn(value.shape[0], rank, generator=generator) * 0.1
            stem = "base_model.model." + name.removesuffix(".weight")
            adapters |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
            base[name] = value - (alpha / rank) * up @ down
    write_json(folder / "config.json", config_of(parts, **changes))
    adapter = {"base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "bias": "none", "fan_in_fan_out": False, "r": rank}
    adapter |= {"lora_alpha": alpha, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    write_json(folder / "adapter_config.json", adapter)
    torch.save(adapters, folder / "adapter_model.bin")
    prefix = "base_model.model.model.mm_projector."
    torch.save({prefix + name: value for name, value in parts.projector.items()}, folder / "non_lora_trainables.bin")
    return base


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2))


def _with_new_words() -> PreTrainedTokenizerFast:
    tokenizer = original_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def _projector(kind: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            return nn.Linear(32, 64)
        layers: list[nn.Module] = [nn.Linear(32, 64)]
        for _ in range(int(kind[3]) - 1):
            layers += [nn.GELU(), nn.Linear(64, 64)]
        return nn.Sequential(*layers)


def _write_shards(folder: Path, tensors: dict[str, Tensor], shards: int, safetensors: bool) -> None:
    stem, ending = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")

    def save(part: dict[str, Tensor], file: Path) -> None:
        if safetensors:
            save_file({name: value.contiguous() for name, value in part.items()}, file, metadata={"format": "pt"})
        else:
            torch.save(part, file)

    if shards == 1:
        save(tensors, folder / f"{stem}.{ending}")
        return
    where: dict[str, str] = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{ending}"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        save(part, folder / file)
        where |= dict.fromkeys(part, file)
    write_json(folder / f"{stem}.{ending}.index.json", {"metadata": {}, "weight_map": where})

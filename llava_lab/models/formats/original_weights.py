"""The weights of original LLaVA folders: read, renamed, LoRA merged, vocabulary grown.

Four layouts: a whole checkpoint, with the vision tower inside (a DeepSpeed run) or without (a consolidated release); a
LoRA folder; a projector alone. A name that is not understood is an error; nothing is filled with chance except the rows of
new words, which are drawn from the mean and covariance of the old ones as the official conversion does, from a fixed seed.

    weights = renamed(read_folder(folder), folder)

Sources: haotian-liu/LLaVA @ c121f04 ``llava/model/builder.py``, ``llava_arch.py``; transformers
``convert_llava_weights_to_hf.py`` (new rows: the mean of the embeddings and 1e-5 of their covariance).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llava_lab.checks import regular_file
from llava_lab.errors import CheckpointError
from llava_lab.models import folders
from llava_lab.models.formats import foreign

ADAPTER_CONFIG, NON_LORA, PROJECTOR = "adapter_config.json", "non_lora_trainables.bin", "mm_projector.bin"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
MULTIPLE = 64  # the vocabulary is filled up to a multiple of it
SPREAD = 1e-5  # of the covariance, for new rows

Weights = dict[str, Tensor]

_TOWER = re.compile(r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?")
_LAYER = re.compile(r"^model\.mm_projector\.(\d+)\.(weight|bias)$")
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.position_ids$|^model\.image_newline$")
_TRANSFORMERS = (
    "language_model.",
    "multi_modal_projector.",
    "vision_tower.",
    "model.language_model.",
    "model.multi_modal_projector.",
)
_CLIP_PARTS = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
_CLIP_REST = ("text_model.", "visual_projection.", "text_projection.", "logit_scale")
_LORA = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight$")


def read_file(file: Path) -> Weights:
    """The tensors of one weight file, read as they are needed where the file allows it. Raises CheckpointError."""
    if file.suffix != ".safetensors":
        tensors = foreign.read_bin(file)
    else:
        try:
            tensors = load_file(regular_file(file, CheckpointError))
        except FileNotFoundError:
            raise CheckpointError(f"{file.parent} has no {file.name}") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is cut off or damaged ({type(error).__name__}); fetch it again") from None
    foreign.check_learnt({name: foreign.kind_of(value) for name, value in tensors.items()}, file)
    return tensors


def read_folder(folder: Path) -> Weights:
    """All tensors of a folder's weight files. Raises CheckpointError for a missing shard or a tensor that stands twice."""
    found: Weights = {}
    for file in folders.weight_files(folder):
        part = read_file(file)
        if twice := sorted(set(found) & set(part)):
            raise CheckpointError(f"{folder} holds {twice[0]} in two of its weight files")
        found |= part
    return found


def read_trained(file: Path) -> Weights:
    """``mm_projector.bin`` or ``non_lora_trainables.bin`` in the names of a whole checkpoint."""
    found = {}
    for name, value in read_file(file).items():
        plain = name.removeprefix("base_model.")
        if plain.startswith(("model.model.", "model.lm_head.")):
            plain = plain.removeprefix("model.")
        found["model.mm_projector." + name.split("mm_projector.", 1)[1] if "mm_projector." in name else plain] = value
    if not any(name.startswith("model.mm_projector.") for name in found):
        some = ", ".join(list(found)[:3]) or "nothing"
        raise CheckpointError(f"{file} holds no projector: expected keys with 'mm_projector.' in them, got {some}")
    return found


def merge_lora(weights: Weights, folder: Path) -> Weights:
    """Base weights with a folder's adapters added to them: W + B A alpha / r, computed in float32."""
    config = folders.read_json(folder / ADAPTER_CONFIG)
    scale = _lora_scale(config, folder)
    file = next((folder / name for name in ADAPTERS if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} has {ADAPTER_CONFIG} but no {' or '.join(ADAPTERS)}")
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in read_file(file).items():
        match = _LORA.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{file} holds {name}; expected base_model.model. ... .lora_A.weight and .lora_B.weight only")
        pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = value
    merged = dict(weights)
    for name, pair in pairs.items():
        old = weights.get(name)
        if old is None or set(pair) != {"A", "B"}:
            raise CheckpointError(
                f"{file} has {' and '.join(sorted(pair))} for {name}, which the base {'lacks' if old is None else 'has'}"
            )
        if pair["A"].ndim != 2 or pair["B"].ndim != 2:
            raise CheckpointError(f"{file} has adapters for {name} that are no matrices")
        if (pair["B"].shape[0], pair["A"].shape[1]) != tuple(old.shape) or pair["A"].shape[0] != pair["B"].shape[1]:
            raise CheckpointError(f"{file} is for another base: {name} is {tuple(old.shape)} there, not "
                                  f"{(pair['B'].shape[0], pair['A'].shape[1])}")  # fmt: skip
        merged[name] = (old.float() + scale * (pair["B"].float() @ pair["A"].float())).to(old.dtype)
    return merged


def _lora_scale(config: dict[str, Any], folder: Path) -> float:
    special = [
        name for name in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(name)
    ]
    if config.get("peft_type", "LORA") != "LORA" or config.get("bias", "none") != "none" or special:
        said = ", ".join(special) or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} is no plain LoRA ({said}); LLaVA's has bias none and one rank")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} has r {rank!r} and lora_alpha {alpha!r}; expected two numbers")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def renamed(weights: Weights, folder: Path) -> Weights:
    """The tensors under the names that the model has in memory; what follows from the config is left out."""
    if mixed := [name for name in weights if name.startswith(_TRANSFORMERS)]:
        raise CheckpointError(
            f"{folder} mixes two spellings: its config.json is the original LLaVA's, {mixed[0]} is transformers'"
        )
    found: Weights = {}
    for name, value in weights.items():
        if not _COMPUTED.search(name):
            found[_in_memory(name)] = value
    return found


def _in_memory(name: str) -> str:
    if name.startswith("model.vision_tower."):
        return _TOWER.sub("model.vision_tower.", name)
    if match := _LAYER.match(name):
        return f"model.multi_modal_projector.linear_{int(match[1]) // 2 + 1}.{match[2]}"
    if name.startswith("model.mm_projector."):
        return name.replace("model.mm_projector.", "model.multi_modal_projector.linear_1.", 1)
    return re.sub(r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1.", name)


def check_projector(weights: Weights, kind: str, widths: tuple[int, int], folder: Path) -> None:
    """Refuse a projector of another kind or width than the config says; `widths` are vision and language."""
    vision, language = widths
    layers = {"linear": 1, "identity": 0}.get(kind)
    count = int(kind.removeprefix("mlp").split("x")[0]) if layers is None else layers
    prefix = "model.multi_modal_projector."
    found = {name.removeprefix(prefix): tuple(value.shape) for name, value in weights.items() if name.startswith(prefix)}
    wanted: dict[str, tuple[int, ...]] = {}
    for number in range(1, count + 1):
        wanted[f"linear_{number}.weight"] = (language, vision if number == 1 else language)
        wanted[f"linear_{number}.bias"] = (language,)
    if found != wanted:
        wrong = [f"{name} {found.get(name, 'missing')} not {wanted.get(name, 'there')}"
                 for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]  # fmt: skip
        raise CheckpointError(
            f"{folder} does not hold a {kind} projector from {vision} (vision) to {language} (language): {'; '.join(wrong[:3])}"
        )


def read_tower(folder: Path) -> Weights:
    """The vision half of a CLIP folder, under the names it has in a LLaVA."""
    found: Weights = {}
    for name, value in read_folder(folder).items():
        plain = name.removeprefix("vision_model.")
        if name.startswith(_CLIP_REST) or plain.endswith("position_ids"):
            continue
        if not plain.startswith(_CLIP_PARTS):
            raise CheckpointError(f"{folder} holds {name}; expected a CLIP model's vision_model. ... tensors")
        found[f"model.vision_tower.{plain}"] = value
    if not found:
        raise CheckpointError(f"{folder} holds no vision_model. ... tensors; expected a CLIP model")
    return found


def grow_vocabulary(weights: Weights, words: int, *, tied: bool) -> int:
    """Give embedding and head rows for `words` words, filled up to a multiple of 64, in place; the number of rows."""
    old = weights[EMBEDDING]
    rows = math.ceil(max(words, len(old)) / MULTIPLE) * MULTIPLE
    if tied:
        weights.pop(HEAD, None)
    generator = torch.Generator().manual_seed(0)
    for name in (EMBEDDING, HEAD):
        if name in weights and len(weights[name]) < rows:
            new = new_rows(old, rows - len(weights[name]), generator)
            weights[name] = torch.cat([weights[name], new.to(weights[name].dtype)])
    return rows


def new_rows(old: Float[Tensor, "V D"], count: int, generator: torch.Generator) -> Float[Tensor, "N D"]:
    """Rows drawn from a Gaussian with the mean of `old` and 1e-5 of its covariance, float32.

    A sum of the centred rows with independent normal weights has exactly their covariance; no matrix is decomposed.
    """
    mean = old.float().mean(0)
    centred = old.float() - mean
    chance = torch.randn(count, len(old), generator=generator)
    return mean + math.sqrt(SPREAD / len(old)) * (chance @ centred)
